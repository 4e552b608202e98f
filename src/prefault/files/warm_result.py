"""Result of warming, and the sums and facts that it is made of."""

from __future__ import annotations

from typing import NamedTuple

from prefault.files.cached_pages import cached_count, cached_ranges
from prefault.files.failures import FewLostPages, FileFailure, LostPages
from prefault.files.file_plan import FilePlan
from prefault.files.file_systems import IN_MEMORY
from prefault.files.open_file import OpenFile
from prefault.files.step_workers import StepFailure, StepWorkers
from prefault.files.warm_methods import WarmMethod
from prefault.limits.evicted_meanwhile import enough_to_tell
from prefault.ranges import RangeSet
from prefault.sizes import format_count, format_size

_FEW_RANGES = 64
"""Ranges up to which cachestat is asked for each, and not mincore for all."""


class WarmResult(NamedTuple):
    """Result of warming: what is in the page cache now, and was not before.

    Attributes:
        bytes: bytes that this call brought in and that are in the page cache now. The kernel was asked for each page,
            except for ``unchecked_bytes``.
        present_bytes: bytes that were in the page cache before, as far as the kernel tells.
        seconds: time that it took.
        method: name of the method that brought in most: ``"populate"``, ``"readahead"``, ``"pread"``; ``""`` for none.
        threads: number of its threads.
        files: files that were warmed, in whole or in part, or were warm before.
        failures: files and parts of files that were not warmed, with reason and remedy.
        read_bytes: bytes that were read for it.
        evicted_bytes: bytes that were read and are not in the page cache any more: behind ``window``, or for lack of memory.
        hole_bytes: bytes of holes of sparse files, which have nothing to read.
        unchecked_bytes: bytes of ``bytes`` that were read, but about which the kernel tells nothing (another user's file).
        stopped: the limit that ended the call early, and its remedy; empty if it came to its end.
    """

    bytes: int = 0
    present_bytes: int = 0
    seconds: float = 0.0
    method: str = ""
    threads: int = 0
    files: int = 0
    failures: tuple[FileFailure, ...] = ()
    read_bytes: int = 0
    evicted_bytes: int = 0
    hole_bytes: int = 0
    unchecked_bytes: int = 0
    stopped: str = ""

    @property
    def bytes_per_second(self) -> float:
        """Bytes read a second."""
        return self.read_bytes / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        text = f"{format_size(self.bytes)} of {format_count(self.files, 'file')} brought in, in {self.seconds:.2f} s"
        details = []
        if self.read_bytes:
            details.append(f"{format_size(int(self.bytes_per_second))}/s by {self.method}")
            details.append(format_count(self.threads, "thread"))
        if self.present_bytes:
            details.append(f"{format_size(self.present_bytes)} cached before")
        if self.evicted_bytes:
            details.append(f"{format_size(self.evicted_bytes)} read and evicted again")
        if self.unchecked_bytes:
            details.append(f"{format_size(self.unchecked_bytes)} not checked: the kernel does not tell")
        if details:
            text += f" ({', '.join(details)})"
        if self.failures:
            text += f"; {format_count(len({failure.path for failure in self.failures}), 'file')} failed"
        return f"{text}; stopped: {self.stopped}" if self.stopped else text


class WarmInterrupted(KeyboardInterrupt):
    """Ctrl-C while files were warmed; the pages that were brought in until then stay.

    Attributes:
        result: the result until then, checked as that of a call that came to its end.
    """

    def __init__(self, message: str, result: WarmResult) -> None:
        super().__init__(message)
        self.result = result


class WarmCancelled(OSError):
    """:meth:`prefault.WarmTask.cancel` stopped a call in the background (ECANCELED); the pages that came in stay.

    Attributes:
        result: the result until then, checked as that of a call that came to its end.
    """

    def __init__(self, number: int, message: str, result: WarmResult) -> None:
        super().__init__(number, message)
        self.result = result

    def __str__(self) -> str:
        return str(self.strerror)


class FileState:
    """Facts about one file while it is warmed.

    Attributes:
        file: the file.
        read_bytes: bytes that were read.
        failures: steps that failed.
        end: the offset at which its end was met too early; None where it was not.
        lost_bytes: bytes that were read and are not in the page cache.
    """

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self.read_bytes = 0
        self.failures: list[StepFailure] = []
        self.end: int | None = None
        self.lost_bytes = 0

    def add(self, workers: StepWorkers) -> None:
        """Add the work of some workers."""
        self.read_bytes += workers.done_bytes
        self.failures += workers.failures
        if workers.end is not None:
            self.end = workers.end

    @property
    def is_over(self) -> bool:
        """True if nothing more is to be read: its end was met, or reading it failed."""
        return self.end is not None or bool(self.failures)


