"""populate: plan it, run it in chunks, and say exactly what happened."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import perf_counter_ns
from typing import Any, NamedTuple, TypeAlias

from prefault.diagnose import diagnose
from prefault.errors import PopulateError, PopulateInterrupted
from prefault.memory import borrow
from prefault.methods import Access
from prefault.pace import FIRST_CHUNK, Pace
from prefault.plan import Plan, Segment, make_plan, only_possible_fallocates
from prefault.ranges import PageRange, RangeSet
from prefault.residency import populated_before
from prefault.rollback import Rollback
from prefault.sizes import Size, format_size
from prefault.vma import Backing

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, in the thread that called populate. What it raises stops the work."""


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
            rate = self.bytes / self.seconds / 1e9
            workers = f", {self.threads} threads" if self.threads > 1 else ""
            text = (
                f"{format_size(self.bytes)} populated {how} in {self.seconds:.2g} s"
                f" ({rate:.1f} GB/s, {self.method}{workers})"
            )
            if self.present_bytes:
                text += f", {format_size(self.present_bytes)} were populated already"
        return "; ".join((text, *self.notes))


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
) -> PopulateResult:
    """Make every page of ``buffer`` present, so that touching it faults no more; or fail, and say how far it came.

    It is a command, not a hint: success means all of the range. No byte changes. Memory that cannot be had is an exception,
    never a SIGBUS. (The OOM killer can still strike: memory limits are not looked at yet.)

    Args:
        buffer: ndarray, mmap, memoryview, bytearray, SharedMemory, tensor, :class:`~prefault.Mapping`, ...: see
            :func:`prefault.memory.borrow`. It is rounded outward to whole pages, which does no harm to the neighbours.
        access: ``"read"``: readable, without breaking copy-on-write, perhaps with the shared zero page and no memory.
            ``"write"``: memory allocated and writable. None: ``"read"`` for what may not be written and for files shared
            with a disk (their holes are allocated as well), else ``"write"``.
        offset: where to start, in bytes from the start of the buffer (``"64 MiB"`` or a number).
        length: how far; None: to its end.
        method: the name of a method of :mod:`prefault.methods`, instead of the best one.
        threads: how many at once, never more than the CPUs that this process may use; None: as it pays.
        rollback: on failure or Ctrl-C discard the pages that this call brought in. What another thread wrote to just those
            pages meanwhile is lost.
        progress: True draws a bar on stderr; a function is called with the bytes done and in all.

    Returns:
        What was done. Pages that were populated before are not counted as work.

    Raises:
        PopulateError: one of its subclasses says why, ``offset`` where, ``populated_bytes`` how much there is now.
        PopulateInterrupted: Ctrl-C; also says how much. At most one chunk (some milliseconds) late.
        TypeError, ValueError: not a buffer; closed or released; an offset or length outside; an unknown option.

    Source: madvise(2), MADV_POPULATE_READ and MADV_POPULATE_WRITE (Linux 5.14, commit 4ca9b3859dac, David Hildenbrand).
    """
    began = perf_counter_ns()
    memory = borrow(buffer)
    try:
        what = make_plan(memory, access, offset, length, method, threads)
        if not what.segments:
            return PopulateResult(0, 0, 0.0, access or "write", "none", 1)
        undo = Rollback(what.segments) if rollback else None  # before anything is done
        if method is None and (len(what.segments) > 1 or what.segments[0].target.fd is not None):
            what = only_possible_fallocates(what)
        if progress is False:
            if what.length <= FIRST_CHUNK and len(what.segments) == 1 and undo is None:
                return _run_small(what, memory.address, began)
            return _Run(what, None, memory.address, undo).run(began)
        with ExitStack() as stack:
            if callable(progress):
                report = progress
            else:
                from prefault.progress import bar

                report = stack.enter_context(bar("populate"))
            return _Run(what, report, memory.address, undo).run(began)
    finally:
        memory.release()


