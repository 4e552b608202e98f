"""Read a file that is larger than memory: pages are brought in ahead of the reader and evicted behind it."""

from __future__ import annotations

import errno
import io
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from prefault.engine.rate import RateLimit, rate_limit
from prefault.files.budget import MemoryBudget
from prefault.files.failures import FileError
from prefault.files.file_plan import FilePlan
from prefault.files.method_choice import MethodChoice
from prefault.files.open_file import OpenFile
from prefault.files.step_workers import ReadStep, StepWorkers
from prefault.files.warm_methods import MethodName, PieceReader, WarmMethod, over_read_bytes, reopened, steps_of
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import GIB, MIB, PAGE_SIZE, Size, format_size, parse_size

_SEGMENT = 64 * MIB
"""Bytes of which it is asked at one time which are cached."""

_HUGE = 2 * MIB
_SMALLEST_WINDOW = 4 * MIB
_TURN_SECONDS = 0.05

_SHARE_OF_MEMORY = 2
"""The window takes at most one part in so many of the memory that is left: readers allocate, too."""


def stream(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes], window: Size = 2 * GIB, *, chunk: Size = 8 * MIB,
    start: Size = 0, stop: Size | None = None, method: MethodName | None = None, threads: int | None = None,
    budget: Size | None = None, rate: RateLimit | Size | None = None,
) -> FileStream:  # fmt: skip
    """Open a file to be read from one end to the other, whatever its size, in constant memory.

    Threads bring in up to ``window`` bytes ahead of the reader, and what the reader is done with is evicted, so that the
    kernel has no reason to evict pages that were brought in and not yet used. Pages that were cached before stay.

    ::

        with prefault.stream("model.safetensors", window="2 GiB") as file:
            for view in file:  # a read-only memoryview of up to ``chunk`` bytes, valid until the next one
                consume(file.position, view)

    Args:
        path: a regular file or a block device.
        window: bytes of page cache that are used at most, 4 MiB or more; less where memory cgroups or the machine leave
            less, but for these 4 MiB.
        chunk: bytes of each memoryview.
        start: byte offset to begin at.
        stop: byte offset to end at; None: the end of the file.
        method: as for :func:`warm`.
        threads: as for :func:`warm`.
        budget: bytes of page cache to use at most, from 4 MiB on, if less than ``window``.
        rate: limit of bytes a second.

    Raises:
        FileError, OSError: the file cannot be opened.
        TypeError, ValueError: an argument that is none, or a window or a budget below 4 MiB.

    Sources: posix_fadvise(2), POSIX_FADV_DONTNEED; llama.cpp#28055, TensorRT-LLM#17430, tokenspeed#833.
    """
    choice = MethodChoice(threads, method)
    return FileStream(
        OpenFile(path), parse_size(window), chunk=parse_size(chunk), start=parse_size(start),
        stop=None if stop is None else parse_size(stop), choice=choice,
        budget=MemoryBudget(budget), rate=rate_limit(rate),
    )  # fmt: skip


