"""Write the manual pages and the completion scripts of the prefault command to a directory, in the layout of share/.

    tools/shell_files.py DIRECTORY

Everything is made from the parser: `make man`, and the build of a wheel (hatch_build.py), which installs it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click_man.man import ManPage  # type: ignore[import-untyped]

from prefault._version import __version__
from prefault.cli import cli
from prefault.cli.completion import SHELLS, script

_COMPLETIONS = {
    "bash": "bash-completion/completions/prefault",
    "zsh": "zsh/site-functions/_prefault",
    "fish": "fish/vendor_completions.d/prefault.fish",
}


def shell_files() -> Iterator[tuple[str, str]]:
    """Yield the path of each file below share/, and its text."""
    yield from _man_pages(click.Context(cli, info_name="prefault", **cli.context_settings))
    for shell in SHELLS:
        yield _COMPLETIONS[shell], script(shell)


def _man_pages(context: click.Context) -> Iterator[tuple[str, str]]:
    command = context.command
    names = command.list_commands(context) if isinstance(command, click.Group) else []
    children = []
    for name in names:
        child = command.get_command(context, name)  # type: ignore[attr-defined]
        children.append(click.Context(child, info_name=name, parent=context, **child.context_settings))
    yield f"man/man1/{_page_name(context)}.1", _man_page(context, children)
    for child in children:
        yield from _man_pages(child)


def _man_page(context: click.Context, children: list[click.Context]) -> str:
    """Return the page of one command. What click's help marks by backspaces and indents becomes sections and filled text."""
    first, *paragraphs = inspect.cleandoc(context.command.help or "").split("\n\n")
    sections: dict[str, list[str]] = {}
    described = [_escaped(first)]
    for paragraph in paragraphs:
        lines = paragraph.splitlines()
        if lines[0] != "\b":
            described += [".PP", _escaped(paragraph)]
        elif lines[1].endswith(":"):
            sections["EXAMPLES" if lines[1] == "Example:" else lines[1].rstrip(":").upper()] = lines[2:]
        else:
            described += [".PP", ".nf", _escaped("\n".join(lines[1:])), ".fi"]
    page = ManPage(context.command_path)
    page.version = f"prefault {__version__}"
    page.date = ""  # a date would make each build another one
    page.short_help = _escaped(" ".join(first.split()).rstrip("."))
    page.synopsis = _escaped(" ".join(context.command.collect_usage_pieces(context)))
    page.description = "\n".join(described)
    records = [parameter.get_help_record(context) for parameter in context.command.get_params(context)]
    page.options = [(_escaped(option), _escaped(text)) for option, text in filter(None, records)]
    page.commands = [(child.info_name, _escaped(_short_help(child))) for child in children]
    if context.parent is not None:
        sections["EXIT STATUS"] = ["See prefault(1)."]
    others = [context.parent, *children] if context.parent else children
    sections["SEE ALSO"] = [", ".join(f"{_page_name(other)}(1)" for other in others)]
    return str(page) + "".join(_section(title, lines) for title, lines in sections.items())


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f".SH {title}", ".nf", *(_escaped(line.removeprefix("  ")) for line in lines), ".fi", ""])


def _short_help(context: click.Context) -> str:
    return " ".join((context.command.help or "").partition("\n\n")[0].split())


def _page_name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _escaped(text: str) -> str:
    """Escape backslashes, and a dot or quote at the start of a line, which roff takes for a request."""
    return re.sub(r"^(?=[.'])", r"\\&", text.replace("\\", r"\e"), flags=re.MULTILINE)


def main(directory: str) -> None:
    for name, text in shell_files():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
