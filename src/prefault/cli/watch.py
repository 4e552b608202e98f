"""``prefault watch``: a live heat map of files or of a process."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

import click

from prefault.cli.messages import printable
from prefault.cli.options.option_types import CountType, SecondsType, pid_option

if TYPE_CHECKING:
    from rich.console import Group

    from prefault.pictures.heat_rows import HeatRow
    from prefault.pictures.sampling import Frame

Show = Callable[["Frame"], None]


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True), metavar="[PATH]...")
@pid_option("Watch the mappings of a process instead of files.")
@click.option(
    "-i",
    "--interval",
    type=SecondsType(0.05, 86400),
    default=1.0,
    show_default=True,
    help="Seconds between two frames.",
)
@click.option("-n", "--count", type=CountType(min=1), help="Frames to show; else until Ctrl-C.")
@click.option("--once", is_flag=True, help="Show one frame with all rows, and end.")
@click.option("-r", "--record", type=click.Path(dir_okay=False, writable=True), metavar="FILE",
              help="Write the frames to a file, for `prefault report --watch FILE`.")  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True,
    help="Write one JSON object a frame to stdout (docs/schemas/prefault-watch.json), as --record does to a file.",
)  # fmt: skip
def watch(
    paths: tuple[str, ...],
    pid: int | None,
    interval: float,
    count: int | None,
    once: bool,
    record: str | None,
    as_json: bool,
) -> None:
    """Show which parts of files, or of a process, are in memory, and how that changes.

    Each row is a file or a mapping, each cell an equal part of it, the fuller the more of it is present. Rows stand by what
    is missing. Where stdout is no terminal, each frame is one line. Ctrl-C ends it.

    \b
    Example:
      prefault watch models/
      prefault watch --pid 4711 --record frames.jsonl
    """
    from prefault.pictures.sampling import frames

    number = 1 if once else count
    with contextlib.ExitStack() as stack:
        source = frames(stack.enter_context(taking(paths, pid)))
        try:
            first = next(source)  # before the recording is opened: one that is there stays if there is nothing to show
            shows: list[Show] = [stack.enter_context(_recorder(record))] if record else []
            shows.append(_on_stdout() if as_json else _show_all if once else stack.enter_context(_display()))
            for frame in itertools.islice(itertools.chain([first], _paced(source, interval)), number):
                for show in shows:
                    show(frame)
        except KeyboardInterrupt:
            if count is not None or once:
                raise


@contextlib.contextmanager
def taking(paths: tuple[str, ...], pid: int | None) -> Iterator[Callable[[], list[HeatRow]]]:
    """Yield the function that takes the rows of these paths, or of this process and no later one of its number.

    Raises:
        click.UsageError: neither is given, or both.
    """
    from prefault.pictures.sampling import opened_process, rows_of_files

    if bool(paths) == (pid is not None):
        raise click.UsageError("give one or several PATHs, or --pid")
    if pid is None:
        yield lambda: rows_of_files(paths)
        return
    with opened_process(pid) as take:
        yield take


def _paced(source: Iterator[Frame], interval: float) -> Iterator[Frame]:
    due = time.monotonic() + interval
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        yield next(source)
        due = max(due + interval, time.monotonic())


@contextlib.contextmanager
def _recorder(path: str) -> Iterator[Show]:
    from prefault.pictures.watch_recording import FrameWriter

    with open(path, "w", encoding="utf-8") as file:
        yield FrameWriter(file).add


def _on_stdout() -> Show:
    from prefault.pictures.watch_recording import FrameWriter

    return FrameWriter(sys.stdout or open(os.devnull, "w")).add


@contextlib.contextmanager
def _display() -> Iterator[Show]:
    """Show frames in place on a terminal that can, else one line each."""
    from rich.console import Console
    from rich.live import Live

    from prefault.pictures.terminal_map import picture, summary

    console = Console()
    # A dumb terminal cannot go back: rich would show the last frame only, at the end.
    if sys.stdout is None or not sys.stdout.isatty() or console.is_dumb_terminal:
        yield lambda frame: _line(sys.stdout, summary(frame))
        return
    last: list[Frame] = []

    def drawn(frame: Frame) -> Group:
        return picture(frame, console.width, console.height, printable, ascii_only=console.options.ascii_only)

    def show(frame: Frame) -> None:
        last[:] = [frame]
        live.update(drawn(frame), refresh=True)

    # The alternate screen is drawn whole each time: after the window was resized nothing of an earlier picture is left.
    with Live(console=console, auto_refresh=False, screen=True) as live:
        yield show
    for frame in last:
        console.print(drawn(frame))


def _line(stream: TextIO | None, text: str) -> None:
    click.echo(f"{datetime.now().astimezone():%H:%M:%S} {text}", file=stream)


def _show_all(frame: Frame) -> None:
    from prefault.pictures.terminal_map import picture, plain_row, summary

    if sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        lines = len(frame.rows) + 100
        console.print(picture(frame, console.width, lines, printable, ascii_only=console.options.ascii_only))
        return
    click.echo(summary(frame))
    for row in frame.rows:
        click.echo(plain_row(row, printable))
