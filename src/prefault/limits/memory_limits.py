"""The limits of the memory cgroups and of the machine: of memory, at which the OOM killer ends a process, and of page cache.

Page cache is never too much for the kernel: at its limit the pages that came in first are evicted for those that come last.
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prefault._system import cgroups
from prefault._system.kept_files import KeptFile
from prefault._system.meminfo import read_meminfo
from prefault._system.memory_cgroups import Bound, MemoryCgroup
from prefault._system.numa import format_list, read_node_meminfo
from prefault.limits.limit import Limit
from prefault.sizes import MIB, PAGE_SIZE

_RESERVE = 1 * MIB, 32 * MIB
_RESERVE_SHARE = 32

# memory.stat is gathered once this many pages a CPU have changed (MEMCG_CHARGE_BATCH), or every two seconds.
_STATISTICS_LAG = 64 * PAGE_SIZE * (os.cpu_count() or 1)

_own_cgroups_file = KeptFile("/proc/self/cgroup")
_min_free_file = KeptFile("/proc/sys/vm/min_free_kbytes")


class _OwnCgroups(NamedTuple):
    """The memory cgroups of this process, its own first, and the lines of /proc/self/cgroup that they were found by."""

    lines: bytes
    levels: tuple[MemoryCgroup, ...]
    counts_hugetlb: bool


_own_cgroups = _OwnCgroups(b"", (), False)


def _cgroups() -> _OwnCgroups:
    """Look the cgroups up, again if the process was moved: finding the directories takes 200 us, asking about a move 6."""
    global _own_cgroups
    known = _own_cgroups
    try:
        lines = _own_cgroups_file.read()
        if lines != known.lines:
            governing = cgroups.governing("memory")
            levels = tuple(MemoryCgroup(directory, governing.version) for directory in governing.directories)
            counts = "memory_hugetlb_accounting" in governing.options.split(",")  # Linux 6.7
            known = _own_cgroups = _OwnCgroups(lines, _counting(levels), counts)
    except OSError:
        return _OwnCgroups(b"", (), False)  # no /proc, or it is filtered: nothing is known
    return known


def _counting(levels: tuple[MemoryCgroup, ...]) -> tuple[MemoryCgroup, ...]:
    """Drop the parents that do not count their children."""
    for index, level in enumerate(levels[1:], 1):
        if not level.hierarchical():
            return levels[:index]
    return levels


def counts_hugetlb() -> bool:
    """Return whether hugetlb pages are charged to the memory cgroup as well (cgroup v2, memory_hugetlb_accounting)."""
    return _cgroups().counts_hugetlb


def memory_limits(levels: Sequence[MemoryCgroup] | None = None, *, swap: bool = True) -> list[Limit]:
    """Read the limits on memory: of every cgroup from this process' own upward, and the machine's.

    Args:
        levels: the cgroups, instead of this process' own.
        swap: count free swap as reclaimable.
    """
    return [*cgroup_limits(levels, swap=swap), *machine_limits(swap=swap)]


def cgroup_limits(levels: Sequence[MemoryCgroup] | None = None, *, swap: bool = True) -> list[Limit]:
    """Read the limits of every memory cgroup from this process' own upward."""
    levels = _cgroups().levels if levels is None else levels
    free_swap = _free_swap() if swap else 0
    return [_cgroup_limit(levels, index, bound, free_swap) for index, bound in _bounds(levels)]


def machine_limits(*, swap: bool = True) -> list[Limit]:
    """Read MemAvailable, which may be taken without swapping, and free swap; the list is empty if there is no /proc."""
    try:
        try:
            available, total, free_swap = read_meminfo("MemAvailable", "MemTotal", "SwapFree")
        except KeyError:  # not every sandbox shows its swap
            (available, total), free_swap = read_meminfo("MemAvailable", "MemTotal"), 0
    except (OSError, KeyError):
        return []
    return [
        Limit(
            "MemAvailable", "memory", total, total - available, free_swap if swap else 0, _reserve(total),
            "the OOM killer ends a process of the machine", "/proc/meminfo", "free memory, or add swap",
        )
    ]  # fmt: skip


