"""populate_many and discard_many: vectors of 1024 ranges, all or nothing over all of them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING

from prefault._kernel import mman
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.engine.attempts import ChunkFailure, locate
from prefault.engine.chunking import ChunkSize
from prefault.engine.discarding import DiscardResult, drop
from prefault.engine.methods import Access
from prefault.engine.outcomes import Settlement, failed, interrupted
from prefault.engine.planning import NO_FALLOCATE, Segment, make_plan, without_fallocate
from prefault.engine.populating import HeadroomChoice, PopulateResult
from prefault.engine.rollback import Rollback, holes_before
from prefault.errors import DiscardError, PopulateError
from prefault.inspection.mincore import resident_in
from prefault.inspection.scan import occupied
from prefault.intervals import Intervals
from prefault.limits import MemoryUse, Shortfall
from prefault.limits.admission import AdmissionControl
from prefault.limits.demand import Demand
from prefault.memory.borrowing import Borrowed
from prefault.memory.vma import Backing
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, format_size
from prefault.sparse.advice_vector import AdviceVector, advise
from prefault.sparse.exclusion import BlockGuard
from prefault.sparse.operations import Discarding, Populating

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy import bool_
    from numpy.typing import NDArray

    from prefault.intervals import Numbers

_PIECE = 4 * MIB
_NEAR = 4 * MIB
"""A gap that is scanned as well: one more call costs more than to walk it, page tables full of guards included."""
_STEP = 64 * MIB
_UNDONE_AT_ONCE = 512

_PRESENT, _SWAPPED = int(PageCategory.PRESENT), int(PageCategory.SWAPPED)
_ZERO_PAGE = int(PageCategory.PFNZERO)
_COPY_PENDING = int(PageCategory.PFNZERO | PageCategory.FILE)


def populate_many(
    memory: Borrowed, guard: BlockGuard, blocks: Intervals, access: Access | None, headroom: HeadroomChoice
) -> PopulateResult:
    """Populate the blocks, all or none."""
    began = perf_counter_ns()
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")
    if not blocks:
        return PopulateResult(0, 0, 0.0, access or "write", "none", 1)
    with Populating(guard, blocks):
        return _BatchRun(memory, blocks, access, headroom).run(began)


class _BatchRun:
    """One call at work on blocks that its operation has admitted."""

    def __init__(self, memory: Borrowed, blocks: Intervals, access: Access | None, headroom: HeadroomChoice) -> None:
        # All blocks are parts of one mapping, so what is best for the first is best for all.
        first, stop = blocks.span
        plan = make_plan(memory, access, first, blocks.edges[1] - first, None, 1)
        (segment,) = plan.segments
        method = segment.method
        if segment.backing is not Backing.FILE:
            method = method.without_fallocate  # fallocate first pays for large ranges only (docs/design/sparse.md)
        self._notes = plan.notes
        self._origin = memory.address
        self._pages = blocks.shifted(memory.address)
        self._segment = Segment(
            memory.address + first, memory.address + stop, method, segment.target, segment.backing, segment.reason
        )
        self._vector = AdviceVector(*self._pages.pieces(max(_PIECE, segment.target.page_size)))
        self._at = 0
        self._tried: int | None = None
        self._before = self._kept = Intervals()
        self._inspect()
        self._admission: AdmissionControl | None = None
        if headroom == "check":
            missing = self._pages - self._before - self._resident
            self._admission = AdmissionControl(
                [_Scattered(self._segment.use, self._pages, missing, memory.fd)], memory.address
            )
            self._admission.start()

    # --- before

    def _inspect(self) -> None:
        """Find out the facts that are needed to count the work, and to undo it."""
        segment = self._segment
        rows = occupied(self._pages.bridged(_NEAR).edges)
        populated, swapped = self._populated(rows), (rows[:, 2] & _SWAPPED) != 0
        self._before = _ranges(rows[populated]) & self._pages
        self._kept = _ranges(rows[populated | swapped]) & self._pages
        if not (capabilities.PAGEMAP_SCAN.available or capabilities.PAGEMAP.available):
            raise PopulateError(
                errno.EOPNOTSUPP,
                "all or nothing is not possible here: /proc/self/pagemap cannot be read, so the pages that a call brings"
                " in cannot be told from those before; nothing was populated",
                address=segment.start, offset=segment.start - self._origin,
            )  # fmt: skip
        self._resident = self._file_pages()
        self._holes = holes_before(segment)

    def _populated(self, rows: Numbers) -> NDArray[bool_]:
        """Tell which rows need no population: present, and not still to be copied by a write."""
        populated: NDArray[bool_] = (rows[:, 2] & _PRESENT) != 0
        if self._segment.method.access == "write" and not self._segment.target.shared:
            populated &= (rows[:, 2] & _COPY_PENDING) == 0
        return populated

    def _file_pages(self) -> Intervals:
        """Return the pages of a shared memory file that are in memory already, mapped by this process or not."""
        if not self._segment.target.shared or self._segment.backing is Backing.FILE:
            return Intervals()
        return resident_in([PageRange(*span) for span in self._pages.bridged(_NEAR)])

    # --- work

    def run(self, began: int) -> PopulateResult:
        advice = self._segment.method.advice
        try:
            if advice is not None and capabilities.PROCESS_MADVISE.available:
                self._by_vectors(advice)
            else:
                self._one_by_one()
        except PopulateError:
            raise
        except BaseException as interruption:
            ended = interrupted(interruption, self._origin, self._pages.length, self._settle())
            if ended is interruption:
                raise
            raise ended from None
        whole, present = self._pages.length, self._before.length
        seconds = (perf_counter_ns() - began) / 1e9
        method = self._segment.method  # without fallocate, perhaps, by now
        return PopulateResult(whole - present, present, seconds, method.access, method.name, 1, self._notes)

    def _by_vectors(self, advice: int) -> None:
        vector, pace = self._vector, ChunkSize(on_disk=self._segment.backing is Backing.FILE)
        with own_process() as pidfd:
            while self._at < len(vector):
                stop = vector.stop_of(
                    self._at, pace.size if self._admission is None else min(pace.size, self._admission.largest_chunk)
                )
                pace.start()
                with self._admitted(self._at, stop):
                    try:
                        self._at = vector.advise(pidfd, self._at, stop, advice)
                    except OSError:
                        self._one(self._at)
                        self._at += 1
                pace.finish()

    def _one_by_one(self) -> None:
        while self._at < len(self._vector):
            with self._admitted(self._at, self._at + 1):
                self._one(self._at)
            self._at += 1

    def _one(self, number: int) -> None:
        """Populate one piece, or find the page that cannot be populated."""
        failure = locate(PageRange(*self._vector.span(number, number + 1)), self._segment)
        if failure is None:
            return
        without = None if isinstance(failure.error, Shortfall) else without_fallocate(self._segment, failure.error)
        if without is None:
            raise self._failed(failure)
        self._segment, self._notes = without, (*self._notes, NO_FALLOCATE)
        self._one(number)

    @contextmanager
    def _admitted(self, first: int, stop: int) -> Iterator[None]:
        """Around populating the pieces of these numbers: check the limits again."""
        if self._admission is None:
            yield
            return
        start, end = self._vector.span(first, stop)
        shortfall = self._admission.admit(start, end)
        if shortfall is not None:
            raise self._failed(ChunkFailure(start, self._segment, shortfall))
        try:
            yield
        finally:
            self._admission.release()

    # --- the end

    def _failed(self, failure: ChunkFailure) -> PopulateError:
        self._tried = self._at + 1
        return failed(failure, self._origin, f", in one of {len(self._pages)} ranges", self._settle)

    def _settle(self) -> Settlement:
        """Roll back, and return how many bytes this call brought in, and the pages that are still there.

        Only pages that were tried, lest others lose what they touch; and a few ranges at a time: finding out what to discard
        takes memory, at a moment when there may be none left.
        """
        # After an interruption it is unknown how far into a vector it struck.
        tried = self._at + mman.IOV_MAX if self._tried is None else self._tried
        _, end = self._vector.span(0, min(tried, len(self._vector)))
        begun = self._pages & Intervals([(self._segment.start, end)])
        brought_in, stayed = 0, list[PageRange]()
        for part in begun.batches(_UNDONE_AT_ONCE):
            done = _pages(self._brought_in(part))
            brought_in += done.length
            kept, resident = (_pages(some.window(*part.span)) for some in (self._kept, self._resident))
            stayed += Rollback.knowing(self._segment, kept, resident, self._holes).undo(done, _pages(part))
        return Settlement(brought_in, RangeSet(stayed), rolled_back=True)

    def _brought_in(self, pages: Intervals) -> Intervals:
        """Return the pages of a set that are populated now and were not before."""
        rows = occupied(pages.bridged(_NEAR).edges)
        return (_ranges(rows[self._populated(rows)]) & pages) - self._before.window(*pages.span)


def _ranges(rows: Numbers) -> Intervals:
    return Intervals.from_arrays(rows[:, 0], rows[:, 1])


def _pages(pages: Intervals) -> RangeSet:
    return RangeSet.from_edges(pages.edges)


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
    freed = _allocated(pages)
    with Discarding(guard, blocks):
        how = "MADV_DONTNEED"
        if guard.memory_file is not None:
            how = "FALLOC_FL_PUNCH_HOLE"
            _each(pages, guard.punch)
        elif guard.protection is None:
            how = _drop(pages)
    return DiscardResult(blocks.length, freed, perf_counter() - began, how)


def _allocated(pages: Intervals) -> int | None:
    if not capabilities.PAGEMAP_SCAN.available:
        return None
    rows = occupied(pages.bridged(_NEAR).edges)
    allocated = (rows[:, 2] & (_PRESENT | _ZERO_PAGE)) == _PRESENT
    return (_ranges(rows[allocated]) & pages).length


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
