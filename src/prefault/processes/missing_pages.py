"""The pages of a mapping of another process that are worth bringing in, and the reason for those that are not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from prefault._kernel import procmap
from prefault._system.descriptors import opened
from prefault.memory.vma import Backing, Vma
from prefault.processes.other_process import OtherProcess
from prefault.processes.process_status import MappingStatus, walk_refusal
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE

_MOST_DATA_RANGES = 65536
"""Ranges of data of one file that are looked for; what follows is taken for data."""

_NEVER_TOUCHED = "huge pages of hugetlb are never swapped: the missing ones were never touched"
_HOLES_UNKNOWN = (
    "the shared memory cannot be opened ({}), so that its holes are not known, and reading one would allocate a page:"
    " it needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, or ask for untouched pages"
)


class Missing(NamedTuple):
    """Missing pages of a mapping.

    Attributes:
        pages: the pages to bring in, as addresses.
        charged: True if they are charged to the memory cgroup of the process, False for the page cache.
        reason: why pages of the mapping are left out; empty where none is.
    """

    pages: RangeSet
    charged: bool = True
    reason: str = ""


def missing_pages(process: OtherProcess, mapping: MappingStatus, swapped: RangeSet, *, untouched: bool) -> Missing:
    """Find the pages of a mapping that hold something and are not present.

    Args:
        process: the process.
        mapping: one of its mappings.
        swapped: its pages in swap space, as addresses.
        untouched: find pages that hold nothing as well.
    """
    refusal = _refusal(mapping)
    if refusal:
        return Missing(RangeSet(), reason=refusal)
    assert mapping.present is not None
    whole = RangeSet([PageRange(mapping.start, mapping.stop)])
    missing = whole - mapping.present.shifted(mapping.start)
    backing = _backing(mapping)
    if backing is Backing.HUGETLB:
        if untouched:
            return Missing(missing)
        return Missing(RangeSet(), reason=_NEVER_TOUCHED if missing else "")
    if backing is Backing.ANONYMOUS:
        return Missing(missing if untouched else swapped & missing)
    private_file = backing is Backing.FILE
    try:
        with _opened_file(process, mapping) as fd:
            # Not to be read in any case: a page beyond the end of the file is a SIGBUS to the process.
            size = os.fstat(fd).st_size
            inside = _in_file(RangeSet([PageRange(0, size + -size % PAGE_SIZE)]), mapping) if size else RangeSet()
            data = inside if untouched else _in_file(_data_ranges(fd, mapping), mapping) & inside
    except OSError as error:
        if private_file:
            return Missing(missing, charged=False)
        if untouched:
            return Missing(missing)
        return Missing(swapped & missing, reason=_HOLES_UNKNOWN.format(os.strerror(error.errno or 0)))
    return Missing(missing & (data | swapped), charged=not private_file)


def _refusal(mapping: MappingStatus) -> str:
    flags = mapping.vm_flags
    if mapping.name.startswith("[v"):
        return "special memory of the kernel"
    if mapping.name.startswith("/secretmem"):
        return "memfd_secret memory: only the process itself can read it"
    if walk_refusal(flags):
        return walk_refusal(flags)
    if mapping.permissions[0] != "r":
        return f"the process may not read it either ({mapping.permissions})"
    if flags & {"um", "ui"}:
        return "its pages come from a userfaultfd handler: populate it from inside the process"
    return ""


def _backing(mapping: MappingStatus) -> Backing:
    bits = (procmap.PROCMAP_QUERY_VMA_READABLE, procmap.PROCMAP_QUERY_VMA_WRITABLE, procmap.PROCMAP_QUERY_VMA_EXECUTABLE)
    flags = sum(bit for letter, bit in zip(mapping.permissions, bits, strict=False) if letter != "-")
    if mapping.permissions[3] == "s":
        flags |= procmap.PROCMAP_QUERY_VMA_SHARED
    device = mapping.device if mapping.inode else 0
    vma = Vma(
        mapping.start, mapping.stop, flags, mapping.page_size, mapping.file_offset, device, mapping.inode, mapping.name
    )  # fmt: skip
    return vma.backing


@contextmanager
def _opened_file(process: OtherProcess, mapping: MappingStatus) -> Iterator[int]:
    """Open the file behind a mapping for the length of a block: by /proc/PID/map_files, else by its path.

    Raises:
        OSError: neither may be opened, or the path is another file's by now.
    """
    path = f"/proc/{process.pid}/map_files/{mapping.start:x}-{mapping.stop:x}"
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if not os.access(path, os.R_OK, effective_ids=True):
        path = mapping.name
    with opened(os.open, path, flags) as fd:
        found = os.fstat(fd)
        # Not st_dev: that of btrfs and overlay files differs from the number that maps shows.
        if found.st_ino != mapping.inode:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        yield fd


def _data_ranges(fd: int, mapping: MappingStatus) -> RangeSet:
    """Return the parts of a file that hold data, in whole pages, by SEEK_DATA (lseek(2)); all where it does not tell.

    For shared memory these are the pages that the kernel keeps for it, in memory or swap.
    """
    at, end = mapping.file_offset, mapping.file_offset + mapping.size_bytes
    found: list[PageRange] = []
    while at < end and len(found) < _MOST_DATA_RANGES:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            stop = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return RangeSet(found)
            break
        if start >= end:
            return RangeSet(found)
        found.append(PageRange.outward(start, stop))
        at = stop
    if at < end:
        found.append(PageRange.outward(at, end))
    return RangeSet(found)


def _in_file(ranges: RangeSet, mapping: MappingStatus) -> RangeSet:
    """Return ranges of a file as the addresses where the mapping has them."""
    end = mapping.file_offset + mapping.size_bytes
    clipped = ranges.clipped(mapping.file_offset, end)
    by = mapping.start - mapping.file_offset
    return RangeSet.from_edges([edge + by for edge in clipped.edges])
