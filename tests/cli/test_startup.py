"""What the command loads at its start, and what its list of commands says."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from prefault import cli

_HEAVY = {"numpy", "rich", "msgspec", "prefault.bench", "prefault.device", "prefault.doctor"}


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after the statement."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stderr))


def test_importing_the_package_loads_nothing_of_the_command() -> None:
    assert not loaded_by("import prefault") & (_HEAVY | {"click", "prefault.cli"})


def test_help_loads_click_and_no_command() -> None:
    loaded = loaded_by("from prefault.cli import main; main(['--help'])")
    assert not loaded & _HEAVY
    assert {name for name in loaded if name.startswith("prefault.cli")} == {"prefault.cli", "prefault.cli.messages"}


@pytest.mark.parametrize("arguments", [["doctor", "--json"], ["bench", "--list"], ["device", "--help"], ["--version"]])
def test_rich_is_loaded_only_to_render(arguments: list[str]) -> None:
    loaded = loaded_by(f"from prefault.cli import main; main({arguments})")
    assert not loaded & {"rich", "numpy"}


def test_the_list_of_commands_says_what_the_commands_say() -> None:
    group = cli.cli
    context = click.Context(group)
    listed = dict(cli._COMMANDS)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        assert (command.help or "").partition("\n")[0] == listed.pop(name)
    assert not listed


def test_every_command_is_shown() -> None:
    done = subprocess.run([sys.executable, "-m", "prefault", "--help"], capture_output=True, text=True, check=True)
    lines = done.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines if line[2:3].strip()] == list(cli._COMMANDS)
