"""What is present: the state of every page of a range, asked of the kernel.

Three sources, the best one that this kernel has: PAGEMAP_SCAN (Linux 6.7), ``/proc/self/pagemap``, mincore(2). The weaker
ones cannot tell everything, and the answer says what.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import os
import threading
from array import array
from collections.abc import Sequence
from ctypes import sizeof
from typing import TYPE_CHECKING, Any, NamedTuple

from prefault._kernel import mman, pagemap
from prefault._kernel.cachestat import PageCache, cachestat
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities, proc
from prefault._system.kept_files import KeptFile
from prefault.intervals import common, merged, union, without
from prefault.memory.borrowing import Borrowed, borrow
from prefault.memory.vma import Backing, Vma, any_descriptor, vmas
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import GIB, MIB, PAGE_SIZE, Size, format_size

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


class PageRun(NamedTuple):
    """Neighbouring pages of the same state: addresses ``[start, stop)``."""

    start: int
    stop: int
    state: PageState


_PAGE_STATES = tuple(PageState(value) for value in range(2 * PageState.GUARD))


class Residency:
    """The pages of a range at one moment.

    Attributes:
        range: the whole pages that were looked at, as addresses.
        runs: neighbouring pages of the same state; pages of which nothing is to be said are left out. Made when first asked
            for.
        source: ``"pagemap_scan"``, ``"pagemap"`` or ``"mincore"``.
        unknown: the states that this source cannot tell for this memory, each with the reason.
        page_cache: pages of the file behind it in the page cache (in base pages), where the memory is a Mapping with a
            file and the kernel has cachestat (Linux 6.5); else None.
        cached_bytes: bytes of the files behind it that are in the page cache, mapped here or not; None where there is no
            file, or the kernel does not tell this process.
    """

    def __init__(
        self, pages: PageRange, words: array[int], source: str, unknown: dict[PageState, str],
        page_cache: PageCache | None = None,
    ) -> None:  # fmt: skip
        """``words`` holds the start, stop and state of each run in turn: an object for each is made when it is asked for."""
        self.range = pages
        self.source = source
        self.unknown = unknown
        self.page_cache = page_cache
        self.cached_bytes = None if page_cache is None else page_cache.cached * PAGE_SIZE
        self._words = words

    @functools.cached_property
    def runs(self) -> list[PageRun]:
        """Neighbouring pages of the same state, in order of address."""
        words, make = self._words, tuple.__new__
        rows = zip(words[::3], words[1::3], map(_PAGE_STATES.__getitem__, words[2::3]), strict=True)
        return [make(PageRun, row) for row in rows]

    @functools.cached_property
    def _bytes_by_state(self) -> dict[int, int]:
        """Bytes of the pages of each state, of which there are few."""
        words = self._words
        found: dict[int, int] = {}
        if len(words) >= 3 * _MANY:
            lengths, states = _rows(words)[:, 1] - _rows(words)[:, 0], _rows(words)[:, 2]
            return {state: int(lengths[states == state].sum()) for state in _distinct(states)}
        for start, stop, state in zip(words[::3], words[1::3], words[2::3], strict=True):
            found[state] = found.get(state, 0) + stop - start
        return found

    def bytes_in(self, state: PageState) -> int:
        """Bytes of the pages that have every flag of ``state``. ValueError where the source cannot tell."""
        self._require(state)
        wanted = int(state)
        return sum(count for flags, count in self._bytes_by_state.items() if flags & wanted == wanted)

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
        base, wanted, words = self.range.start, int(state), self._words
        if len(words) >= 3 * _MANY:
            rows = _rows(words)
            rows = rows[rows[:, 2] & wanted == wanted] - base
            return RangeSet.from_edges(merged(rows[:, 0], rows[:, 1]).tolist())
        return RangeSet(
            PageRange(start - base, stop - base)
            for start, stop, flags in zip(words[::3], words[1::3], words[2::3], strict=True)
            if flags & wanted == wanted
        )  # fmt: skip

    def pages(self) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
        """One :class:`PageState` a base page, in order: shape ``(range.pages,)``, dtype uint8."""
        import numpy

        rows = _rows(self._words)
        first, last = ((rows[:, column] - self.range.start) // PAGE_SIZE for column in (0, 1))
        states = rows[:, 2].astype(numpy.uint8)
        # By how much the state changes from page to page, modulo 256. No run begins, or ends, where another one does.
        changes = numpy.zeros(self.range.pages + 1, numpy.uint8)
        changes[first] += states
        changes[last] -= states
        return numpy.cumsum(changes[:-1], dtype=numpy.uint8)

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


_MANY = 1024
"""For so many runs importing numpy pays."""


def _rows(words: array[int]) -> numpy.typing.NDArray[numpy.int64]:
    """View words as rows of three: start, stop, and state or categories. They cannot grow while the view lives."""
    import numpy

    return numpy.frombuffer(words, numpy.int64).reshape(-1, 3)


def _distinct(flags: numpy.typing.NDArray[numpy.int64]) -> list[int]:
    """Return the values of a column of states or categories: small numbers."""
    import numpy

    values: list[int] = numpy.flatnonzero(numpy.bincount(flags)).tolist()
    return values


def _to_states(words: array[int]) -> set[int]:
    """Replace the categories in rows of words by page states; return the categories that there were."""
    states = _state_of_categories()
    if len(words) >= 3 * _MANY:
        import numpy

        column = _rows(words)[:, 2]
        found = set(_distinct(column))
        column[:] = numpy.array(states, numpy.int64)[column]
        return found
    categories = words[2::3]
    words[2::3] = array("Q", map(states.__getitem__, categories))
    return set(categories)


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
        if found.page_cache is None and memory.page_provider is None:
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
_QUICK_SCAN = 4 * MIB  # some 10 us: less than to take the GIL again
_SCAN_STEP = GIB  # a call that walks this much takes at most some 10 ms, so Ctrl-C is not kept waiting
_ALL = PageCategory.PRESENT | PageCategory.SWAPPED | PageCategory.GUARD
_PRESENT = int(PageCategory.PRESENT)
_COPY_PENDING = int(PageCategory.PFNZERO | PageCategory.FILE)
_NO_TRACKING = "nobody tracks writes here: this kernel has no soft-dirty bits, and the memory is not write-protected"

_pagemap_file = KeptFile("/proc/self/pagemap")


class _Scanner(threading.local):
    """The argument and the result vector of PAGEMAP_SCAN, one a thread, made once."""

    def __init__(self) -> None:
        self.busy = False
        self.regions = array("Q", bytes(_REGIONS * sizeof(pagemap.PageRegion)))
        self.argument = pagemap.PmScanArg(
            size=sizeof(pagemap.PmScanArg), vec=self.regions.buffer_info()[0], vec_len=_REGIONS
        )  # fmt: skip

    def scan(self, spans: Sequence[int], mask: int, inverted: int, any_of: int, returned: int) -> array[int]:
        """Scan spans of addresses (start and stop in turn), and return the regions that match.

        Returns:
            64-bit words: start, stop, categories, start, ... in order of address.
        """
        if self.busy:
            # A signal handler, or a finalizer, in the middle of a scan of this very thread.
            return _Scanner().scan(spans, mask, inverted, any_of, returned)
        words = array("Q")
        self.busy = True
        try:
            argument, regions, ioctl = self.argument, self.regions, _pagemap_file.ioctl
            argument.category_mask, argument.category_inverted = mask, inverted
            argument.category_anyof_mask, argument.return_mask = any_of, returned
            for first, stop in zip(spans[::2], spans[1::2], strict=True):
                start = int(first)
                while start < stop:
                    argument.start, argument.end = start, min(int(stop), start + _SCAN_STEP)
                    try:
                        count = ioctl(pagemap.PAGEMAP_SCAN, argument, quick=stop - start <= _QUICK_SCAN)
                    except OSError as error:
                        if error.errno != errno.EFAULT:
                            raise
                        return words  # beyond the end of user space, where nobody has pages
                    if count:
                        words += regions[: 3 * count]
                    # Not argument.walk_end: with more than 512 regions, the size of the kernel's own buffer, it may be where
                    # that was full for the last time and not where the walk ended (seen on 6.18), and regions would come
                    # twice.
                    start = argument.end if count < _REGIONS else regions[3 * count - 2]
        finally:
            self.busy = False
        return words


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
            words = _scanner.scan((start, stop), mask, inverted, 0, mask)
            found = array("Q", bytes(len(words) // 3 * 16))
            found[::2], found[1::2] = words[::3], words[1::3]
        elif capabilities.PAGEMAP.available:
            for run in _from_pagemap(PageRange(start, stop), None).runs:
                if run.state & PageState.PRESENT and not (write and private and run.state & PageState.FILE):
                    found.append(run.start)
                    found.append(run.stop)
    except PermissionError:
        found = array("Q")  # as in residency_of: this process gave up root
    return found


def populated_among(start: int, stop: int, copied: Sequence[int]) -> array[int]:
    """As :func:`populated_before`, of memory of both kinds, by one scan.

    Args:
        start: address of the first page.
        stop: address after the last one.
        copied: private memory that is to be written, as addresses, start and stop in turn, ascending; all other memory of
            the range is to be read, or shared.
    """
    import numpy

    found = residency_of(PageRange(start, stop))
    if found.source == "mincore":
        return array("Q")
    rows = _rows(found._words)
    rows = rows[(rows[:, 2] & int(PageState.PRESENT)) != 0]
    pending = (rows[:, 2] & int(PageState.FILE)) != 0
    if PageState.ALLOCATED not in found.unknown:
        pending |= (rows[:, 2] & int(PageState.ALLOCATED)) == 0
    present, settled = merged(rows[:, 0], rows[:, 1]), merged(rows[~pending, 0], rows[~pending, 1])
    written = numpy.array(copied, numpy.int64)
    return array("Q", union(common(settled, written), without(present, written)).tobytes())


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
            words = _scanner.scan(spans, guard, guard, _OCCUPIED, returned)
            return _rows(words)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        rows = [(run.start, run.stop, _category_of(run.state)) for run in residency_of(PageRange(start, stop)).runs]
        table = numpy.array(rows, numpy.int64).reshape(-1, 3)
        found.append(table[(table[:, 2] & _OCCUPIED) != 0])
    return numpy.concatenate(found) if found else numpy.empty((0, 3), numpy.int64)


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
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(proc.opened_proc("/proc/self/pagemap"))
        except OSError:
            return RangeSet()
        words = array("Q", pagemap.read_pagemap(fd, pages.start // PAGE_SIZE, pages.pages))
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
    tracked = capabilities.SOFT_DIRTY.available
    every = int(_ALL | PageCategory.FILE | PageCategory.PFNZERO | PageCategory.HUGE | PageCategory.WRITTEN
                | PageCategory.WPALLOWED | PageCategory.SOFT_DIRTY)  # fmt: skip
    if not capabilities.PAGE_IS_GUARD.available:
        every &= ~int(PageCategory.GUARD)
    any_of = every & int(_ALL)
    words = _scanner.scan(pages, 0, 0, any_of, every)
    unprotected = not all(category & PageCategory.WPALLOWED for category in _to_states(words))
    unknown = {}
    # WRITTEN means "not write-protected" to the kernel, which says nothing of memory that nobody protected.
    if not tracked and unprotected:
        unknown[PageState.WRITTEN] = _NO_TRACKING
    if not capabilities.PAGE_IS_GUARD.available:
        unknown[PageState.GUARD] = "PAGE_IS_GUARD needs Linux 6.15"
    return Residency(pages, words, "pagemap_scan", unknown, cache)


@functools.cache
def _state_of_categories() -> tuple[int, ...]:
    """The state for every number that PAGEMAP_SCAN can tell as categories."""
    return tuple(int(_state_of(categories)) for categories in range(2 * PageCategory.GUARD))


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

    words = array("Q")
    with proc.opened_proc("/proc/self/pagemap") as fd:
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
            words += _words(part.start, states)
    reason = "it needs PAGEMAP_SCAN (Linux 6.7)"
    unknown: dict[PageState, str] = {
        PageState.ALLOCATED: f"pagemap does not tell the zero page; {reason}",
        PageState.HUGE: reason,
    }
    if not capabilities.SOFT_DIRTY.available:
        unknown[PageState.WRITTEN] = _NO_TRACKING
    if not capabilities.PAGE_IS_GUARD.available:
        unknown[PageState.GUARD] = "the guard bit needs Linux 6.15"
    return Residency(pages, words, "pagemap", unknown, cache)


def _from_mincore(pages: PageRange, cache: PageCache | None) -> Residency:
    import numpy

    words = array("Q")
    for vma in vmas(pages.start, pages.stop):  # mincore refuses a range with a hole in it
        for part in (pages & PageRange(vma.start, vma.stop)).chunks(256 * MIB):
            resident = numpy.frombuffer(mman.mincore(part.start, part.length), numpy.uint8) & numpy.uint8(1)
            words += _words(part.start, resident)  # PRESENT is 1
    reason = "mincore tells only whether a page is in memory, for a file whether it is in the page cache"
    unknown: dict[PageState, str] = {state: reason for state in PageState if state is not PageState.PRESENT}
    return Residency(pages, words, "mincore", unknown, cache)


def _words(start: int, states: numpy.typing.NDArray[numpy.uint8]) -> array[int]:
    """Return start, stop and state of neighbouring pages of equal state in turn, those of state 0 left out."""
    import numpy

    if not len(states):
        return array("Q")
    edges = numpy.concatenate(([0], numpy.flatnonzero(numpy.diff(states)) + 1, [len(states)]))
    rows = numpy.empty((len(edges) - 1, 3), numpy.uint64)
    rows[:, 0], rows[:, 1] = start + edges[:-1] * PAGE_SIZE, start + edges[1:] * PAGE_SIZE
    rows[:, 2] = states[edges[:-1]]
    return array("Q", rows[rows[:, 2] != 0].tobytes())
