"""Ways to bring a piece of a file into the page cache, each as one thread does it.

=============  =====================================================================================================
``populate``   MADV_POPULATE_READ through a mapping of our own: no copy. MADV_HUGEPAGE on it has the kernel read 2 MiB
               at once (Linux 5.18) where ``read_ahead_kb`` is small.
``readahead``  POSIX_FADV_WILLNEED in steps that the kernel does not cut short, then one pass of pread that waits for
               them. Reads exactly the bytes that it is given.
``pread``      preadv into a small buffer that is used again.
=============  =====================================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from prefault._kernel import mman
from prefault._system import capabilities
from prefault.files.open_file import OpenFile
from prefault.files.step_workers import ReadStep
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import KIB, MIB, format_count

MethodName: TypeAlias = Literal["populate", "readahead", "pread"]
METHOD_NAMES: tuple[MethodName, ...] = ("populate", "readahead", "pread")

_STEP = {"populate": 8 * MIB, "readahead": 1 * MIB, "pread": 256 * KIB}
"""Bytes that one thread brings in at once: Ctrl-C, budgets and limits on the rate are looked at between two steps."""

_BUFFER = 256 * KIB
"""Bytes of a reading thread's buffer: small enough for the CPU's cache."""

_HUGE = 2 * MIB

_UNKNOWN_READ_AHEAD = 128 * KIB
_LONGEST_READ_AHEAD = 1 * MIB


class WarmMethod(NamedTuple):
    """A way to bring in pages, and the number of threads that do it at one time."""

    name: MethodName
    threads: int

    @property
    def step_bytes(self) -> int:
        """Bytes that one thread brings in at once."""
        return _STEP[self.name]

    @property
    def is_exact(self) -> bool:
        """True if the kernel reads nothing beside the bytes that were asked for."""
        return self.name == "readahead"

    def __str__(self) -> str:
        return f"{self.name}, {format_count(self.threads, 'thread')}"


def can_populate() -> bool:
    """Tell whether this kernel has MADV_POPULATE_READ (Linux 5.14)."""
    return capabilities.MADV_POPULATE.available


class PieceReader:
    """One thread's descriptors and buffer for one file. Not for several threads: the kernel keeps read-ahead by descriptor.

    Args:
        file: the file; the caller keeps it open for longer.
        method: the way to read.
    """

    def __init__(self, file: OpenFile, method: MethodName) -> None:
        self._method = method
        window = _window(file)
        self._read_ahead = min(window, _LONGEST_READ_AHEAD)
        # Two huge pages are under way at first. Where the kernel reads as much ahead anyway, they gain nothing. Without
        # MADV_SEQUENTIAL it would read behind the range as well.
        self._advice = mman.MADV_HUGEPAGE if window < 2 * _HUGE else mman.MADV_SEQUENTIAL
        self._buffer: memoryview | None = None
        # The kernel doubles the read-ahead of a sequential reader, and reads for a random one what it asks for alone.
        self._fd = reopened(file.fd, os.POSIX_FADV_SEQUENTIAL if _is_doubled(file) else os.POSIX_FADV_NORMAL)
        # Opened now: a thread that is left behind with a hanging server must not use the number of a closed descriptor.
        self._exact_fd = reopened(file.fd, os.POSIX_FADV_RANDOM)

    def bring_in(self, start: int, stop: int, *, exact: bool = False) -> int:
        """Bring in the bytes ``[start, stop)``; return ``stop``, or the offset where the file ended.

        Args:
            start: byte offset of a page.
            stop: byte offset.
            exact: read nothing beside them, whatever the method.

        Raises:
            OSError: they could not be read: the pages before are in the page cache.
        """
        if exact or self._method == "readahead":
            return self._read_exactly(start, stop)
        if self._method == "populate":
            try:
                _populate(self._fd, start, stop, self._advice)
            except OSError as error:
                if error.errno not in _PREAD_TELLS:
                    raise
            else:
                return stop
        return self._pread(self._fd, start, stop)

    def _read_exactly(self, start: int, stop: int) -> int:
        for at in range(start, stop, self._read_ahead):
            with contextlib.suppress(OSError):  # advice: pread finds the error, and reads what nobody read ahead
                os.posix_fadvise(self._fd, at, min(self._read_ahead, stop - at), os.POSIX_FADV_WILLNEED)
        if self._method != "readahead" and can_populate():
            # Windows of the other methods end in pages that have any pread begin the next window, whatever its
            # descriptor was advised. A mapping that was advised MADV_RANDOM does not.
            try:
                _populate(self._exact_fd, start, stop, mman.MADV_RANDOM)
            except OSError as error:
                if error.errno not in _PREAD_TELLS:
                    raise
            else:
                return stop
        return self._pread(self._exact_fd, start, stop)

    def _pread(self, fd: int, start: int, stop: int) -> int:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFER))
        at = start
        while at < stop:
            count = os.preadv(fd, [self._buffer[: min(_BUFFER, stop - at)]], at)
            if not count:
                break
            at += count
        return at

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        for fd in (self._fd, self._exact_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._exact_fd = -1


def steps_of(file: OpenFile, ranges: RangeSet, method: WarmMethod, *, may_read_beyond: bool = False) -> Iterator[ReadStep]:
    """Cut ranges of a file into steps, so that the kernel reads ahead of no range.

    The method does the middle of a long range. Its end, short ranges, and what lies before the first huge page are read
    exactly: reading ahead in the middle ends before the range does.

    Args:
        file: the file, whose size ends the last step.
        ranges: byte offsets of whole pages.
        method: the way to read.
        may_read_beyond: leave the ends to the method as well.
    """
    margin = 0 if may_read_beyond else over_read_bytes(file)
    for pages in ranges:
        stop = min(pages.stop, file.size)
        first, last = pages.start, stop
        if not method.is_exact and margin:
            if method.name == "populate":  # a huge page begins before the range
                first += -first % _HUGE
            if stop < file.size:
                last = stop - margin
                if last - first < margin:
                    first = last = stop
        yield from _cut(pages.start, min(first, stop), WarmMethod("readahead", 1).step_bytes, exact=True)
        yield from _cut(first, last, method.step_bytes, exact=False)
        yield from _cut(max(first, last), stop, WarmMethod("readahead", 1).step_bytes, exact=True)


def _cut(start: int, stop: int, size: int, *, exact: bool) -> Iterator[ReadStep]:
    while start < stop:
        end = min(stop, start - start % size + size)
        yield ReadStep(start, end, exact)
        start = end


def over_read_bytes(file: OpenFile) -> int:
    """Return the bytes that the kernel may read beyond those that a method was asked for."""
    # Reading into one window has the kernel begin the next; so does reading into a huge folio.
    ahead = 2 * _window(file) + 4 * _HUGE
    return ahead + -ahead % _HUGE


_PREAD_TELLS = (errno.EFAULT, errno.ENODEV, errno.EACCES, errno.EOPNOTSUPP)
"""Errors after which pread is tried: EFAULT is the end of the file as well as a failing disk; the others, no mapping."""


def _populate(fd: int, start: int, stop: int, advice: int) -> None:
    """Map a piece, populate it, and unmap it. The mapping is not read through, so that a shrinking file raises no SIGBUS."""
    pages = PageRange.outward(start, stop)
    address = mman.mmap(0, pages.length, mman.PROT_READ, mman.MAP_PRIVATE, fd, pages.start)
    try:
        with contextlib.suppress(OSError):  # EINVAL: a kernel without transparent huge pages
            mman.madvise(address, pages.length, advice)
        mman.madvise(address, pages.length, mman.MADV_POPULATE_READ)
    finally:
        mman.munmap(address, pages.length)


def reopened(fd: int, advice: int) -> int:
    """Open a file again, for read-ahead of its own; where that is impossible, duplicate its descriptor."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    for also in (os.O_NOATIME, 0):
        with contextlib.suppress(OSError):
            opened = os.open(f"/proc/self/fd/{fd}", flags | also)
            with contextlib.suppress(OSError):  # not every file system takes advice
                os.posix_fadvise(opened, 0, 0, advice)
            return opened
    return os.dup(fd)


def _is_doubled(file: OpenFile) -> bool:
    """Tell whether a device reads so little ahead that it is to read twice as much."""
    return _read_ahead_window(file) < _LONGEST_READ_AHEAD


def _window(file: OpenFile) -> int:
    """Return the bytes that the kernel reads ahead for a :class:`PieceReader`: the longest POSIX_FADV_WILLNEED."""
    return _read_ahead_window(file) * (2 if _is_doubled(file) else 1) or _UNKNOWN_READ_AHEAD


def _read_ahead_window(file: OpenFile) -> int:
    """Return the device's ``read_ahead_kb`` in bytes."""
    device = os.fstat(file.fd).st_rdev if file.is_block_device else file.identity.device
    number = f"{os.major(device)}:{os.minor(device)}"
    # A partition has that of its disk.
    for name in (f"/sys/class/bdi/{number}/read_ahead_kb", f"/sys/dev/block/{number}/../queue/read_ahead_kb"):
        with contextlib.suppress(OSError, ValueError), open(name) as setting:
            return int(setting.read()) * KIB
    return _UNKNOWN_READ_AHEAD  # that of an overlay is its disk's
