"""Pages of an open file that are in the page cache: counts by cachestat(2), ranges by mincore(2), or an honest refusal.

No page is touched: mincore looks at a mapping that is never read through, so a file that shrinks meanwhile raises no SIGBUS.
Which call is believed when, and why, is in ``docs/design/files.md``.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from prefault._kernel import mman
from prefault._kernel.cachestat import PageCache, cachestat
from prefault._system import capabilities
from prefault.files.failures import CannotTellError
from prefault.files.open_file import OpenFile
from prefault.inspection.mincore import append_runs
from prefault.inspection.page_cache import counts_own_pages
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import GIB, MIB, PAGE_SIZE

_WINDOW = 256 * MIB
"""Bytes of one mapping and one mincore call: some milliseconds, so that Ctrl-C is answered."""

_SIEVES = (64 * GIB, 4 * GIB, 256 * MIB, 16 * MIB)
"""Pieces in which cachestat is asked for nothing at all, before mincore looks at each page."""

_OTHERS_FILE = (
    "the kernel tells of this file's page cache only to its owner, to those who may write it, and to root",
    "run as its owner or as root",
)


class CachedCount(NamedTuple):
    """Count of a file's pages in the page cache.

    Attributes:
        pages: base pages that are cached; None where the kernel does not say.
        reason: the reason why it does not say; empty where it does.
        source: ``"cachestat"``, ``"mincore"``, ``"fstat"`` (the blocks of a file on hugetlbfs are its pages), or ``""``
            without an answer.
        dirty: cached pages that wait for write-back; None where that is not known (only cachestat tells).
        writeback: cached pages that are being written; None where that is not known.
    """

    pages: int | None
    reason: str
    source: Literal["cachestat", "mincore", "fstat", ""]
    dirty: int | None = None
    writeback: int | None = None

    @property
    def bytes(self) -> int | None:
        """Bytes of the cached pages, a last partial page counted whole; None where the kernel does not say."""
        return None if self.pages is None else self.pages * PAGE_SIZE


def cached_count(file: OpenFile, start: int = 0, stop: int | None = None) -> CachedCount:
    """Count the pages of a file that are in the page cache; microseconds for any size where cachestat(2) is allowed.

    Unlike :func:`cached_ranges`, the count of cachestat includes pages that are still being read, or could not be read.

    Args:
        file: the file.
        start: byte offset, rounded down to a whole page.
        stop: byte offset, rounded up to a whole page; None: the end of the file.
    """
    pages = file.pages(start, stop)
    if not pages:
        return CachedCount(0, "", "fstat", 0, 0)
    if file.file_system == "hugetlbfs":
        return _count_by_blocks(file, pages)
    counted = _cachestat(file, pages)
    if counted is not None and (counted.cached or counts_own_pages(file.file_system)):
        return CachedCount(counted.cached, "", "cachestat", counted.dirty, counted.writeback)
    try:
        return CachedCount(cached_ranges(file, pages.start, pages.stop).pages, "", "mincore")
    except CannotTellError as error:
        return CachedCount(None, error.reason, "")


def cached_ranges(file: OpenFile, start: int = 0, stop: int | None = None) -> RangeSet:
    """Return the ranges of a file that are in the page cache and hold its content, as byte offsets of whole pages.

    Args:
        file: the file.
        start: byte offset, rounded down to a whole page.
        stop: byte offset, rounded up to a whole page; None: the end of the file.

    Raises:
        CannotTellError: the kernel does not say: another user's file (since Linux 5.2), hugetlbfs in part, or a file that
            cannot be mapped.
    """
    pages = file.pages(start, stop)
    if not pages:
        return RangeSet()
    if file.file_system == "hugetlbfs":
        counted = _count_by_blocks(file, pages)
        if counted.pages is None:
            raise CannotTellError(errno.EOPNOTSUPP, counted.reason, file.path)
        return RangeSet([pages] if counted.pages else [])
    starts, stops = array("Q"), array("Q")
    looked_at = claimed = 0
    for window in _windows(file, pages):
        with _mapped(file, window) as address:
            found = mman.mincore(address, window.length)
        looked_at += window.pages
        claimed += append_runs(found, window.start, starts, stops)
    if looked_at and claimed == looked_at and not _is_told_the_truth(file, pages, claimed):
        raise CannotTellError(errno.EPERM, _OTHERS_FILE[0], file.path, _OTHERS_FILE[1])
    return RangeSet.from_ascending(starts, stops)


def _count_by_blocks(file: OpenFile, pages: PageRange) -> CachedCount:
    """Count the pages of a file on hugetlbfs, which mincore knows only as far as a mapping faulted them."""
    file.current_size()
    allocated = os.fstat(file.fd).st_blocks * 512
    if not allocated:
        return CachedCount(0, "", "fstat", 0, 0)
    if pages == file.pages() or allocated >= file.pages().length:
        return CachedCount(min(allocated, pages.length) // PAGE_SIZE, "", "fstat", 0, 0)
    return CachedCount(None, "hugetlbfs tells how many pages a file has, not which", "")


def _cachestat(file: OpenFile, pages: PageRange) -> PageCache | None:
    """Ask cachestat(2); None where the kernel does not answer."""
    if not capabilities.CACHESTAT.available:
        return None
    try:
        return cachestat(file.fd, pages.start, pages.length)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return None


def _windows(file: OpenFile, pages: PageRange) -> Iterator[PageRange]:
    """Yield the windows that mincore must look at: those in which cachestat does not count zero."""
    if not counts_own_pages(file.file_system) or _cachestat(file, PageRange(pages.start, pages.start + PAGE_SIZE)) is None:
        yield from pages.chunks(_WINDOW)
    else:
        yield from _sieved(file, pages, 0)


def _sieved(file: OpenFile, pages: PageRange, depth: int) -> Iterator[PageRange]:
    counted = _cachestat(file, pages)
    if counted is not None and not counted.cached:
        return
    while depth < len(_SIEVES) and pages.length <= _SIEVES[depth]:
        depth += 1
    if depth == len(_SIEVES) or (counted is not None and counted.cached == pages.pages):
        yield from pages.chunks(_WINDOW)
        return
    for part in pages.chunks(_SIEVES[depth]):
        yield from _sieved(file, part, depth + 1)


@contextmanager
def _mapped(file: OpenFile, window: PageRange) -> Iterator[int]:
    """Map a window of a file; yield its address, which is not to be read through. The file may be shorter."""
    try:
        # Private: some network file systems refuse shared mappings, and mincore finds the file's pages either way.
        address = mman.mmap(0, window.length, mman.PROT_READ, mman.MAP_PRIVATE, file.fd, window.start)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EACCES, errno.EOPNOTSUPP):
            reason = f"{file.file_system} does not let this file be mapped, so mincore(2) cannot look at it"
            raise CannotTellError(error.errno, reason, file.path) from error
        raise
    try:
        yield address
    finally:
        mman.munmap(address, window.length)


def _is_told_the_truth(file: OpenFile, pages: PageRange, claimed: int) -> bool:
    """Tell whether mincore's answer that all pages are resident is true.

    Since Linux 5.2 mincore gives that answer to those who may not see a file's page cache (can_do_mincore, mm/mincore.c).
    """
    if capabilities.CACHESTAT.available:
        try:
            counted = cachestat(file.fd, pages.start, pages.length).cached
        except OSError as error:
            if error.errno == errno.EPERM:  # cachestat has the rule of mincore (Linux 6.13)
                return False
        else:
            if counted >= claimed:
                return True
    return os.geteuid() in (0, file.owner) or _may_write(file)


def _may_write(file: OpenFile) -> bool:
    return os.access(f"/proc/self/fd/{file.fd}", os.W_OK, effective_ids=True)
