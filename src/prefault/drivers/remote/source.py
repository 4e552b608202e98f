"""Sources of bytes of a pinned version, read at any offset, with retries.

A source returns the bytes of the one version that it was opened with, or raises: never other bytes, fewer, or zeros.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import io
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from prefault.errors import DeviceError

_T = TypeVar("_T")

CHUNK = 256 << 10
"""Bytes that are read between two checks of the time limit."""

TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which a retry may succeed."""


def printable(text: str) -> str:
    """Return a text that UTF-8 can encode: lone surrogates, which stand for any bytes of a file name, are escaped."""
    return text.encode(errors="backslashreplace").decode()


class SourceError(DeviceError):
    """A source cannot be read, and a retry would not help or did not; the message tells what to do."""

    def __init__(self, number: int | None, message: str | None) -> None:
        super().__init__(number, message and printable(message))  # it is sent from the server to the clients


class SourceMissingError(SourceError, FileNotFoundError):
    """A source does not exist, or no longer (ENOENT)."""


class SourceChangedError(SourceError):
    """A source has changed since it was mapped (ESTALE): open it again."""


class GivenUpError(SourceError):
    """A read was retried for as long, or as often, as the patience allows."""


class TransientError(Exception):
    """A failure after which the read is retried.

    Attributes:
        done: bytes that had arrived before, and are right.
        after_s: seconds that the source asks to wait.
        at_once: only an idle connection was closed: retry without pause; it does not count as a failure.
    """

    def __init__(self, reason: str, *, done: int = 0, after_s: float = 0.0, at_once: bool = False) -> None:
        super().__init__(reason)
        self.done = done
        self.after_s = after_s
        self.at_once = at_once


class Version(NamedTuple):
    """Version of a source: plain values, so that a recipe can carry them.

    Attributes:
        length: bytes.
        tag: changes with the content: an ETag, or device and inode of a local file. Empty: unknown.
        modified: the time of the last change, as the source writes it. Empty: unknown.
    """

    length: int
    tag: str = ""
    modified: str = ""

    @property
    def told_apart(self) -> bool:
        """True if another version of the same length would be noticed."""
        return bool(self.tag or self.modified)

    def derived(self, length: int, how: str) -> Version:
        """Return the version of content that is inside this one; ``how`` ends in "of" or "in"."""
        return Version(length, f"{how} {self.length} {self.tag}".strip(), self.modified)

    def change(self, now: Version) -> str:
        """Return the difference between this version and ``now``, in words; empty if there is none."""
        if now.length != self.length:
            return f"it had {self.length} bytes and has {now.length} now"
        if now.tag != self.tag:
            return f"its version was {self.tag or 'not given'} and is {now.tag or 'not given'} now"
        if now.modified != self.modified:
            return f"it was of {self.modified or 'no date'} and is of {now.modified or 'no date'} now"
        return ""


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits of retries after transient failures: connection errors, timeouts, 429 and 5xx.

    Attributes:
        retries: maximum of retries of one read without a byte of progress in between.
        timeout_s: seconds to wait for the next bytes.
        total_s: seconds that one read may take in all, retries and pauses included.
        first_pause_s: seconds before the first retry; each pause is twice as long as the one before.
        longest_pause_s: maximum of seconds between retries.
    """

    retries: int = 6
    timeout_s: float = 10.0
    total_s: float = 60.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 8.0


class _ThreadDeadline(threading.local):
    until: float = math.inf


_deadline = _ThreadDeadline()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit the time of all reads of this thread inside the ``with``, also of those that a library starts."""
    before = _deadline.until
    _deadline.until = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.until = before


class Attempts:
    """Retries of one read: their number, pauses and time limit."""

    def __init__(self, patience: Patience, name: str) -> None:
        self._patience = patience
        self._name = name
        self._failures = 0
        self._until = min(time.monotonic() + patience.total_s, _deadline.until)

    @property
    def left_s(self) -> float:
        """Seconds left for this read; raises GivenUpError when there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise GivenUpError(
                errno.ETIMEDOUT,
                f"{self._name}: a read took longer than {self._patience.total_s:g} s: on a slow line a smaller batch, fewer"
                " workers or a longer patience help",
            )
        return left

    @property
    def timeout_s(self) -> float:
        """Seconds to wait for the next bytes; raises GivenUpError when no time is left."""
        return min(self._patience.timeout_s, self.left_s)

    @property
    def long_timeout_s(self) -> float:
        """Seconds to wait for a request that shows no progress: half of the time left, so that it can be retried once."""
        return max(self.timeout_s, self.left_s / 2)

    def retry(self, function: Callable[[], _T]) -> _T:
        """Call a function until it raises no TransientError; return its result."""
        while True:
            try:
                return function()
            except TransientError as failure:
                self.wait(failure)

    def wait(self, failure: TransientError) -> None:
        """Pause before the next attempt; raise GivenUpError if no retry or no time is left."""
        if failure.at_once:
            return
        self._failures = 1 if failure.done else self._failures + 1
        if self._failures > self._patience.retries:
            tries = f"{self._failures} tries" if self._failures > 1 else "one try"
            raise GivenUpError(errno.EIO, f"{self._name}: given up after {tries}: {failure}") from failure
        pause = min(self._patience.longest_pause_s, self._patience.first_pause_s * 2 ** (self._failures - 1))
        # Jitter: many readers that failed at one moment do not all come back at one moment.
        pause = max(pause * random.uniform(0.5, 1.0), failure.after_s)
        if time.monotonic() + pause >= self._until:
            raise GivenUpError(
                errno.ETIMEDOUT,
                f"{self._name}: given up, for the next try in {pause:.1f} s would exceed the {self._patience.total_s:g} s"
                f" that a read may take: {failure}",
            ) from failure
        time.sleep(pause)


class Source(abc.ABC):
    """Bytes of one version, read at any offset. Thread-safe.

    Attributes:
        name: the name in messages; without passwords and signatures.
        version: the pinned version.
    """

    name: str
    version: Version

    def __init__(self, name: str, patience: Patience) -> None:
        self.name = name
        self.patience = patience

    @property
    def length(self) -> int:
        """Length in bytes."""
        return self.version.length

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on; raise SourceError if they cannot be read."""
        if offset < 0 or offset + len(target) > self.length:
            raise ValueError(f"{self.name}: bytes {offset} to {offset + len(target)} lie outside its {self.length} bytes")
        attempts = Attempts(self.patience, self.name)
        done = 0
        while done < len(target):
            try:
                # Released even if an exception keeps this stack frame: the memory may be unmapped.
                with target[done:] as rest:
                    self._attempt(offset + done, rest, attempts)
                return
            except TransientError as failure:
                done += failure.done
                attempts.wait(failure)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    @abc.abstractmethod
    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:
        """Fill ``target``, which is not empty, or raise TransientError (with the bytes that arrived) or SourceError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close connections and files. Idempotent."""

    def check_version(self, now: Version) -> None:
        """Raise SourceChangedError unless the pinned version is the version now."""
        difference = self.version.change(now)
        if difference:
            raise self.changed(difference)

    def cut_short(self, stop: int) -> SourceError:
        """Return the error for a source that ends at byte ``stop``, before its length."""
        return SourceError(errno.EIO, f"{self.name}: it ends at byte {stop} of {self.length}")

    def changed(self, what: str) -> SourceChangedError:
        """Return the error for a changed source; ``what`` tells the change."""
        return SourceChangedError(errno.ESTALE, f"{self.name} changed while it was mapped: {what}; open it again")


