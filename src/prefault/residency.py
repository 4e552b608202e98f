"""What is present: the state of every page of a range, asked of the kernel.

Three sources, the best one that this kernel has: PAGEMAP_SCAN (Linux 6.7), ``/proc/self/pagemap``, mincore(2). The weaker
ones cannot tell everything, and the answer says what.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from ctypes import addressof, c_char, sizeof
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from prefault import capabilities
from prefault._kernel import mman, pagemap, proc
from prefault._kernel.cachestat import PageCache, cachestat
from prefault._kernel.pagemap import PageCategory
from prefault.memory import Borrowed, borrow
from prefault.ranges import PageRange, RangeSet
from prefault.selffile import SelfFile
from prefault.sizes import GIB, MIB, PAGE_SIZE, Size, format_size
from prefault.vma import Backing, Vma, any_descriptor, vmas

if TYPE_CHECKING:
    import numpy
    import numpy.typing


class PageState(enum.IntFlag):
    """What can be said of a page."""

    PRESENT = 1
    """A page-table entry exists: reading does not fault."""
    ALLOCATED = 2
    """Present, and memory of its own lies behind it: not the shared zero page."""
    HUGE = 4
    """Mapped by one entry for a whole huge page (PMD-mapped THP, or hugetlb)."""
    SWAPPED = 8
    """Not present, and the entry is not empty: in swap space, or for a moment under migration; poisoned pages too."""
    FILE = 16
    """Present, and a page of a file or of shared memory: not (or not yet) a private copy."""
    WRITTEN = 32
    """Written since tracking began: soft-dirty, or userfaultfd write-protection in asynchronous mode."""
    GUARD = 64
    """A guard region: any access is a SIGSEGV."""


class Run(NamedTuple):
    """Neighbouring pages of the same state: addresses ``[start, stop)``."""

    start: int
    stop: int
    state: PageState


class Residency:
    """The pages of a range at one moment.

    Attributes:
        range: the whole pages that were looked at, as addresses.
        runs: neighbouring pages of the same state; pages of which nothing is to be said are left out.
        source: ``"pagemap_scan"``, ``"pagemap"`` or ``"mincore"``.
        unknown: the states that this source cannot tell for this memory, each with the reason.
        page_cache: pages of the file behind it in the page cache (in base pages), where the memory is a Mapping with a
            file and the kernel has cachestat (Linux 6.5); else None.
        cached_bytes: bytes of the files behind it that are in the page cache, mapped here or not; None where there is no
            file, or the kernel does not tell this process.
    """

    def __init__(
        self, pages: PageRange, runs: list[Run], source: str, unknown: dict[PageState, str],
        page_cache: PageCache | None = None,
    ) -> None:  # fmt: skip
        self.range = pages
        self.runs = runs
        self.source = source
        self.unknown = unknown
        self.page_cache = page_cache
        self.cached_bytes = None if page_cache is None else page_cache.cached * PAGE_SIZE

    def bytes_in(self, state: PageState) -> int:
        """Bytes of the pages that have every flag of ``state``. ValueError where the source cannot tell."""
        self._require(state)
        return sum(run.stop - run.start for run in self.runs if run.state & state == state)

    @property
    def present_bytes(self) -> int:
        """Bytes that are present."""
        return self.bytes_in(PageState.PRESENT)

    @property
    def allocated_bytes(self) -> int | None:
        """Bytes that are present and allocated; None where the source cannot tell."""
        return None if PageState.ALLOCATED in self.unknown else self.bytes_in(PageState.ALLOCATED)

    @property
    def huge_bytes(self) -> int | None:
        """Bytes mapped by huge entries; None where the source cannot tell."""
        return None if PageState.HUGE in self.unknown else self.bytes_in(PageState.HUGE)

    @property
    def swapped_bytes(self) -> int | None:
        """Bytes in swap space; None where the source cannot tell."""
        return None if PageState.SWAPPED in self.unknown else self.bytes_in(PageState.SWAPPED)

    def ranges(self, state: PageState = PageState.PRESENT) -> RangeSet:
        """The pages that have every flag of ``state``, as byte offsets from ``range.start``."""
        self._require(state)
        base = self.range.start
        return RangeSet(PageRange(r.start - base, r.stop - base) for r in self.runs if r.state & state == state)

    def pages(self) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
        """One :class:`PageState` a base page, in order: shape ``(range.pages,)``, dtype uint8."""
        import numpy

        states = numpy.zeros(self.range.pages, numpy.uint8)
        for start, stop, state in self.runs:
            states[(start - self.range.start) // PAGE_SIZE : (stop - self.range.start) // PAGE_SIZE] = int(state)
        return states

    def _require(self, state: PageState) -> None:
        for flag, reason in self.unknown.items():
            if state & flag:
                raise ValueError(f"{flag.name} cannot be told: {reason}")

    def __str__(self) -> str:
        parts = [f"{format_size(self.present_bytes)} present"]
        for name, count in (
            ("allocated", self.allocated_bytes), ("huge", self.huge_bytes), ("swapped", self.swapped_bytes),
        ):  # fmt: skip
            if count or (count == 0 and name == "allocated"):
                parts.append(f"{format_size(count)} {name}")
        if self.cached_bytes is not None:
            parts.append(f"{format_size(self.cached_bytes)} of the file in the page cache")
        return f"{format_size(self.range.length)}: {', '.join(parts)}"

    def __repr__(self) -> str:
        return f"<Residency of {self.range}, {self} (from {self.source})>"


def residency(buffer: Any, *, offset: Size = 0, length: Size | None = None) -> Residency:
    """The state of every page that holds a byte of ``buffer``.

    Args:
        buffer: any memory, as for :func:`~prefault.populate`.
        offset: where to start looking, in bytes from the start of the buffer.
        length: how far; None: to its end.

    The answer is as of the moment of asking: other threads and the kernel go on meanwhile.

    Sources: PAGEMAP_SCAN and pagemap, Documentation/admin-guide/mm/pagemap.rst; mincore(2).
    """
    with borrow(buffer) as memory:
        span = memory.select(offset, length)
        pages = PageRange.outward(span.start, span.stop)
        found = residency_of(pages, _page_cache(memory, buffer, pages))
        if found.page_cache is None and memory.supplier is None:
            found.cached_bytes = _cached_bytes(pages)
        return found


def _page_cache(memory: Borrowed, buffer: Any, pages: PageRange) -> PageCache | None:
    if memory.fd is None or not pages or not capabilities.CACHESTAT.available:
        return None
    try:
        return cachestat(memory.fd, buffer.file_offset + pages.start - memory.address, pages.length)
    except OSError:  # hugetlbfs has none, and a file that we may not write tells nothing
        return None


def _cached_bytes(pages: PageRange) -> int | None:
    """Return how much of the files behind ``pages`` is in the page cache; None without a file, or where none tells."""
    known = [
        _cached_part(vma, pages & PageRange(vma.start, vma.stop))
        for vma in vmas(pages.start, pages.stop)
        if vma.inode and vma.backing in (Backing.FILE, Backing.TMPFS, Backing.MEMFD)
    ]
    told = [count for count in known if count is not None]
    return sum(told) if told else None


def _cached_part(vma: Vma, pages: PageRange) -> int | None:
    fd = any_descriptor(vma) if capabilities.CACHESTAT.available else None
    if fd is not None:
        with contextlib.suppress(OSError):  # EPERM: the file is another user's; EBADF: closed by another thread
            return cachestat(fd, vma.file_offset + pages.start - vma.start, pages.length).cached * PAGE_SIZE
    # mincore counts private copies as well. Of a file that is another user's it says that all pages are there (since 5.2).
    if (vma.shared or not vma.writable) and _is_ours(vma):
        return resident(pages).length
    return None


def _is_ours(vma: Vma) -> bool:
    """Return whether the kernel tells this process of the page cache of the file (can_do_mincore, mm/mincore.c)."""
    try:
        return os.geteuid() in (0, os.stat(vma.name).st_uid) or os.access(vma.name, os.W_OK, effective_ids=True)
    except OSError:
        return False


# --- PAGEMAP_SCAN ------------------------------------------------------------------------------------------------------

_REGIONS = 1024
_SCAN_STEP = GIB  # a call that walks this much takes at most some 10 ms, so Ctrl-C is not kept waiting
_ALL = PageCategory.PRESENT | PageCategory.SWAPPED | PageCategory.GUARD
_PRESENT = int(PageCategory.PRESENT)
_COPY_PENDING = int(PageCategory.PFNZERO | PageCategory.FILE)
_NO_TRACKING = "nobody tracks writes here: this kernel has no soft-dirty bits, and the memory is not write-protected"

_pagemap_file = SelfFile("pagemap")


class _Scanner(threading.local):
    """The argument and the result vector of PAGEMAP_SCAN, one a thread, made once."""

    def __init__(self) -> None:
        self.busy = False
        regions = array("Q", bytes(_REGIONS * sizeof(pagemap.PageRegion)))
        self.words = memoryview(regions)
        self.argument = pagemap.PmScanArg(size=sizeof(pagemap.PmScanArg), vec=regions.buffer_info()[0], vec_len=_REGIONS)

    def scan(self, start: int, stop: int, mask: int, inverted: int, any_of: int, returned: int) -> Iterator[memoryview]:
        """Regions that match, as views of 64-bit words (start, stop, categories, start, ...), valid until the next."""
        if self.busy:
            # A signal handler, or a finalizer, in the middle of a scan of this very thread.
            yield from _Scanner().scan(start, stop, mask, inverted, any_of, returned)
            return
        self.busy = True
        try:
            argument = self.argument
            argument.category_mask, argument.category_inverted = mask, inverted
            argument.category_anyof_mask, argument.return_mask = any_of, returned
            while start < stop:
                argument.start, argument.end = start, min(stop, start + _SCAN_STEP)
                try:
                    count = _pagemap_file.ioctl(pagemap.PAGEMAP_SCAN, argument)
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    return  # beyond the end of user space, where nobody has pages
                # Not argument.walk_end: with more than 512 regions, the size of the kernel's own buffer, it may be where
                # that was full for the last time and not where the walk ended (seen on 6.18), and regions would come twice.
                start = argument.end if count < _REGIONS else self.words[3 * count - 2]
                yield self.words[: 3 * count]
        finally:
            self.busy = False


_scanner = _Scanner()


def populated_before(start: int, stop: int, *, write: bool, private: bool) -> array[int]:
    """What of ``[start, stop)`` needs no population: a flat array of addresses, start and stop in turn.

    For reading, that is what is present; for writing in private memory, what is present and neither the zero page nor a
    page of the file that is still to be copied. Pages shared with a forked child count as populated although the first
    write copies them, and so do pages of a shared file that were only read although the first write makes them dirty: no
    interface tells these apart. Where the kernel has neither PAGEMAP_SCAN nor pagemap, nothing is
    known to be populated.
    """
    found = array("Q")
    try:
        if capabilities.PAGEMAP_SCAN.available:
            inverted = _COPY_PENDING if write and private else 0
            mask = _PRESENT | inverted
            for words in _scanner.scan(start, stop, mask, inverted, 0, mask):
                for index in range(0, len(words), 3):
                    found.append(words[index])
                    found.append(words[index + 1])
        elif capabilities.PAGEMAP.available:
            for run in _from_pagemap(PageRange(start, stop), None).runs:
                if run.state & PageState.PRESENT and not (write and private and run.state & PageState.FILE):
                    found.append(run.start)
                    found.append(run.stop)
    except PermissionError:
        found = array("Q")  # as in residency_of: this process gave up root
    return found


_OCCUPIED = int(PageCategory.PRESENT | PageCategory.SWAPPED)
_OCCUPIED_HOW = _OCCUPIED | int(PageCategory.PFNZERO | PageCategory.FILE)


def occupied(spans: Sequence[int], *, how: bool = True) -> numpy.typing.NDArray[numpy.int64]:
    """Pages that are present or swapped, many of them: rows of start, stop and :class:`PageCategory`, in order.

    Args:
        spans: where to look: addresses, start and stop in turn, ascending.
        how: tell apart PRESENT, SWAPPED, PFNZERO and FILE; else only PRESENT and SWAPPED, in fewer rows.

    Where the kernel cannot tell (see :class:`Residency`), PFNZERO is missing; with mincore, all but PRESENT.
    """
    import numpy

    found: list[numpy.typing.NDArray[numpy.int64]] = []
    with contextlib.suppress(PermissionError):  # as in residency_of
        if capabilities.PAGEMAP_SCAN.available:
            returned = _OCCUPIED_HOW if how else _OCCUPIED
            guard = int(PageCategory.GUARD) if capabilities.PAGE_IS_GUARD.available else 0  # SWAPPED as well
            words = _scan_spans(spans, guard, guard, _OCCUPIED, returned)
            return numpy.frombuffer(words, numpy.int64).reshape(-1, 3)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        rows = [(run.start, run.stop, _category_of(run.state)) for run in residency_of(PageRange(start, stop)).runs]
        table = numpy.array(rows, numpy.int64).reshape(-1, 3)
        found.append(table[(table[:, 2] & _OCCUPIED) != 0])
    return numpy.concatenate(found) if found else numpy.empty((0, 3), numpy.int64)


def _scan_spans(spans: Sequence[int], mask: int, inverted: int, any_of: int, returned: int) -> array[int]:
    """As :meth:`_Scanner.scan`, of many spans, which may be small: so without a generator for each."""
    words = array("Q")
    vector = bytearray(_REGIONS * sizeof(pagemap.PageRegion))
    pinned = (c_char * len(vector)).from_buffer(vector)
    argument = pagemap.PmScanArg(
        size=sizeof(pagemap.PmScanArg), vec=addressof(pinned), vec_len=_REGIONS, category_mask=mask,
        category_inverted=inverted, category_anyof_mask=any_of, return_mask=returned,
    )  # fmt: skip
    ioctl = _pagemap_file.ioctl
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        while start < stop:
            argument.start, argument.end = start, min(stop, start + _SCAN_STEP)
            count = ioctl(pagemap.PAGEMAP_SCAN, argument)
            if count:
                words.frombytes(vector[: count * sizeof(pagemap.PageRegion)])
            start = argument.end if count < _REGIONS else words[-2]
    return words


def _category_of(state: PageState) -> int:
    """What :func:`occupied` tells of a page whose state comes from a weaker source."""
    category = PageCategory(0)
    if state & PageState.PRESENT:
        category |= PageCategory.PRESENT
    if state & PageState.SWAPPED:
        category |= PageCategory.SWAPPED
    if state & PageState.FILE:
        category |= PageCategory.FILE
    return int(category)


def resident(pages: PageRange) -> RangeSet:
    """The pages that mincore(2) finds in memory: of a shared mapping, whether this process has mapped them or not."""
    return RangeSet(PageRange(run.start, run.stop) for run in _from_mincore(pages, None).runs)


def mapped_by_others(pages: PageRange) -> RangeSet:
    """The pages that this process maps, and somebody else too (or this process twice); none where nobody can tell."""
    try:
        fd = proc.open_proc("/proc/self/pagemap")
    except OSError:
        return RangeSet()
    try:
        words = array("Q", pagemap.read_pagemap(fd, pages.start // PAGE_SIZE, pages.pages))
    finally:
        os.close(fd)
    first = PageRange(pages.start, pages.start + PAGE_SIZE)
    return RangeSet(
        first.shifted(number * PAGE_SIZE)
        for number, word in enumerate(words)
        if word & pagemap.PM_PRESENT and not word & pagemap.PM_MMAP_EXCLUSIVE  # since Linux 4.2
    )


def residency_of(pages: PageRange, page_cache: PageCache | None = None) -> Residency:
    """The residency of addresses, for callers that have no buffer."""
    # A process that gave up root since we asked may not open its own pagemap: the next weaker source has to do.
    with contextlib.suppress(PermissionError):
        if capabilities.PAGEMAP_SCAN.available:
            return _from_scan(pages, page_cache)
        if capabilities.PAGEMAP.available:
            return _from_pagemap(pages, page_cache)
    return _from_mincore(pages, page_cache)


def _from_scan(pages: PageRange, cache: PageCache | None) -> Residency:
    runs: list[Run] = []
    tracked = capabilities.SOFT_DIRTY.available
    every = int(_ALL | PageCategory.FILE | PageCategory.PFNZERO | PageCategory.HUGE | PageCategory.WRITTEN
                | PageCategory.WPALLOWED | PageCategory.SOFT_DIRTY)  # fmt: skip
    if not capabilities.PAGE_IS_GUARD.available:
        every &= ~int(PageCategory.GUARD)
    any_of = every & int(_ALL)
    protected = 0
    for words in _scanner.scan(pages.start, pages.stop, 0, 0, any_of, every):
        for index in range(0, len(words), 3):
            start, stop, categories = words[index], words[index + 1], words[index + 2]
            runs.append(Run(start, stop, _state_of(categories)))
            protected += stop - start if categories & PageCategory.WPALLOWED else 0
    unknown = {}
    # WRITTEN means "not write-protected" to the kernel, which says nothing of memory that nobody protected.
    if not tracked and protected < sum(run.stop - run.start for run in runs):
        unknown[PageState.WRITTEN] = _NO_TRACKING
    if not capabilities.PAGE_IS_GUARD.available:
        unknown[PageState.GUARD] = "PAGE_IS_GUARD needs Linux 6.15"
    return Residency(pages, runs, "pagemap_scan", unknown, cache)


def _state_of(categories: int) -> PageState:
    state = PageState(0)
    if categories & PageCategory.PRESENT:
        state |= PageState.PRESENT
        if not categories & PageCategory.PFNZERO:
            state |= PageState.ALLOCATED
        if categories & PageCategory.FILE:
            state |= PageState.FILE
        if categories & PageCategory.HUGE:
            state |= PageState.HUGE
    if categories & PageCategory.GUARD:
        return state | PageState.GUARD
    if categories & PageCategory.SWAPPED:
        state |= PageState.SWAPPED
    written = categories & PageCategory.WRITTEN and categories & PageCategory.WPALLOWED
    if written or categories & PageCategory.SOFT_DIRTY:
        state |= PageState.WRITTEN
    return state


# --- /proc/self/pagemap and mincore -------------------------------------------------------------------------------------


def _from_pagemap(pages: PageRange, cache: PageCache | None) -> Residency:
    import numpy

    fd = proc.open_proc("/proc/self/pagemap")
    runs: list[Run] = []
    try:
        for part in pages.chunks(256 * MIB):
            entries = numpy.frombuffer(pagemap.read_pagemap(fd, part.start // PAGE_SIZE, part.pages), numpy.uint64)
            states = numpy.zeros(len(entries), numpy.uint8)
            for bit, state in (
                (pagemap.PM_PRESENT, PageState.PRESENT),
                (pagemap.PM_SWAP, PageState.SWAPPED),
                (pagemap.PM_FILE, PageState.FILE),
                (pagemap.PM_SOFT_DIRTY, PageState.WRITTEN if capabilities.SOFT_DIRTY.available else PageState(0)),
                (pagemap.PM_GUARD_REGION, PageState.GUARD),
            ):
                states[(entries & numpy.uint64(bit)) != 0] |= int(state)
            states[(states & int(PageState.GUARD)) != 0] = int(PageState.GUARD)
            runs += _runs(part.start, states)
    finally:
        os.close(fd)
    reason = "it needs PAGEMAP_SCAN (Linux 6.7)"
    unknown: dict[PageState, str] = {
        PageState.ALLOCATED: f"pagemap does not tell the zero page; {reason}",
        PageState.HUGE: reason,
    }
    if not capabilities.SOFT_DIRTY.available:
        unknown[PageState.WRITTEN] = _NO_TRACKING
    if not capabilities.PAGE_IS_GUARD.available:
        unknown[PageState.GUARD] = "the guard bit needs Linux 6.15"
    return Residency(pages, runs, "pagemap", unknown, cache)


def _from_mincore(pages: PageRange, cache: PageCache | None) -> Residency:
    import numpy

    runs: list[Run] = []
    for vma in vmas(pages.start, pages.stop):  # mincore refuses a range with a hole in it
        for part in (pages & PageRange(vma.start, vma.stop)).chunks(256 * MIB):
            resident = numpy.frombuffer(mman.mincore(part.start, part.length), numpy.uint8) & numpy.uint8(1)
            runs += _runs(part.start, resident)  # PRESENT is 1
    reason = "mincore tells only whether a page is in memory, for a file whether it is in the page cache"
    unknown: dict[PageState, str] = {state: reason for state in PageState if state is not PageState.PRESENT}
    return Residency(pages, runs, "mincore", unknown, cache)


def _runs(start: int, states: numpy.typing.NDArray[numpy.uint8]) -> Iterator[Run]:
    """Neighbouring pages of equal state, those of state 0 left out."""
    import numpy

    if not len(states):
        return
    edges = [0, *(numpy.flatnonzero(numpy.diff(states)) + 1).tolist(), len(states)]
    for first, last in pairwise(edges):
        if states[first]:
            yield Run(start + first * PAGE_SIZE, start + last * PAGE_SIZE, PageState(int(states[first])))
