"""Execution of a populate call: threads take chunks in order of address; the end is settled once none is at work."""

from __future__ import annotations

import signal
import threading
from _thread import start_new_thread
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter_ns
from types import FrameType
from typing import TYPE_CHECKING

from prefault._kernel.rwlock import Attendance
from prefault.engine.attempts import ChunkFailure, locate
from prefault.engine.chunk_queue import Chunk, ChunkQueue
from prefault.engine.chunking import ChunkSize
from prefault.engine.outcomes import PopulateResult, Settlement, evicted, failed, interrupted
from prefault.engine.planning import Segment, without_fallocate
from prefault.engine.populated_pages import populated_pages
from prefault.engine.progress import Progress
from prefault.engine.rate import RateLimit
from prefault.engine.readahead import ReadAhead
from prefault.engine.rollback import Rollback
from prefault.errors import PopulateError
from prefault.inspection.scan import residency_of
from prefault.intervals import Intervals
from prefault.limits.admission import AdmissionControl
from prefault.limits.limit import Shortfall
from prefault.memory.vma import Backing
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import format_size

if TYPE_CHECKING:
    from prefault.memory.huge_advice import HugeAdvice


class Execution:
    """One populate call at work.

    Args:
        queue: the chunks of the plan.
        origin: the address that offsets in errors are counted from.
        before: the pages that are populated already.
        progress: called after each chunk of the calling thread.
        rollback: undoes the call if it fails; None leaves what it brought in.
        admission: checks the limits before each chunk; None does not.
        rate: limit of bytes a second; None: as fast as possible.
        huge: advises huge pages chunk by chunk; None does not.
    """

    def __init__(
        self, queue: ChunkQueue, origin: int, before: Intervals, progress: Progress | None = None,
        rollback: Rollback | None = None, admission: AdmissionControl | None = None, rate: RateLimit | None = None,
        huge: HugeAdvice | None = None,
    ) -> None:  # fmt: skip
        self._queue = queue
        self._threads = queue.plan.threads
        self._origin = origin
        self._before = before
        self._progress = progress
        self._rollback = rollback
        self._admission = admission
        self._rate = rate
        self._huge = huge
        self.is_part = False
        """True if other executions belong to the call, which looks at the pages of all at its end."""
        self._failures: list[ChunkFailure] = []
        self._defect: BaseException | None = None
        self._stop = False
        self._stopped_waiting = threading.Event() if rate is not None else None
        self._settlement: Settlement | None = None
        self._attendance = Attendance()

    @property
    def length(self) -> int:
        """Bytes to populate."""
        return self._queue.length

    def run(self, began: int, interruption: BaseException | None = None) -> PopulateResult:
        """Populate all chunks; ``began`` is when the call began, by :func:`time.perf_counter_ns`.

        With ``interruption``, which ended the call elsewhere, only settle the end.

        Raises:
            PopulateError, PopulateInterrupted: it failed, or was interrupted, and was rolled back if that was asked for.
        """
        ended: PopulateResult | BaseException | None = None
        try:
            while ended is None:
                # Again after a further exception, which must not stop the rollback of what the first one interrupted.
                try:
                    ended = self._end(began, self._together()) if interruption is None else self._stopped(interruption)
                except KeyboardInterrupt as ctrl_c:
                    if interruption is None:
                        interruption = ctrl_c
                except BaseException as error:
                    if interruption is not None:
                        raise
                    interruption = error
            if isinstance(ended, PopulateResult):
                return ended
            raise ended
        finally:
            del ended, interruption  # an exception must not refer to the frame that it refers to: see attempt()

    # --- threads

    def _together(self) -> int:
        """Take chunks in this thread and in helpers; return how many there were. However it ends, none is at work then."""
        started = 0
        try:
            for _ in range(self._threads - 1):
                try:
                    # Not threading.Thread: Ctrl-C in its start() or join() leaves it in disorder.
                    start_new_thread(self._help, ())
                except RuntimeError:  # a limit of threads (RLIMIT_NPROC, a pids cgroup), or the interpreter is going down
                    break
                started += 1
            self._work(self._progress)
        except BaseException:
            self._stop_others()
            if self._admission is not None:
                self._admission.abandoned = True  # this thread's chunk may be admitted, and helpers wait for its end
            raise
        finally:
            # CPython runs signal handlers only between calls. There is none from the exception to this one, which waits for
            # all helpers at once: nothing can come between. A chunk takes some milliseconds.
            self._attendance.wait()
        return started

    def _help(self) -> None:
        if self._attendance.enter():
            return  # the call is over
        try:
            self._work(None)
        except BaseException as defect:  # noqa: BLE001  raised again in the thread that waits for the helpers
            self._defect = defect
            self._stop_others()
        finally:
            self._attendance.leave()

    def _work(self, progress: Progress | None) -> None:
        """Populate one chunk after the other, until there is no further one or a chunk failed."""
        segments = self._queue.plan.segments
        on_disk = any(segment.backing is Backing.FILE for segment in segments)
        pace = ChunkSize(on_disk=on_disk, threads=self._threads, vectors=self._queue.by_vectors)
        ahead = ReadAhead(PageRange(segments[0].start, segments[-1].stop)) if on_disk else None
        while not self._stop:
            size = pace.size if self._admission is None else min(pace.size, self._admission.largest_chunk)
            size = size if self._rate is None else min(size, self._rate.chunk_bytes)
            chunk = self._queue.take(size if self._huge is None else max(size, self._huge.chunk_bytes))
            if chunk is None:
                return
            if self._rate is not None and not self._may_go_on(self._rate, chunk):
                return
            pace.start()
            populate = partial(self._populate, chunk)
            failure = populate() if ahead is None else ahead.run(chunk.pages, populate)
            if failure is not None:
                self._stop_others()
                self._failures.append(failure)
                self._queue.finish(chunk, failure.address)
                return
            pace.finish()
            self._queue.finish(chunk)
            if progress is not None:
                progress(self._queue.done_bytes, self._queue.length)

    def _may_go_on(self, rate: RateLimit, chunk: Chunk) -> bool:
        """Wait until the missing pages of a chunk are due; return whether nothing has stopped the call meanwhile."""
        rate.wait(chunk.length - self._before.clipped(*chunk.pages).length, self._stopped_waiting)
        return not self._stop

    def _stop_others(self) -> None:
        self._stop = True
        if self._stopped_waiting is not None:
            self._stopped_waiting.set()

    # --- one chunk

    def _populate(self, chunk: Chunk) -> ChunkFailure | None:
        """Populate a chunk if the limits admit it; return the first page that cannot be populated, if there is one."""
        if self._admission is None:
            return self._populate_chunk(chunk)
        shortfall = self._admission.admit(*chunk.pages)
        if shortfall is not None:
            return ChunkFailure(chunk.pages.start, self._queue.plan.segments[0], shortfall)
        try:
            return self._populate_chunk(chunk)
        finally:
            self._admission.release()

    def _populate_chunk(self, chunk: Chunk) -> ChunkFailure | None:
        if self._huge is None:
            return self._populate_pages(chunk)
        return self._huge.run(chunk.pages, partial(self._populate_pages, chunk))

    def _populate_pages(self, chunk: Chunk) -> ChunkFailure | None:
        if chunk.populate_at_once():
            return None
        return next(filter(None, (self._populate_part(*part) for part in chunk.parts())), None)

    def _populate_part(self, part: PageRange, segment: Segment) -> ChunkFailure | None:
        failure = locate(part, segment)
        if failure is None or isinstance(failure.error, Shortfall):
            return failure
        without = without_fallocate(segment, failure.error)
        if without is None:
            return failure
        self._queue.replace(segment, without)
        return self._populate_part(part, without)

    # --- the end

    def _end(self, began: int, helpers: int) -> PopulateResult | PopulateError:
        if self._defect is not None:
            raise self._defect
        if self._failures:
            lowest = min(self._failures, key=lambda failure: failure.address)
            return failed(lowest, *self._queue.place_of(lowest.address, self._origin), self.settle)
        if self._progress is not None:
            self._progress(self._queue.done_bytes, self._queue.length)  # other threads may have finished later
        eviction = None if self._admission is None or self.is_part else self._admission.look_again()
        if eviction is not None:
            return evicted(eviction, *self._queue.place_of(eviction.pages.span[0], self._origin), self.settle())
        plan = self._queue.plan
        present = self._before.length
        # A hint is taken for all segments.
        hint = plan.segments[0].method.hint
        after = populated_pages(plan.segments).length if hint else self._queue.length
        seconds = (perf_counter_ns() - began) / 1e9
        notes = plan.notes if 1 + helpers == self._threads else (*plan.notes, _too_few(1 + helpers, self._threads))
        if self._huge is not None:
            notes += (*_in_huge_pages(plan.segments), *self._huge.notes)
        return PopulateResult(max(0, after - present), present, seconds, plan.access, plan.method, 1 + helpers, notes)

    def _stopped(self, interruption: BaseException) -> BaseException:
        return interrupted(interruption, self._origin, self._queue.length, self.settle())

    def settle(self) -> Settlement:
        """Return what the call brought in, rolled back if that was asked for, once. No thread is at work any more."""
        deferring_ctrl_c(self._roll_back)
        assert self._settlement is not None
        return self._settlement

    def _roll_back(self) -> None:
        if self._settlement is not None:
            return
        brought_in_bytes, kept = 0, list[RangeSet]()
        for tried, populated in self._queue.tried():
            brought_in = populated - self._before.window(*tried.span)
            brought_in_bytes += brought_in.length
            kept.append(brought_in if self._rollback is None else self._rollback.undo(brought_in, tried))
        self._settlement = Settlement(brought_in_bytes, RangeSet.union_of(kept), rolled_back=self._rollback is not None)


