"""Replay: bring the pages of a recording back into the page cache, in disk order, several files at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from prefault._kernel import ioprio
from prefault._kernel.fiemap import fiemap
from prefault.device.client import area_logs
from prefault.device.client.area_logs import LoggedArea
from prefault.engine.progress import Progress, reporting
from prefault.files.budget import MemoryBudget
from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import CannotTellError, FileFailure
from prefault.files.open_file import OpenFile
from prefault.files.warm_result import length_in_file
from prefault.files.warming import warm_file
from prefault.limits.process_limits import no_process
from prefault.ranges import PageRange, RangeSet
from prefault.recordings.recording_file import RecordedFile, Recording, load
from prefault.recordings.roots import Roots
from prefault.sizes import MIB, Size, parse_size

_SLOW = frozenset({"fuse", "nfs", "cifs", "smb2", "smb", "9p", "ceph", "lustre", "gpfs", "afs"})
"""File systems where a file is several round trips, and the disk's order is not known."""
_SLOW_THREADS = 32
_MANY_PIECES = 4
_DISK_THREADS = 4
_LARGE = 16 * MIB
"""Bytes of one file from which on it is worth several threads of its own, and a choice among methods."""
_PIECE = MIB
_LONGEST_WAIT_S = 0.2


class ReplayResult(NamedTuple):
    """Result of a replay.

    Attributes:
        bytes: bytes of the recording that were brought in.
        present_bytes: bytes of the recording that were in the page cache already.
        skipped_bytes: bytes of files that were skipped, or beyond the budget.
        files: count of files whose recorded pages are in the page cache now.
        changed: files that were skipped since inode, size or time of modification differ, or that shrank meanwhile.
        missing: files that were skipped since they are gone, or below a root that was not given.
        over_budget: count of files that were left out, or cut, because the budget was used up.
        failures: files that could not be read, or not whole.
        area_bytes: bytes of device memory that were populated, or present already.
        skipped_areas: recorded device memory that is not mapped here in the same version.
        evicted_bytes: bytes of these files that were cached, are not in the recording, and were evicted (``exact``).
        seconds: duration.
    """

    bytes: int
    present_bytes: int
    skipped_bytes: int
    files: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    over_budget: int
    failures: tuple[FileFailure, ...]
    area_bytes: int
    skipped_areas: tuple[str, ...]
    evicted_bytes: int
    seconds: float

    @property
    def complete(self) -> bool:
        """True if every page of the recording is in memory."""
        return not (self.changed or self.missing or self.over_budget or self.failures or self.skipped_areas)


