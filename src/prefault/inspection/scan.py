"""The ways to scan for the state of every page of a range.

Three sources, the best one that this kernel has: PAGEMAP_SCAN (Linux 6.7), ``/proc/self/pagemap``, mincore(2). The weaker
ones cannot tell everything, and the answer names what they leave out.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefault._kernel import pagemap
from prefault._kernel.cachestat import PageCache
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities, proc
from prefault.inspection.mincore import resident
from prefault.inspection.page_cache import cached_bytes, page_cache_of
from prefault.inspection.pagemap_scan import categories_of, scan, states_of_categories
from prefault.inspection.result import PageState, Residency, rows_of, translate_states
from prefault.intervals import Intervals
from prefault.memory.borrowing import borrow, other_spans, provided_spans
from prefault.memory.file_verbs import verbs_on
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, PAGE_SIZE, Size

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_PRESENT = int(PageCategory.PRESENT)
_COPY_PENDING = int(PageCategory.PFNZERO | PageCategory.FILE)
_OCCUPIED = int(PageCategory.PRESENT | PageCategory.SWAPPED)
_ANY = int(PageCategory.PRESENT | PageCategory.SWAPPED | PageCategory.GUARD)
_EVERY = _ANY | int(
    PageCategory.FILE
    | PageCategory.PFNZERO
    | PageCategory.HUGE
    | PageCategory.WRITTEN
    | PageCategory.WPALLOWED
    | PageCategory.SOFT_DIRTY
)
_NO_TRACKING = "writes are not tracked here: this kernel has no soft-dirty bits, and the memory is not write-protected"
_READ_AT_ONCE = 256 * MIB
_NEAR = 4 * MIB
"""A gap between scattered pages that is scanned as well: one more scan costs more."""
_NONE = Intervals()


def residency(buffer: Any, *, offset: Size = 0, length: Size | None = None, nodes: bool = False) -> Residency:
    """Return the state of every page that holds a byte of ``buffer``.

    Args:
        buffer: any memory, as for :func:`~prefault.populate`; of a collection all buffers together, each page once. Of
            a path (a ``str`` or a ``pathlib.Path``) the pages of that file that are in the page cache, by byte offsets:
            PRESENT says that reading waits for no disk, and nothing about mappings.
        offset: where to start looking, in bytes from the start of the buffer.
        length: how far; None: to its end.
        nodes: whether to ask for the NUMA node of each page as well, which takes up to a microsecond a page.

    Raises:
        OSError: of a path: it cannot be opened, or is a directory (see :func:`prefault.status`), or the kernel does not tell
            this process.
        TypeError, ValueError: as for :func:`~prefault.populate`.

    The answer is as of the moment of asking: other threads and the kernel go on meanwhile.

    Sources: PAGEMAP_SCAN and pagemap, Documentation/admin-guide/mm/pagemap.rst; mincore(2); move_pages(2).
    """
    found = _residency(buffer, offset, length, nodes)
    if nodes:
        from prefault.inspection.nodes import bytes_by_node, count_bytes, node_of_each_page

        present = Intervals.union_of([found.ranges(PageState.PRESENT).shifted(found.range.start)])
        if found.inspected_bytes == found.range.length:
            found.nodes = node_of_each_page(*found.range, present)
            found.node_bytes = None if found.nodes is None else count_bytes(found.nodes)
        else:
            found.node_bytes = bytes_by_node(present)
    return found


def _residency(buffer: Any, offset: Size, length: Size | None, nodes: bool) -> Residency:
    try:
        memory = borrow(buffer)
    except TypeError as error:
        verbs = verbs_on(buffer)
        if verbs is not None:
            of_file: Residency = verbs.residency(buffer, offset=offset, length=length, nodes=nodes)
            return of_file
        from prefault.memory.borrowed_members import borrowed_collection

        with borrowed_collection(buffer, offset, length, error) as members:
            return residency_of_pages(members.pages)
    with memory:
        span = memory.select(offset, length)
        if memory.strides is not None:
            from prefault.memory.borrowed_members import member_of

            return residency_of_pages(member_of("", memory, Intervals([span])).pages)
        pages = PageRange.outward(span.start, span.stop)
        provided = provided_spans(*pages)
        if not provided:
            found = residency_of(pages, page_cache_of(memory, buffer, pages))
            if found.page_cache is None:
                found.cached_bytes = cached_bytes(pages)
            return found
        # The page cache of memory that is a device's in part is that of the other parts.
        others = other_spans(*pages, provided)
        found = residency_of(pages, None if others else page_cache_of(memory, buffer, pages))
        counts = [count for part in others if (count := cached_bytes(PageRange(*part))) is not None]
        if counts:
            found.cached_bytes = sum(counts)
        return found


def residency_of_pages(pages: Intervals) -> Residency:
    """Return the residency of scattered pages, without what lies between them."""
    import numpy

    parts: list[numpy.typing.NDArray[numpy.int64]] = []
    found = residency_of(PageRange(0, 0))
    unknown: dict[PageState, str] = {}
    for start, stop in pages.bridged(_NEAR) if len(pages) > 1 else pages:
        found = residency_of(PageRange(start, stop))
        unknown |= found.unknown
        for state in numpy.unique(found.rows[:, 2]).tolist():
            rows = found.rows[found.rows[:, 2] == state]
            edges = (Intervals.from_arrays(rows[:, 0], rows[:, 1]) & pages).to_numpy()
            parts.append(numpy.column_stack((edges[::2], edges[1::2], numpy.full(len(edges) // 2, state, numpy.int64))))
    together = numpy.concatenate(parts) if parts else numpy.empty((0, 3), numpy.int64)
    words = array("Q", together[numpy.argsort(together[:, 0])].tobytes())
    result = Residency(PageRange(*pages.span), words, found.source, unknown)
    result.inspected_bytes = pages.length
    return result


def residency_of(pages: PageRange, page_cache: PageCache | None = None) -> Residency:
    """Return the residency of addresses, for callers that have no buffer."""
    # A process that gave up root since the capabilities were asked may not open its own pagemap: the next source has to do.
    with contextlib.suppress(PermissionError):
        if capabilities.PAGEMAP_SCAN.available:
            return _from_scan(pages, page_cache)
        if capabilities.PAGEMAP.available:
            return _from_pagemap(pages, page_cache)
    return _from_mincore(pages, page_cache)


# --- parts of the answer, for callers that need no more


def populated_before(start: int, stop: int, *, write: bool, private: bool) -> Intervals:
    """Return the addresses in ``[start, stop)`` of the pages that need no population.

    For reading, these are the present pages; for writing in private memory, the present pages that are neither the zero page
    nor a page of the file that is still to be copied. Pages shared with a forked child count as populated although the first
    write copies them, and so do pages of a shared file that were only read although the first write makes them dirty: no
    interface tells these apart. Where the kernel has neither PAGEMAP_SCAN nor pagemap, no page is known to be populated.
    """
    try:
        if capabilities.PAGEMAP_SCAN.available:
            inverted = _COPY_PENDING if write and private else 0
            mask = _PRESENT | inverted
            words = scan((start, stop), mask, inverted, 0, mask)
            if len(words) <= 3:
                return Intervals.from_edges(words[:2]) if words else _NONE
            return Intervals.from_ascending(words[::3], words[1::3])
        if capabilities.PAGEMAP.available:
            return Intervals(
                (run.start, run.stop)
                for run in _from_pagemap(PageRange(start, stop), None).runs
                if run.state & PageState.PRESENT and not (write and private and run.state & PageState.FILE)
            )
    except PermissionError:
        pass  # as in residency_of: this process gave up root
    return Intervals()


def populated_among(start: int, stop: int, copied: Sequence[int]) -> Intervals:
    """Return the addresses in a range of several kinds of memory of the pages that need no population, by one scan.

    Args:
        start: address of the first page.
        stop: address after the last one.
        copied: private memory that is to be written, as addresses, start and stop in turn, ascending; all other memory of
            the range is to be read, or shared.
    """
    found = residency_of(PageRange(start, stop))
    if found.source == "mincore":
        return Intervals()
    rows = found.rows
    rows = rows[(rows[:, 2] & int(PageState.PRESENT)) != 0]
    pending = (rows[:, 2] & int(PageState.FILE)) != 0
    if PageState.ALLOCATED not in found.unknown:
        pending |= (rows[:, 2] & int(PageState.ALLOCATED)) == 0
    present = Intervals.from_arrays(rows[:, 0], rows[:, 1])
    settled = Intervals.from_arrays(rows[~pending, 0], rows[~pending, 1])
    written = Intervals.from_edges(copied)
    return settled & written | present - written


def occupied(spans: Sequence[int], *, how: bool = True) -> numpy.typing.NDArray[numpy.int64]:
    """Return the pages that are present or swapped as rows of start, stop and :class:`PageCategory`, in order.

    Args:
        spans: where to look: addresses, start and stop in turn, ascending.
        how: tell apart PRESENT, SWAPPED, PFNZERO and FILE; else only PRESENT and SWAPPED, in fewer rows.

    Where the kernel cannot tell (see :class:`Residency`), PFNZERO is missing; with mincore, all but PRESENT.
    """
    import numpy

    with contextlib.suppress(PermissionError):  # as in residency_of
        if capabilities.PAGEMAP_SCAN.available:
            guard = int(PageCategory.GUARD) if capabilities.PAGE_IS_GUARD.available else 0  # SWAPPED as well
            returned = _OCCUPIED | _COPY_PENDING if how else _OCCUPIED
            return rows_of(scan(spans, guard, guard, _OCCUPIED, returned))
    found: list[numpy.typing.NDArray[numpy.int64]] = []
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        rows = [(run.start, run.stop, categories_of(run.state)) for run in residency_of(PageRange(start, stop)).runs]
        table = numpy.array(rows, numpy.int64).reshape(-1, 3)
        found.append(table[(table[:, 2] & _OCCUPIED) != 0])
    return numpy.concatenate(found) if found else numpy.empty((0, 3), numpy.int64)


def mapped_by_others(pages: PageRange) -> RangeSet:
    """Return the pages that this process maps together with another one (or twice); none where pagemap cannot be read."""
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


# --- the three sources


def _from_scan(pages: PageRange, cache: PageCache | None) -> Residency:
    guard = 0 if capabilities.PAGE_IS_GUARD.available else int(PageCategory.GUARD)
    words = scan(pages, 0, 0, _ANY & ~guard, _EVERY & ~guard)
    unprotected = not all(category & PageCategory.WPALLOWED for category in translate_states(words, states_of_categories()))
    unknown = {}
    # WRITTEN means "not write-protected" to the kernel, which says nothing of memory that was never protected.
    if unprotected and not capabilities.SOFT_DIRTY.available:
        unknown[PageState.WRITTEN] = _NO_TRACKING
    if guard:
        unknown[PageState.GUARD] = "PAGE_IS_GUARD needs Linux 6.15"
    return Residency(pages, words, "pagemap_scan", unknown, cache)


def _from_pagemap(pages: PageRange, cache: PageCache | None) -> Residency:
    import numpy

    words = array("Q")
    with proc.opened_proc("/proc/self/pagemap") as fd:
        for part in pages.chunks(_READ_AT_ONCE):
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
            words += _runs_of(part.start, states)
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


def _runs_of(start: int, states: numpy.typing.NDArray[numpy.uint8]) -> array[int]:
    """Return start, stop and state of neighbouring pages of equal state in turn, those of state 0 left out."""
    import numpy

    bounds = numpy.concatenate(([0], numpy.flatnonzero(numpy.diff(states)) + 1, [len(states)]))
    rows = numpy.empty((len(bounds) - 1, 3), numpy.uint64)
    rows[:, 0], rows[:, 1] = start + bounds[:-1] * PAGE_SIZE, start + bounds[1:] * PAGE_SIZE
    rows[:, 2] = states[bounds[:-1]]
    return array("Q", rows[rows[:, 2] != 0].tobytes())


def _from_mincore(pages: PageRange, cache: PageCache | None) -> Residency:
    words = array("Q")
    for start, stop in resident(pages):
        words.extend((start, stop, int(PageState.PRESENT)))
    reason = "mincore tells only whether a page is in memory, for a file whether it is in the page cache"
    unknown: dict[PageState, str] = {state: reason for state in PageState if state is not PageState.PRESENT}
    return Residency(pages, words, "mincore", unknown, cache)
