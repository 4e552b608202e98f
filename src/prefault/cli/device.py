"""``prefault device``: serve a device to other processes."""

from __future__ import annotations

import json
from typing import Any

import click

from prefault.sizes import format_size


@click.group()
def device() -> None:
    """Memory whose pages a driver supplies."""


@device.command()
@click.argument("factory", metavar="MODULE:CLASS")
@click.option("--socket", "path", required=True, type=click.Path(), help="Where clients connect; made for you alone.")
@click.option(
    "--arg", "arguments", multiple=True, metavar="NAME=VALUE",
    help="A keyword argument of the class. What is JSON is taken as such (4096, true, null, [1, 2]), all else as text.",
)  # fmt: skip
def serve(factory: str, path: str, arguments: tuple[str, ...]) -> int:
    """Serve a device until SIGTERM, or Ctrl-C, to all processes of this user.

    They map it with prefault.device.connect(PATH). MODULE is searched for as Python does it (PYTHONPATH). At the end clients
    keep the pages that were supplied, and get SIGBUS for others. The exit status is 1 where the driver's process was lost.
    """
    from prefault.device.begin import serve_in_foreground
    from prefault.device.driver import Device, Recipe

    def started(made: Device) -> None:
        what = f"{type(made).__name__}, {format_size(made.length)} in pages of {format_size(made.page_size)}"
        click.echo(f"serving {what}, at {path}")

    try:
        failed = serve_in_foreground(Recipe(factory, _parse(arguments)), path, started)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    return 1 if failed else 0


def _parse(arguments: tuple[str, ...]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--arg takes NAME=VALUE, not {argument!r}")
        if name in parsed:
            raise ValueError(f"--arg {name} is given twice")
        try:
            parsed[name] = json.loads(text)
        except ValueError:
            parsed[name] = text
    return parsed
