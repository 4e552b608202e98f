"""populate_async: populate in a thread of its own, with a task to watch, cancel, wait for, or await."""

from __future__ import annotations

import errno
from time import perf_counter_ns
from types import GeneratorType
from typing import Any, Unpack

from prefault.engine.background.background_task import BackgroundCall, BackgroundTask
from prefault.engine.background.options import AsyncOptions
from prefault.engine.outcomes import PopulateResult
from prefault.engine.parts import PopulateOptions
from prefault.engine.populating import parse_options, populate_borrowed
from prefault.engine.progress import Progress
from prefault.errors import PopulateCancelled, PopulateInterrupted
from prefault.memory.borrowed_members import Members, borrowed_collection
from prefault.memory.borrowing import Borrowed, borrow
from prefault.sizes import Size


class PopulateTask(BackgroundTask[PopulateResult]):
    """A populate call in the background, made by :func:`populate_async`.

    ::

        task = prefault.populate_async(weights, rate="2 GiB/s")
        ...
        print(task.done_bytes, "of", task.total_bytes)
        result = task.result(timeout=60)  # or: await task

    As a context manager: leaving the block waits for the end, and raises the error of a call that failed, unless
    :meth:`result` has raised it already. Where an exception leaves the block, the call is cancelled and waited for.

    A cancelled call raises :class:`~prefault.PopulateCancelled`, whose ``populated`` are the pages that came in; with
    ``rollback=True`` they are discarded again.

    A task that is forgotten does not stop the call. If that fails, the logger ``"prefault"`` gets the error as a warning.

    In a child that is forked while the call runs, only the parent's call goes on: the child's task has ended, as if
    cancelled, and its copy of the buffer can be resized and closed.

    Attributes:
        done_bytes: bytes of pages that are populated by now.
        total_bytes: bytes of pages in all; before the first chunk is done, those of the buffer.
    """


def populate_async(buffer: Any, **options: Unpack[AsyncOptions]) -> PopulateTask:
    """Populate in the background: return at once, with a task to watch, cancel, wait for, or await.

    One thread is started for each call, besides those of ``threads``. The buffer is pinned until the call ends, so that its
    owner can neither resize nor free it. When the interpreter exits, calls under way are cancelled.

    Args:
        buffer: a buffer or a collection, as for :func:`prefault.populate`; not a path, for which there is
            :func:`prefault.warm_async`.
        options: those of :func:`prefault.populate`. A ``progress`` function is called in the thread of the call.

    Raises:
        TypeError, ValueError: not a buffer, or a wrong option; other errors are raised by the task.
        RuntimeError: no thread can be started.
    """
    began = perf_counter_ns()
    arguments: dict[str, Any] = {**options}
    offset: Size = arguments.pop("offset", 0)
    length: Size | None = arguments.pop("length", None)
    parsed = parse_options(began=began, **arguments)
    held: Borrowed | Members
    try:
        held = borrow(buffer)
    except TypeError as error:
        whole = list(buffer) if isinstance(buffer, GeneratorType) else buffer
        held = borrowed_collection(whole, offset, length, error)
    total_bytes = held.length if isinstance(held, Borrowed) else held.pages.length
    call: BackgroundCall[PopulateResult] = BackgroundCall("populate", total_bytes, _cancelled, held)

    def populating(report: Progress) -> PopulateResult:
        mine: PopulateOptions = parsed._replace(progress=report, rate=call.rate(parsed.rate))
        try:
            return populate_borrowed(held, offset, length, mine)
        except PopulateInterrupted as interruption:
            error = _cancelled(f"cancelled: {str(interruption).removeprefix('interrupted: ')}")
            error.populated = interruption.populated
            raise error from None

    call.start(populating, parsed.progress)
    return PopulateTask(call)


def _cancelled(text: str) -> PopulateCancelled:
    return PopulateCancelled(errno.ECANCELED, text)