def node_limits(nodes: Sequence[int], reserve: float = 1.0) -> Iterator[Limit]:
    """Read what NUMA nodes have left, together: free memory and clean page cache. Nothing without /sys.

    Args:
        nodes: their numbers.
        reserve: share of the reserve that must be left, from 0 to 1, beside the kernel's own (``vm.min_free_kbytes``): when
            memory that is bound to the nodes would go below that, the OOM killer comes.
    """
    try:
        (machine,) = read_meminfo("MemTotal")
        kept = int(_min_free_file.read()) * 1024
        numbers = [
            read_node_meminfo(node, "MemTotal", "MemFree", "Active(file)", "Inactive(file)", "Dirty") for node in nodes
        ]
    except (OSError, KeyError):
        return
    total, free, active, inactive, dirty = map(sum, zip(*numbers, strict=True))
    room = int(_reserve(total) * reserve) + kept * total // machine
    yield Limit(
        f"MemFree of {format_list(tuple(nodes))}", "memory", total, total - free, max(0, active + inactive - dirty),
        room, "the OOM killer ends a process, though other nodes may have memory",
        "/sys/devices/system/node", "free memory there, or take another node (or interleave=True)",
    )  # fmt: skip


def cgroup_cache_limits(levels: Sequence[MemoryCgroup] | None = None) -> list[Limit]:
    """Read how much page cache every memory cgroup from this process' own upward can hold at most.

    All but anonymous, shared and locked memory counts as reclaimable, dirty pages and the kernel's own memory as well: more
    than this is certain not to fit, and less may not.
    """
    levels = _cgroups().levels if levels is None else levels
    free_swap = _free_swap()
    return [_cache_limit(levels, index, bound, free_swap) for index, bound in _bounds(levels)]


def machine_cache_limits() -> list[Limit]:
    """Read how much page cache the machine can hold at most, as :func:`cgroup_cache_limits` does; nothing without /proc."""
    names = "MemTotal", "MemFree", "AnonPages", "Shmem", "PageTables", "KernelStack", "Hugetlb"
    try:
        total, free, anonymous, shmem, tables, stacks, huge = read_meminfo(*names)
    except (OSError, KeyError):  # before Linux 4.20, or a sandbox
        return []
    held = max(0, anonymous + shmem - _free_swap()) + tables + stacks + huge
    return [
        Limit(
            "MemTotal", "page cache", total, total - free, max(0, total - free - held), 0, _EVICTION, "/proc/meminfo",
            f"free memory, {_BY_PARTS}",
        )
    ]  # fmt: skip


def _cache_limit(levels: Sequence[MemoryCgroup], index: int, bound: Bound, free_swap: int) -> Limit:
    limit = _cgroup_limit(levels, index, bound, free_swap)
    statistics = levels[index].statistics()
    swap = 0 if bound.counts == "memory+swap" else _swap_left(levels, free_swap)
    held = max(0, statistics.anonymous - swap) + statistics.unevictable - _STATISTICS_LAG
    return limit._replace(
        bounds="page cache", reclaimable_bytes=max(0, bound.usage - max(0, held)), reserve_bytes=0,
        consequence=_EVICTION,
        remedy=f"raise it (write to {bound.file}, or the memory limit of the container), {_BY_PARTS}",
    )  # fmt: skip


_EVICTION = "pages that came in first are evicted for those that come last"
_BY_PARTS = "read the files part by part (prefault.stream)"

_LITTLE = 4 * MIB
"""Bytes that do not push each other out, as the pages that came in last are evicted last."""


