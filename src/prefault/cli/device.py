"""``prefault device``: serve a device to other processes."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import click

from prefault.cli.json_output import json_option, print_json
from prefault.sizes import format_size


@click.group()
def device() -> None:
    """Serve memory whose pages a driver supplies.

    \b
    Example:
      prefault device serve my_drivers:Tape --socket /run/user/1000/tape
    """


@device.command()
@click.argument("factory", metavar="MODULE:CLASS")
@click.option(
    "--socket", "path", required=True, type=click.Path(readable=False), help="Unix socket for clients of this user."
)
@click.option(
    "--arg", "arguments", multiple=True, metavar="NAME=VALUE",
    help="Keyword argument of the class; repeatable. A value is parsed as JSON (4096, true, [1, 2]) and else taken as text.",
)  # fmt: skip
@json_option("prefault-device-serve")
def serve(factory: str, path: str, arguments: tuple[str, ...], as_json: bool) -> int:
    """Serve a device until SIGTERM, or Ctrl-C, to all processes of this user.

    Clients connect with prefault.device.connect(PATH). Python imports MODULE (PYTHONPATH). At the end clients keep the pages
    that were supplied, and get SIGBUS for others. The exit status is 1 if the process of the driver was lost.

    \b
    Example:
      prefault device serve my_drivers:Tape --arg path=/dev/st0 --socket /run/user/1000/tape
    """
    from prefault.device.driver import Device, Recipe
    from prefault.device.process.startup import serve_in_foreground
    from prefault.errors import DeviceError

    if not path:
        raise click.UsageError("--socket takes the path of the socket to make, not an empty one")

    def started(made: Device) -> None:
        if as_json:
            facts = {"device": type(made).__name__, "length": made.length, "page_size": made.page_size}
            print_json("prefault-device-serve", 1, {"socket": path, **facts})
            sys.stdout.flush()
            return
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
    """Return the change of the command line that lets the device be made; empty where no change helps."""
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
        return ""  # the module cannot be imported, and its error says why
    if hasattr(module, name) and not any(text in str(cause) for text in ("is not callable", "is not a prefault.device")):
        return ""  # the factory makes devices, and its error says why not this one
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
