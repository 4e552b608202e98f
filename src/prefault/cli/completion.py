"""``prefault completion``: scripts with which shells complete the command line."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from prefault.cli import cli

SHELLS = ("bash", "zsh", "fish")

_VARIABLE = "_PREFAULT_COMPLETE"
"""The environment variable by which a shell asks for completions: click makes its name from the program's."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that makes a shell complete commands, options and paths.

    bash 4.4 or later loads it from ~/.local/share/bash-completion/completions/prefault, zsh from a file _prefault in a
    directory of $fpath, fish from ~/.config/fish/completions/prefault.fish. A line of ~/.bashrc or ~/.zshrc also works, at
    the cost of starting prefault with each shell.

    \b
    Examples:
      prefault completion bash > ~/.local/share/bash-completion/completions/prefault
      prefault completion fish > ~/.config/fish/completions/prefault.fish
      eval "$(prefault completion zsh)"
    """
    click.echo(script(shell), nl=False)


def script(shell: str) -> str:
    """Return the script for one of :data:`SHELLS`."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(cli, {}, "prefault", _VARIABLE).source()
