"""populate_many and discard_many: vectors of 1024 ranges, all or nothing over all of them."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING

from prefault._kernel import mman
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.engine.chunk_queue import Chunk, ChunkQueue
from prefault.engine.chunking import FIRST_CHUNK
from prefault.engine.discarding import DiscardResult, drop
from prefault.engine.execution import Execution
from prefault.engine.methods import Access
from prefault.engine.parts import KernelPart, Part, ProgressOfParts, device_parts, run_parts
from prefault.engine.planning import Plan, Segment, plan_span
from prefault.engine.populated_pages import scattered_pages_before
from prefault.engine.populating import HeadroomChoice, PopulateResult, access_to, admit
from prefault.engine.progress import Progress, check_progress, reporting
from prefault.engine.rate import RateLimit
from prefault.engine.rollback import Rollback, is_memory_file
from prefault.errors import DiscardError
from prefault.inspection.mincore import resident_in
from prefault.inspection.scan import occupied
from prefault.intervals import Intervals
from prefault.limits.admission import AdmissionControl
from prefault.limits.demand import Demand
from prefault.limits.memory_use import MemoryUse
from prefault.memory.borrowing import Borrowed, ProvidedSpan, Span, provided_spans
from prefault.memory.vma import Backing
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, format_size
from prefault.sparse.advice_vector import AdviceVector, advise
from prefault.sparse.exclusion import BlockGuard
from prefault.sparse.operations import DiscardingMany, Populating

if TYPE_CHECKING:
    from collections.abc import Callable

_PIECE = 4 * MIB
_NEAR = 4 * MIB
"""A gap that is scanned as well: one more call costs more than to walk it, page tables full of guards included."""
_STEP = 64 * MIB
_UNDONE_AT_ONCE = 512

_PRESENT, _ZERO_PAGE = int(PageCategory.PRESENT), int(PageCategory.PFNZERO)


def populate_many(
    memory: Borrowed, guard: BlockGuard, blocks: Intervals, access: Access | None, headroom: HeadroomChoice,
    progress: Progress | bool = False, rate: RateLimit | None = None,
) -> PopulateResult:  # fmt: skip
    """Populate the blocks, all or none."""
    began = perf_counter_ns()
    check_progress(progress)
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")
    if not blocks:
        return PopulateResult(0, 0, 0.0, access or "write", "none", 1)
    with Populating(guard, blocks) as operation, reporting(progress, "populate") as report:
        pages = blocks.shifted(memory.address)
        provided = provided_spans(*pages.span)
        if not provided:
            return _prepare(memory, operation, pages, access, headroom, report, rate).run(began)
        progresses = ProgressOfParts(report, pages.length)
        parts: list[Part] = []
        kernel = pages - _pages_of(provided)
        if kernel:
            told = progresses.of_next(kernel.length)
            parts.append(KernelPart(_prepare(memory, operation, kernel, access, headroom, told, rate)))
        else:
            admit(None, None, operation)
        for start, stop, page_provider in provided:
            if mine := pages.clipped(start, stop):
                parts += device_parts(
                    page_provider, mine, memory.address, access_to(page_provider, memory, access),
                    rollback=True, progresses=progresses, rate=rate, check_headroom=headroom == "check",
                )  # fmt: skip
        return run_parts(parts, memory.address, began)


def _pages_of(provided: Iterable[ProvidedSpan]) -> Intervals:
    return Intervals((start, stop) for start, stop, _ in provided)


def _prepare(
    memory: Borrowed, operation: Populating, pages: Intervals, access: Access | None, headroom: HeadroomChoice,
    progress: Progress | None, rate: RateLimit | None,
) -> Execution:  # fmt: skip
    """Return the execution for pages that the kernel populates; all blocks of the operation are charged and unprotected."""
    # All pages are parts of one mapping, so what is best for the first is best for all.
    start, stop = pages.span
    plan = plan_span(memory, Span(start, pages.edges[1]), access, None, 1)
    (segment,) = plan.segments
    if segment.backing is not Backing.FILE:
        # fallocate first pays for large ranges only (docs/design/sparse.md)
        segment = segment._replace(method=segment.method.without_fallocate)
    segment = segment._replace(start=start, stop=stop)
    before, kept = scattered_pages_before(segment, pages, _NEAR)
    resident = _resident_pages(segment, pages)
    admission = None
    if headroom == "check":
        missing = pages - before - resident if segment.target.shared else pages - before
        demand = _Scattered(segment.use._replace(guarded=True), pages, missing, memory.fd)
        admission = AdmissionControl([demand], memory.address)
    kept -= admit(segment, admission, operation)
    rollback = Rollback((segment,), kept, resident)
    queue = _RowQueue(plan._replace(segments=(segment,)), pages)
    if queue.vector.stop_of(0, FIRST_CHUNK) == len(queue.vector):
        admission = None  # its only chunk has just been looked at
    return Execution(queue, memory.address, before, progress, rollback, admission, rate)


def _resident_pages(segment: Segment, pages: Intervals) -> Intervals:
    """Return the pages among some of a segment that are in memory already if it is a memory file's; see ``file_pages``."""
    if not is_memory_file(segment):
        return Intervals()
    return resident_in([PageRange(*span) for span in pages.bridged(_NEAR)])


