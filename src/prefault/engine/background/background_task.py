"""A call in a thread of its own, with a task to watch, cancel, wait for, or await."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from prefault._system import fork_hooks
from prefault.engine.progress import Progress, reporting
from prefault.engine.rate import RateLimit
from prefault.sizes import format_size

_EXIT_SECONDS = 10.0
"""Longest wait for calls under way when the interpreter exits."""

_LOOK_SECONDS = 0.02
"""Time between two looks whether a call that waits for its rate was cancelled."""


class BroughtIn(Protocol):
    """Result of a call: the bytes that it brought in, and those that were there before."""

    @property
    def bytes(self) -> int: ...  # noqa: D102
    @property
    def present_bytes(self) -> int: ...  # noqa: D102


Result = TypeVar("Result", bound=BroughtIn)


class Held(Protocol):
    """Borrowed memory."""

    def release(self) -> None:
        """Let the owner move or free it again. Idempotent, also in a child that is forked in the midst of it."""


class BackgroundCall(Generic[Result]):
    """State that the thread and the task share. The thread does not refer to the task, so a forgotten task is collected.

    Args:
        title: the name of the function that the thread calls, for progress and the log.
        total_bytes: bytes to bring in, as far as they are known at the start.
        cancelled_error: makes the exception of a call that is cancelled before it has done anything.
        held: borrowed memory, which the end of the call releases. The thread borrows nothing: in a forked child, which does
            not have it, nothing else could release that.
    """

    def __init__(
        self, title: str, total_bytes: int, cancelled_error: Callable[[str], BaseException], held: Held | None = None
    ) -> None:
        self.title = title
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.cancelled = False
        self.finished = threading.Event()
        self.outcome: Result | BaseException | None = None
        self.was_delivered = False
        self._cancelled_error = cancelled_error
        self._held = held
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []

    def start(self, function: Callable[[Progress], Result], progress: Progress | bool) -> None:
        """Start the thread.

        Args:
            function: does the work. What it calls its argument with is the progress; that raises KeyboardInterrupt once the
                call is cancelled, as Ctrl-C would.
            progress: of the caller.

        Raises:
            RuntimeError: no thread can be started.
        """
        _calls.add(self)
        thread = threading.Thread(target=self._work, args=(function, progress), name=f"prefault-{self.title}", daemon=True)
        try:
            thread.start()
        except BaseException as error:
            self._finish(error)
            raise

    def rate(self, limit: RateLimit | None) -> RateLimit | None:
        """Return a rate limit whose waits end once the call is cancelled."""
        return None if limit is None else _CancellableRate(limit, self)

    def _work(self, function: Callable[[Progress], Result], progress: Progress | bool) -> None:
        outcome: Result | BaseException
        try:
            with reporting(progress, self.title) as report:

                def advance(done: int, total: int) -> None:
                    self.done_bytes, self.total_bytes = done, total
                    if self.cancelled and done < total:
                        raise KeyboardInterrupt
                    if report is not None:
                        report(done, total)

                if self.cancelled:
                    outcome = self._cancelled_error("cancelled: nothing was done")
                else:
                    outcome = function(advance)
                    self.done_bytes = self.total_bytes = outcome.bytes + outcome.present_bytes
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            outcome = error
        self._finish(outcome)

    def _finish(self, outcome: Result | BaseException) -> None:
        """Release the memory, then tell all who wait."""
        self._release()
        with self._lock:
            self.outcome = outcome
            self.finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None

    def when_finished(self, callback: Callable[[], object]) -> None:
        """Call a function, in the thread of the call, when it is finished; at once if it is."""
        with self._lock:
            if not self.finished.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def lose(self) -> None:
        """End the call in a forked child, which has no thread that could."""
        if self.finished.is_set():
            return
        self._release()
        self._lock, self.finished, self._callbacks = threading.Lock(), threading.Event(), []
        self.outcome = self._cancelled_error(
            f"this is a fork of the process in which {self.title}_async works: only that one gets the result"
        )
        self.finished.set()

    def log(self) -> None:
        """Log the error of a call whose task was forgotten."""
        if isinstance(self.outcome, BaseException) and not self.cancelled:
            logging.getLogger("prefault").warning(
                "%s_async failed, and nobody asked for the result: %s", self.title, self.outcome
            )


_calls: weakref.WeakSet[BackgroundCall[Any]] = fork_hooks.instances(BackgroundCall.lose)


class _CancellableRate(RateLimit):
    """A rate limit whose waits a cancelled call ends: at a low rate, or with huge pages, they last longer than anyone waits.

    Args:
        limit: the one that it books at, and may share with other calls.
        call: the call that may be cancelled.
    """

    def __init__(self, limit: RateLimit, call: BackgroundCall[Any]) -> None:
        super().__init__(limit.bytes_per_second)
        self._limit = limit
        self._call = call

    def book(self, count: int) -> float:
        """See :class:`~prefault.engine.rate.RateLimit`."""
        return self._limit.book(count)

    def wait(self, count: int, stopped: threading.Event | None = None) -> None:
        """See :class:`~prefault.engine.rate.RateLimit`; KeyboardInterrupt, which ends the call, once it is cancelled."""
        due = monotonic() + self.book(count)
        other = threading.Event() if stopped is None else stopped
        while (seconds := due - monotonic()) > 0:
            if self._call.cancelled:
                raise KeyboardInterrupt
            if other.wait(min(seconds, _LOOK_SECONDS)):
                return


class BackgroundTask(Generic[Result]):
    """Base of tasks: calls in the background, to be watched, cancelled, waited for or awaited.

    As a context manager: leaving the block waits for the end, and raises the error of a call that failed, unless
    :meth:`result` has raised it already. Where an exception leaves the block, the call is cancelled and waited for.

    A task that is forgotten does not stop the call. If that fails, the logger ``"prefault"`` gets the error as a warning.

    In a child that is forked while the call runs, only the parent's call goes on: the child's task has ended, as if
    cancelled, :meth:`result` says so, and its copy of the buffers can be resized and closed.
    """

    def __init__(self, call: BackgroundCall[Result]) -> None:
        self._call = call

    @property
    def done_bytes(self) -> int:
        """Bytes that are brought in by now."""
        return self._call.done_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes in all, as far as they are known by now."""
        return self._call.total_bytes

    def done(self) -> bool:
        """Return whether the call has ended: with success, an error, or cancelled."""
        return self._call.finished.is_set()

    def cancel(self) -> None:
        """Ask the call to stop after the chunks under way, some milliseconds. Idempotent; does not wait.

        :meth:`result` raises the error of a cancelled call then, unless all of it was done before.
        """
        self._call.cancelled = True

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end, and return the result of the call, or raise its error.

        Args:
            timeout: seconds to wait; None: as long as it takes. Ctrl-C ends the wait and not the call.

        Raises:
            TimeoutError: the call goes on.
        """
        if not self._call.finished.wait(timeout):
            done = f"{format_size(self.done_bytes)} of {format_size(self.total_bytes)} are done"
            raise TimeoutError(f"{self._call.title}_async goes on after {timeout} s: {done}")
        outcome = self._call.outcome
        self._call.was_delivered = True
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None
        return outcome

    def __await__(self) -> Generator[Any, None, Result]:
        """Wait in an asyncio event loop, which goes on meanwhile. Cancelling the waiting task cancels the call."""
        import asyncio

        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not end.done():
                end.set_result(None)

        def tell_loop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell)

        self._call.when_finished(tell_loop)
        try:
            yield from end
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.result(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.cancel()
            self._call.finished.wait()
            self._call.was_delivered = True
        elif not self._call.was_delivered:
            self.result()

    def __del__(self) -> None:
        call = self.__dict__.get("_call")
        if call is not None and not call.was_delivered:
            call.when_finished(call.log)

    def __repr__(self) -> str:
        state = "finished" if self.done() else "cancelled" if self._call.cancelled else "under way"
        return f"<{type(self).__name__} {state}, {format_size(self.done_bytes)} of {format_size(self.total_bytes)}>"


def _end_all() -> None:
    """Cancel all calls under way and wait for them, as daemon threads do not outlive the interpreter."""
    under_way = [call for call in list(_calls) if not call.finished.is_set()]
    for call in under_way:
        call.cancelled = True
    deadline = monotonic() + _EXIT_SECONDS
    for call in under_way:
        call.finished.wait(max(0.0, deadline - monotonic()))


atexit.register(_end_all)
