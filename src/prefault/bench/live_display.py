"""The display while the grid runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from prefault.bench.grid import Cell
from prefault.bench.published import expected_ms
from prefault.bench.results import CellResult
from prefault.bench.runner import Event, Repeated

_LINE_SECONDS = 10.0


@contextmanager
def progress(cells: Sequence[Cell], repeats: int, stream: TextIO | None = None) -> Iterator[Callable[[Event], None]]:
    """Show progress on stderr while the block runs: a bar with the time left on a terminal, else a line now and then.

    The value is a function that takes the events of a run.
    """
    stream = stream or sys.stderr
    work = _Work(cells, repeats)
    if not stream.isatty():
        yield _Lines(work, stream).show
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(file=stream)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as display:
        task = display.add_task("warming memory up", total=work.total, count=work.count)

        def show(event: Event) -> None:
            work.add(event)
            if isinstance(event, Cell):
                display.update(task, description=str(event))
            display.update(task, completed=work.done, count=work.count)

        yield show


class _Work:
    """The part of the grid that is done, weighed by the expected time of each cell."""

    def __init__(self, cells: Sequence[Cell], repeats: int) -> None:
        self._weights = {cell: expected_ms(cell) for cell in cells}
        self._repeats = repeats
        self._finished_weight = 0.0
        self._current_weight = 0.0
        self._finished = 0
        self.total = sum(self._weights.values()) * repeats  # the untimed repetition is the same in every cell

    @property
    def done(self) -> float:
        return self._finished_weight + self._current_weight

    @property
    def count(self) -> str:
        return f"{self._finished} of {len(self._weights)} cells"

    def add(self, event: Event) -> None:
        if isinstance(event, Repeated):
            self._current_weight += self._weights[event.cell]
        elif isinstance(event, CellResult):
            self._finished_weight += self._weights[event.cell] * self._repeats
            self._current_weight = 0.0
            self._finished += 1


class _Lines:
    def __init__(self, work: _Work, stream: TextIO) -> None:
        self._work = work
        self._stream = stream
        self._began = self._last = time.monotonic()
        print(f"prefault bench: {work.count}, Ctrl-C stops and keeps what is measured", file=stream, flush=True)

    def show(self, event: Event) -> None:
        self._work.add(event)
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS or not self._work.done:
            return
        self._last = now
        part = self._work.done / self._work.total
        # Warming up and the small cells say little about the large ones.
        left = f", about {(now - self._began) * (1 / part - 1):.0f} s left" if part > 0.01 else ""
        print(f"prefault bench: {self._work.count}{left}", file=self._stream, flush=True)