class _Rows(Chunk):
    """Rows of a vector, from number ``first`` to the one before ``stop``."""

    def __init__(self, queue: _RowQueue, first: int, stop: int) -> None:
        self.pages = PageRange(*queue.vector.span(first, stop))
        self._length = int(queue.vector.lengths[first:stop].sum())
        self._queue = queue
        self._first = first
        self._stop = stop

    @property
    def length(self) -> int:
        """See :class:`~prefault.engine.chunk_queue.Chunk`: without what lies between the rows."""
        return self._length

    def populate_at_once(self) -> bool:
        """See :class:`~prefault.engine.chunk_queue.Chunk`."""
        advice = self._queue.plan.segments[0].method.advice
        if advice is None or not capabilities.PROCESS_MADVISE.available:
            return False
        with contextlib.suppress(OSError), own_process() as pidfd:
            self._first = self._queue.vector.advise(pidfd, self._first, self._stop, advice)
        return self._first == self._stop

    def parts(self) -> Iterator[tuple[PageRange, Segment]]:
        """See :class:`~prefault.engine.chunk_queue.Chunk`: the rows that are not populated yet."""
        for number in range(self._first, self._stop):
            yield PageRange(*self._queue.vector.span(number, number + 1)), self._queue.plan.segments[0]


class _RowQueue(ChunkQueue):
    """Hands out many ranges of one segment as rows of a vector, without an object for each of them."""

    def __init__(self, plan: Plan, pages: Intervals) -> None:
        super().__init__(plan, pages.length, f", in one of {len(pages)} ranges")
        self._pages = pages
        self.vector = AdviceVector(*pages.pieces(max(_PIECE, plan.segments[0].target.page_size)))
        self._at = 0

    def take(self, size: int) -> _Rows | None:
        """See :class:`~prefault.engine.chunk_queue.ChunkQueue`."""
        first = self._at
        if first == len(self.vector):
            return None
        self._at = self.vector.stop_of(first, size)
        return _Rows(self, first, self._at)

    def finish(self, chunk: Chunk, failed: int | None = None) -> None:
        """See :class:`~prefault.engine.chunk_queue.ChunkQueue`."""
        if failed is None:
            self.done_bytes += chunk.length
        if failed is not None:
            self._at = int(self.vector.starts.searchsorted(failed, side="right"))  # what lies above was not tried

    def tried(self) -> Iterator[tuple[RangeSet, RangeSet]]:
        """See :class:`~prefault.engine.chunk_queue.ChunkQueue`. The page tables tell which are populated.

        Only pages that were tried, lest others lose what they touch; and a few ranges at a time: finding out what to discard
        takes memory, at a moment when there may be none left.
        """
        if not self._at:
            return
        (segment,) = self.plan.segments
        tried = self._pages & Intervals([self.vector.span(0, self._at)])
        for part in tried.batches(_UNDONE_AT_ONCE):
            populated, _ = scattered_pages_before(segment, part, _NEAR)
            yield RangeSet.from_edges(part.edges), RangeSet.from_edges(populated.edges)


class _Scattered(Demand):
    """The demand of ranges scattered in one segment, whose missing pages are known."""

    def __init__(self, use: MemoryUse, pages: Intervals, missing: Intervals, fd: int | None) -> None:
        # A full disk is an error and kills no process; the part of a file's holes that lies in the ranges is not counted.
        super().__init__(use._replace(allocates=False), missing, fd, pages)

    def memory(self, start: int, stop: int) -> int:
        takes = self.use.copies or self.use.fills_shmem
        return self.missing_bytes(start, stop) if takes else super().memory(start, stop)

    def unallocated(self, start: int, stop: int) -> int:
        return self.missing_bytes(start, stop)


def discard_many(memory: Borrowed, guard: BlockGuard, blocks: Intervals) -> DiscardResult:
    """Discard the blocks."""
    began = perf_counter()
    if not blocks:
        return DiscardResult(0, 0, 0.0, "none")
    pages = blocks.shifted(memory.address)
    provided = provided_spans(*pages.span)
    kernel = pages - _pages_of(provided)
    freed = _allocated(kernel) if kernel else 0
    used: list[str] = []
    operation = DiscardingMany(guard, blocks, punches=bool(provided))
    with operation:
        at = 0
        try:
            for start, stop, page_provider in provided:
                for at, end in pages.clipped(start, stop):
                    supplied_bytes = page_provider.discard(Span(at, end))[1]
                    freed = None if freed is None else freed + supplied_bytes
                    used[:] = ["device"]
        except BaseException:
            operation.refused = (pages - kernel).clipped(at, pages.span[1]).shifted(-memory.address)
            raise
        if kernel:
            used.append(_discard_kernel(kernel, guard))
    return DiscardResult(blocks.length, freed, perf_counter() - began, ", ".join(used))


def _discard_kernel(pages: Intervals, guard: BlockGuard) -> str:
    """Discard pages of the kernel whose blocks are protected, if they ever are; return the name of the method."""
    if guard.memory_file is not None:
        return _each(pages, guard.punch)
    return _drop(pages) if guard.protection is None else "MADV_DONTNEED"


def _allocated(pages: Intervals) -> int | None:
    if not capabilities.PAGEMAP_SCAN.available:
        return None
    rows = occupied(pages.bridged(_NEAR).edges)
    allocated = (rows[:, 2] & (_PRESENT | _ZERO_PAGE)) == _PRESENT
    return (Intervals.from_arrays(rows[allocated, 0], rows[allocated, 1]) & pages).length


def _drop(pages: Intervals) -> str:
    try:
        advise(pages, mman.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Locked memory: there is another advice for it, or an error that says where.
        return _each(pages, drop)
    return "MADV_DONTNEED"


def _each(pages: Intervals, discard_one: Callable[[int, int], str]) -> str:
    """Discard range by range, long ones in steps; return the name of the method of the last one."""
    how = ""
    starts, lengths = pages.pieces(_STEP)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        try:
            how = discard_one(start, length)
        except OSError as error:
            raise DiscardError(
                error.errno or 0,
                f"cannot discard {format_size(length)} at {start:#x}: {error.strerror}"
                " (memory that is locked must be unlocked first)",
                address=start,
            ) from error
    return how
