"""Options that the commands of recordings share, and how their results are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from prefault.cli.messages import printable
from prefault.cli.options.option_types import CountType, SizeType
from prefault.sizes import format_size

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SHOWN = 5


class RootType(click.ParamType):  # type: ignore[type-arg]  # a class without types before click 8.3
    """A root, ``NAME=DIR``."""

    name = "NAME=DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return name and directory."""
        if isinstance(value, tuple):
            return value
        name, equals, directory = str(value).partition("=")
        if not equals or not name or not directory:
            self.fail(f"{value!r} is not NAME=DIR, such as model=/srv/model", param, ctx)
        return name, directory


def root_option(command: _Command) -> _Command:
    """Add ``--root``, which the command gets as ``roots``."""
    return click.option(
        "--root", "roots", multiple=True, type=RootType(), metavar="NAME=DIR",
        help="Files below DIR are kept by NAME and the path below it, so that they can be found elsewhere; repeatable.",
    )(command)  # fmt: skip


def replay_options(command: _Command) -> _Command:
    """Add the options of commands that bring pages back."""
    options = (
        click.option("--budget", type=SizeType(), help="Bring in at most this much, such as '2 GiB'."),
        click.option("--threads", type=CountType(1, 256), help="Files that are read at a time."),
        click.option("--idle", is_flag=True, help="Read in the idle I/O class: disks serve other processes first."),
        click.option("--ignore-time", is_flag=True, help="Also take files whose time of modification differs."),
        click.option("--progress/--no-progress", default=None, help="Show a bar, or log; default: a bar on a terminal."),
    )
    for option in reversed(options):
        command = option(command)
    return root_option(command)


@contextmanager
def told_as_usage() -> Iterator[None]:
    """Turn errors of a recording's content and of options into messages of the command line."""
    from prefault.recordings.recording_file import RecordingError

    try:
        yield
    except RecordingError as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def check_writable(output: str) -> None:
    """Check that a file can be made or replaced, before anything is done for it.

    Raises:
        click.UsageError: it cannot; the message names it.
    """
    from prefault.recordings.recording_file import can_be_replaced

    if not output:
        raise click.UsageError("'': the path of the recording is empty: name a file; a variable in the command may be unset")
    if not can_be_replaced(output):
        return
    directory = os.path.dirname(os.path.realpath(output))
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise click.UsageError(f"{output}: no file can be made in {directory}: give another directory")


def some_of(names: tuple[str, ...]) -> str:
    """Return the first few names, for people."""
    shown = ", ".join(map(printable, names[:_SHOWN]))
    return f"{shown}, ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def tell_notes(notes: list[str]) -> None:
    """Print what a recording lacks, on stderr."""
    for note in notes:
        click.echo(f"prefault: {note}", err=True)


def size(number: int) -> str:
    """Return a number of bytes for people."""
    return format_size(number)