class Tally:
    """Sums over files, in bytes, and their failures; :class:`WarmResult` explains them.

    Attributes:
        kept_bytes: bytes of ``present_bytes`` that the kernel may evict.
    """

    def __init__(self) -> None:
        self.files = self.bytes = self.present_bytes = self.read_bytes = self.evicted_bytes = 0
        self.hole_bytes = self.unchecked_bytes = self.kept_bytes = 0
        self.failures: list[FileFailure] = []
        self._by_method: dict[WarmMethod, int] = {}

    def begin(self, file: OpenFile, plan: FilePlan) -> None:
        """Count a file, and what of it needs no reading."""
        self.files += 1
        self.hole_bytes += plan.hole_bytes
        self.present_bytes += plan.present.length
        if file.file_system not in IN_MEMORY:
            self.kept_bytes += plan.present.length

    def count(self, method: WarmMethod, count: int) -> None:
        """Count bytes that were read by a method."""
        self.read_bytes += count
        self._by_method[method] = self._by_method.get(method, 0) + count

    def check(self, state: FileState, fresh: RangeSet, *, is_known: bool) -> None:
        """Count the pages of ``fresh``, none of which was cached before, that are in the page cache now."""
        cached = _cached_now(state, fresh) if is_known else None
        if cached is None:
            self.bytes += state.read_bytes
            self.unchecked_bytes += state.read_bytes
            return
        self.bytes += cached
        state.lost_bytes = max(0, min(state.read_bytes, fresh.length) - cached)
        self.evicted_bytes += state.lost_bytes

    def note(self, state: FileState) -> None:
        """Note what went wrong with a file."""
        path = state.file.path
        if state.failures:
            first = state.failures[0]
            told = FileFailure.of(path, first.error)
            more = f" ({len(state.failures)} parts failed)" if len(state.failures) > 1 else ""
            reason = f"{format_size(first.step.start)} from its start: {told.reason}{more}"
            self.failures.append(FileFailure(path, reason, told.remedy, told.errno))
        elif state.end is not None:
            size = format_size(state.file.current_size())
            self.failures.append(FileFailure(path, f"it shrank to {size} meanwhile", "warm it again once it is whole"))
        elif state.lost_bytes:
            lost, read = format_size(state.lost_bytes), format_size(state.read_bytes)
            reason = f"{lost} of the {read} that were read are not in the page cache"
            remedy = "memory is short, or the file system keeps no page cache (direct I/O)"
            few = state.lost_bytes < enough_to_tell(state.read_bytes)
            self.failures.append((FewLostPages if few else LostPages)(path, reason, remedy))

    def add(self, other: Tally) -> None:
        """Add the sums and failures of other files."""
        for name in (
            "files", "bytes", "present_bytes", "read_bytes", "evicted_bytes", "hole_bytes", "unchecked_bytes",
            "kept_bytes",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures += other.failures
        for method, count in other._by_method.items():
            self._by_method[method] = self._by_method.get(method, 0) + count

    def result(self, seconds: float, stopped: str) -> WarmResult:
        """Make the result."""
        most = max(self._by_method, key=lambda method: self._by_method[method], default=None)
        return WarmResult(
            self.bytes, self.present_bytes, seconds, most.name if most else "", most.threads if most else 0, self.files,
            tuple(self.failures), self.read_bytes, self.evicted_bytes, self.hole_bytes, self.unchecked_bytes, stopped,
        )  # fmt: skip


def length_in_file(file: OpenFile, ranges: RangeSet) -> int:
    """Return the bytes of ranges that lie before the end of the file."""
    return ranges.length - max(0, ranges.span.stop - file.size)


def _cached_now(state: FileState, ranges: RangeSet) -> int | None:
    """Count the bytes of ranges that are cached now; None where the kernel does not say.

    cachestat is not asked unless all of them were read: it counts pages that are still being read, or whose read failed.
    """
    file = state.file
    try:
        was_read = not state.failures and state.read_bytes >= length_in_file(file, ranges)
        # Cut at the end as it is now: a page beyond it stays cached where the kernel could not split its large folio.
        file.current_size()
        if was_read and len(ranges) <= _FEW_RANGES:
            counts = [cached_count(file, pages.start, pages.stop).bytes for pages in ranges]
            return None if None in counts else sum(count or 0 for count in counts)
        span = ranges.span
        return (cached_ranges(file, span.start, span.stop) & ranges).length
    except OSError:  # the file's server went away meanwhile
        return None