def cgroups_have_free(needed: int, levels: Sequence[MemoryCgroup] | None = None) -> bool:
    """Return whether the memory cgroups leave so many bytes free that nothing is reclaimed for them."""
    if needed <= _LITTLE:
        return True
    levels = _cgroups().levels if levels is None else levels
    return all(needed <= bound.limit - bound.usage for _, bound in _bounds(levels))


def machine_has_free(needed: int) -> bool:
    """Return whether the machine has so many bytes free that nothing is reclaimed for them."""
    if needed <= _LITTLE:
        return True
    try:
        free, total = read_meminfo("MemFree", "MemTotal")
    except (OSError, KeyError):
        return True
    return needed <= free - _reserve(total)


class MemoryAnswer(NamedTuple):
    """The limit that leaves less than was asked for, or None; and about how many bytes it, or the tightest one, leaves."""

    short: Limit | None
    left_bytes: int


def check_cgroups(needed: int, reserve: float = 1.0, levels: Sequence[MemoryCgroup] | None = None) -> MemoryAnswer:
    """Check whether the memory cgroups leave ``needed`` bytes, and this share of the reserve of each limit.

    Statistics are read only where limit minus usage is too little.
    """
    left = NO_LIMIT
    levels = _cgroups().levels if levels is None else levels
    for index, bound in _bounds(levels):
        room = bound.limit - bound.usage - int(reserve * _reserve(bound.limit))
        if room < needed:
            limit = _cgroup_limit(levels, index, bound, _free_swap())
            room = _room(limit, reserve)
            if room < needed:
                return MemoryAnswer(limit, max(0, room))
        left = min(left, room)
    return MemoryAnswer(None, left)


def check_machine(needed: int, reserve: float = 1.0) -> MemoryAnswer:
    """Check whether the machine has ``needed`` bytes left, and this share of its reserve."""
    limits = machine_limits()
    if not limits:
        return MemoryAnswer(None, NO_LIMIT)
    (machine,) = limits
    room = _room(machine, reserve)
    return MemoryAnswer(machine if room < needed else None, max(0, room))


NO_LIMIT = 1 << 62
"""Bytes that are left where no limit is set."""


def _room(limit: Limit, reserve: float) -> int:
    return limit.limit_bytes - limit.used_bytes + limit.reclaimable_bytes - int(reserve * limit.reserve_bytes)


def _bounds(levels: Sequence[MemoryCgroup]) -> Iterator[tuple[int, Bound]]:
    for index, level in enumerate(levels):
        for bound in level.bounds():
            yield index, bound


def _cgroup_limit(levels: Sequence[MemoryCgroup], index: int, bound: Bound, free_swap: int) -> Limit:
    statistics = levels[index].statistics()
    clean = max(0, statistics.file - statistics.dirty - statistics.writeback - _STATISTICS_LAG)
    reclaimable = clean + statistics.slab_reclaimable // 2
    if bound.counts != "memory+swap":
        reclaimable += _swap_left(levels, free_swap)
    directory, name = os.path.split(bound.file)
    high = bound.counts == "high"
    return Limit(
        f"{name} of {directory}", "memory", bound.limit, bound.usage, reclaimable, _reserve(bound.limit),
        "every thread of the cgroup is slowed down to a crawl" if high else "the OOM killer ends a process of the cgroup",
        bound.file,
        f"raise it (write to {bound.file}, or the memory limit of the container), or use less memory in the cgroup",
    )  # fmt: skip


def _swap_left(levels: Sequence[MemoryCgroup], free_swap: int) -> int:
    """Return the bytes of swap that every level may still use."""
    return min([free_swap, *(left for level in levels if (left := level.swap_left()) is not None)])


def _free_swap() -> int:
    try:
        return read_meminfo("SwapFree")[0]
    except (OSError, KeyError):
        return 0


def _reserve(limit: int) -> int:
    """Return a thirty-second of the limit, from 1 to 32 MiB."""
    least, most = _RESERVE
    return min(most, max(least, limit // _RESERVE_SHARE))
