"""Recording: find out which pages of which files processes touch, by the kernel's trace or by residency."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import CannotTellError
from prefault.files.open_file import OpenFile
from prefault.files.selection import SelectedFile, select
from prefault.ranges import RangeSet
from prefault.recordings.held_command import HeldCommand
from prefault.recordings.opened_files import OpenedFiles, descendants
from prefault.recordings.recording_file import RecordedArea, RecordedFile, Recording, Way, clip, plain
from prefault.recordings.roots import Roots
from prefault.recordings.trace_instance import Touched, TraceInstance, TraceRefusedError
from prefault.sizes import format_size

WayChoice = Literal["auto", "trace", "residency"]

_LOOK_EVERY_S = 0.02


class RecordedCommand(NamedTuple):
    """A command that was recorded.

    Attributes:
        status: exit status of the command; 128 and the signal's number after a death by signal.
        recording: the pages that it touched.
    """

    status: int
    recording: Recording


def record_command(
    command: Sequence[str | bytes], *, way: WayChoice = "auto", files: Iterable[str | os.PathLike[str]] = (),
    evict: bool = False, roots: Mapping[str, str | os.PathLike[str]] | None = None,
    environment: dict[str, str] | None = None, areas: Callable[[], list[RecordedArea]] | None = None,
) -> RecordedCommand:  # fmt: skip
    """Run a command and record which pages of which files it and its children touch.

    Args:
        command: program and arguments.
        way: ``"trace"``: by the kernel's tracepoints (root); ``"residency"``: by the page cache before and after;
            ``"auto"``: the first where the kernel allows it.
        files: files and directories; by residency their cached pages are compared before and after.
        evict: evict ``files`` from the page cache first: what is cached already is told apart by neither way as well.
        roots: directories by name; files below one are kept by that name and the path below it.
        environment: environment of the command; None: that of this process.
        areas: called after the command; returns the parts of device memory that it touched.

    Raises:
        OSError: the command cannot be run; with ``way="trace"``, the kernel does not let this process trace.
    """
    with HeldCommand(command, environment) as held:
        with held.interruptible():  # to evict a tree, or to look at one, may take minutes
            recorder = Recorder([held.pid], way=way, files=files, evict=evict, roots=roots)
        try:
            held.release()
            status = held.wait(lambda: recorder.look_at(descendants(held.pid)), _LOOK_EVERY_S)
        except BaseException:
            recorder.stop()
            raise
        recording = recorder.finish([os.fsencode(word) for word in command], areas() if areas else [])
    return RecordedCommand(status, recording)


class Recorder:
    """Records the page cache accesses of threads, and of all their later children, until :meth:`finish`.

    Args:
        tids: the threads.
        way: as for :func:`record_command`.
        files: as for :func:`record_command`.
        evict: as for :func:`record_command`.
        roots: as for :func:`record_command`.
        is_own: True if the threads are those of this process.

    Attributes:
        way: the way that is used.
    """

    way: Way

    def __init__(
        self, tids: Iterable[int], *, way: WayChoice = "auto", files: Iterable[str | os.PathLike[str]] = (),
        evict: bool = False, roots: Mapping[str, str | os.PathLike[str]] | None = None, is_own: bool = False,
    ) -> None:  # fmt: skip
        if way not in ("auto", "trace", "residency"):
            raise ValueError(f"way is 'auto', 'trace' or 'residency', not {way!r}")
        self._roots = Roots(roots)
        self._notes: list[str] = []
        self._complete = True
        self._before: dict[tuple[int, int], RangeSet | None] = {}
        """Cached pages of files that were known before; None where the kernel does not say."""
        self._trace: TraceInstance | None = None
        self._opened = OpenedFiles()
        self._own = OpenedFiles()
        """Files of this process: the child touches them until it runs the command, and the trace sees that."""
        self.way = "residency"
        (self._opened if is_own else self._own).look_at([os.getpid()])
        if evict:
            for path in _selected(files):
                _evict(path)
        try:
            if way != "residency":
                self._start_trace(tids, required=way == "trace")
            if self._trace is None:
                for path in _selected(files):
                    self._look_before(path)
                for file in self._opened.files():
                    self._before[file.device, file.inode] = _cached(file.path)
        except BaseException:
            self.stop()
            raise

    def _start_trace(self, tids: Iterable[int], *, required: bool) -> None:
        try:
            self._opened.watch()
            self._trace = TraceInstance(tids)
            self.way = "trace"
        except OSError as error:
            self._opened.stop()
            if required:
                what = error.strerror if isinstance(error, TraceRefusedError) else f"fanotify(7): {error.strerror}"
                raise TraceRefusedError(error.errno, f"{what}: run as root, or record by residency") from error

    def _look_before(self, path: str) -> None:
        try:
            with OpenFile(path) as file:
                self._opened.add(path, os.fstat(file.fd))
        except OSError as error:
            self._lack(f"{path} could not be looked at: {error.strerror}")

    def _lack(self, note: str) -> None:
        self._complete = False
        self._notes.append(plain(note))

    def look_at(self, pids: Iterable[int]) -> None:
        """Look at the files that processes have open or mapped now; to be called again and again."""
        if self.way != "trace" or not self._opened.files():
            self._opened.look_at(pids)

    def stop(self) -> None:
        """End the trace. Idempotent."""
        if self._trace is not None:
            self._trace.stop()
        self._opened.stop()

    def finish(self, command: list[bytes], areas: list[RecordedArea]) -> Recording:
        """End, and return what was recorded."""
        self.stop()
        found = self._traced() if self._trace is not None else self._by_residency()
        files = sorted((file for file in found if file is not None and file.edges), key=lambda file: (file.root, file.path))
        return Recording(self.way, time.time_ns(), command, self._complete, self._notes, files, areas)

    # --- by trace

    def _traced(self) -> list[RecordedFile | None]:
        assert self._trace is not None
        if self._trace.lost_events:
            self._lack(f"the kernel dropped {self._trace.lost_events} events that came faster than they were read")
        if self._opened.overflowed:
            self._lack("fanotify(7) dropped names of files: its queue was full")
        found, nameless = [], 0
        for key, touched in self._trace.touched().items():
            name = self._opened.find(key.device, key.inode)
            if name is None:
                if self._own.find(key.device, key.inode) is None:
                    nameless += (touched.pages | touched.windows).length
            else:
                found.append(recorded_file(name.path, partial(_touched_in, touched), self._roots))
        if nameless:
            self._notes.append(
                f"{format_size(nameless)} belong to files without a name here: deleted, opened before the recording began,"
                " or in another mount namespace"
            )
        return found

    # --- by residency

    def _by_residency(self) -> list[RecordedFile | None]:
        found, tally = [], _Tally()
        for name in self._opened.files():
            key = (name.device, name.inode)
            if key in self._before and self._before[key] is None:
                tally.unknown += 1
            else:
                found.append(recorded_file(name.path, partial(tally.came, self._before.get(key)), self._roots))
        if tally.unknown:
            self._lack(
                f"the kernel does not say which pages of {tally.unknown} files are cached: run as their owner or root"
            )
        if tally.cached_before:
            self._notes.append(
                f"{format_size(tally.cached_before)} of these files were in the page cache before, and may have been touched"
                " or not: they are left out. Record as root, by trace; or evict the files first (--files PATH --evict)"
            )
        if tally.found_late:
            self._notes.append(
                f"{format_size(tally.found_late)} are cached of files that were found while the command ran, and are"
                " recorded whole: they may have been cached before. Name files by --files to tell that apart"
            )
        return found


class _Tally:
    """Files and bytes of which residency cannot tell whether they were touched."""

    def __init__(self) -> None:
        self.unknown = self.cached_before = self.found_late = 0

    def came(self, before: RangeSet | None, file: OpenFile) -> RangeSet:
        """Return the pages of a file that came, if it was known before; else all that are cached."""
        try:
            now = cached_ranges(file)
        except CannotTellError:
            self.unknown += 1
            return RangeSet()
        if before is None:
            self.found_late += now.length
            return now
        self.cached_before += (now & before).length
        return now - before


def recorded_file(path: str, ranges: Callable[[OpenFile], RangeSet], roots: Roots) -> RecordedFile | None:
    """Return a file with some of its pages, as a recording has it; None where it is gone or cannot be read."""
    try:
        with OpenFile(path) as file:
            edges = clip(ranges(file), file.size)
            root, below = roots.split(path)
            return RecordedFile(below, root, *file.identity, file.size, file.modified_ns, edges)
    except OSError:
        return None


def _touched_in(touched: Touched, file: OpenFile) -> RangeSet:
    """Return the touched pages of a file: of windows around a fault, those that were cached."""
    windows = touched.windows - touched.pages
    if windows:
        with contextlib.suppress(CannotTellError):
            windows = windows & cached_ranges(file)
    return touched.pages | windows


def _evict(path: str) -> None:
    with contextlib.suppress(OSError), OpenFile(path) as file:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _cached(path: str) -> RangeSet | None:
    try:
        with OpenFile(path) as file:
            return cached_ranges(file)
    except OSError:
        return None


def _selected(paths: Iterable[str | os.PathLike[str]]) -> Iterable[str]:
    """Return absolute paths of the files that paths stand for."""
    given = [os.path.realpath(os.fsdecode(path)) for path in paths]
    return (found.path for found in select(given) if isinstance(found, SelectedFile))
