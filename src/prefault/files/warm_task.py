"""warm_async: warm files in a thread of its own, with a task to watch, cancel, wait for, or await."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict, Unpack

from prefault.engine.background.background_task import BackgroundCall, BackgroundTask
from prefault.engine.progress import Progress, check_progress
from prefault.engine.rate import RateLimit, rate_limit
from prefault.files.failures import FileFailure
from prefault.files.file_status import RangesOfFile
from prefault.files.selection import Path, SelectedFile, Selection, as_selection
from prefault.files.warm_methods import MethodName
from prefault.files.warm_result import WarmCancelled, WarmInterrupted, WarmResult
from prefault.files.warming import warm
from prefault.sizes import Size


class WarmOptions(TypedDict, total=False):
    """Keyword arguments of :func:`prefault.warm`, each as there."""

    ranges: Iterable[tuple[Size, Size | None]] | RangesOfFile | None
    method: MethodName | None
    threads: int | None
    budget: Size | None
    window: Size | None
    rate: RateLimit | Size | None
    progress: Progress | bool
    missing_only: bool


class WarmTask(BackgroundTask[WarmResult]):
    """A warm call in the background, made by :func:`warm_async`.

    ::

        with prefault.warm_async("checkpoint/", rate="500 MB/s") as task:
            build_the_model()
        print(task.result())

    As a context manager: leaving the block waits for the end, and raises the error of a call that failed. Where an exception
    leaves the block, the call is cancelled and waited for. Files that could not be warmed are ``failures`` of the result,
    and no error. A cancelled call raises :class:`~prefault.WarmCancelled`.

    Attributes:
        done_bytes: bytes that are brought in by now.
        total_bytes: bytes that are missing in the files that were looked at by now: more with each file.
    """


def warm_async(paths: Path | Iterable[Path] | Selection, **options: Unpack[WarmOptions]) -> WarmTask:
    """Warm files in the background: return at once, with a task to watch, cancel, wait for, or await.

    One thread is started for each call, besides those that read. When the interpreter exits, calls under way are cancelled.

    Args:
        paths: files and directories, as for :func:`prefault.warm`.
        options: those of :func:`prefault.warm`. A ``progress`` function is called in the thread of the call.

    Raises:
        TypeError, ValueError: a wrong ``progress`` or ``rate``; other errors are raised by the task.
        RuntimeError: no thread can be started.
    """
    progress = options.get("progress", False)
    check_progress(progress)
    limit = rate_limit(options.get("rate"))
    call: BackgroundCall[WarmResult] = BackgroundCall("warm", 0, _cancelled)

    def warming(report: Progress) -> WarmResult:
        arguments: dict[str, Any] = {**options, "progress": report, "rate": call.rate(limit)}
        try:
            return warm(_until_cancelled(as_selection(paths), call), **arguments)
        except WarmInterrupted as interruption:
            text = f"cancelled: {str(interruption).removeprefix('interrupted: ')}"
            raise _cancelled(text, interruption.result) from None

    call.start(warming, progress)
    return WarmTask(call)


def _until_cancelled(selection: Selection, call: BackgroundCall[WarmResult]) -> Selection:
    """Return a selection that ends by KeyboardInterrupt once the call is cancelled.

    Progress is told only while bytes are brought in, so that a tree that is cached already would be walked to its end.
    """

    def files(_: Selection) -> Iterator[SelectedFile | FileFailure]:
        for found in selection:
            if call.cancelled:
                raise KeyboardInterrupt
            yield found

    return Selection(files)


def _cancelled(text: str, result: WarmResult | None = None) -> WarmCancelled:
    return WarmCancelled(errno.ECANCELED, text, WarmResult() if result is None else result)