def _run_small(plan: Plan, origin: int, began: int) -> PopulateResult:
    """One chunk in this thread, without the machinery of :class:`_Run`, which costs more than populating a page."""
    segment = plan.segments[0]
    start, length = segment.start, segment.stop - segment.start
    before = _populated(segment, start, segment.stop)
    if segment.method.hint:
        return _Run(plan, None, origin, before=[before]).run(began)
    try:
        failed = _attempt(segment, start, length) is not None
    except BaseException as interruption:
        _Run(plan, None, origin, before=[before]).interrupted(interruption, PageRange(start, segment.stop))
        raise
    if failed:
        return _Run(plan, None, origin, before=[before]).run(began)  # does it again, and finds the page
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


class _Failure(NamedTuple):
    address: int
    segment: Segment
    error: OSError


class _Run:
    """One populate call at work. Threads take chunks in order of address from one cursor."""

    def __init__(
        self, plan: Plan, progress: Progress | None, origin: int, rollback: Rollback | None = None, *,
        before: list[array[int]] | None = None,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._progress = progress
        self._rollback = rollback
        self._origin = origin
        self._lock = threading.Lock()
        self._index = 0
        self._at = plan.segments[0].start
        self._taken: list[PageRange] = []
        self._done: list[PageRange] = []
        self._open: dict[int, tuple[PageRange, Segment]] = {}
        self._done_bytes = 0
        self._failures: list[_Failure] = []
        self._defect: BaseException | None = None
        self._stop = False
        # What needed no population, segment by segment; looked up before anything is done.
        self._before = before or [_populated(segment, segment.start, segment.stop) for segment in plan.segments]

    def run(self, began: int) -> PopulateResult:
        helpers = [
            threading.Thread(target=self._help, name="prefault-populate", daemon=True) for _ in range(self._plan.threads - 1)
        ]
        try:
            for helper in helpers:
                try:
                    helper.start()
                except RuntimeError:  # a limit of threads (RLIMIT_NPROC, a pids cgroup), or the interpreter is going down
                    break
            self._work(self._progress)
            for helper in helpers:
                if helper.ident is not None:
                    helper.join()
            if self._defect is not None:
                raise self._defect
            if self._progress is not None and not self._failures:
                self._progress(self._done_bytes, self._plan.length)  # others may have finished after us
        except BaseException as interruption:
            self._stop = True
            _wait_for(helpers)
            self.interrupted(interruption)
            raise
        if self._failures:
            raise self._failed(min(self._failures, key=lambda failure: failure.address))
        return self._result(began, 1 + sum(helper.ident is not None for helper in helpers))

    # --- work

    def _help(self) -> None:
        try:
            self._work(None)
        except BaseException as defect:  # noqa: BLE001  raised again in the thread that waits for us
            self._defect = defect
            self._stop = True

    def _work(self, progress: Progress | None) -> None:
        pace = Pace(on_disk=any(segment.backing is Backing.FILE for segment in self._plan.segments))
        while not self._stop:
            taken = self._next(pace.size)
            if taken is None:
                return
            chunk, segment = taken
            pace.start()
            if _attempt(segment, chunk.start, chunk.length) is not None:
                failure = _locate(chunk, segment)
                if failure is not None:
                    self._stop = True
                    self._failures.append(failure)
                    self._finish(PageRange(chunk.start, failure.address))
                    return
            pace.finish()
            self._finish(chunk)
            if progress is not None:
                progress(self._done_bytes, self._plan.length)

    def _next(self, size: int) -> tuple[PageRange, Segment] | None:
        """The next chunk, cut at a multiple of ``size`` so that no huge page is split."""
        with self._lock:
            segments = self._plan.segments
            if self._at == segments[self._index].stop:
                if self._index + 1 == len(segments):
                    return None
                self._index += 1
                self._at = segments[self._index].start
            segment = segments[self._index]
            size = max(size, segment.target.page_size)
            chunk = PageRange(self._at, min(segment.stop, self._at - self._at % size + size))
            self._at = chunk.stop
            self._open[threading.get_ident()] = chunk, segment
            self._taken.append(chunk)
            return chunk, segment

    def _finish(self, done: PageRange) -> None:
        with self._lock:
            del self._open[threading.get_ident()]
            self._done.append(done)
            self._done_bytes += done.length

    # --- the end

    def _result(self, began: int, threads: int) -> PopulateResult:
        plan = self._plan
        present = 0
        new = 0
        for segment, before in zip(plan.segments, self._before, strict=True):
            there = _length(before)
            after = _length(_populated(segment, segment.start, segment.stop)) if segment.method.hint else segment.length
            present += there
            new += max(0, after - there)
        return PopulateResult(new, present, (perf_counter_ns() - began) / 1e9, plan.access, plan.method, threads, plan.notes)

    def _failed(self, failure: _Failure) -> PopulateError:
        """The exception for the lowest page that failed."""
        segment = failure.segment
        cause = diagnose(failure.address, segment.method, failure.error, segment.target.fd)
        brought_in, kept = self._settle()
        offset = failure.address - self._origin
        done = f"{format_size(brought_in.length)} populated{self._and_undone(kept)}"
        error = cause.error(
            cause.errno,
            f"cannot populate the page at offset {offset} ({failure.address:#x}) of {format_size(self._plan.length)}:"
            f" {cause.sentence}; before that {done}",
            address=failure.address,
            offset=offset,
            populated=kept,
        )
        error.__cause__ = failure.error
        return error

    def interrupted(self, interruption: BaseException, caught: PageRange | None = None) -> None:
        """Raise PopulateInterrupted for Ctrl-C, else add a note; ``caught`` is a chunk that was under way elsewhere."""
        if caught is not None:
            self._open[0] = caught, self._plan.segments[0]
        brought_in, kept = self._settle()
        text = f"{format_size(brought_in.length)} of {format_size(self._plan.length)} populated{self._and_undone(kept)}"
        if isinstance(interruption, KeyboardInterrupt):
            raise PopulateInterrupted(f"interrupted: {text}", kept) from None
        interruption.add_note(f"populate was stopped: {text}")

    def _and_undone(self, kept: RangeSet) -> str:
        if self._rollback is None:
            return ""
        return f", and discarded again but for {format_size(kept.length)}" if kept else ", and discarded again"

    def _settle(self) -> tuple[RangeSet, RangeSet]:
        """What this call brought in, and what of that is still there. No thread is at work any more."""
        before = RangeSet(item for pairs in self._before for item in _ranges(pairs))
        # Chunks that an interruption caught before they were booked: look what has become of them.
        caught = (_populated(segment, chunk.start, chunk.stop) for chunk, segment in self._open.values())
        done = RangeSet([*self._done, *(item for pairs in caught for item in _ranges(pairs))])
        brought_in = done - before
        if self._rollback is None:
            return brought_in, brought_in
        return brought_in, self._rollback.undo(brought_in, RangeSet(self._taken))


def _wait_for(helpers: list[threading.Thread]) -> None:
    """Wait until they have finished their chunks, also through further Ctrl-C: the memory is still borrowed for them."""
    for helper in helpers:
        while helper.ident is not None and helper.is_alive():
            try:
                helper.join()
            except KeyboardInterrupt:
                continue  # one is under way already


def _populated(segment: Segment, start: int, stop: int) -> array[int]:
    write = segment.method.access == "write"
    return populated_before(start, stop, write=write, private=not segment.target.shared)


def _ranges(pairs: array[int]) -> Iterator[PageRange]:
    for index in range(0, len(pairs), 2):
        yield PageRange(pairs[index], pairs[index + 1])


def _length(pairs: array[int]) -> int:
    return sum(pairs[1::2]) - sum(pairs[::2])


def _locate(chunk: PageRange, segment: Segment) -> _Failure | None:
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
            return _Failure(low, segment, error)
        else:
            length = max(step, length // 2 // step * step)
    return None
