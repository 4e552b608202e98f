"""Warm files: bring the pages that are missing into the page cache, the fastest way, within the memory that there is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from time import monotonic

from prefault.engine.progress import Progress, check_progress, reporting
from prefault.engine.rate import RateLimit, rate_limit
from prefault.files.budget import MemoryBudget
from prefault.files.failures import FileFailure
from prefault.files.file_plan import FilePlan
from prefault.files.file_status import CheckedRanges, RangesOfFile, checked_ranges, pages_of
from prefault.files.method_choice import MethodChoice, small_file_threads
from prefault.files.open_file import OpenFile
from prefault.files.selection import Path, SelectedFile, Selection, as_selection
from prefault.files.small_files import SmallFiles
from prefault.files.step_workers import StepWorkers
from prefault.files.warm_methods import MethodName, PieceReader, WarmMethod, steps_of
from prefault.files.warm_result import FileState, Tally, WarmInterrupted, WarmResult, length_in_file
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, PAGE_SIZE, Size, format_size, parse_size

_SMALL = 1 * MIB
"""Bytes of a file up to which several files are worked on at one time, and not several parts of one."""

_BATCH_FILES = 256
_BATCH_BYTES = 64 * MIB

_SMALLEST_WINDOW = 2 * MIB

_TURN_SECONDS = 0.02
"""Time between two looks at Ctrl-C, the budget and the limit on the rate."""

_REPORT_SECONDS = 0.05


def warm(
    paths: Path | Iterable[Path] | Selection, *, ranges: Iterable[tuple[Size, Size | None]] | RangesOfFile | None = None,
    method: MethodName | None = None, threads: int | None = None, budget: MemoryBudget | Size | None = None,
    window: Size | None = None, rate: RateLimit | Size | None = None, progress: Progress | bool = False,
    missing_only: bool = True,
) -> WarmResult:  # fmt: skip
    """Bring the missing pages of files into the page cache, so that reading them later waits for no disk and no server.

    Only what is missing is read. Each file that cannot be warmed is a failure in the result, and the others go on. The call
    never brings in more than memory cgroups and the machine leave: more would evict what it had brought in before.

    Args:
        paths: files and directories, an iterable of them, or what :func:`select` returns. Directories stand for all files in
            them.
        ranges: byte ranges ``(start, stop)`` of each file, ``stop`` None for its end, or a function from an open file to
            them; None: all of it.
        method: ``"populate"``, ``"readahead"`` or ``"pread"``; None: the fastest, by file system and measurement.
        threads: number of threads; None: as many as pay.
        budget: bytes to bring in at most, or a budget that several calls share; None: as many as fit.
        window: bytes to keep in the page cache while passing through each file, from 2 MiB on; what lies behind is evicted.
            For caches below the page cache, such as a volume that is loaded from a snapshot. See :func:`stream` for reading.
        rate: limit of bytes a second.
        progress: True for a bar or log lines, or a function that takes the bytes done and the bytes in all so far.
        missing_only: False: read what is cached as well, which marks it as used.

    Returns:
        Counts of bytes, checked by cachestat(2) or mincore(2), and the failures.

    Raises:
        TypeError, ValueError: an argument that is none.
        WarmInterrupted: Ctrl-C, with the result so far.

    Sources: madvise(2), posix_fadvise(2), cachestat(2), mincore(2).
    """
    spans: CheckedRanges = None
    if ranges is not None:
        parsed = (
            ranges if callable(ranges)
            else [(parse_size(start), None if stop is None else parse_size(stop)) for start, stop in ranges]
        )  # fmt: skip
        spans = checked_ranges(parsed)
    with Warming(
        method=method, threads=threads, budget=budget, window=window, rate=rate, progress=progress,
        missing_only=missing_only,
    ) as warming:  # fmt: skip
        for item in as_selection(paths):
            if warming.is_stopped:
                break
            if not isinstance(item, SelectedFile):
                warming.add_failure(item)
            elif spans is None and 0 < item.size <= _SMALL:
                warming.add_small(item.path, item.size)
            else:
                warming.open_and_warm(item.path, spans)
    return warming.result


def warm_file(
    file: OpenFile, ranges: RangeSet | None = None, *, method: MethodName | None = None, threads: int | None = None,
    budget: MemoryBudget | Size | None = None, rate: RateLimit | Size | None = None, progress: Progress | bool = False,
    missing_only: bool = True,
) -> WarmResult:  # fmt: skip
    """Bring the missing pages of one open file into the page cache.

    Args:
        file: the file.
        ranges: byte offsets of whole pages; None: all of it.
        method: ``"populate"``, ``"readahead"`` or ``"pread"``; None: the fastest, by file system and measurement.
        threads: number of threads; None: as many as pay.
        budget: bytes to bring in at most, or a budget that several calls share; None: as many as fit.
        rate: limit of bytes a second.
        progress: as for :func:`warm`.
        missing_only: False: read what is cached as well.

    Raises:
        WarmInterrupted: Ctrl-C, with the result so far.
    """
    with Warming(
        method=method, threads=threads, budget=budget, rate=rate, progress=progress, missing_only=missing_only
    ) as warming:
        warming.warm(file, ranges)
    return warming.result


class Warming:
    """One call that warms files one after another, small ones several at a time; a context manager.

    Leaving the block finishes the small files and makes ``result``. Ctrl-C inside becomes :class:`WarmInterrupted`.

    Attributes:
        is_stopped: True if memory or the budget has come to its end.
        result: the result, once the block was left.
    """

    def __init__(
        self, *, method: MethodName | None = None, threads: int | None = None,
        budget: MemoryBudget | Size | None = None, window: Size | None = None, rate: RateLimit | Size | None = None,
        progress: Progress | bool = False, missing_only: bool = True,
    ) -> None:  # fmt: skip
        check_progress(progress)
        self._threads = threads
        self._budget = budget if isinstance(budget, MemoryBudget) else MemoryBudget(budget)
        self._window = None if window is None else parse_size(window)
        if self._window is not None and self._window < _SMALLEST_WINDOW:
            raise ValueError(f"a window has {format_size(_SMALLEST_WINDOW)} at least, not {format_size(self._window)}")
        self._rate = rate_limit(rate)
        self._progress = progress
        self._missing_only = missing_only
        self._choice = MethodChoice(threads, "readahead" if self._rate is not None and method is None else method)
        self._tally = Tally()
        self._done_bytes = self._total_bytes = 0
        self._small: list[tuple[str, int]] = []
        self._small_bytes = 0
        self.is_stopped = False
        self._stopped = ""
        self._stack = ExitStack()
        self.result = WarmResult()

    def __enter__(self) -> Warming:
        self._began = monotonic()
        self._report = self._stack.enter_context(reporting(self._progress, "warm"))
        self._reported = 0.0
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._stack:
                if kind is None:
                    self._flush_small()
                    self._tell(0, at_once=True)
        except KeyboardInterrupt as error:
            kind = type(error)
        finally:
            self.result = self._tally.result(monotonic() - self._began, self._stopped)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            raise WarmInterrupted(f"interrupted: {self.result}", self.result) from None

    def add_failure(self, failure: FileFailure) -> None:
        """Add a file that cannot be warmed."""
        self._tally.failures.append(failure)

    # --- one file

    def open_and_warm(self, path: str, spans: CheckedRanges = None) -> None:
        """Open a file and warm byte ranges of it; None: all of it. What fails becomes a failure."""
        try:
            with OpenFile(path) as file:
                self.warm(file, None if spans is None else pages_of(file, spans))
        except OSError as error:
            self.add_failure(FileFailure.of(path, error))

    def warm(self, file: OpenFile, ranges: RangeSet | None = None) -> None:
        """Warm ranges of one file, which are cut at its end; None: all of it.

        Raises:
            OSError: the file cannot be looked at. An error in reading it is a failure of the result.
        """
        plan = FilePlan.of(file, ranges, missing_only=self._missing_only)
        kept = self._tally.kept_bytes
        self._tally.begin(file, plan)
        self._budget.keep(self._tally.kept_bytes - kept)
        self._total_bytes += length_in_file(file, plan.missing)
        if not plan.missing:
            return
        if self._window is None:
            self._bring_in(file, plan)
        else:
            self._pass_through(file, plan.missing, self._window)

    def _bring_in(self, file: OpenFile, plan: FilePlan) -> None:
        left = self._budget.left_bytes()
        fitting = plan.missing if plan.missing.length <= left else _first(plan.missing, left)
        state = FileState(file)
        try:
            self._read(state, fitting)
        finally:
            self._tally.check(state, plan.fresh, is_known=plan.is_known)
        if fitting is not plan.missing or self.is_stopped:
            self._stop(file.path, state.read_bytes, plan.missing.length)
        self._tally.note(state)

    def _read(self, state: FileState, missing: RangeSet) -> None:
        if self._choice.asks_first(state.file, missing.length):
            page = _first(missing, PAGE_SIZE)
            began = monotonic()
            if not self._run(state, page, WarmMethod("readahead", 1)) or state.is_over or self.is_stopped:
                return
            self._choice.asked(state.file, monotonic() - began)
            missing -= page
        place = self._choice.place_to_measure(state.file, missing)
        if place is not None:

            def bring_in(piece: PageRange, method: WarmMethod) -> int:
                done = self._run(state, RangeSet([piece]), method, is_part=True)
                return 0 if state.is_over or self.is_stopped else done

            rest = self._choice.measure(state.file, place, bring_in)
            if state.is_over or self.is_stopped:
                return
            missing -= RangeSet([PageRange(place.start, rest.start)])
        self._run(state, missing, self._choice.first(state.file))

    def _run(self, state: FileState, missing: RangeSet, method: WarmMethod, *, is_part: bool = False) -> int:
        """Bring ranges in by a method; return the bytes that were read."""
        file = state.file
        steps = steps_of(file, missing, method, may_read_beyond=is_part)
        with StepWorkers(
            steps, lambda: PieceReader(file, method.name), method.threads, None if self._rate is None else 0
        ) as workers:
            try:
                self._attend(workers, method.step_bytes)
            finally:
                workers.stop()
                self._tally.count(method, workers.done_bytes)
                self._done_bytes += workers.done_bytes
                state.add(workers)
        return workers.done_bytes

    def _attend(self, workers: StepWorkers, step_bytes: int) -> None:
        """Let workers do what the budget and the rate allow, until they have ended or nothing more is allowed."""
        rate, seen = self._rate, 0
        granted = 0
        while True:
            ended = workers.wait(_TURN_SECONDS)
            done = workers.done_bytes
            self._budget.take(done - seen)
            seen = done
            self._tell(done)
            if ended:
                return
            left = self._budget.left_bytes()
            allowed = done + left
            if rate is not None:
                if granted - done < max(rate.chunk_bytes, step_bytes):
                    piece = max(rate.chunk_bytes, step_bytes)
                    rate.wait(piece)
                    granted += piece
                allowed = min(allowed, granted)
            workers.allow(allowed)
            if allowed == done + left and left < step_bytes and workers.is_waiting_to_be_allowed:
                self.is_stopped = True
                return

    def _stop(self, path: str, done: int, wanted: int) -> None:
        self.is_stopped = True
        self._stopped = self._budget.tightest
        reason = f"stopped after {format_size(done)} of {format_size(wanted)}, and before all files that follow"
        if self._budget.asked_bytes is None:
            reason += ", as more would evict what was brought in before"
        self._tally.failures.append(FileFailure(path, reason, self._stopped))

    # --- passing through

    def _pass_through(self, file: OpenFile, missing: RangeSet, window: int) -> None:
        state = FileState(file)
        half = max(MIB, window // 2)
        behind = RangeSet()
        left = missing
        read = 0
        while left and not (state.is_over or self.is_stopped):
            piece = _first(left, min(half, self._room()))
            if not piece and not behind:
                self.is_stopped = True
                break
            left -= piece
            if piece:
                state.read_bytes = 0
                self._run(state, piece, self._choice.first(file))
                read += state.read_bytes
            self._tally.evicted_bytes += _evict(file, behind, self._budget)
            behind = piece
        self._tally.check(state, behind, is_known=True)
        if self.is_stopped:
            self._stop(file.path, read, missing.length)
        self._tally.note(state)

    def _room(self) -> int:
        """Return how many bytes the next piece may have, so that there is room for the one behind it as well."""
        left = self._budget.left_bytes()
        # Where memory is short, a MiB is still better than to end: it is evicted at once. A budget is meant as it is said.
        return max(left // 2, MIB if self._budget.asked_bytes is None else min(left, MIB))

    # --- small files

    def add_small(self, path: str, size: int) -> None:
        """Warm a file of at most a MiB, together with others like it."""
        self._small.append((path, size))
        self._small_bytes += size
        if len(self._small) >= _BATCH_FILES or self._small_bytes >= _BATCH_BYTES:
            self._flush_small()

    def _flush_small(self) -> None:
        files, self._small, self._small_bytes = self._small, [], 0
        if not files or self.is_stopped:
            return
        left = self._budget.left_bytes()
        batch = SmallFiles(missing_only=self._missing_only)
        for path, size in files:
            left -= size + -size % PAGE_SIZE
            if left < 0:
                self._stop(path, 0, size)
                break
            batch.add(path, size)
        self._total_bytes += batch.bytes
        seen = 0
        try:
            workers = StepWorkers(batch.steps(), batch.reader, self._threads or small_file_threads(files[0][0]))
        except OSError as error:
            self._tally.failures += [FileFailure.of(path, error) for path, _ in files]
            return
        with workers:
            try:
                ended = False
                while not ended:
                    ended = workers.wait(_TURN_SECONDS)
                    done = workers.done_bytes
                    if self._rate is not None:
                        self._rate.wait(done - seen)
                    seen = done
                    self._tell(done)
            finally:
                workers.stop()
                tally = batch.tally()
                self._tally.add(tally)
                self._done_bytes += workers.done_bytes
                self._budget.take(tally.bytes)
                self._budget.keep(tally.kept_bytes)
        for path in batch.grown:
            if not self.is_stopped:
                self.open_and_warm(path)

    # --- progress

    def _tell(self, more: int, *, at_once: bool = False) -> None:
        now = monotonic()
        if self._report is not None and (at_once or now - self._reported >= _REPORT_SECONDS):
            self._reported = now
            self._report(min(self._done_bytes + more, self._total_bytes), self._total_bytes)


def _first(ranges: RangeSet, count: int) -> RangeSet:
    """Return the first ``count`` bytes of a set, rounded down to whole pages."""
    found, left = [], count - count % PAGE_SIZE
    for pages in ranges:
        if left <= 0:
            break
        found.append(PageRange(pages.start, min(pages.stop, pages.start + left)))
        left -= pages.length
    return RangeSet(found)


def _evict(file: OpenFile, ranges: RangeSet, budget: MemoryBudget) -> int:
    """Evict ranges; return their bytes."""
    for pages in ranges:
        os.posix_fadvise(file.fd, pages.start, pages.length, os.POSIX_FADV_DONTNEED)
    budget.take(-ranges.length)
    return ranges.length
