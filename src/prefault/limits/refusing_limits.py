"""The limits at which the kernel refuses: huge pages, space in file systems, the commit limit, resource limits."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from typing import Literal

from prefault._system import cgroups, hugetlb
from prefault._system.kept_files import KeptFile
from prefault._system.memory_cgroups import hugetlb_bounds
from prefault.limits.limit import Bounds, Limit
from prefault.limits.memory_limits import field, meminfo_text
from prefault.memory.vma import Backing
from prefault.sizes import KIB, format_size

ALLOCATED_WHEN_TOUCHED = (Backing.MEMFD, Backing.TMPFS)
"""What counts against the commit limit page by page; other memory did so as a whole when it was mapped (mm/shmem.c)."""


def hugetlb_limits(page_size: int) -> list[Limit]:
    """The pool of huge pages of one size, and the hugetlb cgroups above this process."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        pool = hugetlb.read_pool(page_size)
        found.append(
            Limit(
                f"hugetlb pool of {format_size(page_size)} pages", "huge pages",
                (pool.total + pool.surplus_left) * page_size, (pool.total - pool.available) * page_size, 0, 0,
                "SIGBUS when touched, ENOMEM from mmap if not MAP_NORESERVE", pool.setting,
                f"write a larger number of pages to {pool.setting}",
            )
        )  # fmt: skip
        governing = cgroups.governing("hugetlb")
        for directory in governing.directories:
            for bound in hugetlb_bounds(directory, governing.version, page_size):
                pages = bound.counts == "pages"
                found.append(
                    Limit(
                        f"{os.path.basename(bound.file)} of {directory}",
                        "huge pages" if pages else "huge page reservations", bound.limit, bound.usage, 0, 0,
                        "SIGBUS when touched" if pages else "ENOMEM from mmap", bound.file,
                        f"write a larger number to {bound.file}",
                    )
                )  # fmt: skip
    return found


def space_limit(
    file: int | str | None, bounds: Literal["tmpfs space", "disk space"], name: str | None = None
) -> Limit | None:
    """The space of the file system that holds an open file or a path; None where it has no limit, or cannot be told."""
    if file is None:
        return None
    try:
        space = os.statvfs(file)
    except OSError:
        return None
    if not space.f_blocks:  # a tmpfs without size=, or the kernel's own, where memfds live
        return None
    # Blocks that are set aside for root are root's to take. Quotas are not known.
    free = space.f_bfree if os.geteuid() == 0 else space.f_bavail
    where = name or (file if isinstance(file, str) else "the file")
    kind = "tmpfs" if bounds == "tmpfs space" else "disk"
    total = space.f_blocks * space.f_frsize
    remedy = "mount it larger (mount -o remount,size=...)" if kind == "tmpfs" else "make it larger"
    return Limit(
        f"{kind} space of {where}", bounds, total, total - free * space.f_frsize, 0, 0,
        "SIGBUS when touched, ENOSPC from fallocate", f"statvfs({where})", f"{remedy}, or remove files",
    )  # fmt: skip


def commit_limits() -> Iterator[Limit]:
    """The commit limit, if there is one (vm.overcommit_memory = 2)."""
    with contextlib.suppress(OSError, ValueError):
        if _overcommit_file.read().strip() != b"2":
            return
        text = meminfo_text()
        limit, committed = field(text, "CommitLimit"), field(text, "Committed_AS")
        if limit is None or committed is None:
            return
        # What the kernel sets aside: a part of the process' size, and some for root (mm/util.c, __vm_enough_memory).
        status = _read("/proc/self/status")
        kept = min((field(status, "VmSize") or 0) // 32, int(_read("/proc/sys/vm/user_reserve_kbytes")) * KIB)
        if not _capable(status, _CAP_SYS_ADMIN):
            kept += int(_read("/proc/sys/vm/admin_reserve_kbytes")) * KIB
        yield Limit(
            "CommitLimit", "commit", limit, committed, 0, kept,
            "ENOMEM from mmap, SIGBUS when a memfd or a tmpfs file is touched", "/proc/meminfo",
            "raise vm.overcommit_ratio, set vm.overcommit_memory to 0 or 1, or add swap",
        )  # fmt: skip


def locked_memory_limit() -> Limit | None:
    """RLIMIT_MEMLOCK; None where there is none, as for whoever has CAP_IPC_LOCK."""
    status = _read("/proc/self/status")
    if _capable(status, _CAP_IPC_LOCK):
        return None
    return _rlimit("RLIMIT_MEMLOCK", "locked memory", field(status, "VmLck"), "ENOMEM from mlock", "ulimit -l")


def mmap_limits(*, private: bool) -> Iterator[Limit]:
    """The limits that a new mapping meets: what is mapped already has passed them."""
    status = _read("/proc/self/status")
    limits = [_rlimit("RLIMIT_AS", "address space", field(status, "VmSize"), "ENOMEM from mmap", "ulimit -v")]
    if private:
        limits.append(_rlimit("RLIMIT_DATA", "data", field(status, "VmData"), "ENOMEM from mmap", "ulimit -d"))
    yield from (limit for limit in limits if limit is not None)


def _rlimit(name: str, bounds: Bounds, used: int | None, consequence: str, command: str) -> Limit | None:
    soft, _ = resource.getrlimit(getattr(resource, name))
    if soft == resource.RLIM_INFINITY or used is None:
        return None
    return Limit(
        name, bounds, soft, used, 0, 0, consequence, f"getrlimit({name}), /proc/self/status", f"raise it ({command})"
    )


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
