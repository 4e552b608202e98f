"""All commands of the parser: what tests of the command line walk."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from prefault.cli import cli


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def _walk(context: click.Context) -> Iterator[click.Context]:
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None, name
            yield from _walk(_context(command, name, context))


COMMANDS = {context.command_path: context for context in _walk(_context(cli, "prefault"))}
"""Each command and group by its path, such as ``prefault bench device``."""


def runs(context: click.Context) -> bool:
    """Whether the command does something by itself, as a group of commands does not."""
    return not isinstance(context.command, click.Group) or context.command.invoke_without_command


def examples(context: click.Context) -> list[list[str]]:
    """Return the words of each example in the help of a command, without ``prefault``, and up to a pipe."""
    found = []
    for line in (context.command.help or "").splitlines():
        at = re.match(r" {2,}(?:[^$|]*(?:\||&&) )?prefault (.*)", line)
        if at is not None:
            words = shlex.split(at[1], comments=True)
            ends = [words.index(end) for end in ("|", "<", ">", "&&", "&") if end in words]
            found.append(words[: min(ends, default=len(words))])
    return found
