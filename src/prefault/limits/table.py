"""The table of the limits: a row says who sets it, which memory it concerns, how it is read, and what it is asked for.

headroom(), populate (before the start and between chunks), lock, the explanation of failures, the frames of devices and the
store of a pool all read this table, so that a new limit is a new row.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prefault.limits.demand import (
    Demand,
    holes_on_disk,
    length_of_all,
    memory_of_all,
    missing_in_all,
    unallocated_in_all,
    uncached_in_all,
    unlocked_in_all,
)
from prefault.limits.limit import Limit, Shortfall
from prefault.limits.memory_limits import (
    NO_LIMIT,
    MemoryAnswer,
    cgroup_cache_limits,
    cgroup_limits,
    cgroups_have_free,
    check_cgroups,
    check_machine,
    counts_hugetlb,
    machine_cache_limits,
    machine_has_free,
    machine_limits,
    node_limits,
)
from prefault.limits.memory_use import MemoryUse
from prefault.limits.refusing_limits import (
    commit_limits,
    hugetlb_cgroup_limits,
    hugetlb_pool_limits,
    node_pool_limits,
    resource_limit,
    space_limits,
)
from prefault.memory.vma import Backing


class LimitRow(NamedTuple):
    """One limit.

    Attributes:
        name: for code that asks for just this one.
        set_by: the one who sets it, and the setting.
        concerns: returns whether it bears on a use of memory.
        read: returns the limit as it stands, once for each cgroup; nothing if it is not set or cannot be read.
        at_most: returns the bytes that demands take from it at most, cheaply.
        counted: returns the bytes that demands take from it, by the state of each page or block.
        resource: returns a key that is equal for memory that draws on the same limit.
        reserves: True if a mapping without MAP_NORESERVE has taken its share when it was mapped.
        check: checks cheaply whether it leaves so many bytes of memory, and so much of its reserve, from 0 to 1. The kernel
            kills at such a limit, so that it is checked between chunks as well. None: the kernel refuses with an errno.
        shrinks: True if it can be lowered at any moment, so that it is checked before every chunk; else every 20 ms.
        has_free: checks cheaply whether so many bytes are free, before the limit is read. None: it is read at once.
    """

    name: str
    set_by: str
    concerns: Callable[[MemoryUse], bool]
    read: Callable[[MemoryUse], Iterable[Limit]]
    at_most: Callable[[Sequence[Demand]], int] = length_of_all
    counted: Callable[[Sequence[Demand]], int] = length_of_all
    resource: Callable[[MemoryUse], object] = lambda _: None
    reserves: bool = False
    check: Callable[[int, float], MemoryAnswer] | None = None
    shrinks: bool = False
    has_free: Callable[[int], bool] | None = None


def _takes_memory(use: MemoryUse) -> bool:
    """Return whether populating takes memory that cannot be reclaimed: pages of a shared file on a disk can be."""
    if use.backing is Backing.HUGETLB:
        return counts_hugetlb()
    return use.takes_memory and not (use.backing is Backing.FILE and use.shared)


def takes_node_memory(use: MemoryUse) -> bool:
    """Return whether populating takes memory of the NUMA nodes that were asked for, which cannot be reclaimed."""
    return bool(use.nodes) and _takes_memory(use)


def _fills_page_cache(use: MemoryUse) -> bool:
    return use.fills_page_cache


def _takes_commit(use: MemoryUse) -> bool:
    """Return whether it counts against the commit limit: page by page when touched, or as a whole when mapped."""
    if use.backing in (Backing.MEMFD, Backing.TMPFS):  # VM_NORESERVE files in mm/shmem.c
        return True
    return not use.mapped and use.backing in (Backing.ANONYMOUS, Backing.SHARED_ANONYMOUS)


def _is_hugetlb(use: MemoryUse) -> bool:
    return use.backing is Backing.HUGETLB


TABLE = (
    LimitRow(
        "memory cgroups", "the container or the administrator: memory.max, memory.high of every level",
        _takes_memory, lambda _: cgroup_limits(), check=check_cgroups, shrinks=True,
    ),
    LimitRow(
        "MemAvailable", "the machine: its memory and swap",
        _takes_memory, lambda _: machine_limits(), check=check_machine,
    ),
    LimitRow(
        "page cache of memory cgroups", "the container or the administrator: memory.max, memory.high of every level",
        _fills_page_cache, lambda _: cgroup_cache_limits(), missing_in_all, uncached_in_all, has_free=cgroups_have_free,
    ),
    LimitRow(
        "page cache of the machine", "the machine: its memory and swap",
        _fills_page_cache, lambda _: machine_cache_limits(), missing_in_all, uncached_in_all, has_free=machine_has_free,
    ),
    LimitRow(
        "node memory", "the machine: memory of the NUMA nodes that were asked for",
        takes_node_memory, lambda use: node_limits(use.nodes),
        missing_in_all, memory_of_all, lambda use: use.nodes,
    ),
    LimitRow(
        "node hugetlb pool", "the administrator: nr_hugepages of the NUMA nodes that were asked for",
        lambda use: bool(use.nodes) and _is_hugetlb(use), lambda use: node_pool_limits(use.nodes, use.page_size),
        missing_in_all, unallocated_in_all, lambda use: (use.nodes, use.page_size),
    ),
    LimitRow(
        "CommitLimit", "the administrator: vm.overcommit_memory and vm.overcommit_ratio",
        _takes_commit, lambda _: commit_limits(), missing_in_all, unallocated_in_all,
    ),
    LimitRow(
        "tmpfs space", "the mount option size=",
        lambda use: use.backing is Backing.TMPFS, lambda use: space_limits(use, "tmpfs space"),
        missing_in_all, unallocated_in_all, MemoryUse.file_system,
    ),
    LimitRow(
        "disk space", "the file system",
        lambda use: use.backing is Backing.FILE and use.allocates, lambda use: space_limits(use, "disk space"),
        length_of_all, holes_on_disk, MemoryUse.file_system,
    ),
    LimitRow(
        "hugetlb pool", "the administrator: nr_hugepages and nr_overcommit_hugepages",
        _is_hugetlb, lambda use: hugetlb_pool_limits(use.page_size),
        missing_in_all, unallocated_in_all, lambda use: use.page_size, reserves=True,
    ),
    LimitRow(
        "hugetlb cgroups", "the container or the administrator: hugetlb.*.max of every level",
        _is_hugetlb, lambda use: hugetlb_cgroup_limits(use.page_size, "pages"),
        missing_in_all, unallocated_in_all, lambda use: use.page_size,
    ),
    LimitRow(
        "hugetlb reservations", "the container or the administrator: hugetlb.*.rsvd.max of every level",
        _is_hugetlb, lambda use: hugetlb_cgroup_limits(use.page_size, "reservations"),
        missing_in_all, unallocated_in_all, lambda use: use.page_size, reserves=True,
    ),
    LimitRow(
        "RLIMIT_MEMLOCK", "the session: ulimit -l",
        lambda use: use.locks, lambda _: resource_limit("RLIMIT_MEMLOCK"), length_of_all, unlocked_in_all,
    ),
    LimitRow(
        "RLIMIT_AS", "the session: ulimit -v", lambda use: not use.mapped, lambda _: resource_limit("RLIMIT_AS"),
    ),
    LimitRow(
        "RLIMIT_DATA", "the session: ulimit -d",
        lambda use: not (use.mapped or use.shared) and use.backing is Backing.ANONYMOUS and use.access == "write",
        lambda _: resource_limit("RLIMIT_DATA"),
    ),
)  # fmt: skip
"""Every limit that calls use up byte by byte. The others (descriptors, processes, file size) are in ``process_limits``."""


def read_limit(name: str, use: MemoryUse | None = None) -> Limit | None:
    """Read the limit of one row, the tightest if it has several; None if it is not set or cannot be read."""
    (row,) = (row for row in TABLE if row.name == name)
    return min(row.read(use or MemoryUse()), key=lambda limit: limit.available_bytes, default=None)


def limits_on(use: MemoryUse) -> list[Limit]:
    """Read every limit that bears on a use of memory; ``applies`` is False if a reservation at mmap has covered it."""
    reserved = use.backing is Backing.HUGETLB and use.stop > 0 and use.is_reserved
    return [
        limit._replace(applies=False) if row.reserves and reserved else limit
        for row in TABLE
        if row.concerns(use)
        for limit in row.read(use)
    ]


def ask_for_memory(needed: int, *, reserve: float = 1.0, only_shrinking: bool = False) -> MemoryAnswer:
    """Ask the limits at which the kernel kills for ``needed`` bytes.

    Args:
        needed: bytes.
        reserve: share of each limit's reserve that must be left, from 0 to 1.
        only_shrinking: ask only the limits that can be lowered at any moment.
    """
    left = NO_LIMIT
    for row in TABLE:
        if row.check is not None and (row.shrinks or not only_shrinking):
            answer = row.check(needed, reserve)
            if answer.short is not None:
                return answer
            left = min(left, answer.left_bytes)
    return MemoryAnswer(None, left)


def has_free_memory(needed: int) -> bool:
    """Return whether so many bytes are free everywhere, so that no page is evicted for them."""
    return all(row.has_free is None or row.has_free(needed) for row in TABLE)


def shortfall_of(use: MemoryUse, needed: int, name: str | None = None) -> Shortfall | None:
    """Return the first limit at which the kernel would refuse ``needed`` bytes for this use; None if there is none.

    Args:
        use: kind of memory.
        needed: bytes.
        name: check only the row of this name.
    """
    for row in TABLE:
        if row.check is None and name in (None, row.name) and row.concerns(use):
            found = _first_short(row, use, needed)
            if found is not None:
                return found
    return None


def refusal_ahead(demands: Sequence[Demand], name: str | None = None, *, is_free: bool = False) -> Shortfall | None:
    """Return the first limit at which the kernel would refuse these demands; None if there is none.

    Demands that draw on the same limit are added up. Pages and blocks are counted only where an upper bound does not fit.

    Args:
        demands: in order of address.
        name: check only the row of this name.
        is_free: True if :func:`has_free_memory` has just said so of all of them: such limits are not asked again.
    """
    for row in TABLE:
        if row.check is not None or name not in (None, row.name) or (is_free and row.has_free is not None):
            continue
        groups: dict[object, list[Demand]] = {}
        for demand in demands:
            if row.concerns(demand.use):
                groups.setdefault(row.resource(demand.use), []).append(demand)
        for group in groups.values():
            needed, use = row.at_most(group), group[0].use
            if not needed or (row.has_free is not None and row.has_free(needed)) or _first_short(row, use, needed) is None:
                continue
            # Pages that were set aside at mmap are not the pool's to give to others.
            takers = [demand for demand in group if not demand.use.is_reserved] if row.reserves else group
            found = _first_short(row, use.named(), row.counted(takers))
            if found is not None:
                return found
    return None


def _first_short(row: LimitRow, use: MemoryUse, needed: int) -> Shortfall | None:
    for limit in row.read(use):
        if needed > limit.available_bytes:
            return Shortfall(limit, needed, limit.available_bytes)
    return None
