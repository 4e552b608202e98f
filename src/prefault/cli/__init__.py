"""The ``prefault`` command: parse and print, one module a command. Everything it shows comes from the library."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from typing import Any

import click

from prefault._version import __version__

_COMMANDS = ("bench", "device", "doctor")
"""Each is the command object of that name in the module of that name, loaded when it is asked for."""


class _LazyGroup(click.Group):
    """Commands are imported when they are needed: ``prefault --version`` pays for none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [name for name in _COMMANDS if importlib.util.find_spec(f"{__name__}.{name}") is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: Any = getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


_SIGNALLED = 128
"""Exit statuses above it name a signal, as the shell has it."""


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prefault")
def cli() -> None:
    """Make memory present before it is touched."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status.

    What the user can mend is one sentence on stderr: 2 for a wrong call, 1 for everything else. Ctrl-C is 130.
    """
    try:
        status = cli.main(arguments, prog_name="prefault", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        _complain(error.format_message())
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read us has gone, as with `| head`. Python would complain when it flushes at exit.
        sys.stdout = None
        return 1
    except OSError as error:
        _complain(_sentence(error))
        return 1
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "prefault":
            raise
        _complain(str(error))  # an extra that is not installed
        return 1
    if not isinstance(status, int):
        return 0
    if status > _SIGNALLED:
        # All is kept and put back: one more Ctrl-C would only interrupt the interpreter's own shutdown, with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def _sentence(error: OSError) -> str:
    """One line; the errno is left out where there is more to read than its name."""
    text = error.strerror
    if not text or error.errno is None or text == os.strerror(error.errno):
        text = str(error)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _complain(sentence: str) -> None:
    click.echo(f"prefault: {sentence}", err=True)
