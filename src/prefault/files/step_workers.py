"""Threads that work through the steps of one range after another, no further than they are allowed."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from prefault.files.failures import FileError
from prefault.limits.process_limits import start_thread

_MOST_FAILURES = 8
"""Failed steps after which no more of a file are begun: a server that is gone answers each with a delay."""


class ReadStep(NamedTuple):
    """Bytes ``[start, stop)`` of a file that one thread brings in; ``exact``: nothing beside them."""

    start: int
    stop: int
    exact: bool = False


class StepFailure(NamedTuple):
    """ReadStep that failed, and its error."""

    step: ReadStep
    error: OSError


class Reader(Protocol):
    """One thread's means of bringing in steps, such as :class:`prefault.files.warm_methods.PieceReader`."""

    def bring_in(self, start: int, stop: int, *, exact: bool) -> int:
        """Bring in a step; return ``stop``, or the offset where the file ended."""

    def close(self) -> None:
        """Release what it holds."""


class StepWorkers:
    """Threads that bring in steps in order, started at once; a context manager that stops them.

    A thread that waits for a disk or a server that does not answer cannot be stopped: it is left behind, and ends with its
    system call. All that it uses is its own.

    Args:
        steps: the work.
        make_reader: makes the means of one thread, in the thread.
        threads: how many; fewer where the system starts no more.
        allowed_bytes: bytes that may be begun until :meth:`allow` allows more; None: all.
        allowed_stop: offset where the last step ends that may be begun until :meth:`allow_up_to` allows more; None: any.

    Attributes:
        done_bytes: bytes of the steps that are done.
        failures: steps that failed, in order of time.
        end: the smallest offset at which a step met the end of the file; None where none did.

    Raises:
        FileError: EAGAIN: no thread can be started at all.
    """

    def __init__(
        self, steps: Iterator[ReadStep], make_reader: Callable[[], Reader], threads: int,
        allowed_bytes: int | None = None, allowed_stop: int | None = None,
    ) -> None:  # fmt: skip
        self._steps = steps
        self._make_reader = make_reader
        self._allowed_bytes = allowed_bytes
        self._allowed_stop = allowed_stop
        self._begun_bytes = 0
        self._next: ReadStep | None = next(steps, None)
        self._open: set[int] = set()
        self._changed = threading.Condition(threading.RLock())
        self._stopped = False
        self.done_bytes = 0
        self.failures: list[StepFailure] = []
        self.end: int | None = None
        self._running = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work, name="prefault warm", daemon=True) for _ in range(threads)]
        if self._next is None:
            self._ended.set()
            return
        for number, thread in enumerate(self._threads):
            with self._changed:
                self._running += 1
            try:
                start_thread(thread)
            except OSError as error:
                self._has_ended()
                if not number:
                    raise FileError(errno.EAGAIN, "no thread can be started to read it", "", str(error.strerror)) from error
                break  # those that run do the work

    # --- in the threads

    def _work(self) -> None:
        reader = None
        try:
            while (step := self._take()) is not None:
                try:
                    if reader is None:
                        reader = self._make_reader()
                    reached = reader.bring_in(step.start, step.stop, exact=step.exact)
                except OSError as error:
                    self._finish(step, None, error)
                else:
                    self._finish(step, reached, None)
        finally:
            if reader is not None:
                reader.close()
            self._has_ended()

    def _has_ended(self) -> None:
        with self._changed:
            self._running -= 1
            if not self._running:
                self._ended.set()
            self._changed.notify_all()

    def _take(self) -> ReadStep | None:
        with self._changed:
            while True:
                step = self._next
                if step is None or self._stopped or len(self.failures) >= _MOST_FAILURES:
                    return None
                if self.end is not None and step.start >= self.end:
                    return None
                if self._is_allowed(step):
                    break
                self._changed.wait()
            self._next = next(self._steps, None)
            self._begun_bytes += step.stop - step.start
            self._open.add(step.start)
            return step

    def _is_allowed(self, step: ReadStep) -> bool:
        return (self._allowed_bytes is None or self._begun_bytes + step.stop - step.start <= self._allowed_bytes) and (
            self._allowed_stop is None or step.stop <= self._allowed_stop
        )

    def _finish(self, step: ReadStep, reached: int | None, error: OSError | None) -> None:
        with self._changed:
            self._open.discard(step.start)
            if error is not None:
                self.failures.append(StepFailure(step, error))
            elif reached is not None:
                self.done_bytes += max(0, reached - step.start)
                if reached < step.stop:
                    self.end = reached if self.end is None else min(self.end, reached)
            self._changed.notify_all()

    # --- for their owner

    @property
    def ended(self) -> bool:
        """True when no thread works any more."""
        return self._ended.is_set()

    @property
    def is_waiting_to_be_allowed(self) -> bool:
        """True if all threads wait for :meth:`allow`."""
        with self._changed:
            step = self._next
            return step is not None and not self._open and not self.ended and not self._is_allowed(step)

    @property
    def frontier(self) -> int | None:
        """Offset below which every step is done; None if all of them are."""
        with self._changed:
            starts = [*self._open]
            if self._next is not None:
                starts.append(self._next.start)
            return min(starts, default=None)

    def allow(self, bytes_in_all: int) -> None:
        """Let the threads begin steps until so many bytes have been begun since the start."""
        with self._changed:
            self._allowed_bytes = bytes_in_all
            self._changed.notify_all()

    def allow_up_to(self, stop: int) -> None:
        """Let the threads begin the steps that end at an offset or before."""
        with self._changed:
            self._allowed_stop = stop
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait until all threads have ended, for ``timeout`` seconds at most; return whether they have."""
        return self._ended.wait(timeout)

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until a condition holds, which is looked at after each step, for ``timeout`` seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: condition() or self.ended, timeout)

    def stop(self, timeout: float = 0.2) -> None:
        """Have the threads begin no further step, and wait up to ``timeout`` seconds for those under way; idempotent."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._ended.wait(timeout)

    def __enter__(self) -> StepWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
