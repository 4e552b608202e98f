"""Headroom of a target: the limits that bear on a buffer, on a backing, or on this process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from prefault._system import hugetlb
from prefault._system.proc import read_mounts
from prefault.limits.limit import Headroom, Limit
from prefault.limits.memory_use import MemoryUse, use_of_vma
from prefault.limits.table import limits_on
from prefault.memory.backings import (
    BackingSource,
    parse_backing,
)
from prefault.memory.borrowing import borrow
from prefault.memory.vma import Backing, Vma, file_descriptor, vmas
from prefault.sizes import MIB

_NEAR = 64 * MIB
"""A gap between buffers over which one walk over the mappings goes on."""


def headroom(target: Any = None) -> Headroom:
    """Read the limits that could stop or kill a populate call.

    Args:
        target: any buffer or collection, as for :func:`~prefault.populate`; or a backing or its name (``"memfd"``,
            ``prefault.File(path)``): the limits that a new mapping of it would meet, at mmap as well; None: this process in
            general.

    Raises:
        TypeError, ValueError: none of these; closed or released.

    Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; proc_meminfo(5); statvfs(3); getrlimit(2);
    Documentation/admin-guide/mm/hugetlbpage.rst.
    """
    if target is None:
        found = [limits_on(MemoryUse(mapped=False))]
        found += [[limit._replace(applies=False) for limit in limits_on(use)] for use in _other_memory()]
    elif isinstance(target, str | BackingSource):
        found = [limits_on(use) for use in _of_backing(parse_backing(target))]
    else:
        found = _on_memory(target)
    # Memory of several kinds meets the same limits, which may have been read twice; the first reading counts.
    limits = [limit for several in found for limit in several]
    return Headroom(tuple({(limit.name, limit.bounds, limit.source): limit for limit in reversed(limits)}.values())[::-1])


def _on_memory(target: Any) -> list[list[Limit]]:
    try:
        borrowed = borrow(target)
    except TypeError as error:
        # Imported here: a part of the import time that most programs need not spend.
        from prefault.memory.borrowed_members import borrowed_collection

        with borrowed_collection(target, 0, None, error) as members:
            pages = members.pages
            clusters = pages.bridged(_NEAR) if len(pages) > 1 else pages
            touched = (vma for span in clusters for vma in vmas(*span) if pages.clipped(vma.start, vma.stop))
            return _limits_on(touched, None)
    with borrowed as memory:
        found = vmas(memory.address, memory.address + memory.length) if memory.length else ()
        return _limits_on(found, memory.fd)


def _limits_on(mappings: Iterable[Vma], fd: int | None) -> list[list[Limit]]:
    # One of many mappings of a kind stands for all, of which sparse memory can have thousands.
    uses = [_of_vma(vma, fd) for vma in {_kind(vma): vma for vma in mappings}.values()]
    # Private mappings of files are populated readable unless asked otherwise: their pages stay the file's.
    uses += [use._replace(access="read") for use in uses if use.backing is Backing.FILE and use.copies]
    return [limits_on(use) for use in uses]


def _kind(vma: Vma) -> tuple[object, ...]:
    return vma.backing, vma.shared, vma.writable, vma.page_size, vma.device, vma.inode


def _of_vma(vma: Vma, fd: int | None) -> MemoryUse:
    on_disk = vma.backing is Backing.FILE and vma.shared and vma.writable
    if fd is None and on_disk:
        fd = file_descriptor(vma)
    use = use_of_vma(vma, fd)
    if fd is None and on_disk:
        return use._replace(allocates=False)  # populate fills no holes without a descriptor
    return use.named() if vma.backing in (Backing.TMPFS, Backing.FILE) else use


def _other_memory() -> Iterator[MemoryUse]:
    """Yield memory that a process may also use: locked, on /dev/shm, of huge pages."""
    yield MemoryUse(locks=True)
    yield MemoryUse(backing=Backing.TMPFS, directory="/dev/shm")
    yield from (MemoryUse(backing=Backing.HUGETLB, page_size=page_size) for page_size in hugetlb.page_sizes())


def _of_backing(source: BackingSource) -> Iterator[MemoryUse]:
    if source.huge_page_size is not None:
        yield MemoryUse(backing=Backing.HUGETLB, page_size=source.huge_page_size, mapped=False)
    elif source.location is not None:
        yield from _of_file_system(source.location)
    elif source.has_file:
        yield MemoryUse(backing=Backing.MEMFD, shared=True, mapped=False)
    else:
        yield MemoryUse(mapped=False)


def _of_file_system(file: str | int) -> Iterator[MemoryUse]:
    try:
        device, page_size = os.stat(file).st_dev, os.statvfs(file).f_bsize
    except OSError:  # opening it will tell
        yield MemoryUse(backing=None, mapped=False)
        return
    if page_size in hugetlb.page_sizes():
        yield MemoryUse(backing=Backing.HUGETLB, page_size=page_size, mapped=False)
        return
    backing = Backing.TMPFS if _is_in_memory(device) else Backing.FILE
    fd, path = (file, None) if isinstance(file, int) else (None, file)
    yield MemoryUse(backing=backing, shared=True, allocates=True, mapped=False, fd=fd, directory=path)


def _is_in_memory(device: int) -> bool:
    """Return True on tmpfs, and on a mount of the kernel's own, which no process sees, as memfds are."""
    return next((mount.filesystem for mount in read_mounts() if mount.device == device), "tmpfs") in ("tmpfs", "ramfs")
