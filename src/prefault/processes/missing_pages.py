"""The pages of a mapping of another process that are worth bringing in, and the reason for those that are not."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from prefault._kernel import procmap
from prefault._system import proc
from prefault._system.descriptors import opened
from prefault.memory.vma import Backing, Vma
from prefault.processes.other_process import OtherProcess
from prefault.processes.process_status import MappingStatus, walk_refusal
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE

_MOST_DATA_RANGES = 65536
"""Ranges of data of one file that are looked for; what follows is taken for data."""

_NEVER_TOUCHED = "huge pages of hugetlb are never swapped: the missing ones were never touched"
_SHARED_HUGE = (
    "the kernel does not tell which huge pages of a shared file exist, and reading one that does not would allocate it:"
    " ask for untouched pages"
)
_ZERO = os.makedev(1, 5)
_DEVICE = "memory of a device or of the kernel: reading it may have side effects, so prefault does not"
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


_WITHOUT_DISK = ("tmpfs", "ramfs", "devtmpfs", "rootfs")


class MissingPages:
    """Finds the missing pages of a process' mappings. What holds for many of them is looked up once."""

    def __init__(self, process: OtherProcess, *, untouched: bool) -> None:
        """Prepare to look.

        Args:
            process: the process.
            untouched: find pages that hold nothing as well.
        """
        self._process = process
        self._untouched = untouched
        # As the process sees them: its mount namespace may be another.
        mounts = proc.read_mounts(process.pid)
        self._without_disk = {mount.device for mount in mounts if mount.filesystem in _WITHOUT_DISK}
        self._backings: dict[tuple[int, int, str, str, int], Backing] = {}

    def of(self, mapping: MappingStatus, swapped: RangeSet, guards: RangeSet) -> Missing:
        """Find the pages of a mapping that hold something and are not present.

        Args:
            mapping: one of the mappings of the process.
            swapped: its pages in swap space, as addresses.
            guards: its guard regions (MADV_GUARD_INSTALL, Linux 6.13), as addresses: reading one fails.
        """
        refusal = _refusal(mapping)
        if refusal:
            return Missing(RangeSet(), reason=refusal)
        assert mapping.present is not None
        if mapping.present_bytes == mapping.size_bytes:
            return Missing(RangeSet())
        whole = RangeSet([PageRange(mapping.start, mapping.stop)])
        missing = whole - mapping.present.shifted(mapping.start) - guards
        backing = self._backing(mapping)
        if backing is Backing.HUGETLB:
            if self._untouched:
                return Missing(missing)
            reason = _SHARED_HUGE if mapping.permissions[3] == "s" else _NEVER_TOUCHED
            return Missing(RangeSet(), reason=reason if missing else "")
        if backing is Backing.ANONYMOUS:
            return Missing(missing if self._untouched else swapped & missing)
        return self._of_file(mapping, backing, missing, swapped)

    def _of_file(self, mapping: MappingStatus, backing: Backing, missing: RangeSet, swapped: RangeSet) -> Missing:
        path, mode, device = _file_of(self._process, mapping)
        if stat.S_ISBLK(mode):
            return Missing(missing, charged=False)
        if device == _ZERO and mapping.permissions[3] == "p":  # anonymous memory (zero(4)), by whatever name
            return Missing(missing if self._untouched else swapped & missing)
        if backing is Backing.SPECIAL or stat.S_ISCHR(mode):
            return Missing(RangeSet(), reason=_DEVICE)
        on_disk = backing is Backing.FILE and mapping.device not in self._without_disk
        try:
            with _opened_file(path, mapping) as fd:
                # Not to be read in any case: a page beyond the end of the file is a SIGBUS to the process.
                size = os.fstat(fd).st_size
                inside = _in_file(RangeSet([PageRange(0, size + -size % PAGE_SIZE)]), mapping) if size else RangeSet()
                data = inside if self._untouched else _in_file(_data_ranges(fd, mapping), mapping) & inside
        except OSError as error:
            if on_disk:
                return Missing(missing, charged=False)
            if self._untouched:
                return Missing(missing)
            return Missing(swapped & missing, reason=_HOLES_UNKNOWN.format(os.strerror(error.errno or 0)))
        return Missing(missing & (data | swapped), charged=not on_disk)

    def _backing(self, mapping: MappingStatus) -> Backing:
        kind = mapping.device, mapping.inode, mapping.name, mapping.permissions, mapping.page_size
        found = self._backings.get(kind)
        if found is None:
            found = self._backings[kind] = _backing(mapping)
        return found


def _refusal(mapping: MappingStatus) -> str:
    flags = mapping.vm_flags
    if mapping.name.startswith("[v"):
        return "special memory of the kernel"
    if mapping.name in ("/secretmem", "/secretmem (deleted)"):
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


def _file_of(process: OtherProcess, mapping: MappingStatus) -> tuple[str, int, int]:
    """Return a path of the file behind a mapping, its mode and device number, without opening it: that may act on a device.

    The path is that of /proc/PID/map_files, for which the kernel wants CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, else the
    mapping's name below the root of the process, else as this process sees it. The path is empty and the numbers are 0 where
    the file cannot be found, or the path is another file's by now.
    """
    for path in (
        f"/proc/{process.pid}/map_files/{mapping.start:x}-{mapping.stop:x}",
        f"/proc/{process.pid}/root{mapping.name}",  # of another mount namespace
        mapping.name,
    ):
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            continue
        # Not st_dev: that of btrfs and overlay files differs from the number that maps shows.
        if found.st_ino == mapping.inode:
            return path, found.st_mode, found.st_rdev
    return "", 0, 0


@contextmanager
def _opened_file(path: str, mapping: MappingStatus) -> Iterator[int]:
    """Open the file behind a mapping for the length of a block.

    Raises:
        OSError: it may not be opened, or the path is another file's by now.
    """
    with opened(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY) as fd:
        if os.fstat(fd).st_ino != mapping.inode:
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