class FileStream(io.RawIOBase):
    """File that is read in constant memory; made by :func:`stream`. Not for several threads.

    It is a raw binary file (io.RawIOBase), except that iterating gives memoryviews.

    Attributes:
        position: offset in the file of the next byte to be read.
        size: bytes of the file when it was opened.
        stop: offset at which the stream ends.
        evicted_bytes: bytes that were evicted behind the reader so far.
    """

    def __init__(
        self, file: OpenFile, window: int, *, chunk: int, start: int, stop: int | None, choice: MethodChoice,
        budget: MemoryBudget, rate: RateLimit | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._file = file
        try:
            if chunk < 1:
                raise ValueError("a chunk has at least 1 byte")
            self.size = file.size
            self.stop = file.size if stop is None else min(stop, file.size)
            for name, given in (("window", window), ("budget", budget.asked_bytes)):
                if given is not None and given < _SMALLEST_WINDOW:
                    least = format_size(_SMALLEST_WINDOW)
                    given_size = format_size(given)
                    raise ValueError(f"a stream takes {least} of page cache at least, and {name}= is {given_size}: raise it")
            if start > self.stop:
                raise ValueError(f"the stream begins at byte {start}, behind its end at {self.stop}")
            memory = budget.left_bytes() // _SHARE_OF_MEMORY if budget.asked_bytes is None else budget.asked_bytes
            self._window = max(min(window, memory), _SMALLEST_WINDOW)  # however little is left, the reader goes on
            self._chunk = chunk
            self._behind = min(8 * MIB, max(MIB, self._window // 4))
            self._budget = budget
            self._rate = rate
            self._buffer: memoryview | None = None
            margin = over_read_bytes(file)
            method = choice.first(file)
            # A small window leaves no room for what the kernel reads ahead by itself.
            self._method = method if self._window >= 4 * margin else WarmMethod("readahead", method.threads)
            self._segment = max(_SEGMENT, 2 * margin)
            self.evicted_bytes = 0
            self.position = start
            self._workers: StepWorkers | None = None
            self._brought: deque[PageRange] = deque()
            self._evicted_to = start
            self._counted_bytes = 0
            # What is not there any more is read, and nothing else.
            self._fd = reopened(file.fd, os.POSIX_FADV_RANDOM)
        except BaseException:
            file.close()
            super().close()
            raise

    # --- ahead of the reader

    def _start(self) -> StepWorkers:
        self._evicted_to = self.position - self.position % PAGE_SIZE
        file, method = self._file, self._method
        self._counted_bytes = 0
        try:
            workers = StepWorkers(self._steps(), lambda: PieceReader(file, method.name), method.threads, allowed_stop=0)
        except OSError as error:
            error.filename = file.path
            raise
        self._workers = workers
        return workers

    def _steps(self) -> Iterator[ReadStep]:
        """Yield the steps, segment by segment. Runs in the threads, one at a time.

        A segment is looked at before the previous one is read: what the kernel reads ahead into it is the stream's own.
        """
        at = self._evicted_to
        planned = self._plan(at)
        while planned is not None:
            stop, missing = planned
            planned = self._plan(stop)
            self._brought.extend(missing)
            yield from steps_of(self._file, missing, self._method, may_read_beyond=planned is not None)

    def _plan(self, at: int) -> tuple[int, RangeSet] | None:
        if at >= self.stop:
            return None
        stop = min(self.stop, at - at % self._segment + self._segment)
        return stop, FilePlan.of(self._file, RangeSet([self._file.pages(at, stop)]), missing_only=True).missing

    def _allow(self, workers: StepWorkers) -> None:
        """Let the threads go on, as far as window and memory allow."""
        self._budget.take(workers.done_bytes - self._counted_bytes)
        self._counted_bytes = workers.done_bytes
        room = min(self._window, max(0, self._budget.taken_bytes) + self._budget.left_bytes() // _SHARE_OF_MEMORY)
        # The reader goes on however little is left.
        workers.allow_up_to(max(self._evicted_to + room, self.position + 2 * self._method.step_bytes))

    def _wait_until_read(self, workers: StepWorkers, stop: int) -> int:
        """Wait until bytes at the position are there; return the offset up to which they are, ``stop`` at most."""

        def reached() -> int:
            frontier = workers.frontier
            return stop if frontier is None or workers.ended else min(stop, frontier)

        while (ready := reached()) <= self.position:
            self._allow(workers)
            workers.wait_for(lambda: reached() > self.position, _TURN_SECONDS)
        return ready

    # --- the reader

    def readinto(self, buffer: Any) -> int:
        """Fill a writable buffer; return the number of bytes, which is smaller only at the end of the stream.

        Raises:
            OSError: the file cannot be read.
            FileError: it has become shorter.
            ValueError: the stream is closed.
        """
        view = memoryview(buffer).cast("B")
        if self.closed:
            raise ValueError("the stream is closed")
        workers = self._workers or self._start()
        done = 0
        wanted = min(len(view), self.stop - self.position)
        while done < wanted:
            ready = self._wait_until_read(workers, min(self.position + wanted - done, self.position + self._behind))
            count = self._read(view[done : done + ready - self.position])
            done += count
            self.position += count
            if self._rate is not None:
                self._rate.wait(count)
            self._evict_behind()
            self._allow(workers)
        return done

    def _read(self, view: memoryview) -> int:
        try:
            count = os.preadv(self._fd, [view], self.position)
        except OSError as error:
            error.filename = self._file.path
            raise
        if not count:
            size = format_size(self._file.current_size())
            reason = f"it shrank to {size} while it was streamed"
            raise FileError(errno.ENODATA, reason, self._file.path, "stream it again once it is whole")
        return count

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, fewer only at the end; negative: all that is left."""
        left = max(0, self.stop - self.position)
        found = bytearray(left if size < 0 else min(size, left))
        return bytes(memoryview(found)[: self.readinto(found)])

    def __iter__(self) -> Iterator[memoryview]:  # type: ignore[override]  # of the lines of a binary file, nobody has use
        """Yield read-only memoryviews of the rest of the stream; each is valid until the next one is asked for."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(self._chunk))
        while count := self.readinto(self._buffer):
            yield self._buffer[:count].toreadonly()

    # --- behind the reader

    def _evict_behind(self) -> None:
        # Large folios are aligned: none of them lies on both sides.
        done = self.position - self.position % min(_HUGE, self._behind)
        if done - self._evicted_to >= self._behind:
            self._evict(done)
            self._evicted_to = done

    def _evict(self, stop: int) -> None:
        """Evict what was brought in and lies before ``stop``."""
        while self._brought and self._brought[0].start < stop:
            pages = self._brought.popleft()
            if pages.stop > stop:
                self._brought.appendleft(PageRange(stop, pages.stop))
                pages = PageRange(pages.start, stop)
            os.posix_fadvise(self._file.fd, pages.start, pages.length, os.POSIX_FADV_DONTNEED)
            self.evicted_bytes += pages.length
            self._budget.take(-pages.length)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, and return it. What was brought in for the old place is evicted, unless it lies just ahead."""
        if self.closed:
            raise ValueError("the stream is closed")
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.stop}
        if whence not in bases:
            raise ValueError(f"whence is 0, 1 or 2 (os.SEEK_SET and others), not {whence!r}")
        base = bases[whence]
        target = base + offset
        if target < 0:
            raise ValueError(f"byte {target} of a file")
        target = min(target, self.stop)
        workers = self._workers
        if workers is not None:
            frontier = workers.frontier
            if self.position <= target and (frontier is None or target <= frontier):
                self.position = target
                self._evict_behind()
                self._allow(workers)
                return target
            self._end_workers()
        self.position = target
        return target

    def _end_workers(self) -> None:
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.stop(1.0)
            self._evict(PageRange.outward(0, self.stop).stop)
            self._budget.take(-self._budget.taken_bytes)  # of the last step, less than a page may be missing

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Stop reading ahead, evict what was brought in, and close the file; idempotent."""
        if not self.closed:
            try:
                self._end_workers()
            finally:
                os.close(self._fd)
                self._file.close()
                super().close()

    def __repr__(self) -> str:
        return f"FileStream({self._file.path!r}, position={self.position}, stop={self.stop})"
