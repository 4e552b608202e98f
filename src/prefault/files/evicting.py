"""Eviction: drop files, or ranges of them, from the page cache, and tell what stays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import NamedTuple

from prefault.engine.progress import Progress, check_progress, reporting
from prefault.files.cached_pages import CachedCount, cached_count
from prefault.files.failures import FileFailure
from prefault.files.file_status import Ranges, checked_ranges
from prefault.files.file_systems import IN_MEMORY
from prefault.files.open_file import OpenFile
from prefault.files.selection import Path, Selection, as_selection
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, PAGE_SIZE, format_count, format_size

_CHUNK = 256 * MIB
"""Bytes of one posix_fadvise call: some tens of milliseconds, so that Ctrl-C is answered."""


class EvictedFile(NamedTuple):
    """Pages of one file that an eviction dropped and left.

    Attributes:
        path: the file.
        size: bytes of the file.
        pages: base pages that lie whole in the ranges that were to be dropped.
        evicted_pages: pages that were cached before and are not now; None where the kernel does not say.
        left_pages: pages that are still cached; None where the kernel does not say.
        dirty_pages: pages that were to be written to the disk, or being written, before the eviction; 0 with ``sync``.
        reason: the reason why pages are left, or why the kernel does not say; empty where none are.
    """

    path: str
    size: int
    pages: int
    evicted_pages: int | None
    left_pages: int | None
    dirty_pages: int
    reason: str = ""

    def __str__(self) -> str:
        if self.left_pages is None:
            return f"{self.path}: {self.reason}"
        return f"{self.path}: {format_size(self.left_pages * PAGE_SIZE)} left: {self.reason}"


class EvictResult(NamedTuple):
    """Pages that an eviction dropped and left.

    Attributes:
        files: number of files that were worked on.
        pages: base pages that were to be dropped, if they were cached.
        evicted_pages: base pages that were cached before and are not now, as far as the kernel says.
        left_pages: base pages that are still cached, as far as the kernel says.
        left: files with such pages, or of which the kernel does not say.
        failures: files that could not be worked on.
        directories: directories that were read.
        seconds: time that the call took.
    """

    files: int
    pages: int
    evicted_pages: int
    left_pages: int
    left: list[EvictedFile]
    failures: list[FileFailure]
    directories: int
    seconds: float

    @property
    def evicted_bytes(self) -> int:
        """Bytes of the pages that were dropped."""
        return self.evicted_pages * PAGE_SIZE

    @property
    def left_bytes(self) -> int:
        """Bytes of the pages that are still cached."""
        return self.left_pages * PAGE_SIZE

    def __str__(self) -> str:
        failed = f", {format_count(len(self.failures), 'failure')}" if self.failures else ""
        left = f", {format_size(self.left_bytes)} left in {format_count(len(self.left), 'file')}" if self.left else ""
        evicted = f"{format_size(self.evicted_bytes)} evicted from {format_count(self.files, 'file')}"
        return f"{evicted} in {self.seconds:.2g} s{left}{failed}"


def evict(
    paths: Path | Iterable[Path] | Selection, *, ranges: Ranges | None = None, sync: bool = False,
    progress: Progress | bool = False,
) -> EvictResult:  # fmt: skip
    """Drop files from the page cache. Their content is not lost: it is read from the disk again.

    Pages stay that a process has mapped or locked, and those that are dirty or being written; the result says how many. Only
    pages that lie whole in a range are dropped, and a large folio that reaches out of the range stays whole.

    Args:
        paths: files and directories, or a :func:`prefault.select` of them.
        ranges: byte ranges of each file; None: the whole files.
        sync: write dirty pages to the disk first, as fdatasync(2) does. Otherwise the kernel begins to write them, and they
            stay for now.
        progress: True draws a bar on stderr, or logs; a function is called with the bytes done and those found so far.

    Raises:
        ValueError: a range that is negative or backwards.

    Source: posix_fadvise(2), POSIX_FADV_DONTNEED; mm/fadvise.c and mm/truncate.c (invalidate_mapping_pages).
    """
    check_progress(progress)
    began = perf_counter()
    wanted = checked_ranges(ranges)
    selection = as_selection(paths)
    files = pages = evicted = left_pages = 0
    left: list[EvictedFile] = []
    failures: list[FileFailure] = []
    with reporting(progress, "evict") as report:
        for found in each_evicted(selection, ranges=wanted, sync=sync):
            if isinstance(found, FileFailure):
                failures.append(found)
                continue
            files += 1
            pages += found.pages
            evicted += found.evicted_pages or 0
            left_pages += found.left_pages or 0
            if found.reason:
                left.append(found)
            if report is not None:
                report(pages * PAGE_SIZE, pages * PAGE_SIZE)
    took = perf_counter() - began
    return EvictResult(files, pages, evicted, left_pages, left, failures, selection.directories, took)


def each_evicted(
    selection: Selection, *, ranges: Ranges | None = None, sync: bool = False
) -> Iterator[EvictedFile | FileFailure]:
    """Evict one file of a selection after the other, and yield what came of it; arguments as for :func:`evict`."""
    wanted = checked_ranges(ranges)
    for found in selection:
        if isinstance(found, FileFailure):
            yield found
            continue
        try:
            with OpenFile(found.path) as file:
                yield evict_ranges(file, wanted, sync=sync)
        except OSError as error:
            yield FileFailure.of(found.path, error)


def evict_ranges(file: OpenFile, ranges: Ranges | None = None, *, sync: bool = False) -> EvictedFile:
    """Drop pages of one open file from the page cache.

    Args:
        file: the file.
        ranges: byte ranges; pages that do not lie whole in one of them stay, except the last page of the file. None: all.
        sync: write dirty pages to the disk first.

    Raises:
        OSError: the file system cannot write the dirty pages (EIO, ENOSPC), or refuses the advice.
    """
    size = file.current_size()
    given = [(0, None)] if ranges is None else ranges(file) if callable(ranges) else ranges
    parts = [(start, size if stop is None else min(stop, size)) for start, stop in given]
    pages = RangeSet(_whole_pages(start, stop, size) for start, stop in parts if start < stop)
    if file.file_system in IN_MEMORY:
        left = cached_count(file).pages
        reason = f"the files of {file.file_system} are in memory alone: remove the file to free it" if left else ""
        return EvictedFile(file.path, size, pages.pages, 0, left, 0, reason)
    before = _count(file, pages)
    if sync and before.dirty != 0:
        os.fdatasync(file.fd)
    for part in pages:
        for chunk in part.chunks(_CHUNK):
            # Length 0 is "up to the end": the last page is dropped though the file ends inside of it.
            length = 0 if chunk.stop >= size else chunk.length
            os.posix_fadvise(file.fd, chunk.start, length, os.POSIX_FADV_DONTNEED)
    return _result(file, pages, before, _count(file, pages), sync=sync)


def _whole_pages(start: int, stop: int, size: int) -> PageRange:
    """Return the pages that lie whole in the range, the last page of the file counted whole where its bytes do."""
    return PageRange.inward(start, stop + -stop % PAGE_SIZE if stop == size else stop)


def _count(file: OpenFile, pages: RangeSet) -> CachedCount:
    counts = [cached_count(file, part.start, part.stop) for part in pages]
    reason = next((count.reason for count in counts if count.pages is None), "")
    known = all(count.dirty is not None and count.writeback is not None for count in counts)
    return CachedCount(
        None if reason else sum(count.pages or 0 for count in counts), reason, "cachestat" if known else "mincore",
        sum(count.dirty or 0 for count in counts) if known else None,
        sum(count.writeback or 0 for count in counts) if known else None,
    )  # fmt: skip


def _result(file: OpenFile, pages: RangeSet, before: CachedCount, after: CachedCount, *, sync: bool) -> EvictedFile:
    left = after.pages
    dirty = 0 if sync else (before.dirty or 0) + (before.writeback or 0)
    evicted = None if before.pages is None or left is None else max(0, before.pages - left)
    if left is None:
        reason = after.reason
    elif not left:
        reason = ""
    elif dirty:
        reason = "dirty pages have to be written to the disk before they can be dropped: --sync waits for that"
    else:
        reason = "a process has them mapped, locked or in use, or they belong to a large folio that reaches out of the range"
    return EvictedFile(file.path, file.size, pages.pages, evicted, left, dirty, reason)
