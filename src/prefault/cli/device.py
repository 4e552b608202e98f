"""``prefault device``: serve a device to other processes."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import click

from prefault.sizes import format_size


@click.group()
def device() -> None:
    """Serve memory whose pages a driver supplies."""


@device.command()
@click.argument("factory", metavar="MODULE:CLASS")
@click.option(
    "--socket", "path", required=True, type=click.Path(readable=False), help="Where clients connect; made for you alone."
)
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
    from prefault.errors import DeviceError

    if not path:
        raise click.UsageError("--socket takes the path of the socket to make, not an empty one")

    def started(made: Device) -> None:
        what = f"{type(made).__name__}, {format_size(made.length)} in pages of {format_size(made.page_size)}"
        click.echo(f"serving {what}, at {path}")

    try:
        failed = serve_in_foreground(Recipe(factory, _parse(arguments)), path, started)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    except DeviceError as error:
        what = f"{error.strerror}{_remedy(factory, error)}"
        raise DeviceError(error.errno, what if factory in what else f"{factory}: {what}") from error
    return 1 if failed else 0


def _remedy(factory: str, error: OSError) -> str:
    """What to do on the command line about a device that cannot be made."""
    from prefault.device.driver import Device

    module_name, _, name = factory.partition(":")
    cause, module = error.__cause__, sys.modules.get(module_name)
    if isinstance(cause, ModuleNotFoundError):
        if not f"{module_name}.".startswith(f"{cause.name}."):
            return f", which {module_name} imports: install it, or set PYTHONPATH to where it is"
        named = "; name the module without .py, and" if module_name.endswith(".py") else ":"
        return f"{named} set PYTHONPATH to the directory that holds it"
    if isinstance(cause, TypeError) and "argument" in str(cause):
        return ": --arg NAME=VALUE gives arguments"
    if module is None:
        return ""  # it cannot be imported, and says why
    if hasattr(module, name) and not any(text in str(cause) for text in ("is not callable", "is not a prefault.device")):
        return ""  # it makes devices, and says why not this one
    found = sorted(
        each for each, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Device) and not inspect.isabstract(value)
    )  # fmt: skip
    which = f" ({module_name} has {', '.join(found[:5])})" if found else ""
    return f": name a class made from prefault.device.Device{which}, or a function that makes such a device"


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
