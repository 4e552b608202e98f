"""What a part of a plan takes from the limits at which the kernel refuses.

They are looked at before the start only: an errno in the middle kills nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from prefault._kernel import fiemap
from prefault.engine.demand import Demand
from prefault.engine.planning import Segment
from prefault.limits import (
    ALLOCATED_WHEN_TOUCHED,
    Limit,
    commit_limits,
    hugetlb_limits,
    locked_memory_limit,
    space_limit,
)
from prefault.memory.vma import Backing, Vma, mount_directory, vm_flags, vma_at


def space_demand(part: Demand) -> Iterator[tuple[Limit, int]]:
    """Each limit with the bytes that are needed from it: exact where an upper bound would not fit."""
    segment = part.segment
    start, stop, backing = segment.start, segment.stop, segment.backing
    if backing in ALLOCATED_WHEN_TOUCHED:
        limits = [*commit_limits()]
        if backing is Backing.TMPFS:
            limits += _space_left(part, "tmpfs space")
        missing = part.missing_bytes(start, stop)
        if any(missing > limit.available_bytes for limit in limits):
            missing = _unallocated(part)
        yield from ((limit, missing) for limit in limits)
    elif backing is Backing.HUGETLB:
        yield from _huge_pages(part)
    elif backing is Backing.FILE and segment.target.fd is not None and segment.method.allocates:
        for limit in _space_left(part, "disk space"):
            yield limit, part.length if part.length <= limit.available_bytes else _hole_bytes(segment)
    if segment.method.locks:
        locked = locked_memory_limit()
        # What is locked already is not counted twice by the kernel.
        if locked is not None and (part.length <= locked.available_bytes or "lo" not in vm_flags(start)):
            yield locked, part.length


def _space_left(part: Demand, bounds: Literal["tmpfs space", "disk space"]) -> Iterator[Limit]:
    segment, fd = part.segment, part.fd
    limit = None if fd is None else space_limit(fd, bounds)
    if fd is None or (limit is not None and part.length > limit.available_bytes):
        vma = vma_at(segment.start)  # its mount has a name, for people
        directory = None if vma is None else mount_directory(vma)
        limit = space_limit(directory if fd is None else fd, bounds, directory)
    if limit is not None:
        yield limit


def _huge_pages(part: Demand) -> Iterator[tuple[Limit, int]]:
    segment = part.segment
    missing = part.missing_bytes(segment.start, segment.stop)
    if not missing:
        return
    limits = hugetlb_limits(segment.target.page_size)
    if all(missing <= limit.available_bytes for limit in limits):
        return
    if segment.target.shared or segment.method.access == "read":
        # Not all that our page tables lack: others may have brought it in.
        missing = _unallocated(part)
    # Pages that were set aside when it was mapped are not the pool's to give to others.
    reserved = "nr" not in vm_flags(segment.start)
    for limit in limits:
        is_pool = limit.bounds == "huge page reservations" or limit is limits[0]
        if not (reserved and is_pool):
            yield limit, missing


def _unallocated(part: Demand) -> int:
    """Bytes that the file behind a part does not have; 0 where that cannot be told, so that nothing is refused."""
    segment = part.segment
    holes = _holes(part)
    if segment.backing is Backing.HUGETLB:  # mincore knows but the page tables there
        return min(holes or 0, part.missing_bytes(segment.start, segment.stop))
    needed = part.unallocated()
    return needed if holes is None else min(needed, holes)


def _holes(part: Demand) -> int | None:
    """Bytes that the whole file is short of its size; None where it cannot be looked at."""
    fd, page_size = part.fd, part.segment.target.page_size
    try:
        status = os.fstat(fd) if fd is not None else _status(vma_at(part.segment.start))
    except OSError:
        return None
    if status is None:
        return None
    return max(0, status.st_size + -status.st_size % page_size - status.st_blocks * 512)


def _hole_bytes(segment: Segment) -> int:
    target = segment.target
    assert target.fd is not None
    start, stop = segment.start + target.file_base, min(segment.stop + target.file_base, target.file_size)
    return sum(last - first for first, last in fiemap.holes(target.fd, start, stop))


def _status(vma: Vma | None) -> os.stat_result | None:
    """Of the file behind a mapping whose descriptor is not known."""
    if vma is None:
        return None
    status = os.stat(f"/proc/self/map_files/{vma.start:x}-{vma.stop:x}")
    return status if status.st_ino == vma.inode else None
