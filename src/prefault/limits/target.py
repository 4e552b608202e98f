"""Which limits bear on a target."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from prefault._system import hugetlb
from prefault._system.proc import read_mounts
from prefault.limits.limit import Headroom, Limit
from prefault.limits.memory_limits import memory_limits
from prefault.limits.refusing_limits import (
    ALLOCATED_WHEN_TOUCHED,
    commit_limits,
    hugetlb_limits,
    locked_memory_limit,
    mmap_limits,
    space_limit,
)
from prefault.memory.backings import (
    BackingSource,
    parse_backing,
)
from prefault.memory.borrowing import borrow
from prefault.memory.vma import Backing, Vma, file_descriptor, mount_directory, vm_flags, vmas


def headroom(target: Any = None) -> Headroom:
    """The limits that could stop or kill a populate call.

    Args:
        target: any buffer, as for :func:`~prefault.populate`; or a backing or its name (``"memfd"``,
            ``prefault.File(path)``): what a new mapping of it would meet, at mmap as well; None: this process in general.

    Raises:
        TypeError, ValueError: none of these; closed or released.

    Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; proc_meminfo(5); statvfs(3); getrlimit(2);
    Documentation/admin-guide/mm/hugetlbpage.rst.
    """
    if target is None:
        return Headroom((*memory_limits(), *commit_limits(), *mmap_limits(private=True), *_of_other_memory()))
    if isinstance(target, str | BackingSource):
        return Headroom(tuple(dict.fromkeys(_of_backing(parse_backing(target)))))
    with borrow(target) as memory:
        stop = memory.address + memory.length
        # Of many mappings of one kind the first is as good as all, which sparse memory can have thousands of.
        kinds = {_kind(vma): vma for vma in vmas(memory.address, stop)} if memory.length else {}
        found = [limit for vma in kinds.values() for limit in _of_vma(vma, memory.fd)]
    # Those of several kinds meet the same limits, which may have been read twice.
    return Headroom(tuple({(limit.name, limit.source): limit for limit in found}.values()))


def _kind(vma: Vma) -> tuple[object, ...]:
    return vma.backing, vma.shared, vma.writable, vma.page_size, vma.device, vma.inode


def _of_other_memory() -> Iterator[Limit]:
    everything = [locked_memory_limit(), space_limit("/dev/shm", "tmpfs space")]
    everything += [limit for page_size in hugetlb.page_sizes() for limit in hugetlb_limits(page_size)]
    yield from (limit._replace(applies=False) for limit in everything if limit is not None)


def _of_backing(source: BackingSource) -> Iterator[Limit]:
    huge_page_size = source.huge_page_size
    yield from mmap_limits(private=not source.has_file and huge_page_size is None)
    if huge_page_size is not None:
        yield from hugetlb_limits(huge_page_size)
    elif source.location is not None:
        yield from _of_file_system(source.location)
    else:
        yield from memory_limits()
        yield from commit_limits()


def _of_file_system(file: str | int) -> Iterator[Limit]:
    try:
        device, page_size = os.stat(file).st_dev, os.statvfs(file).f_bsize
    except OSError:  # opening it will say why
        return
    if page_size in hugetlb.page_sizes():
        yield from hugetlb_limits(page_size)
        return
    in_memory = _is_in_memory(device)
    space = space_limit(file, "tmpfs space" if in_memory else "disk space")
    if space is not None:
        yield space
    if in_memory:
        yield from memory_limits()
        yield from commit_limits()


def _is_in_memory(device: int) -> bool:
    """On tmpfs; or on a mount of the kernel's own, which no process sees, as memfds are."""
    return next((mount.filesystem for mount in read_mounts() if mount.device == device), "tmpfs") in ("tmpfs", "ramfs")


def _of_vma(vma: Vma, fd: int | None) -> Iterator[Limit]:
    if vma.backing is Backing.HUGETLB:
        reserved = "nr" not in vm_flags(vma.start)  # at mmap: the pool keeps the pages for this mapping
        yield from (limit._replace(applies=not reserved) for limit in hugetlb_limits(vma.page_size))
    elif vma.backing is Backing.FILE and vma.shared:
        fd = file_descriptor(vma) if fd is None else fd
        space = None if fd is None or not vma.writable else space_limit(fd, "disk space", mount_directory(vma))
        if space is not None:
            yield space
    elif vma.backing is not Backing.SPECIAL:
        yield from memory_limits()
        if vma.backing is Backing.TMPFS:
            directory = mount_directory(vma)
            space = space_limit(fd if fd is not None else directory, "tmpfs space", directory)
            if space is not None:
                yield space
        if vma.backing in ALLOCATED_WHEN_TOUCHED:
            yield from commit_limits()
