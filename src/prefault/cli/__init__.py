"""The ``prefault`` command: one module per command, which parses and prints. What it shows comes from the library."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from importlib import import_module
from types import FrameType
from typing import Any

import click

from prefault._version import __version__
from prefault.cli.messages import complain, sentence

_COMMANDS = {
    "bench": "Measure how fast this machine populates memory, beside the figures published in 2021.",
    "completion": "Print a script that makes a shell complete commands, options and paths.",
    "device": "Serve memory whose pages a driver supplies.",
    "doctor": "Show what this machine can do for prefault, what limits it, and what could be better.",
    "evict": "Drop files from the page cache: they are read from the disk again. Nothing is lost.",
    "lock": "Bring files into memory and keep them there, until SIGTERM, or Ctrl-C.",
    "record": "Run COMMAND and note which pages of which files it touches, to be brought back by prefault replay.",
    "replay": "Bring the pages of RECORDING back into the page cache, in disk order; then run COMMAND, if there is one.",
    "report": "Write one HTML file that shows which parts of files, or of a process, are in memory.",
    "run": "Run COMMAND, a backup say, without pushing other files out of the page cache for longer than it runs.",
    "snapshot": "Save which pages of files are in the page cache, and bring them back.",
    "status": "Show how much of files is in the page cache. Nothing is read in.",
    "warm": "Bring files into the page cache, so that reading them later waits for no disk and no server.",
    "watch": "Show which parts of files, or of a process, are in memory, and how that changes.",
}
"""The first line of each command's help. ``NAME`` is the command object ``NAME`` in the module ``prefault.cli.NAME``."""


class _LazyGroup(click.Group):
    """A group that imports a command's module when that command is run: ``prefault --help`` imports none."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Names alone, as get_command() imports the commands: since click 8.4 a mistyped one is told those that look like it.
        self.commands = dict.fromkeys(_COMMANDS)  # type: ignore[assignment]

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
    """Make memory present before it is touched.

    \b
    Exit status:
      0    all of it was done
      1    part of it, or nothing: stderr says what is missing, and the remedy
      2    the command line is wrong
      130  Ctrl-C
      143  SIGTERM
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    An error that the user can correct is one sentence on stderr, with status 2 for a wrong call and 1 otherwise. Ctrl-C is
    130, SIGTERM 143: docs/command.md.
    """
    _write_names_as_they_are()
    with _EndBySigterm() as ending:
        try:
            status = cli.main(arguments, prog_name="prefault", standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk is an exception that can be caught, and not at exit
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return 2
        except click.ClickException as error:
            complain(error.format_message())
            return error.exit_code
        except (KeyboardInterrupt, click.Abort):
            complain("terminated" if ending.came else "interrupted")
            return 128 + (signal.SIGTERM if ending.came else signal.SIGINT)
        except BrokenPipeError:
            # The reader of stdout has gone, as with `| head`. Python would complain when it flushes stdout at exit.
            sys.stdout = None
            return 1
        except OSError as error:
            complain(sentence(error))
            _drop_output_that_cannot_be_written()
            return 1
        except MemoryError as error:
            complain(str(error) or "Python found no memory: free some, or raise RLIMIT_AS or the cgroup's limit")
            return 1
        except ImportError as error:
            if (error.name or "").partition(".")[0] == "prefault":
                raise
            complain(str(error))  # an extra that is not installed
            return 1
    return status if isinstance(status, int) else 0


class _EndBySigterm:
    """SIGTERM as a Ctrl-C with another exit status: what a command holds is given back by the same code.

    Attributes:
        came: True once SIGTERM came.
    """

    def __init__(self) -> None:
        self.came = False
        self._process = os.getpid()
        self._before: Any = None

    def __enter__(self) -> _EndBySigterm:
        # A handler of the caller stays, and SIGTERM that is ignored stays so.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._before = signal.signal(signal.SIGTERM, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _end(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork that has set no handler of its own
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.came = True
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)  # not raised here: steps that must not be cut short defer Ctrl-C


def _write_names_as_they_are() -> None:
    """Let stdout and stderr take names that are not UTF-8, byte by byte, rather than raise UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="surrogateescape")


def _drop_output_that_cannot_be_written() -> None:
    """Drop stdout where it cannot be flushed: Python would flush it again at exit, with a traceback and exit status 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        sys.stdout = None
