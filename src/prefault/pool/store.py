"""Store of a pool: the backing of its members' files, checked against the limits before the first of them is made."""

from __future__ import annotations

import errno
import math
import os
from typing import NamedTuple

from prefault._system.descriptors import Descriptors
from prefault._system.meminfo import read_meminfo
from prefault._system.proc import read_mounts
from prefault.errors import HugePagesError, MappingError
from prefault.limits.memory_use import MemoryUse
from prefault.limits.refusing_limits import space_limit
from prefault.limits.table import read_limit
from prefault.memory.backings import BackingSource, parse_backing
from prefault.memory.vma import Backing
from prefault.sizes import PAGE_SIZE, format_size


class Store(NamedTuple):
    """Backing of the members' files.

    Attributes:
        backing: maker of the files.
        page_size: the kernel's for these files, in bytes.
        notes: facts worth knowing, each a sentence.
    """

    backing: BackingSource
    page_size: int
    notes: tuple[str, ...]


def open_store(backing: BackingSource | str, capacity: int) -> Store:
    """Make the store for ``capacity`` bytes, if the limits permit so many.

    Raises:
        TypeError, ValueError: a backing that has no file, or one on a disk.
        MappingError: the tmpfs is smaller than that, or the hugetlb pool has fewer pages.
    """
    source = parse_backing(backing)
    if not source.has_file or source.is_given:
        raise ValueError(
            f"a pool makes its files itself, in memory: backing is 'memfd', 'tmpfs', 'memfd-hugetlb', a prefault.Memfd or a"
            f" prefault.TemporaryFile, not {source!r}"
        )
    # A file of the smallest size shows what the backing is.
    notes: tuple[str, ...] = ()
    with Descriptors() as descriptors:
        opened = source.open(descriptors, 1, writable=True)
        assert opened.fd is not None
        if opened.page_size > PAGE_SIZE:
            _check_hugetlb(opened.page_size, opened.fd, capacity)
        elif source.location is None:
            notes = _check_memory(capacity)
        else:
            notes = _check_tmpfs(str(source.location), opened.fd, capacity)
    return Store(source, opened.page_size, notes)


def _check_hugetlb(page_size: int, fd: int, capacity: int) -> None:
    # hugetlbfs has a size like tmpfs; a memfd, and a mount without a limit, have none.
    mounted = space_limit(fd, "tmpfs space")
    if mounted is not None and capacity > mounted.limit_bytes:
        raise MappingError(
            errno.ENOSPC,
            f"this hugetlbfs holds {format_size(mounted.limit_bytes)}, the pool is to hold {format_size(capacity)}: mount it"
            " larger, or make the pool smaller",
        )
    limit = read_limit("hugetlb pool", MemoryUse(backing=Backing.HUGETLB, page_size=page_size))
    if limit is not None and capacity > limit.available_bytes:
        raise HugePagesError(
            errno.ENOMEM,
            f"a pool of {format_size(capacity)} takes {math.ceil(capacity / page_size)} huge pages of"
            f" {format_size(page_size)}, and {limit.available_bytes // page_size} of {limit.limit_bytes // page_size} are"
            f" free and not reserved ({limit.remedy}, or make the pool smaller)",
        )


def _check_memory(capacity: int) -> tuple[str, ...]:
    total = sum(read_meminfo("MemTotal", "SwapTotal"))
    if capacity > total:
        return (
            f"the capacity of {format_size(capacity)} is more than this machine's memory and swap of {format_size(total)}:"
            " it can never be populated in full",
        )
    return ()


def _check_tmpfs(directory: str, fd: int, capacity: int) -> tuple[str, ...]:
    device = os.fstat(fd).st_dev
    filesystem = next((mount.filesystem for mount in read_mounts() if mount.device == device), "an unknown file system")
    if filesystem not in ("tmpfs", "ramfs"):
        raise ValueError(f"{directory} is on {filesystem}: a pool is memory, its directory is on tmpfs or hugetlbfs")
    mounted = read_limit("tmpfs space", MemoryUse(backing=Backing.TMPFS, fd=fd, directory=directory))
    if mounted is None:  # mounted without a limit
        return _check_memory(capacity)
    if capacity > mounted.limit_bytes:
        raise MappingError(
            errno.ENOSPC,
            f"{directory} holds {format_size(mounted.limit_bytes)}, the pool is to hold {format_size(capacity)}:"
            " mount it larger (mount -o remount,size=...), or make the pool smaller",
        )
    if capacity > mounted.available_bytes:
        return (
            f"{format_size(mounted.available_bytes)} of {directory} are free now, the pool is to hold"
            f" {format_size(capacity)}: until other files leave it, it is full before the pool's accounting shows it",
        )
    return _check_memory(capacity)
