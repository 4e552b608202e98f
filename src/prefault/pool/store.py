"""Where the memory of a pool comes from, and what can be known of it beforehand."""

from __future__ import annotations

import errno
import math
import os
from typing import NamedTuple

from prefault._system import hugetlb
from prefault._system.descriptors import Descriptors
from prefault._system.proc import read_meminfo, read_mounts
from prefault.errors import HugePagesError, MappingError
from prefault.memory.backings import BackingSource, parse_backing
from prefault.sizes import PAGE_SIZE, format_size


class Store(NamedTuple):
    """Where the files of the members are made.

    Attributes:
        backing: that makes them.
        page_size: of the kernel, for these files.
        notes: what is worth knowing, each a sentence.
    """

    backing: BackingSource
    page_size: int
    notes: tuple[str, ...]


def open_store(backing: BackingSource | str, capacity: int) -> Store:
    """Look whether ``capacity`` bytes can be had.

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
    mounted = os.fstatvfs(fd)
    size = mounted.f_blocks * mounted.f_frsize  # 0 for a memfd, and for a mount without a limit
    if size and capacity > size:
        raise MappingError(
            errno.ENOSPC,
            f"this hugetlbfs holds {format_size(size)}, the pool is to hold {format_size(capacity)}: mount it larger, or"
            " make the pool smaller",
        )
    pool = hugetlb.read_pool(page_size)
    needed = math.ceil(capacity / page_size)
    if needed > pool.available + max(0, pool.overcommit - pool.surplus):
        raise HugePagesError(
            errno.ENOMEM,
            f"a pool of {format_size(capacity)} takes {needed} huge pages of {format_size(page_size)}, and {pool.available}"
            f" of {pool.total} are free and not reserved (write more to {pool.setting}, or make the pool smaller)",
        )


def _check_memory(capacity: int) -> tuple[str, ...]:
    memory = read_meminfo()
    total = memory["MemTotal"] + memory["SwapTotal"]
    if capacity > total:
        return (
            f"the capacity of {format_size(capacity)} is more than this machine's memory and swap of {format_size(total)}:"
            " not all of it can ever be had",
        )
    return ()


def _check_tmpfs(directory: str, fd: int, capacity: int) -> tuple[str, ...]:
    device = os.fstat(fd).st_dev
    filesystem = next((mount.filesystem for mount in read_mounts() if mount.device == device), "an unknown file system")
    if filesystem not in ("tmpfs", "ramfs"):
        raise ValueError(f"{directory} is on {filesystem}: a pool is memory, its directory is on tmpfs or hugetlbfs")
    mounted = os.fstatvfs(fd)
    size, free = mounted.f_blocks * mounted.f_frsize, mounted.f_bavail * mounted.f_frsize
    if not size:  # mounted without a limit
        return _check_memory(capacity)
    if capacity > size:
        raise MappingError(
            errno.ENOSPC,
            f"{directory} holds {format_size(size)}, the pool is to hold {format_size(capacity)}:"
            " mount it larger (mount -o remount,size=...), or make the pool smaller",
        )
    if capacity > free:
        return (
            f"{format_size(free)} of {directory} are free now, the pool is to hold"
            f" {format_size(capacity)}: until others leave it, it is full before its books say so",
        )
    return _check_memory(capacity)
