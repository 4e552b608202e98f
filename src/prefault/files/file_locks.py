"""Locks on the page cache of files: read-only mappings that are locked, for as long as a :class:`FileLock` is open."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from time import perf_counter
from typing import NamedTuple

from prefault._kernel import mman
from prefault.engine.populating import HeadroomChoice
from prefault.engine.progress import Progress, check_progress, reporting
from prefault.engine.rate import RateLimit, rate_limit
from prefault.errors import HeadroomError
from prefault.files.failures import FileError, FileFailure
from prefault.files.file_status import CheckedRanges, Ranges, checked_ranges, pages_of
from prefault.files.open_file import OpenFile
from prefault.files.selection import Path, Selection, as_selection
from prefault.limits.limit import Shortfall
from prefault.limits.memory_use import MemoryUse
from prefault.limits.mmap_refusal import why_no_room
from prefault.limits.process_limits import lock_refusal
from prefault.limits.table import ask_for_memory, shortfall_of
from prefault.memory.file_verbs import HeldFiles
from prefault.ranges import PageRange
from prefault.sizes import MIB, Size, format_count, format_size

_CHUNK = 16 * MIB
"""Bytes of one mlock call, which reads what is missing: Ctrl-C waits for it."""


class _Part(NamedTuple):
    """A mapped range of a file: its address, and the range in the file."""

    path: str
    address: int
    pages: PageRange


class FileLock(HeldFiles):
    """Files whose pages stay in memory until it is closed; a context manager. The locks end with the process, too.

    The files may be renamed, removed and written to meanwhile. A child that is forked does not inherit the locks, mlock(2).

    Attributes:
        files: number of files that have locked pages.
        bytes: bytes of the locked pages, the last page of a file counted whole.
        failures: files that could not be locked; the others are.
        seconds: time that locking took.
    """

    failures: list[FileFailure]

    def __init__(self) -> None:
        self.files = self.bytes = 0
        self.failures = []
        self.seconds = 0.0
        self._parts: list[_Part] = []

    def __repr__(self) -> str:
        return f"<FileLock of {format_count(self.files, 'file')}, {format_size(self.bytes)}>"

    def close(self) -> None:
        """End the locks; idempotent. The pages stay cached until the kernel wants the memory."""
        while self._parts:
            part = self._parts.pop()
            mman.munmap(part.address, part.pages.length)

    @property
    def closed(self) -> bool:
        """True once the locks have ended, and where there were none."""
        return not self._parts

    def __enter__(self) -> FileLock:
        return self

    def __del__(self) -> None:
        self.close()

    def __str__(self) -> str:
        failed = f", {format_count(len(self.failures), 'failure')}" if self.failures else ""
        return f"{format_size(self.bytes)} locked in {format_count(self.files, 'file')}, in {self.seconds:.2g} s{failed}"

    def _map(self, selection: Selection, ranges: CheckedRanges) -> int:
        """Map the files, and return the bytes that their locks may take from the memory that is left."""
        needed = 0
        for found in selection:
            if isinstance(found, FileFailure):
                self.failures.append(found)
                continue
            try:
                with OpenFile(found.path) as file:
                    for pages in pages_of(file, ranges):
                        address = mman.mmap(0, pages.length, mman.PROT_READ, mman.MAP_SHARED, file.fd, pages.start)
                        self._parts.append(_Part(found.path, address, pages))
                        if file.file_system not in ("hugetlbfs", "tmpfs", "ramfs"):  # these are in memory already
                            needed += pages.length
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    raise _no_room(found.path, len(self._parts), found.size) from error
                self.failures.append(FileFailure.of(found.path, error))
        return needed

    def _lock(self, report: Progress | None, rate: RateLimit | None) -> None:
        step = _CHUNK if rate is None else min(_CHUNK, rate.chunk_bytes)
        total, done = sum(part.pages.length for part in self._parts), 0
        failed: set[str] = set()
        locked: set[str] = set()
        for part in self._parts:
            if part.path in failed:
                continue
            try:
                for chunk in PageRange(part.address, part.address + part.pages.length).chunks(step):
                    if rate is not None:
                        rate.wait(chunk.length)
                    mman.mlock2(chunk.start, chunk.length)  # reads what is missing; a failure is an errno, never SIGBUS
                    done += chunk.length
                    if report is not None:
                        report(done, total)
                locked.add(part.path)
            except OSError as error:
                failed.add(part.path)
                self.failures.append(FileFailure.of(part.path, _refusal(part, error)))
        for part in [part for part in self._parts if part.path in failed]:
            self._parts.remove(part)
            mman.munmap(part.address, part.pages.length)
        self.files = len(locked - failed)
        self.bytes = sum(part.pages.length for part in self._parts)


def lock_files(
    paths: Path | Iterable[Path] | Selection, *, ranges: Ranges | None = None,
    progress: Progress | bool = False, rate: RateLimit | Size | None = None, headroom: HeadroomChoice = "check",
) -> FileLock:  # fmt: skip
    """Bring files into memory and lock them there: the kernel does not drop their pages until the lock is closed.

    Args:
        paths: files and directories, or a :func:`prefault.select` of them.
        ranges: byte ranges of each file, rounded outward to whole pages; None: the whole files.
        progress: True draws a bar on stderr, or logs; a function is called with the bytes done and in all.
        rate: limit of the bytes a second, as ``"2 GiB/s"``, those included that are cached already; None: none.
        headroom: ``"check"`` checks before the start that RLIMIT_MEMLOCK, the memory cgroups and the machine leave as much;
            ``"ignore"`` does not.

    Returns:
        The lock, to be kept and closed. Files that could not be locked are in its ``failures``.

    Raises:
        HeadroomError: a limit leaves less; nothing is locked.
        OSError: ENOMEM: the process has as many mappings as it may have; nothing is locked.
        ValueError: a range that is negative or backwards.

    Source: mlock(2); vmtouch(8), ``-l``.
    """
    check_progress(progress)
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    wanted = checked_ranges(ranges)
    began, limit = perf_counter(), rate_limit(rate)
    made = FileLock()
    try:
        needed = made._map(as_selection(paths), wanted)
        if headroom == "check":
            _ensure_allowed(sum(part.pages.length for part in made._parts), needed)
        with reporting(progress, "lock") as report:
            made._lock(report, limit)
    except BaseException:
        made.close()
        raise
    made.seconds = perf_counter() - began
    return made


def _ensure_allowed(total: int, needed: int) -> None:
    short = shortfall_of(MemoryUse(locks=True), total, "RLIMIT_MEMLOCK")
    if short is None:
        answer = ask_for_memory(needed)
        short = None if answer.short is None else Shortfall(answer.short, needed, answer.left_bytes)
    if short is not None:
        raise _headroom_error(short)


def _headroom_error(short: Shortfall) -> HeadroomError:
    return short.error(
        f"locking takes {format_size(short.needed_bytes)}, and {short.limit.advice}; --headroom ignore, or"
        " headroom='ignore', tries all the same"
    )


def _no_room(path: str, parts: int, size: int) -> FileError:
    reason = why_no_room(size, size, data=False, noreserve=False)
    return FileError(errno.ENOMEM, f"cannot be mapped beside {parts} files", path, f"{reason}; nothing is locked")


def _refusal(part: _Part, error: OSError) -> OSError:
    """Return the error of a file whose pages cannot be locked, with the cause where it can be found."""
    try:
        size = os.stat(part.path).st_size
    except OSError as gone:
        return gone
    if size < part.pages.start + 1 or PageRange.outward(0, size).stop < part.pages.stop:
        return FileError(errno.ENOMEM, f"shrank to {format_size(size)} meanwhile", part.path, "try again")
    if error.errno in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        reason = "cannot be read or locked (mlock(2) tells no more)"
        return FileError(error.errno, reason, part.path, f"look at dmesg for errors of the disk; {lock_refusal()}")
    return error
