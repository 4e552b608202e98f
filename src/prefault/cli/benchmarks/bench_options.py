"""Options of both bench commands, and the exit status of a run that was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from prefault.bench import jsonfile
from prefault.bench.kinds import HUGE_PAGE_BYTES
from prefault.bench.stopping import StopRequest
from prefault.cli.json_output import Command
from prefault.sizes import parse_size


def json_option(kind: str) -> Callable[[Command], Command]:
    """Return the option ``--json FILE``: these commands print a table beside it, and a run of an hour is worth a file."""
    return click.option(
        "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE",
        help=f"Save the run in FILE, as one JSON object (docs/schemas/{kind}.json).",
    )  # fmt: skip


def sizes(valid: Callable[[int], bool], otherwise: str) -> Callable[..., tuple[int, ...]]:
    """Return a callback that parses a repeatable option into distinct sizes; ``otherwise`` follows an invalid value."""

    def parse(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
        found = []
        for value in values:
            try:
                size = parse_size(value)
            except ValueError as error:
                raise click.UsageError(f"{parameter.opts[0]}: {error}") from error
            if not valid(size):
                raise click.UsageError(f"{parameter.opts[0]} {value}{otherwise}")
            found.append(size)
        return tuple(dict.fromkeys(found))

    return parse


mapping_sizes = sizes(
    lambda size: size > 0 and size % HUGE_PAGE_BYTES == 0,
    " is not a multiple of 2 MiB above 0: not every backing has such a size",
)


def check_json_path(path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured."""
    if path is None:
        return
    try:
        jsonfile.check_writable(path)
    except OSError as error:
        raise click.ClickException(f"--json {path} cannot be written: {error.strerror or error}") from error


def exit_if_stopped(context: click.Context, stop: StopRequest) -> None:
    """Exit with the status that the signal asks for, if one stopped the run."""
    if stop.signal is not None:
        stop.ignore_more()
        context.exit(128 + stop.signal)