def replay(
    recording: Recording | str | os.PathLike[str], *, roots: Mapping[str, str | os.PathLike[str]] | None = None,
    budget: Size | None = None, threads: int | None = None, idle: bool = False, check_time: bool = True,
    exact: bool = False, areas: Iterable[LoggedArea] | None = None, progress: Progress | bool = False,
) -> ReplayResult:  # fmt: skip
    """Bring the pages of a recording back: of files into the page cache, of device memory into its areas.

    Files whose inode, size or time of modification differ from the recording are skipped and counted.

    Args:
        recording: a recording, or the path of one.
        roots: directories by name, for files that were recorded below a root. Of these, device and inode are not compared.
        budget: bytes to bring in at most; None: what the machine and the memory cgroup have left.
        threads: files that are read at a time; None: 4 on disks, and 32 on file systems with latency.
        idle: read in the idle I/O class (ioprio_set(2)): disk schedulers serve others first.
        check_time: compare the time of modification as well; False where files were copied without it.
        exact: evict what is cached of these files and is not in the recording. The kernel keeps pages that are mapped or
            locked.
        areas: areas whose recorded pages are populated, in one call each; None: all of this process.
        progress: report it, see :func:`prefault.populate`.

    Raises:
        RecordingError: the file is no recording, or a damaged one.
        OSError: the recording cannot be read, or no thread can be started (EAGAIN).
        ValueError: a budget or a number of threads that is none.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is the number of files that are read at a time, at least 1, not {threads}")
    found = recording if isinstance(recording, Recording) else load(recording)
    limit = None if budget is None else parse_size(budget)
    result = _Replay(found.files, Roots(roots), limit, threads, idle, check_time, exact).run(progress)
    if not found.areas:
        return result
    from prefault.recordings.area_replay import replay_areas

    done, skipped = replay_areas(found, area_logs.areas() if areas is None else areas)
    return result._replace(area_bytes=done, skipped_areas=tuple(skipped))


class _Replay:
    def __init__(
        self, files: list[RecordedFile], roots: Roots, budget: int | None, threads: int | None, idle: bool, check_time: bool,
        exact: bool,
    ) -> None:  # fmt: skip
        self._files = files
        self._roots = roots
        self._budget = MemoryBudget(budget)
        self._threads = threads
        self._idle = idle
        self._check_time = check_time
        self._exact = exact
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._done = self._present = self._skipped = self._count = self._over_budget = self._evicted = 0
        self._changed: list[str] = []
        self._missing: list[str] = []
        self._failures: list[FileFailure] = []
        self._readers: ThreadPoolExecutor | None = None
        """Threads for the pieces of single files, on file systems with latency."""
        self._on_disk: list[tuple[tuple[int, int], RecordedFile]] = []

    def run(self, progress: Progress | bool) -> ReplayResult:
        began = time.perf_counter()
        total = sum(file.bytes for file in self._files)
        with reporting(progress, "replay") as report:

            def tell() -> None:
                if report is not None:
                    report(min(total, self._done + self._present + self._skipped), total)

            # Files on slow file systems are read when they are first opened; those on disks are put in order first.
            self._in_threads(self._threads or _SLOW_THREADS, self._look_at, self._files, tell)
            self._on_disk.sort(key=lambda item: item[0])
            self._in_threads(self._threads or _DISK_THREADS, self._read, [file for _, file in self._on_disk], tell)
        return ReplayResult(
            self._done, self._present, self._skipped, self._count, tuple(sorted(self._changed)),
            tuple(sorted(self._missing)),
            self._over_budget, tuple(sorted(self._failures)), 0, (), self._evicted, time.perf_counter() - began,
        )  # fmt: skip

    def _in_threads(
        self, count: int, work: Callable[[RecordedFile], None], files: Sequence[RecordedFile], tell: Callable[[], None]
    ) -> None:
        # Each thread takes the next file: a future for each would be looked at again at every one that is done.
        left = iter(files)

        def take() -> None:
            while not self._stopping.is_set():
                with self._lock:
                    file = next(left, None)
                if file is None:
                    return
                work(file)

        count = min(count, len(files))
        pool = ThreadPoolExecutor(max(1, count), "prefault-replay", self._be_idle if self._idle else None)
        try:
            try:
                waiting: set[Future[None]] = {pool.submit(take) for _ in range(count)}
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, no_process()) from error
            while waiting:
                done, waiting = wait(waiting, _LONGEST_WAIT_S, FIRST_COMPLETED)
                for each in done:
                    each.result()
                tell()
        finally:
            self._stopping.set()
            pool.shutdown(cancel_futures=True)
            readers, self._readers = self._readers, None
            if readers is not None:
                readers.shutdown()
            self._stopping.clear()

    @staticmethod
    def _be_idle() -> None:
        ioprio.ioprio_set(ioprio.IOPRIO_WHO_PROCESS, 0, ioprio.IOPRIO_CLASS_IDLE << ioprio.IOPRIO_CLASS_SHIFT)

    # --- in the threads

    def _look_at(self, recorded: RecordedFile) -> None:
        """Put a file on a disk into the list; read another one at once."""

        def look(file: OpenFile) -> None:
            if file.file_system in _SLOW:
                self._bring_in(file, recorded)
                return
            place = _place(file, recorded.edges[0] if recorded.edges else 0)
            with self._lock:
                self._on_disk.append((place, recorded))

        self._with_file(recorded, look)

    def _read(self, recorded: RecordedFile) -> None:
        self._with_file(recorded, lambda file: self._bring_in(file, recorded))

    def _with_file(self, recorded: RecordedFile, work: Callable[[OpenFile], None]) -> None:
        """Open a recorded file and work on it; skip it where it is gone or changed."""
        try:
            opened = self._roots.open(recorded)
            if opened is None:
                self._skip(self._missing, recorded)
                return
            with opened as file:
                if self._is_as_recorded(file, recorded):
                    work(file)
                else:
                    self._skip(self._changed, recorded)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                self._skip(self._missing, recorded)
                return
            with self._lock:
                self._failures.append(FileFailure.of(recorded.shown_path, error))

    def _is_as_recorded(self, file: OpenFile, recorded: RecordedFile) -> bool:
        if file.size != recorded.size or (self._check_time and file.modified_ns != recorded.modified_ns):
            return False
        return bool(recorded.root) or file.identity == (recorded.device, recorded.inode)

    def _skip(self, names: list[str], recorded: RecordedFile) -> None:
        with self._lock:
            names.append(recorded.shown_path)
            self._skipped += recorded.bytes

    def _bring_in(self, file: OpenFile, recorded: RecordedFile) -> None:
        wanted = recorded.ranges.clipped(0, file.pages().stop)
        missing = wanted
        with contextlib.suppress(CannotTellError):
            cached = cached_ranges(file)
            missing = wanted - cached
            if self._exact:
                evicted = evict_pages(file, cached - wanted)
                with self._lock:
                    self._evicted += evicted
        granted = self._take(missing)
        with self._lock:
            self._present += wanted.length - missing.length
            self._skipped += missing.length - granted.length
        done, failures, stopped = self._read_granted(file, granted)
        with self._lock:
            self._done += done
            self._skipped += granted.length - done
            self._failures += (failure._replace(path=recorded.shown_path) for failure in failures)
            self._over_budget += stopped and granted == missing  # else it was counted when less was granted
            if not (failures or stopped) and done < granted.length:
                self._changed.append(recorded.shown_path)  # it shrinks meanwhile
            self._count += granted == missing and done == granted.length

    def _read_granted(self, file: OpenFile, granted: RangeSet) -> tuple[int, Sequence[FileFailure], bool]:
        """Read pages of a file; return the bytes of those that came, what failed, and whether a limit stopped it."""
        failures: Sequence[FileFailure]
        stopped = False
        if granted.length > _LARGE:
            result = warm_file(file, granted, missing_only=False)
            stopped = bool(result.stopped)  # less is left than was granted: told as any file that does not fit
            failures = tuple(one for one in result.failures if not stopped or one.remedy != result.stopped)
            if not failures and not stopped:
                left = length_in_file(file, granted) - result.read_bytes - result.hole_bytes  # holes have nothing to read
                return granted.length - max(0, left), (), False
        else:
            try:
                return self._read_pages(file, granted), (), False
            except OSError as error:
                failures = (FileFailure.of(file.path, error),)
        came = 0  # also those of steps that failed
        with contextlib.suppress(OSError):  # the kernel does not tell: as if none had come
            came = (cached_ranges(file) & granted).length
        return came, failures, stopped

    def _read_pages(self, file: OpenFile, pages: RangeSet) -> int:
        """Read pages of a file: where each request is slow, several at a time."""
        if file.file_system not in _SLOW or len(pages) < _MANY_PIECES:
            return read_pages(file, pages, self._stopping.is_set)
        with self._lock:
            if self._readers is None:
                setting_up = self._be_idle if self._idle else None
                self._readers = ThreadPoolExecutor(self._threads or _SLOW_THREADS, "prefault-read", setting_up)
        share = -(-len(pages) // (self._threads or _SLOW_THREADS))
        parts = [self._readers.submit(read_pages, file, part, self._stopping.is_set) for part in pages.batches(share)]
        wait(parts)  # all of them, also after a failure: the file is open until they end
        return sum(part.result() for part in parts)

    def _take(self, missing: RangeSet) -> RangeSet:
        """Take the bytes of a set of pages from the budget; return the part of the set for which it suffices."""
        with self._lock:
            left = self._budget.left_bytes()
            granted = missing
            if missing.length > left:
                self._over_budget += 1
                granted = _first_bytes(missing, left)
            self._budget.take(granted.length)
            return granted


def _first_bytes(pages: RangeSet, count: int) -> RangeSet:
    """Return the first pages of a set, ``count`` bytes at most."""
    first = []
    for item in pages:
        part = PageRange.inward(item.start, min(item.stop, item.start + count))
        count -= part.length
        first.append(part)
        if part != item:
            break
    return RangeSet(first)


def read_pages(file: OpenFile, pages: RangeSet, is_stopping: Callable[[], bool] = lambda: False) -> int:
    """Read pages of a file into the page cache; return the bytes of those that are there now."""
    # Without read-ahead: the caller says what is wanted, and no more is read.
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
    target, done = memoryview(bytearray(_PIECE)), 0
    for item in pages:
        for piece in item.chunks(_PIECE):
            at, stop = piece.start, min(piece.stop, file.size)
            while at < stop:  # a read ends early before pages that cannot be read: the next one tells why
                count = 0 if is_stopping() else os.preadv(file.fd, [target[: stop - at]], at)
                if not count:
                    return done + PageRange.inward(piece.start, at).length  # the file shrinks meanwhile
                at += count
            done += piece.length
    return done


def evict_pages(file: OpenFile, pages: RangeSet) -> int:
    """Evict pages of a file from the page cache; return how many bytes are gone. Dirty ones are written first."""
    if not pages:
        return 0
    os.fdatasync(file.fd)
    for item in pages:
        os.posix_fadvise(file.fd, item.start, item.length, os.POSIX_FADV_DONTNEED)
    return (pages - cached_ranges(file)).length


def _place(file: OpenFile, offset: int) -> tuple[int, int]:
    """Return a file system's device and the place on its disk where the byte at ``offset`` lies."""
    try:
        extents = fiemap(file.fd, offset, 1, 1)
    except OSError:  # EOPNOTSUPP: the file system cannot tell
        extents = []
    return file.identity.device, extents[0].fe_physical if extents else file.identity.inode
