"""populate_async: populate in a thread of its own, with a task to watch, cancel, wait for, or await."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack
from time import monotonic
from types import GeneratorType, TracebackType
from typing import Any, Self, Unpack

from prefault._system import fork_hooks
from prefault.engine.background.options import AsyncOptions
from prefault.engine.outcomes import PopulateResult
from prefault.engine.populating import populate
from prefault.engine.progress import Progress, check_progress, reporting
from prefault.engine.rate import RateLimit, rate_limit
from prefault.errors import PopulateCancelled, PopulateInterrupted
from prefault.memory.borrowed_members import borrowed_collection
from prefault.memory.borrowing import borrow
from prefault.sizes import format_size

_EXIT_SECONDS = 10.0
"""Longest wait for calls under way when the interpreter exits."""

_LOOK_SECONDS = 0.02
"""Time between two looks whether a call that waits for its rate was cancelled."""


class _Call:
    """State that the thread and the task share. The thread does not refer to the task, so a forgotten task is collected."""

    def __init__(self, total_bytes: int, pins: ExitStack) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.cancelled = False
        self.finished = threading.Event()
        self.outcome: PopulateResult | BaseException | None = None
        self.was_delivered = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        self._pins = pins

    def work(self, populating: Callable[[Progress], PopulateResult], progress: Progress | bool) -> None:
        """Populate, in the thread of the call."""
        outcome: PopulateResult | BaseException
        try:
            with reporting(progress, "populate") as report:

                def advance(done: int, total: int) -> None:
                    self.done_bytes, self.total_bytes = done, total
                    if self.cancelled and done < total:
                        raise KeyboardInterrupt  # which ends the call and settles it, as Ctrl-C does
                    if report is not None:
                        report(done, total)

                outcome = _cancelled("nothing was populated") if self.cancelled else populating(advance)
        except PopulateInterrupted as interruption:
            outcome = _cancelled(str(interruption).removeprefix("interrupted: "))
            outcome.populated = interruption.populated
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            outcome = error
        if isinstance(outcome, PopulateResult):
            self.done_bytes = self.total_bytes = outcome.bytes + outcome.present_bytes
        self.finish(outcome)

    def finish(self, outcome: PopulateResult | BaseException) -> None:
        """Release the buffers, then tell all who wait."""
        self._pins.close()
        with self._lock:
            self.outcome = outcome
            self.finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

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
        self._lock, self.finished, self._callbacks = threading.Lock(), threading.Event(), []
        self.outcome = PopulateCancelled(
            errno.ECANCELED, "this is a fork of the process that populates in the background: only that one gets the result"
        )
        self.finished.set()


class _CancellableRate(RateLimit):
    """A rate limit whose waits a cancelled call ends: at a low rate, or with huge pages, they last longer than anyone waits.

    Args:
        limit: the one that it books at, and may share with other calls.
        call: the call that may be cancelled.
    """

    def __init__(self, limit: RateLimit, call: _Call) -> None:
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


_calls: weakref.WeakSet[_Call] = fork_hooks.instances(_Call.lose)


def _cancelled(text: str) -> PopulateCancelled:
    return PopulateCancelled(errno.ECANCELED, f"cancelled: {text}")


class PopulateTask:
    """A populate call in the background, made by :func:`populate_async`.

    ::

        task = prefault.populate_async(weights, rate="2 GiB/s")
        ...
        print(task.done_bytes, "of", task.total_bytes)
        result = task.result(timeout=60)  # or: await task

    As a context manager: leaving the block waits for the end, and raises the error of a call that failed, unless
    :meth:`result` has raised it already. Where an exception leaves the block, the call is cancelled and waited for.

    A task that is forgotten does not stop the call. If that fails, the logger ``"prefault"`` gets the error as a warning.

    Attributes:
        done_bytes: bytes of pages that are populated by now.
        total_bytes: bytes of pages in all; before the first chunk is done, those of the buffer.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call

    @property
    def done_bytes(self) -> int:
        """Bytes of pages that are populated by now."""
        return self._call.done_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of pages in all; before the first chunk is done, those of the buffer."""
        return self._call.total_bytes

    def done(self) -> bool:
        """Return whether the call has ended: with success, an error, or cancelled."""
        return self._call.finished.is_set()

    def cancel(self) -> None:
        """Ask the call to stop after the chunks under way, some milliseconds. Idempotent; does not wait.

        :meth:`result` raises PopulateCancelled then, unless all of it was populated before. With ``rollback=True`` the pages
        that the call brought in are discarded again.
        """
        self._call.cancelled = True

    def result(self, timeout: float | None = None) -> PopulateResult:
        """Wait for the end, and return the result of the call.

        Args:
            timeout: seconds to wait; None: as long as it takes. Ctrl-C ends the wait and not the call.

        Raises:
            TimeoutError: the call goes on.
            PopulateCancelled: :meth:`cancel` stopped it; ``populated`` are the pages that it has brought in.
            PopulateError: as :func:`prefault.populate`.
        """
        if not self._call.finished.wait(timeout):
            raise TimeoutError(f"still populating after {timeout} s: {self.done_bytes} of {self.total_bytes} bytes are done")
        outcome = self._call.outcome
        self._call.was_delivered = True
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None
        return outcome

    def __await__(self) -> Generator[Any, None, PopulateResult]:
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
            call.when_finished(lambda: _log(call))

    def __repr__(self) -> str:
        state = "finished" if self.done() else "cancelled" if self._call.cancelled else "populating"
        return f"<PopulateTask {state}, {format_size(self.done_bytes)} of {format_size(self.total_bytes)}>"


def _log(call: _Call) -> None:
    if isinstance(call.outcome, BaseException) and not isinstance(call.outcome, PopulateCancelled):
        logging.getLogger("prefault").warning("populate_async failed, and nobody asked for the result: %s", call.outcome)


def populate_async(buffer: Any, **options: Unpack[AsyncOptions]) -> PopulateTask:
    """Populate in the background: return at once, with a task to watch, cancel, wait for, or await.

    One thread is started for each call, besides those of ``threads``. The buffer is pinned until the call ends, so that its
    owner can neither resize nor free it. When the interpreter exits, calls under way are cancelled.

    Args:
        buffer: a buffer or a collection, as for :func:`prefault.populate`.
        options: those of :func:`prefault.populate`. A ``progress`` function is called in the thread of the call.

    Raises:
        TypeError, ValueError: not a buffer, or a wrong ``progress`` or ``rate``; other errors are raised by the task.
        RuntimeError: no thread can be started.
    """
    progress = options.get("progress", False)
    check_progress(progress)
    limit = rate_limit(options.get("rate"))
    if isinstance(buffer, GeneratorType):
        buffer = list(buffer)
    with ExitStack() as stack:
        try:
            total_bytes = stack.enter_context(borrow(buffer)).length
        except TypeError as error:
            members = stack.enter_context(borrowed_collection(buffer, 0, None, error))
            total_bytes = sum(member.pages.length for member in members)
        call = _Call(total_bytes, stack.pop_all())
    _calls.add(call)

    def populating(report: Progress) -> PopulateResult:
        rate = None if limit is None else _CancellableRate(limit, call)
        arguments: dict[str, Any] = {**options, "progress": report, "rate": rate}
        return populate(buffer, **arguments)

    thread = threading.Thread(target=call.work, args=(populating, progress), name="prefault-populate", daemon=True)
    try:
        thread.start()
    except BaseException as error:
        call.finish(error)
        raise
    return PopulateTask(call)


def _end_all() -> None:
    """Cancel all calls under way and wait for them, as daemon threads do not outlive the interpreter."""
    under_way = [call for call in list(_calls) if not call.finished.is_set()]
    for call in under_way:
        call.cancelled = True
    deadline = monotonic() + _EXIT_SECONDS
    for call in under_way:
        call.finished.wait(max(0.0, deadline - monotonic()))


atexit.register(_end_all)
