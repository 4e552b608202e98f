"""Progress of a call: told to a function, drawn as a bar on a terminal, or logged."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, TypeAlias

from prefault._system import fork_hooks
from prefault.sizes import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, in the thread that does the work. What it raises stops the work."""

LOG_SECONDS = 5.0
"""Time between two lines in the log of one call."""

QUIET_SECONDS = 1.0
"""Calls that take less than this log nothing."""


def check_progress(progress: object) -> None:
    """Check an argument ``progress`` before anything is done.

    Raises:
        TypeError: neither True, False nor a function.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress is True, False or a function, not {type(progress).__name__}")


@contextmanager
def reporting(progress: Progress | bool, title: str) -> Iterator[Progress | None]:
    """Report the progress of a call while the block runs.

    Args:
        progress: True draws a bar on stderr where that is a terminal, and else logs a line every few seconds, at level INFO,
            to the logger ``"prefault"``; a function is called itself; False reports nothing.
        title: what is done, in a word or two: ``"populate"``.

    Yields:
        The function to call with the bytes done and in all; None: no progress is reported.

    Raises:
        TypeError: ``progress`` is none of these.
    """
    check_progress(progress)
    if progress is False:
        yield None
    elif progress is not True:
        yield progress
    elif sys.stderr is not None and sys.stderr.isatty():
        with _bars.task(title) as report:
            yield report
    else:
        lines = _Lines(title)
        yield lines.report
        lines.end()


class _SharedBars:
    """The bars of all calls under way, in one display: two displays would overwrite each other's lines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._display: Bars | None = None
        self._tasks: set[TaskID] = set()

    @contextmanager
    def task(self, title: str) -> Iterator[Progress]:
        """Show a bar while the block runs."""
        with self._lock:
            display = self._display = self._display or _new_display()
            task = display.add_task(title, total=None)
            self._tasks.add(task)
        try:
            yield lambda done, total: display.update(task, completed=done, total=total)
        finally:
            with self._lock:
                self._tasks.discard(task)
                if not self._tasks and self._display is display:
                    self._display = None
                    display.stop()

    def forget(self) -> None:
        """Leave the display to the parent process, whose thread draws it."""
        self.__init__()  # type: ignore[misc]


_bars = _SharedBars()
fork_hooks.register(in_child=_bars.forget)


def _new_display() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    display = Bars(*columns, console=Console(stderr=True))
    display.start()
    return display


class _Lines:
    """Lines in the log, for stderr that is no terminal: a file, a service's journal, a notebook."""

    def __init__(self, title: str) -> None:
        from logging import getLogger

        self._log = getLogger("prefault")
        self._title = title
        self._began = self._last = monotonic()
        self._done = self._total = 0

    def report(self, done: int, total: int) -> None:
        """Log a line if it is time for one."""
        self._done, self._total = done, total
        now = monotonic()
        if now - self._last < LOG_SECONDS or done >= total:
            return
        self._last = now
        speed = done / max(now - self._began, 1e-9)
        left = f", {_duration((total - done) / speed)} left" if speed else ""
        self._log.info(
            "%s: %s of %s, %s/s%s", self._title, format_size(done), format_size(total), format_size(int(speed)), left
        )

    def end(self) -> None:
        """Log the sum of a call that took a while."""
        took = monotonic() - self._began
        if took >= QUIET_SECONDS:
            speed = format_size(int(self._done / max(took, 1e-9)))
            self._log.info("%s: %s in %s, %s/s", self._title, format_size(self._done), _duration(took), speed)


def _duration(seconds: float) -> str:
    """Format a duration for people: ``"8 s"``, ``"3:20 min"``, ``"1:05 h"``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{int(seconds) // 60}:{int(seconds) % 60:02} min" if seconds < 3600 else f"{minutes // 60}:{minutes % 60:02} h"
