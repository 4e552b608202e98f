"""Populating and discarding many ranges at once: vectors of 1024 ranges, and all or nothing over all of them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING, Any

from prefault._kernel import mman
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.engine.chunking import ChunkSize
from prefault.engine.diagnosis import diagnose
from prefault.engine.discarding import DiscardResult, drop
from prefault.engine.methods import Access
from prefault.engine.planning import NO_FALLOCATE, Segment, make_plan, without_fallocate
from prefault.engine.populating import HeadroomChoice, PopulateResult, locate
from prefault.engine.rollback import Rollback, holes_before
from prefault.errors import DiscardError, PopulateError, PopulateInterrupted
from prefault.inspection.scan import occupied
from prefault.limits import MemoryUse, Shortfall
from prefault.limits.admission import AdmissionControl
from prefault.limits.demand import ScatteredDemand
from prefault.memory.borrowing import Borrowed
from prefault.memory.vma import Backing
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, format_size
from prefault.sparse import range_arguments as sets
from prefault.sparse.advice_vector import AdviceVector, advise
from prefault.sparse.operations import Discarding, Populating, SparseAccessGuard

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefault.sparse.range_arguments import Numbers

_PIECE = 4 * MIB
_NEAR = 4 * MIB
"""A gap that is looked at as well: a call more costs more than to walk it, page tables full of guards included."""
_STEP = 64 * MIB
_TAKEN_BACK_AT_ONCE = 512

_PRESENT, _SWAPPED = int(PageCategory.PRESENT), int(PageCategory.SWAPPED)
_COPY_PENDING = int(PageCategory.PFNZERO | PageCategory.FILE)


def populate_many(
    memory: Borrowed, gate: SparseAccessGuard, blocks: Numbers, access: Access | None, headroom: HeadroomChoice
) -> PopulateResult:
    """Populate the blocks, given as edges, all or none."""
    began = perf_counter_ns()
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")
    if not len(blocks):
        return PopulateResult(0, 0, 0.0, access or "write", "none", 1)
    with Populating(gate, blocks):
        return _BatchRun(memory, blocks, access, headroom).run(began)


class _BatchRun:
    """One call at work on blocks that the gate has let through."""

    def __init__(self, memory: Borrowed, blocks: Numbers, access: Access | None, headroom: HeadroomChoice) -> None:
        # All blocks are parts of one mapping, so what is best for the first is best for all.
        first, stop = int(blocks[0]), int(blocks[-1])
        plan = make_plan(memory, access, first, int(blocks[1]) - first, None, 1)
        (segment,) = plan.segments
        method = segment.method
        if segment.backing is not Backing.FILE:
            method = method.without_fallocate  # fallocate first pays for large ranges only (docs/design/sparse.md)
        self._notes = plan.notes
        self._origin = memory.address
        self._pages = blocks + memory.address
        self._segment = Segment(
            memory.address + first, memory.address + stop, method, segment.target, segment.backing, segment.reason
        )
        starts, lengths = sets.pieces(self._pages, max(_PIECE, segment.target.page_size))
        self._vector = AdviceVector(starts, lengths)
        self._at = 0
        self._tried: int | None = None
        self._before = self._kept = self._pages[:0]
        self._look()
        self._watch: AdmissionControl | None = None
        if headroom == "check":
            missing = sets.without(sets.without(self._pages, self._before), self._resident)
            self._watch = AdmissionControl([_Scattered(self._segment.use, self._pages, missing, memory.fd)], memory.address)
            self._watch.start()

    # --- before

    def _look(self) -> None:
        """Find out what has to be known in order to count the work, and to undo it."""
        segment = self._segment
        rows = occupied(sets.bridged(self._pages, _NEAR))
        category = rows[:, 2]
        present, swapped = (category & _PRESENT) != 0, (category & _SWAPPED) != 0
        if segment.method.access == "write" and not segment.target.shared:
            present &= (category & _COPY_PENDING) == 0
        self._before = self._within(rows[present])
        self._kept = self._within(rows[present | swapped])
        self._known = capabilities.PAGEMAP_SCAN.available or capabilities.PAGEMAP.available
        if not self._known:
            raise PopulateError(
                errno.EOPNOTSUPP,
                "all or nothing is not possible here: /proc/self/pagemap cannot be read, so the pages that a call brings"
                " in cannot be told from those before; nothing was populated",
                address=segment.start, offset=segment.start - self._origin,
            )  # fmt: skip
        self._resident = self._file_pages()
        self._holes = holes_before(segment)

    def _within(self, rows: Any) -> Numbers:
        return sets.common(sets.merged(rows[:, 0], rows[:, 1]), self._pages)

    def _file_pages(self) -> Numbers:
        """Of shared memory the pages of our blocks that are in memory already, mapped by this process or not."""
        import numpy

        segment = self._segment
        if not segment.target.shared or segment.backing is Backing.FILE:
            return self._pages[:0]
        spans = sets.bridged(self._pages, _NEAR)
        every = numpy.concatenate([
            sets.incore(part.start, mman.mincore(part.start, part.length))
            for start, stop in zip(spans[::2], spans[1::2], strict=True)
            for part in PageRange(start, stop).chunks(256 * MIB)
        ])  # fmt: skip
        return sets.merged(every[::2], every[1::2])

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
            brought_in, kept = self._settle()
            text = f"{format_size(brought_in)} of {format_size(sets.total(self._pages))} populated{_undone(kept)}"
            if isinstance(interruption, KeyboardInterrupt):
                raise PopulateInterrupted(f"interrupted: {text}", kept) from None
            interruption.add_note(f"populate_many was stopped: {text}")
            raise
        whole, present = sets.total(self._pages), sets.total(self._before)
        seconds = (perf_counter_ns() - began) / 1e9
        method = self._segment.method  # without fallocate, perhaps, by now
        return PopulateResult(whole - present, present, seconds, method.access, method.name, 1, self._notes)

    def _by_vectors(self, advice: int) -> None:
        vector, pace = self._vector, ChunkSize(on_disk=self._segment.backing is Backing.FILE)
        with own_process() as pidfd:
            while self._at < len(vector):
                stop = vector.stop_of(
                    self._at, pace.size if self._watch is None else min(pace.size, self._watch.largest_chunk)
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
            raise self._failed(failure.address, failure.error)
        self._segment, self._notes = without, (*self._notes, NO_FALLOCATE)
        self._one(number)

    @contextmanager
    def _admitted(self, first: int, stop: int) -> Iterator[None]:
        """Around populating pieces of these numbers: the limits are looked at again."""
        if self._watch is None:
            yield
            return
        start, end = self._vector.span(first, stop)
        shortage = self._watch.admit(start, end)
        if shortage is not None:
            raise self._failed(start, shortage)
        try:
            yield
        finally:
            self._watch.release()

    # --- the end

    def _failed(self, address: int, error: OSError | Shortfall) -> PopulateError:
        # By what is there now, so before anything is discarded.
        segment = self._segment
        self._tried = self._at + 1
        cause = error if isinstance(error, Shortfall) else diagnose(address, segment.method, error, segment.target.fd)
        brought_in, kept = self._settle()
        offset = address - self._origin
        where = f"offset {offset} ({address:#x}), in one of {len(self._pages) // 2} ranges"
        done = f"before that {format_size(brought_in)} populated{_undone(kept)}"
        if isinstance(cause, Shortfall):
            message = f"stopped at {where}: for the next part {cause.sentence}; {done}"
            return cause.error(message, address=address, offset=offset, populated=kept)
        result = cause.error(
            cause.errno, f"cannot populate the page at {where}: {cause.sentence}; {done}",
            address=address, offset=offset, populated=kept,
        )  # fmt: skip
        result.__cause__ = error if isinstance(error, OSError) else None
        return result

    def _settle(self) -> tuple[int, RangeSet]:
        """How many bytes this call brought in, and what of that is still there.

        Only what was tried, lest others lose what they touch; and a few ranges at a time: it takes memory to find out what
        is to be discarded, at a moment when there may be none left.
        """
        # Of an interruption nobody knows how far into a vector it struck.
        tried = self._at + mman.IOV_MAX if self._tried is None else self._tried
        _, end = self._vector.span(0, min(tried, len(self._vector)))
        begun = sets.window(self._pages, self._segment.start, end)
        brought_in, stayed = 0, list[PageRange]()
        for at in range(0, len(begun), 2 * _TAKEN_BACK_AT_ONCE):
            part = begun[at : at + 2 * _TAKEN_BACK_AT_ONCE]
            if part[-1] > end:  # it was cut into pieces
                part = part.copy()
                part[-1] = end
            done = sets.as_set(self._brought_in(part))
            brought_in += done.length
            kept, resident = (sets.as_set(sets.window(some, part[0], part[-1])) for some in (self._kept, self._resident))
            stayed += Rollback.knowing(self._segment, kept, resident, self._holes).undo(done, sets.as_set(part))
        return brought_in, RangeSet(stayed)

    def _brought_in(self, pages: Numbers) -> Numbers:
        """What of these pages is there now and was not before."""
        rows = occupied(sets.bridged(pages, _NEAR))
        present = (rows[:, 2] & _PRESENT) != 0
        if self._segment.method.access == "write" and not self._segment.target.shared:
            present &= (rows[:, 2] & _COPY_PENDING) == 0
        there = sets.common(sets.merged(rows[present, 0], rows[present, 1]), pages)
        return sets.without(there, sets.window(self._before, pages[0], pages[-1]))


class _Scattered(ScatteredDemand):
    """What ranges take that lie scattered in one segment, of which it is known what is missing."""

    def __init__(self, use: MemoryUse, pages: Numbers, missing: Numbers, fd: int | None) -> None:
        # That a disk is full is an error and kills nobody; how much of a file's holes lies in the ranges is not counted.
        super().__init__(use._replace(allocates=False), pages, missing, fd)

    def memory(self, start: int, stop: int) -> int:
        takes = self.use.copies or self.use.fills_shmem
        return self.missing_bytes(start, stop) if takes else super().memory(start, stop)

    def unallocated(self, start: int, stop: int) -> int:
        return self.missing_bytes(start, stop)


def _undone(kept: RangeSet) -> str:
    return f", and discarded again but for {format_size(kept.length)}" if kept else ", and discarded again"


def discard_many(memory: Borrowed, gate: SparseAccessGuard, blocks: Numbers) -> DiscardResult:
    """Discard the blocks, given as edges."""
    began = perf_counter()
    if not len(blocks):
        return DiscardResult(0, 0, 0.0, "none")
    pages = blocks + memory.address
    freed = _allocated(pages)
    with Discarding(gate, blocks):
        how = "MADV_DONTNEED"
        if gate.memory_file is not None:
            how = "FALLOC_FL_PUNCH_HOLE"
            _each(pages, gate.punch)
        elif gate.fence is None:
            how = _drop(pages)
    return DiscardResult(sets.total(blocks), freed, perf_counter() - began, how)


def _allocated(pages: Numbers) -> int | None:
    if not capabilities.PAGEMAP_SCAN.available:
        return None
    rows = occupied(sets.bridged(pages, _NEAR))
    there = ((rows[:, 2] & _PRESENT) != 0) & ((rows[:, 2] & int(PageCategory.PFNZERO)) == 0)
    return sets.total(sets.common(sets.merged(rows[there, 0], rows[there, 1]), pages))


def _drop(pages: Numbers) -> str:
    try:
        advise(0, pages, mman.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Locked memory: there is another advice for it, or an error that says where.
        return _each(pages, drop)
    return "MADV_DONTNEED"


def _each(pages: Numbers, give_back: Callable[[int, int], str]) -> str:
    """Range by range, those that are long in steps; what gave back the last one."""
    how = ""
    starts, lengths = sets.pieces(pages, _STEP)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        try:
            how = give_back(start, length)
        except OSError as error:
            raise DiscardError(
                error.errno or 0,
                f"cannot discard {format_size(length)} at {start:#x}: {error.strerror}"
                " (memory that is locked must be unlocked first)",
                address=start,
            ) from error
    return how