class DerivedSource(Source):
    """A source whose bytes come from another, which it owns and closes. That one has the attempts and the time limit."""

    def __init__(self, inner: Source, name: str) -> None:
        super().__init__(name, inner.patience)
        self._inner = inner

    def close(self) -> None:
        """Close the other source."""
        self._inner.close()


class Slice(DerivedSource):
    """A part of another source."""

    def __init__(self, inner: Source, name: str, start: int, version: Version) -> None:
        super().__init__(inner, name)
        if start + version.length > inner.length:
            raise SourceError(
                errno.EIO,
                f"{name}: it would end at byte {start + version.length} of {inner.length} bytes: the source is broken",
            )
        self._start = start
        self.version = version

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:  # noqa: ARG002
        self._inner.read_into(self._start + offset, target)


class SourceFile(io.RawIOBase):
    """A source as a file object, for libraries that need one.

    Attributes:
        failure: the last error of a read: some libraries replace it by an error of their own that tells less.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._position = 0
        self.failure: Exception | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the offset of the next read, see :meth:`io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, except at the end of the source; an error is also kept in :attr:`failure`."""
        with memoryview(buffer) as whole, whole.cast("B") as view:
            count = max(0, min(len(view), self._source.length - self._position))
            try:
                with view[:count] as target:
                    self._source.read_into(self._position, target)
            except Exception as error:
                self.failure = error
                raise
        self._position += count
        return count


_MOST_IDLE = 8
"""Idle streams from which on one is moved backwards, and no further one is opened."""


class StreamPool:
    """Pool of file objects of one content: each is used by one thread at a time."""

    def __init__(self, opener: Any) -> None:
        self._opener = opener
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def use(self, cost: Callable[[Any], float] | None = None) -> Iterator[Any]:
        """Yield a file object; after an exception close it, as it may be broken for good: a retry opens another.

        Args:
            cost: the cheapest idle one is taken; where all have infinite cost, another is opened.
        """
        stream = self._take(cost)
        try:
            yield stream
        except BaseException:
            with contextlib.suppress(Exception):
                stream.close()
            raise
        with self._lock:
            self._idle.append(stream)

    def _take(self, cost: Callable[[Any], float] | None) -> Any:
        with self._lock:
            if self._idle:
                index = len(self._idle) - 1
                if cost is not None:
                    index = min(range(len(self._idle)), key=lambda index: cost(self._idle[index]))
                if cost is None or len(self._idle) >= _MOST_IDLE or cost(self._idle[index]) < math.inf:
                    return self._idle.pop(index)
        return self._opener()

    def close(self) -> None:
        """Close the idle file objects."""
        with self._lock:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()


def runs_of(numbers: Iterable[int]) -> list[range]:
    """Return ascending numbers as runs of consecutive ones."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def missing_package(needs: str, package: str, install: str) -> ImportError:
    """Return the error for a package that is not installed: "``needs`` it"; ``install`` is the argument of pip."""
    return ImportError(f"{needs} {package}, which is not installed: pip install {install}", name=package)


def fill_from(stream: Any, offset: int, target: memoryview) -> int:
    """Seek and read until ``target`` is full or the stream ends; return the number of bytes."""
    stream.seek(offset)
    done = 0
    while done < len(target):
        if hasattr(stream, "readinto"):
            with target[done : done + CHUNK] as piece:
                count = stream.readinto(piece)
        else:
            content = stream.read(min(CHUNK, len(target) - done))
            count = len(content)
            if count > len(target) - done:
                raise ValueError(f"read({len(target) - done}) returned {count} bytes")
            target[done : done + count] = content
        if not count:
            break
        done += count
    return done
