"""Where the bytes of a remote file come from: a source of a pinned version, read at any offset, patiently.

A source gives the bytes of the one version that it was opened with, or raises: never other bytes, fewer, or zeros.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from prefault.errors import DeviceError

CHUNK = 256 << 10
"""How much is read between two looks at the clock, in bytes."""


PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of HTTP that may be better in a moment."""


def printable(text: str) -> str:
    """Return a text with its lone surrogates escaped, so that UTF-8 can encode it: file names may have any bytes (PEP 383)."""
    return text.encode(errors="backslashreplace").decode()


class SourceError(DeviceError):
    """A source cannot be read, and a retry would not help or did not; the message says what to do."""

    def __init__(self, number: int | None, message: str | None) -> None:
        super().__init__(number, message and printable(message))  # it is sent from the server to the clients


class SourceMissingError(SourceError, FileNotFoundError):
    """There is nothing at that place, or no longer (ENOENT)."""


class SourceChangedError(SourceError):
    """The source is not what it was when it was mapped (ESTALE): open it again."""


class GivenUpError(SourceError):
    """It was tried for as long, or as often, as the patience allows."""


class PassingError(Exception):
    """What may be better in a moment: it is tried again.

    Attributes:
        done: bytes that had arrived, and that are right.
        after_s: how long the source asks us to wait, in seconds.
        at_once: nothing is wrong but an old connection; it does not count as a failure.
    """

    def __init__(self, reason: str, *, done: int = 0, after_s: float = 0.0, at_once: bool = False) -> None:
        super().__init__(reason)
        self.done = done
        self.after_s = after_s
        self.at_once = at_once


class Version(NamedTuple):
    """What tells a source apart from what it may become; plain values, so that it travels in a recipe.

    Attributes:
        length: bytes.
        tag: what changes with the content: an ETag, or device, inode and so on of a local file. Empty: there is none.
        modified: the time of the last change, as the source writes it. Empty: it does not say.
    """

    length: int
    tag: str = ""
    modified: str = ""

    @property
    def told_apart(self) -> bool:
        """Whether another version would be noticed though it had the same length."""
        return bool(self.tag or self.modified)

    def change(self, now: Version) -> str:
        """What is different now, in words; empty if nothing is."""
        if now.length != self.length:
            return f"it had {self.length} bytes and has {now.length} now"
        if now.tag != self.tag:
            return f"its version was {self.tag or 'not given'} and is {now.tag or 'not given'} now"
        if now.modified != self.modified:
            return f"it was of {self.modified or 'no date'} and is of {now.modified or 'no date'} now"
        return ""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on with what may pass: connection errors, time-outs, 429 and 5xx.

    Attributes:
        retries: how often one read is tried again without a byte of progress in between.
        timeout_s: how long to wait for the next bytes, in seconds.
        total_s: how long one read may take in all, retries and pauses included, in seconds.
        first_pause_s: before the first retry, in seconds; it doubles each time.
        longest_pause_s: up to which, in seconds.
    """

    retries: int = 6
    timeout_s: float = 10.0
    total_s: float = 60.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 8.0


class _Limit(threading.local):
    until: float = math.inf


_limit = _Limit()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """All reads of this thread inside the ``with`` end before then, also those that a library asks for."""
    before = _limit.until
    _limit.until = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _limit.until = before


class Attempts:
    """The retries of one read: counts, pauses, and gives up."""

    def __init__(self, patience: Patience, name: str) -> None:
        self._patience = patience
        self._name = name
        self._failures = 0
        self._until = min(time.monotonic() + patience.total_s, _limit.until)

    @property
    def left_s(self) -> float:
        """Of the time that a read may take; SourceError when there is none."""
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
        """How long to wait for the next bytes; SourceError as above."""
        return min(self._patience.timeout_s, self.left_s)

    @property
    def long_timeout_s(self) -> float:
        """How long to wait for a request of which nothing is seen before all is there: it can be repeated once."""
        return max(self.timeout_s, self.left_s / 2)

    def wait(self, failure: PassingError) -> None:
        """Pause before the next attempt; SourceError if there is to be none."""
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
    """Bytes at any offset, of one version. Safe to be read by several threads.

    Attributes:
        name: for messages; without passwords and signatures.
        version: what it was when it was opened.
    """

    name: str
    version: Version

    def __init__(self, name: str, patience: Patience) -> None:
        self.name = name
        self.patience = patience

    @property
    def length(self) -> int:
        """Bytes."""
        return self.version.length

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on. SourceError if that cannot be done."""
        if offset < 0 or offset + len(target) > self.length:
            raise ValueError(f"{self.name}: bytes {offset} to {offset + len(target)} lie outside its {self.length} bytes")
        attempts = Attempts(self.patience, self.name)
        done = 0
        while done < len(target):
            try:
                # Released also where an exception keeps this frame: nobody holds on to memory that may go.
                with target[done:] as rest:
                    self._attempt(offset + done, rest, attempts)
                return
            except PassingError as failure:
                done += failure.done
                attempts.wait(failure)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    @abc.abstractmethod
    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:
        """Fill ``target``, which is not empty, or raise PassingError (with what had arrived) or SourceError."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give up connections and files. A second call does nothing."""

    def changed(self, what: str) -> SourceChangedError:
        """The error that says so."""
        return SourceChangedError(errno.ESTALE, f"{self.name} changed while it was mapped: {what}; open it again")


class Slice(Source):
    """A part of another source, which it owns."""

    def __init__(self, inner: Source, name: str, start: int, version: Version) -> None:
        super().__init__(name, inner.patience)
        if start + version.length > inner.length:
            raise SourceError(
                errno.EIO,
                f"{name}: it is to end at byte {start + version.length} of {inner.length} bytes: the source is broken",
            )
        self._inner = inner
        self._start = start
        self.version = version

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:  # noqa: ARG002  the inner one has its own
        self._inner.read_into(self._start + offset, target)

    def close(self) -> None:
        """Close the whole of it."""
        self._inner.close()


class SourceFile(io.RawIOBase):
    """A source as a file object, for libraries that want one.

    Attributes:
        failure: what a read raised last: some libraries replace it by an error of their own that says less.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._position = 0
        self.failure: Exception | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See :meth:`io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """All of the buffer, but at the end of the source; what it raises is also in :attr:`failure`."""
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
"""Streams that are kept, before one is moved back rather than another opened."""


class StreamPool:
    """File objects on one content, one a thread at a time; opened when needed, and kept."""

    def __init__(self, opener: Any) -> None:
        self._opener = opener
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def take(self, cost: Callable[[Any], float] | None = None) -> Any:
        """A file object that nobody else uses; the cheapest of the idle ones. Infinite cost: rather a new one."""
        with self._lock:
            if self._idle:
                index = len(self._idle) - 1
                if cost is not None:
                    index = min(range(len(self._idle)), key=lambda index: cost(self._idle[index]))
                if cost is None or len(self._idle) >= _MOST_IDLE or cost(self._idle[index]) < math.inf:
                    return self._idle.pop(index)
        return self._opener()

    def give(self, stream: Any) -> None:
        """It may be used by others again."""
        with self._lock:
            self._idle.append(stream)

    def close(self) -> None:
        """Close all that are not in use."""
        with self._lock:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()


def fill_from(stream: Any, offset: int, target: memoryview) -> int:
    """Seek and read until ``target`` is full or the stream ends; how many bytes that were."""
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
                raise ValueError(f"read({len(target) - done}) gave {count} bytes")
            target[done : done + count] = content
        if not count:
            break
        done += count
    return done