def _too_few(threads: int, planned: int) -> str:
    """Return the note for threads that the system refused to start."""
    return f"{threads} of {planned} threads: the system starts no more (RLIMIT_NPROC, or pids.max of a cgroup)"


def _in_huge_pages(segments: Sequence[Segment]) -> Iterator[str]:
    """Yield a note about the memory that huge entries map now, where the kernel tells that."""
    huge = residency_of(PageRange(segments[0].start, segments[-1].stop)).huge_bytes
    if huge is not None:
        yield f"{format_size(huge)} in huge pages"


def deferring_ctrl_c(work: Callable[[], None]) -> None:
    """Call ``work``, and raise KeyboardInterrupt for Ctrl-C meanwhile only when that is done.

    Not by pthread_sigmask: the kernel gives a signal that this thread blocks to another thread, and Python then runs its
    handler in this one all the same.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _defer):
        work()  # no Ctrl-C here, or a handler of the program's own
        return
    _deferred.clear()
    try:
        signal.signal(signal.SIGINT, _defer)
        work()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _deferred:
            raise KeyboardInterrupt


_deferred: list[int] = []


def _defer(number: int, frame: FrameType | None) -> None:
    """Note Ctrl-C within :func:`deferring_ctrl_c`; if another exception kept that from its end, do so instead."""
    at = frame
    while at is not None:
        if at.f_code is deferring_ctrl_c.__code__:
            _deferred.append(number)
            return
        at = at.f_back
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.default_int_handler(number, frame)
