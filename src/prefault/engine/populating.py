"""populate: plan it, run it in chunks, and say exactly what happened."""

from __future__ import annotations

import errno
import threading
from _thread import start_new_thread
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import perf_counter_ns
from typing import Any, Literal, NamedTuple, TypeAlias

from prefault._kernel.rwlock import Attendance
from prefault.engine.chunking import FIRST_CHUNK, ChunkSize
from prefault.engine.diagnosis import diagnose
from prefault.engine.methods import Access
from prefault.engine.planning import NO_FALLOCATE, Plan, Segment, make_plan, without_fallocate
from prefault.engine.readahead import ReadAhead
from prefault.engine.rollback import Rollback
from prefault.engine.vectors import LONG, can_advise, populate_long, populate_whole
from prefault.errors import OutOfMemoryError, PopulateError, PopulateInterrupted
from prefault.inspection.scan import populated_among, populated_before
from prefault.limits import Shortfall
from prefault.limits.admission import AdmissionControl
from prefault.limits.allowance import allowance
from prefault.limits.demand import demands_of
from prefault.memory.borrowing import Borrowed, PageProvider, borrow
from prefault.memory.vma import Backing
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import Size, format_size

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, in the thread that called populate. What it raises stops the work."""


HeadroomChoice: TypeAlias = Literal["check", "ignore"]
"""Whether the limits are looked at."""


_NO_MEMORY = (
    "Python found no memory for its own objects during the call: free some, or raise RLIMIT_AS or the cgroup's limit"
)


class PopulateResult(NamedTuple):
    """All of the range is populated.

    Attributes:
        bytes: brought in by this call.
        present_bytes: were populated before.
        seconds: the call took.
        access: ``"read"`` or ``"write"``.
        method: the name of the method, or several, joined by commas.
        threads: that worked.
        notes: what is slower, weaker or otherwise worth knowing, each a sentence.
    """

    bytes: int
    present_bytes: int
    seconds: float
    access: Access
    method: str
    threads: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.bytes and not self.present_bytes:
            text = "nothing to populate: the buffer is empty" if self.method == "none" else "nothing was populated"
        elif not self.bytes:
            text = f"{format_size(self.present_bytes)} were populated already ({self.seconds:.2g} s)"
        else:
            how = "writable" if self.access == "write" else "readable"
            workers = f", {self.threads} threads" if self.threads > 1 else ""
            text = (
                f"{format_size(self.bytes)} populated {how} in {self.seconds:.2g} s"
                f" ({_rate(self.bytes, self.seconds)}, {self.method}{workers})"
            )
            if self.present_bytes:
                text += f", {format_size(self.present_bytes)} were populated already"
        return "; ".join((text, *self.notes))


def _rate(count: int, seconds: float) -> str:
    """Return bytes a second for people, in the decimal unit of which there is at least one."""
    rate = count / max(seconds, 1e-9)
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if rate >= 0.95 * size:
            return f"{rate / size:.1f} {unit}/s"
    return f"{rate / 1e3:.1f} kB/s"


def populate(
    buffer: Any,
    *,
    access: Access | None = None,
    offset: Size = 0,
    length: Size | None = None,
    method: str | None = None,
    threads: int | None = None,
    rollback: bool = False,
    progress: Progress | bool = False,
    headroom: HeadroomChoice = "check",
) -> PopulateResult:
    """Make every page of ``buffer`` present, so that touching it faults no more; or fail, and say how far it came.

    It is a command, not a hint: success means all of the range. No byte changes. Memory that cannot be had is an exception,
    never a SIGBUS, and a memory limit is an exception before the OOM killer strikes: see :func:`prefault.headroom`.

    Args:
        buffer: ndarray, mmap, memoryview, bytearray, SharedMemory, tensor, :class:`~prefault.Mapping`, ...: see
            :func:`prefault.memory.borrow`. It is rounded outward to whole pages, which does no harm to the neighbours.
        access: ``"read"``: readable, without breaking copy-on-write, perhaps with the shared zero page and no memory.
            ``"write"``: memory allocated and writable. None: ``"read"`` for what may not be written, for files shared with
            a disk (their holes are allocated as well) and for private mappings of files, which would be copied into
            anonymous memory; else ``"write"``.
        offset: where to start, in bytes from the start of the buffer (``"64 MiB"`` or a number).
        length: how far; None: to its end.
        method: the name of a method of :mod:`prefault.engine.methods`, instead of the best one. For device memory the best
            is ``"device"``, its driver's hook; the others fault it in page by page, and Ctrl-C waits for their chunk.
        threads: how many at once, never more than the CPUs that this process may use; None: as it pays.
        rollback: on failure or Ctrl-C discard the pages that this call brought in. What another thread wrote to just those
            pages meanwhile is lost.
        progress: True draws a bar on stderr; a function is called with the bytes done and in all.
        headroom: ``"check"`` looks at the limits before the start, for the pages that are really missing, and at those of
            memory between chunks; ``"ignore"`` does not: the kernel finds out.

    Returns:
        What was done. Pages that were populated before are not counted as work.

    Raises:
        HeadroomError: a limit leaves less than is needed: nothing was populated; or less than at the start, in the middle.
        PopulateError: one of its subclasses says why, ``offset`` where, ``populated_bytes`` how much there is now.
        PopulateInterrupted: Ctrl-C; also says how much. At most one chunk (some milliseconds) late.
        OSError: this process has no descriptor left, or no /proc is mounted; nothing was populated.
        TypeError, ValueError: not a buffer; closed or released; an offset or length outside; an unknown option.

    Source: madvise(2), MADV_POPULATE_READ and MADV_POPULATE_WRITE (Linux 5.14, commit 4ca9b3859dac, David Hildenbrand).
    """
    began = perf_counter_ns()
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress is True, False or a function, not {type(progress).__name__}")
    memory = borrow(buffer)
    try:
        if memory.page_provider is not None and method in (None, "device"):
            return _have_supplied(memory.page_provider, memory, access, offset, length, rollback, progress, headroom, began)
        if memory.access_guard is None:
            what = make_plan(memory, access, offset, length, method, threads)
            return _carry_out(what, memory, began, rollback, progress, headroom)
        # The gate first: behind it the memory may be mapped otherwise, which the plan must see.
        with memory.access_guard.populating([memory.select(offset, length)]) as (span,):
            what = make_plan(memory, access, span.start - memory.address, span.stop - span.start, method, threads)
            return _carry_out(what, memory, began, True, progress, headroom)
    except MemoryError as error:
        if error.args:
            raise
        raise OutOfMemoryError(errno.ENOMEM, _NO_MEMORY, address=memory.address) from error
    finally:
        memory.release()


def _carry_out(
    what: Plan, memory: Borrowed, began: int, rollback: bool, progress: Progress | bool, headroom: HeadroomChoice,
) -> PopulateResult:  # fmt: skip
    if not what.segments:
        return PopulateResult(0, 0, 0.0, what.access, "none", 1)
    undo = Rollback(what.segments) if rollback else None  # before anything is done
    before = _populated(what.segments)  # needs no population
    is_small = what.length <= FIRST_CHUNK and len(what.segments) == 1
    watch = None
    if headroom == "check" and not (is_small and _surely_fits(what.segments[0], began)):
        watch = AdmissionControl(demands_of([segment.use for segment in what.segments], before, memory.fd), memory.address)
        watch.start()
        if is_small:
            watch = None  # its only chunk has just been looked at
    if progress is False:
        if is_small and undo is None:
            return _run_small(what, memory.address, began, before)
        return _Execution(what, None, memory.address, before, undo, watch).run(began)
    with ExitStack() as stack:
        if callable(progress):
            report = progress
        else:
            from prefault.engine.progress import bar

            report = stack.enter_context(bar("populate"))
        return _Execution(what, report, memory.address, before, undo, watch).run(began)


def _have_supplied(
    provider: PageProvider, memory: Borrowed, access: Access | None, offset: Size, length: Size | None, rollback: bool,
    progress: Progress | bool, headroom: HeadroomChoice, began: int,
) -> PopulateResult:  # fmt: skip
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")
    span = memory.select(offset, length)
    chosen: Access = access or ("read" if memory.readonly else "write")
    if span.start == span.stop:
        return PopulateResult(0, 0, 0.0, chosen, "none", 1)
    with ExitStack() as stack:
        report: Progress | None = progress if callable(progress) else None
        if progress is True:
            from prefault.engine.progress import bar

            report = stack.enter_context(bar("populate"))
        done = provider.populate(
            span, memory.address, chosen, rollback=rollback, progress=report, check_headroom=headroom == "check"
        )
    took = (perf_counter_ns() - began) / 1e9
    return PopulateResult(done.bytes, done.present_bytes, took, chosen, "device", done.threads, done.notes)


def _surely_fits(segment: Segment, now_ns: int) -> bool:
    """Whether the last look at the limits left so much that a small call needs none of its own."""
    # An upper bound for page tables and all. Other memory has limits of its own as well.
    return segment.backing is Backing.ANONYMOUS and allowance.spend(segment.length + segment.length // 256 + 65536, now_ns)


def _run_small(plan: Plan, origin: int, began: int, before: array[int]) -> PopulateResult:
    """One chunk in this thread, without the machinery of :class:`_Execution`, which costs more than populating a page."""
    segment = plan.segments[0]
    start, length = segment.start, segment.stop - segment.start
    if segment.method.hint or segment.backing is Backing.FILE:
        return _Execution(plan, None, origin, before).run(began)
    try:
        failed = _attempt(segment, start, length) is not None
    except BaseException as interruption:
        _Execution(plan, None, origin, before).interrupted(interruption, PageRange(start, segment.stop))
        raise
    if failed:
        return _Execution(plan, None, origin, before).run(began)  # does it again, and finds the page
    present = _length(before)
    took = (perf_counter_ns() - began) / 1e9
    return PopulateResult(length - present, present, took, segment.method.access, segment.method.name, 1, plan.notes)


def _attempt(segment: Segment, start: int, length: int) -> OSError | None:
    """Run the method on a part of its segment; the error, if there is one.

    Without its traceback: that would refer to our frames, they to the error, and so to the buffer: an array of many GiB
    would wait for the garbage collector because populating it failed.
    """
    try:
        segment.method.run(start, length, segment.target)
    except OSError as error:
        return error.with_traceback(None)
    return None


class _ChunkFailure(NamedTuple):
    address: int
    segment: Segment
    error: OSError | Shortfall


class _Execution:
    """One populate call at work. Threads take chunks in order of address from one cursor."""

    def __init__(
        self, plan: Plan, progress: Progress | None, origin: int, before: array[int],
        rollback: Rollback | None = None, watch: AdmissionControl | None = None,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._progress = progress
        self._rollback = rollback
        self._watch = watch
        self._origin = origin
        self._lock = threading.Lock()
        self._index = 0
        self._at = plan.segments[0].start
        self._taken: list[PageRange] = []
        self._done: list[PageRange] = []
        self._open: dict[int, tuple[PageRange, tuple[Segment, ...]]] = {}
        # Few segments are taken one by one, so that nothing above a page that fails is populated.
        methods = {segment.method for segment in plan.segments}
        self._joins_segments = len(plan.segments) >= _MANY_SEGMENTS and all(can_advise(method) for method in methods)
        self._stops = [segment.stop for segment in plan.segments]
        self._done_bytes = 0
        self._failures: list[_ChunkFailure] = []
        self._defect: BaseException | None = None
        self._stop = False
        self._before = before
        self._attendance = Attendance()

    def run(self, began: int) -> PopulateResult:
        ended: PopulateResult | BaseException | None = None
        interruption: BaseException | None = None
        try:
            while ended is None:
                # Again after a further Ctrl-C: it must not stop the undoing of what the first one interrupted.
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
            del ended, interruption  # an exception must not refer to the frame that it refers to: see _attempt

    def _together(self) -> int:
        """Take chunks in this thread and in helpers; how many there were. However it ends, none is at work any more."""
        started = 0
        try:
            for _ in range(self._plan.threads - 1):
                try:
                    # Not threading.Thread: Ctrl-C in its start() or join() leaves it in disorder.
                    start_new_thread(self._help, ())
                except RuntimeError:  # a limit of threads (RLIMIT_NPROC, a pids cgroup), or the interpreter is going down
                    break
                started += 1
            self._work(self._progress)
        except BaseException:
            self._stop = True
            if self._watch is not None:
                self._watch.abandoned = True  # our chunk may be admitted, and helpers wait for its end
            raise
        finally:
            # CPython runs signal handlers only between calls. There is none from the exception to this one, which waits for
            # all helpers at once: nothing can come between. A chunk takes some milliseconds.
            self._attendance.wait()
        return started

    # --- work

    def _help(self) -> None:
        if self._attendance.enter():
            return  # the call is over
        try:
            self._work(None)
        except BaseException as defect:  # noqa: BLE001  raised again in the thread that waits for us
            self._defect = defect
            self._stop = True
        finally:
            self._attendance.leave()

    def _work(self, progress: Progress | None) -> None:
        on_disk = any(segment.backing is Backing.FILE for segment in self._plan.segments)
        pace = ChunkSize(on_disk=on_disk, threads=self._plan.threads)
        ahead = ReadAhead(PageRange(self._plan.segments[0].start, self._plan.segments[-1].stop)) if on_disk else None
        while not self._stop:
            taken = self._next(pace.size)
            if taken is None:
                return
            chunk, segments = taken
            pace.start()
            if ahead is None:
                failure = self._populate(chunk, segments)
            else:
                failure = ahead.run(chunk, partial(self._populate, chunk, segments))
            if failure is not None:
                self._stop = True
                self._failures.append(failure)
                if len(segments) == 1:  # else it stays open: what lies above may be populated as well
                    self._finish(PageRange(chunk.start, failure.address))
                return
            pace.finish()
            self._finish(chunk)
            if progress is not None:
                progress(self._done_bytes, self._plan.length)

    def _populate(self, chunk: PageRange, segments: tuple[Segment, ...]) -> _ChunkFailure | None:
        if self._watch is None:
            return self._populate_chunk(chunk, segments)
        shortage = self._watch.admit(chunk.start, chunk.stop)
        if shortage is not None:
            return _ChunkFailure(chunk.start, segments[0], shortage)
        try:
            return self._populate_chunk(chunk, segments)
        finally:
            self._watch.release()

    def _populate_chunk(self, chunk: PageRange, segments: tuple[Segment, ...]) -> _ChunkFailure | None:
        """Populate a part of one segment, or all of several; the first page that cannot be populated, if there is one."""
        if len(segments) == 1:
            return self._populate_part(chunk, segments[0])
        if populate_whole(segments):
            return None
        for segment in segments:
            failure = self._populate_part(PageRange(segment.start, segment.stop), segment)
            if failure is not None:
                return failure
        return None

    def _populate_part(self, part: PageRange, segment: Segment) -> _ChunkFailure | None:
        if part.length > LONG and can_advise(segment.method) and populate_long(segment, *part):
            return None
        if _attempt(segment, part.start, part.length) is None:
            return None
        failure = locate(part, segment)
        if failure is None or isinstance(failure.error, Shortfall):
            return failure
        without = without_fallocate(segment, failure.error)
        if without is None:
            return failure
        with self._lock:
            segments = tuple(without if other is segment else other for other in self._plan.segments)
            notes = tuple(dict.fromkeys((*self._plan.notes, NO_FALLOCATE)))
            self._plan = self._plan._replace(segments=segments, notes=notes)
        return self._populate_part(part, without)

    def _next(self, size: int) -> tuple[PageRange, tuple[Segment, ...]] | None:
        """The next chunk: several whole segments, or a part of one, cut at a multiple of ``size`` to split no huge page."""
        with self._lock:
            segments = self._plan.segments
            if self._at == segments[self._index].stop:
                if self._index + 1 == len(segments):
                    return None
                self._index += 1
                self._at = segments[self._index].start
            segment = segments[self._index]
            if self._watch is not None:
                size = min(size, self._watch.largest_chunk)
            size = max(size, segment.target.page_size)
            end, last = self._at - self._at % size + size, self._index + 1
            if self._joins_segments and self._at == segment.start and segment.stop < end:
                last = max(last, min(self._index + _SEGMENTS_AT_ONCE, bisect_right(self._stops, end, self._index)))
            chunk = PageRange(self._at, min(self._stops[last - 1], end))
            taken = segments[self._index : last]
            self._at, self._index = chunk.stop, last - 1
            self._open[threading.get_ident()] = chunk, taken
            self._taken.append(chunk)
            return chunk, taken

    def _finish(self, done: PageRange) -> None:
        with self._lock:
            del self._open[threading.get_ident()]
            self._done.append(done)
            self._done_bytes += done.length

    # --- the end

    def _end(self, began: int, helpers: int) -> PopulateResult | PopulateError:
        if self._defect is not None:
            raise self._defect
        if self._failures:
            return self._failed(min(self._failures, key=lambda failure: failure.address))
        if self._progress is not None:
            self._progress(self._done_bytes, self._plan.length)  # others may have finished after us
        return self._result(began, 1 + helpers)

    def _result(self, began: int, threads: int) -> PopulateResult:
        plan = self._plan
        present = _length(self._before)
        # A hint is taken for all segments.
        after = _length(_populated(plan.segments)) if plan.segments[0].method.hint else plan.length
        new = max(0, after - present)
        return PopulateResult(new, present, (perf_counter_ns() - began) / 1e9, plan.access, plan.method, threads, plan.notes)

    def _failed(self, failure: _ChunkFailure) -> PopulateError:
        """The exception for the lowest page that failed."""
        segment, error = failure.segment, failure.error
        # By what is there now, so before anything is discarded.
        cause = (
            error if isinstance(error, Shortfall) else diagnose(failure.address, segment.method, error, segment.target.fd)
        )
        brought_in, kept = self._settle()
        offset = failure.address - self._origin
        where = f"offset {offset} ({failure.address:#x}) of {format_size(self._plan.length)}"
        # Other threads may have populated some of it behind the page that failed.
        done = f"{format_size(brought_in.length)} populated in all{self._and_undone(kept)}"
        if isinstance(cause, Shortfall):
            message = f"stopped at {where}: for the next part {cause.sentence}; {done}"
            return cause.error(message, address=failure.address, offset=offset, populated=kept)
        result = cause.error(
            cause.errno, f"cannot populate the page at {where}: {cause.sentence}; {done}",
            address=failure.address, offset=offset, populated=kept,
        )  # fmt: skip
        result.__cause__ = failure.error if isinstance(failure.error, OSError) else None
        return result

    def interrupted(self, interruption: BaseException, caught: PageRange) -> None:
        """Raise PopulateInterrupted for Ctrl-C, else add a note; ``caught`` is a chunk that was under way elsewhere."""
        self._open[0] = caught, self._plan.segments[:1]
        stopped = self._stopped(interruption)
        try:
            if stopped is not interruption:
                raise stopped from None
        finally:
            del stopped

    def _stopped(self, interruption: BaseException) -> BaseException:
        """PopulateInterrupted for Ctrl-C; another exception gets a note."""
        brought_in, kept = self._settle()
        text = f"{format_size(brought_in.length)} of {format_size(self._plan.length)} populated{self._and_undone(kept)}"
        if isinstance(interruption, KeyboardInterrupt):
            return PopulateInterrupted(f"interrupted: {text}", kept)
        if isinstance(interruption, MemoryError) and not interruption.args:
            failure = OutOfMemoryError(errno.ENOMEM, f"{_NO_MEMORY}; {text}", address=self._origin, populated=kept)
            failure.__cause__ = interruption.with_traceback(None)
            return failure
        interruption.add_note(f"populate was stopped: {text}")
        return interruption

    def _and_undone(self, kept: RangeSet) -> str:
        if self._rollback is None:
            return ""
        if not kept:
            return ", and discarded again"
        return (
            f", and discarded again but for {format_size(kept.length)}, which cannot be taken back (locked or sealed memory,"
            " a file without a descriptor to punch holes with, the rest of a huge page)"
        )

    def _settle(self) -> tuple[RangeSet, RangeSet]:
        """What this call brought in, and what of that is still there. No thread is at work any more."""
        before = RangeSet(_ranges(self._before))
        # Chunks that an interruption caught before they were booked: look what has become of them.
        caught = (_populated(segments, chunk) for chunk, segments in self._open.values())
        done = RangeSet([*self._done, *(item for pairs in caught for item in _ranges(pairs))])
        brought_in = done - before
        if self._rollback is None:
            return brought_in, brought_in
        return brought_in, self._rollback.undo(brought_in, RangeSet(self._taken))


_MANY_SEGMENTS = 64
_SEGMENTS_AT_ONCE = 1024


def _populated(segments: tuple[Segment, ...], part: PageRange | None = None) -> array[int]:
    """What of the segments (or of a part of them) needs no population: addresses, start and stop in turn."""
    start, stop = (segments[0].start, segments[-1].stop) if part is None else part
    if len(segments) == 1:
        return populated_before(start, stop, write=_writes(segments[0]), private=not segments[0].target.shared)
    copied = (item for item in segments if _writes(item) and not item.target.shared)
    return populated_among(start, stop, [edge for item in copied for edge in item[:2]])


def _writes(segment: Segment) -> bool:
    return segment.method.access == "write"


def _ranges(pairs: array[int]) -> Iterator[PageRange]:
    for index in range(0, len(pairs), 2):
        yield PageRange(pairs[index], pairs[index + 1])


def _length(pairs: array[int]) -> int:
    return sum(pairs[1::2]) - sum(pairs[::2])


def locate(chunk: PageRange, segment: Segment) -> _ChunkFailure | None:
    """The first page of a chunk that cannot be populated; None where by now all of it can be.

    Methods go from the first page on and may be run again on what is populated, so halving finds the page in at most some
    30 calls, whichever method it is; everything before the page is populated then.
    """
    low, step = chunk.start, segment.target.page_size
    length = chunk.length
    while low < chunk.stop:
        error = _attempt(segment, low, length)
        if error is None:
            low, length = low + length, chunk.stop - low - length
        elif length == step:
            return _ChunkFailure(low, segment, error)
        else:
            length = max(step, length // 2 // step * step)
    return None
