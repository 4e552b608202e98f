"""Shell completion, and the manual pages that are made from the parser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from prefault.cli import completion, main
from support.commands import COMMANDS

_ROOT = Path(__file__).parent.parent.parent
_FOUND = {"bash": r"^plain,doctor$", "zsh": r"^plain\ndoctor\nShow what", "fish": r"^plain,doctor\tShow what"}


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files below share/ of a wheel."""
    directory = tmp_path_factory.mktemp("share")
    subprocess.run([sys.executable, _ROOT / "tools" / "shell_files.py", directory], check=True, timeout=60)
    return directory


# --- completion


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_is_printed_and_installed(shell: str, share: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert "_PREFAULT_COMPLETE" in printed
    assert [path for path in share.rglob("*prefault*") if path.is_file() and path.read_text() == printed]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_what_a_shell_is_answered(shell: str) -> None:
    """The script asks by environment variables: click's protocol."""
    word = {"COMP_WORDS": "prefault doc", "COMP_CWORD": "doc" if shell == "fish" else "1"}
    done = subprocess.run(
        [sys.executable, "-m", "prefault"], env={**os.environ, "_PREFAULT_COMPLETE": f"{shell}_complete", **word},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert re.search(_FOUND[shell], done.stdout, re.MULTILINE), done.stdout
    assert "bench" not in done.stdout


_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
compopt() { echo "compopt $1 $2"; }
complete -p prefault
_prefault_completion prefault
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["d"], ["device", "doctor"]),
        (["bench", "d"], ["device"]),
        (["bench", "device", "--fr"], ["--frames"]),
        (["bench", "device", "--frames", ""], ["ready", "cold"]),
        (["bench", "--json", "/t"], ["compopt -o default"]),
        (["completion", ""], list(completion.SHELLS)),
    ],
)
def test_bash(words: list[str], expected: list[str], share: Path, tmp_path: Path) -> None:
    program = tmp_path / "prefault"  # the script calls it by its name
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m prefault "$@"\n')
    program.chmod(0o755)
    installed = share / "bash-completion" / "completions" / "prefault"
    done = subprocess.run(
        ["bash", "--norc", "-c", _ASK, "bash", installed, "prefault", *words],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    first, *others = done.stdout.splitlines()
    assert first == "complete -o nosort -F _prefault_completion prefault"
    assert others[: len(expected)] == expected


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_syntax_of_a_script(shell: str, share: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (path,) = (each for each in share.rglob("*prefault*") if each.is_file() and shell in str(each.relative_to(share)))
    subprocess.run([shell, "-n", path], check=True, timeout=60)


# --- manual pages


def _page(share: Path, path: str) -> str:
    return (share / "man" / "man1" / f"{path.replace(' ', '-')}.1").read_text()


def test_each_command_has_a_page_and_nothing_else_has(share: Path) -> None:
    assert {page.stem for page in (share / "man" / "man1").iterdir()} == {path.replace(" ", "-") for path in COMMANDS}


@pytest.mark.parametrize("path", COMMANDS)
def test_a_page_has_what_the_help_has(path: str, share: Path) -> None:
    page = _page(share, path)
    context = COMMANDS[path]
    plain = page.replace("\\-", "-")
    for parameter in context.command.get_params(context):
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert option in plain
    for line in (context.command.help or "").splitlines():
        assert line.strip(" \b:").removesuffix("s") in plain or line.strip("\b :").upper() in plain
    assert re.findall(r"^\.SH (.*)", page, re.MULTILINE)[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert "\b" not in page
    if path != "prefault":
        assert "\n.SH EXAMPLES\n" in page


@pytest.mark.parametrize("path", COMMANDS)
def test_a_page_can_be_formatted(path: str, share: Path) -> None:
    requests = set(re.findall(r"^[.'](\S*)", _page(share, path), re.MULTILINE))
    assert requests <= {"TH", "SH", "B", "PP", "TP", "nf", "fi"}
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed: the page was searched for wrong requests only")
    page = share / "man" / "man1" / f"{path.replace(' ', '-')}.1"
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""


def test_a_wheel_has_them_and_the_schemas(share: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=_ROOT, check=True, timeout=60,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {
            name.partition(".data/data/share/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if ".data/data/share/" in name
        }
    schemas = {f"prefault/schemas/{path.name}": path.read_text() for path in (_ROOT / "docs" / "schemas").iterdir()}
    assert found == {**dict(_files(share)), **schemas}


def _files(share: Path) -> Iterator[tuple[str, str]]:
    for path in share.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(share)), path.read_text()
