"""Read the limits at which the kernel refuses: huge pages, space in file systems, the commit limit, resource limits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Literal

from prefault._system import cgroups, hugetlb
from prefault._system.kept_files import KeptFile
from prefault._system.meminfo import number_in, read_meminfo
from prefault._system.memory_cgroups import hugetlb_bounds
from prefault._system.numa import format_list, node_pool
from prefault.limits.limit import Bounds, Limit
from prefault.limits.memory_use import MemoryUse
from prefault.limits.process_limits import soft_limit
from prefault.sizes import KIB, format_size


def hugetlb_pool_limits(page_size: int) -> Iterator[Limit]:
    """Read the pool of huge pages of ``page_size`` bytes, surplus pages that may still be made included."""
    with contextlib.suppress(OSError, ValueError):
        pool = hugetlb.read_pool(page_size)
        yield Limit(
            f"hugetlb pool of {format_size(page_size)} pages", "huge pages",
            (pool.total + pool.surplus_left) * page_size, (pool.total - pool.available) * page_size, 0, 0,
            "SIGBUS when touched, ENOMEM from mmap if not MAP_NORESERVE", pool.setting,
            f"write a larger number of pages to {pool.setting}",
        )  # fmt: skip


def _read_number(path: str) -> int:
    with open(path, "rb") as file:
        return int(file.read())


def node_pool_limits(nodes: Sequence[int], page_size: int) -> Iterator[Limit]:
    """Read the hugetlb pools of NUMA nodes, together: what is free there, reserved or not."""
    total = free = 0
    with contextlib.suppress(OSError, ValueError):
        for node in nodes:
            total += _read_number(f"{node_pool(node, page_size)}/nr_hugepages")
            free += _read_number(f"{node_pool(node, page_size)}/free_hugepages")
        setting = f"{node_pool(nodes[0], page_size)}/nr_hugepages"
        yield Limit(
            f"hugetlb pool of {format_size(page_size)} pages on {format_list(tuple(nodes))}", "huge pages",
            total * page_size, (total - free) * page_size, 0, 0,
            "SIGBUS when touched, though other nodes may have huge pages", setting,
            f"write a larger number of pages to {setting}",
        )  # fmt: skip


def hugetlb_cgroup_limits(page_size: int, counts: Literal["pages", "reservations"]) -> Iterator[Limit]:
    """Read the hugetlb cgroups above this process: the limits on pages in use, or on reserved pages."""
    bounds: Bounds = "huge pages" if counts == "pages" else "huge page reservations"
    with contextlib.suppress(OSError, ValueError):
        governing = cgroups.governing("hugetlb")
        for directory in governing.directories:
            for bound in hugetlb_bounds(directory, governing.version, page_size):
                if bound.counts == counts:
                    yield Limit(
                        f"{os.path.basename(bound.file)} of {directory}", bounds, bound.limit, bound.usage, 0, 0,
                        "SIGBUS when touched" if counts == "pages" else "ENOMEM from mmap", bound.file,
                        f"write a larger number to {bound.file}",
                    )  # fmt: skip


def space_limit(
    file: int | str | None, bounds: Literal["tmpfs space", "disk space"], name: str | None = None
) -> Limit | None:
    """Read the space of the file system that holds an open file or a path; None if it has no limit, or is not readable."""
    if file is None:
        return None
    try:
        space = os.statvfs(file)
    except OSError:
        return None
    if not space.f_blocks:  # a tmpfs without size=, or the kernel's own, where memfds live
        return None
    # Blocks that are set aside for root are free to root. Quotas are not known.
    free = space.f_bfree if os.geteuid() == 0 else space.f_bavail
    where = name or (file if isinstance(file, str) else "the file")
    kind = "tmpfs" if bounds == "tmpfs space" else "disk"
    total = space.f_blocks * space.f_frsize
    remedy = (
        "mount it larger (mount -o remount,size=...; of a container: --shm-size)" if kind == "tmpfs" else "make it larger"
    )
    return Limit(
        f"{kind} space of {where}", bounds, total, total - free * space.f_frsize, 0, 0,
        "SIGBUS when touched, ENOSPC from fallocate", f"statvfs({where})", f"{remedy}, or remove files",
    )  # fmt: skip


def space_limits(use: MemoryUse, bounds: Literal["tmpfs space", "disk space"]) -> Iterator[Limit]:
    """Read the space of the file system behind a use of memory."""
    if use.fd is None:
        use = use.named()
    limit = space_limit(use.directory if use.fd is None else use.fd, bounds, use.directory)
    if limit is not None:
        yield limit


def commit_limits() -> Iterator[Limit]:
    """Read the commit limit, if there is one (vm.overcommit_memory = 2)."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if _overcommit_file.read().strip() != b"2":
            return
        limit, committed = read_meminfo("CommitLimit", "Committed_AS")
        # The kernel sets aside a part of the process' size, and some for root (mm/util.c, __vm_enough_memory).
        status = _read("/proc/self/status")
        kept = min(number_in(status, "VmSize") // 32, int(_read("/proc/sys/vm/user_reserve_kbytes")) * KIB)
        if not _capable(status, _CAP_SYS_ADMIN):
            kept += int(_read("/proc/sys/vm/admin_reserve_kbytes")) * KIB
        yield Limit(
            "CommitLimit", "commit", limit, committed, 0, kept,
            "ENOMEM from mmap, SIGBUS when a memfd or a tmpfs file is touched", "/proc/meminfo",
            "raise vm.overcommit_ratio, set vm.overcommit_memory to 0 or 1, or add swap",
        )  # fmt: skip


def resource_limit(name: str) -> Iterator[Limit]:
    """Read ``"RLIMIT_MEMLOCK"``, ``"RLIMIT_AS"`` or ``"RLIMIT_DATA"``, if it is set and bears on this process."""
    bounds, counter, call, command = _RESOURCES[name]
    soft = soft_limit(name)
    if soft is None:
        return
    status = _read("/proc/self/status")
    if not status or (name == "RLIMIT_MEMLOCK" and _capable(status, _CAP_IPC_LOCK)):
        return
    with contextlib.suppress(KeyError):  # not every sandbox counts it
        yield Limit(
            name, bounds, soft, number_in(status, counter), 0, 0, f"ENOMEM from {call}",
            f"getrlimit({name}), /proc/self/status", f"raise it ({command})",
        )  # fmt: skip


_RESOURCES: dict[str, tuple[Bounds, str, str, str]] = {
    "RLIMIT_MEMLOCK": ("locked memory", "VmLck", "mlock", "ulimit -l"),
    "RLIMIT_AS": ("address space", "VmSize", "mmap", "ulimit -v"),
    "RLIMIT_DATA": ("data", "VmData", "mmap", "ulimit -d"),
}

_overcommit_file = KeptFile("/proc/sys/vm/overcommit_memory")

_CAP_IPC_LOCK = 14
_CAP_SYS_ADMIN = 21


def _capable(status: bytes, capability: int) -> bool:
    _, _, rest = status.partition(b"\nCapEff:")
    return bool(int(rest.split(None, 1)[0], 16) >> capability & 1) if rest else False


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
