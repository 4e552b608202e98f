"""Status of files: how much of each is in the page cache, file by file or in all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import NamedTuple, TypeAlias

from prefault._kernel.cachestat import QuickCachestat
from prefault._system import capabilities
from prefault.files.cached_pages import cached_count, cached_ranges
from prefault.files.failures import CannotTellError, FileFailure
from prefault.files.open_file import OPEN_FLAGS, OpenFile
from prefault.files.selection import Path, SelectedFile, Selection, as_selection
from prefault.inspection.page_cache import counts_own_pages
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE, format_count, format_size

ByteRange = tuple[int, int | None]
"""Bytes of a file from the first offset up to the second; None: its end."""

RangesOfFile: TypeAlias = Callable[[OpenFile], Iterable[ByteRange]]
"""Function that returns byte ranges of an open file, as ``named_tensors`` makes; an OSError is the failure of that file."""

Ranges: TypeAlias = Iterable[ByteRange] | RangesOfFile
"""Byte ranges of each file, or a function that finds those of one."""

_QUICK_BYTES = 16 << 20
"""Bytes of a file for which cachestat answers in 0.1 ms, so that Ctrl-C and other threads need no care."""

_QUICK_FLAGS = OPEN_FLAGS | os.O_NOATIME


CheckedRanges: TypeAlias = list[ByteRange] | RangesOfFile | None


class FileStatus(NamedTuple):
    """Pages of one file in the page cache.

    Attributes:
        path: the file.
        size: bytes of the file.
        pages: base pages that were looked at: all, or those of the ranges that were asked for.
        cached_pages: those that are in the page cache; None where the kernel does not say.
        dirty_pages: those that wait to be written to the disk; None where the kernel does not say.
        reason: the reason why the kernel does not say; empty where it does.
        ranges: the cached ranges as byte offsets, where they were asked for and the kernel says.
        looked_at: the whole pages of the ranges that were asked for, as byte offsets; None: the whole file.
    """

    path: str
    size: int
    pages: int
    cached_pages: int | None
    dirty_pages: int | None
    reason: str = ""
    ranges: RangeSet | None = None
    looked_at: RangeSet | None = None

    @property
    def cached_bytes(self) -> int | None:
        """Bytes of the cached pages, a last partial page counted whole; None where the kernel does not say."""
        return None if self.cached_pages is None else self.cached_pages * PAGE_SIZE

    def missing(self) -> RangeSet | None:
        """Return the ranges that were looked at and are not cached, as byte offsets of whole pages; None: not known."""
        if self.ranges is None:
            return None
        whole = RangeSet([PageRange.outward(0, self.size)]) if self.looked_at is None else self.looked_at
        return whole - self.ranges


class FilesStatus(NamedTuple):
    """Pages of several files in the page cache.

    Attributes:
        files: one entry for each file, in the order of the selection.
        failures: files that could not be looked at; the others were.
        directories: directories that were read.
        seconds: time that the call took.
    """

    files: list[FileStatus]
    failures: list[FileFailure]
    directories: int
    seconds: float

    @property
    def pages(self) -> int:
        """Base pages of all files, those included of which the kernel does not say whether they are cached."""
        return sum(file.pages for file in self.files)

    @property
    def cached_pages(self) -> int:
        """Base pages that are known to be in the page cache."""
        return sum(file.cached_pages or 0 for file in self.files)

    @property
    def unknown(self) -> int:
        """Number of files of which the kernel does not say what is cached."""
        return sum(file.cached_pages is None for file in self.files)

    def __str__(self) -> str:
        unknown = f", {format_count(self.unknown, 'file')} of which the kernel does not tell" if self.unknown else ""
        failed = f", {format_count(len(self.failures), 'failure')}" if self.failures else ""
        cached, size = format_size(self.cached_pages * PAGE_SIZE), format_size(self.pages * PAGE_SIZE)
        return f"{cached} of {size} cached in {format_count(len(self.files), 'file')}{unknown}{failed}"


def status(paths: Path | Iterable[Path] | Selection, *, ranges: Ranges | None = None, pages: bool = False) -> FilesStatus:
    """Tell how much of files is in the page cache. No page is touched, and no access time moves.

    Args:
        paths: files and directories, or a :func:`prefault.select` of them.
        ranges: byte ranges of each file to look at, or a function from an open file to them; None: the whole files.
        pages: also tell which pages are cached, as ranges: mincore(2) looks at each page, where a count takes microseconds.

    Returns:
        The status of each file. Files that cannot be opened are in ``failures``, and the kernel's silence is told as None.

    Raises:
        ValueError: a range that is negative or backwards.

    Sources: cachestat(2) (Linux 6.5); mincore(2); fincore(1) and vmtouch(8) show as much.
    """
    began = perf_counter()
    selection = as_selection(paths)
    files: list[FileStatus] = []
    failures: list[FileFailure] = []
    for found in each_status(selection, ranges=ranges, pages=pages):
        if isinstance(found, FileStatus):
            files.append(found)
        else:
            failures.append(found)
    return FilesStatus(files, failures, selection.directories, perf_counter() - began)


def each_status(
    selection: Selection, *, ranges: Ranges | None = None, pages: bool = False
) -> Iterator[FileStatus | FileFailure]:
    """Yield the status of each file of a selection, in constant memory; arguments as for :func:`status`."""
    wanted = checked_ranges(ranges)
    quick = _QuickCounts()
    whole = wanted is None and not pages
    if whole:
        selection.of_directory = quick.of_directory
    found: FileStatus | SelectedFile | FileFailure
    for found in selection:
        if not isinstance(found, SelectedFile):
            yield found
            continue
        try:
            counted = quick.count(found) if whole else None
            if counted is None:
                with OpenFile(found.path) as file:
                    counted = _status_of(file, wanted, pages)
                    quick.learn(found, file)
        except OSError as error:
            yield FileFailure.of(found.path, error)
        else:
            yield counted


def checked_ranges(ranges: Ranges | None) -> CheckedRanges:
    """Return the ranges as a list; a function, and None, as they are.

    Raises:
        ValueError: a range that is negative or backwards.
    """
    if ranges is None or callable(ranges):
        return ranges
    checked = list(ranges)
    for found in checked:
        try:
            start, stop = found
        except (TypeError, ValueError):
            raise ValueError(
                f"not a range of a file: {found!r}: give (start, stop) in bytes, stop None for its end"
            ) from None
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"not a range of a file: [{start}, {stop})")
    return checked


def pages_of(file: OpenFile, ranges: CheckedRanges) -> RangeSet:
    """Return the whole pages that hold the bytes of the ranges, or of the whole file for None, cut at its end."""
    parts = [(0, None)] if ranges is None else ranges(file) if callable(ranges) else ranges
    return RangeSet(page for page in (file.pages(min(start, file.size), stop) for start, stop in parts) if page)


def _status_of(file: OpenFile, ranges: CheckedRanges, with_ranges: bool) -> FileStatus:
    parts = pages_of(file, ranges)
    cached: int | None = 0
    dirty: int | None = 0
    reason = ""
    found: RangeSet | None = None
    for part in parts:
        count = cached_count(file, part.start, part.stop)
        cached = None if cached is None or count.pages is None else cached + count.pages
        dirty = None if dirty is None or count.dirty is None else dirty + count.dirty
        reason = reason or count.reason
    if with_ranges:
        found = RangeSet()
        try:
            for part in parts:
                found |= cached_ranges(file, part.start, part.stop)
        except CannotTellError as error:
            found, reason = None, reason or error.reason
    looked_at = None if ranges is None else parts
    return FileStatus(file.path, file.size, parts.pages, cached, dirty, reason, found, looked_at)


class _QuickCounts:
    """Counts of whole files by four system calls a file, of which cachestat(2) is one.

    The file system is looked at once for each device. One whose files may have their pages elsewhere is left to the careful
    way, and so is a file of which cachestat does not tell.
    """

    def __init__(self) -> None:
        self._call = QuickCachestat() if capabilities.CACHESTAT.available else None
        self._devices: set[int] = set()

    def learn(self, found: SelectedFile, file: OpenFile) -> None:
        """Note whether the files on this file's device may be counted quickly."""
        if self._call is not None and not file.is_block_device and counts_own_pages(file.file_system):
            self._devices.add(found.stat.st_dev)

    def of_directory(
        self, entries: Iterable[os.DirEntry[str]], device: int
    ) -> Iterator[FileStatus | os.DirEntry[str]]:  # fmt: skip
        """Yield the status of each file of a directory on ``device``, and the entries that another way must look at.

        All in one loop: that is a third faster than to have the selection look at each entry, and this at each file.
        """
        devices, call = self._devices, self._call
        make = tuple.__new__  # FileStatus() goes through a Python function, at twice the time
        for entry in entries:
            if call is None or device not in devices or not entry.is_file(follow_symlinks=False):
                yield entry
                continue
            path = entry.path
            try:
                fd = os.open(path, _QUICK_FLAGS)
            except OSError:  # the careful way finds out why, and tries without O_NOATIME
                yield entry
                continue
            try:
                facts = os.fstat(fd)
                size = facts.st_size
                known = (
                    size <= _QUICK_BYTES
                    and facts.st_nlink == 1
                    and facts.st_dev == device
                    and stat.S_ISREG(facts.st_mode)
                )  # fmt: skip
                cached, dirty = call(fd, size) if known else (0, 0)
            except OSError:
                known = False
            finally:
                os.close(fd)
            yield make(FileStatus, (path, size, -(-size // PAGE_SIZE), cached, dirty, "", None, None)) if known else entry

    def count(self, found: SelectedFile) -> FileStatus | None:
        """Return the status of a file; None where the careful way must tell."""
        path, facts = found
        size = facts.st_size
        if self._call is None or size > _QUICK_BYTES or facts.st_dev not in self._devices:
            return None
        try:
            fd = os.open(path, _QUICK_FLAGS)
        except PermissionError:  # the careful way tries without O_NOATIME
            return None
        try:
            cached, dirty = self._call(fd, size) if size else (0, 0)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
                raise
            return None
        finally:
            os.close(fd)
        return FileStatus(path, size, -(-size // PAGE_SIZE), cached, dirty)
