"""The ``prefault`` command: one module per command, which parses and prints. What it shows comes from the library."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module

import click

from prefault._version import __version__

_COMMANDS = {
    "bench": "Measure how fast this machine populates memory, beside the figures published in 2021.",
    "device": "Serve memory whose pages a driver supplies.",
    "doctor": "Show what this machine can do for prefault, what limits it, and what could be better.",
}
"""The first line of each command's help. ``NAME`` is the command object ``NAME`` in the module ``prefault.cli.NAME``."""


class _LazyGroup(click.Group):
    """A group that imports a command's module when that command is run: ``prefault --help`` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prefault")
def cli() -> None:
    """Make memory present before it is touched."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    An error that the user can correct is one sentence on stderr, with status 2 for a wrong call and 1 otherwise. Ctrl-C is
    130.
    """
    try:
        status = cli.main(arguments, prog_name="prefault", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk is an exception that can be caught, and not at exit
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
        # The reader of stdout has gone, as with `| head`. Python would complain when it flushes stdout at exit.
        sys.stdout = None
        return 1
    except OSError as error:
        _complain(_sentence(error))
        _drop_output_that_cannot_be_written()
        return 1
    except MemoryError as error:
        _complain(str(error) or "Python found no memory: free some, or raise RLIMIT_AS or the cgroup's limit")
        return 1
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "prefault":
            raise
        _complain(str(error))  # an extra that is not installed
        return 1
    return status if isinstance(status, int) else 0


def _drop_output_that_cannot_be_written() -> None:
    """Drop stdout where it cannot be flushed: Python would flush it again at exit, with a traceback and exit status 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        sys.stdout = None


_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _sentence(error: OSError) -> str:
    """Return the error's message on one line, without the errno where the message says more than the errno's name."""
    text = error.strerror or str(error)
    if error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {text}"
    elif error.errno is not None and text == os.strerror(error.errno):
        # Python names no file where writing to an open one fails; commands name all files that they write but their output.
        text = f"the output cannot be written: {text}" if error.errno in _OF_WRITING else str(error)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _complain(sentence: str) -> None:
    click.echo(f"prefault: {sentence}", err=True)
