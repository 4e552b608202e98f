"""Rules that every command keeps: help with an example, JSON, exit statuses, and no traceback for any argument."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from prefault.cli import main
from support.children import in_child
from support.commands import COMMANDS, examples, runs
from support.json_schemas import FOLDER

_PAGE = (Path(__file__).parent.parent.parent / "docs" / "command.md").read_text()

_PARAMETRIZED = pytest.mark.parametrize("path", [path for path, context in COMMANDS.items() if runs(context)])

_WITHOUT_JSON = {
    "prefault completion": "prints a script for a shell",
    "prefault report": "the output is a page, which has its data as JSON inside",
    "prefault record": "the output is the command's",
    "prefault run": "the output is the command's",
    "prefault snapshot auto": "it runs until it is ended",
}


def _call(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: its exit status, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("path", COMMANDS)
def test_help(path: str) -> None:
    for option in ("--help", "-h"):
        status, out, err = _call(*path.split()[1:], option)
        assert (status, err) == (0, "")
        assert out.startswith(f"Usage: {path} ")
    for parameter in COMMANDS[path].command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("path", [path for path in COMMANDS if path != "prefault"])
def test_an_example_that_the_parser_takes(path: str) -> None:
    found = examples(COMMANDS[path])
    assert found
    for words in found:
        context = COMMANDS["prefault"]
        while isinstance(context.command, click.Group) and words and f"{context.command_path} {words[0]}" in COMMANDS:
            context = COMMANDS[f"{context.command_path} {words.pop(0)}"]
        assert context.command_path.startswith(path)
        parser = context.command.make_parser(click.Context(context.command, info_name=path))
        parser.parse_args(words)


def test_examples_are_found() -> None:
    command = click.Command(
        "x", help="Say.\n\n\b\nExamples:\n  prefault x 'a b' | jq\n  find -print0 | prefault x -0 -  # c\n"
    )
    assert examples(click.Context(command)) == [["x", "a b"], ["x", "-0", "-"]]


@_PARAMETRIZED
def test_json_with_a_schema(path: str) -> None:
    """--json names a schema in its help, and docs/command.md lists it."""
    options = [option for option in COMMANDS[path].command.params if "--json" in option.opts]
    assert bool(options) != (path in _WITHOUT_JSON)
    for option in options:
        assert isinstance(option, click.Option)
        kinds = re.findall(r"docs/schemas/([\w-]+)\.json", option.help or "")
        assert kinds
        for kind in kinds:
            assert (FOLDER / f"{kind}.json").is_file()
            assert f"](schemas/{kind}.json)" in _PAGE


def test_each_schema_is_named_by_a_command() -> None:
    named = set(re.findall(r"\]\(schemas/([\w-]+)\.json\)", _PAGE))
    assert {file.stem for file in FOLDER.iterdir()} == named


# --- wrong calls


def test_a_name_that_is_near_a_command_is_told_it() -> None:
    assert _call("stat") == (2, "", "prefault: No such command 'stat'. Did you mean 'status'?\n")
    assert _call("device", "serv") == (2, "", "prefault: No such command 'serv'. Did you mean 'serve'?\n")
    assert _call("xyzzy") == (2, "", "prefault: No such command 'xyzzy'.\n")


@pytest.mark.parametrize("path", COMMANDS)
def test_an_unknown_option_is_one_line(path: str) -> None:
    status, out, err = _call(*path.split()[1:], "--no-such-option")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"prefault: [^\n]*--no-such-option[^\n]*\n", err)


@pytest.mark.parametrize("path", [path for path, context in COMMANDS.items() if isinstance(context.command, click.Group)])
def test_an_unknown_command_is_one_line(path: str) -> None:
    status, out, err = _call(*path.split()[1:], "no-such-command")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"prefault: [^\n]*no-such-command[^\n]*\n", err)


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        ("lock -P /nowhere/pid list", 1, "/nowhere/pid: No such file or directory: there is no directory /nowhere: make it,"
         " or name another"),
        ("snapshot restore nothing", 1, "nothing: No such file or directory: check the path"),
        ("report -o /nowhere/page.html list", 1, "/nowhere/page.html: No such file or directory: there is no directory"
         " /nowhere: make it, or name another"),
        ("report -o page.html --bench list", 1, "list: not a file that prefault bench --json wrote, as it is no JSON:"
         " Expecting value: line 1 column 1 (char 0)"),
        ("report -o page.html --watch list", 1, "list: line 1 is not JSON, so that it is none of"
             " 'prefault watch --record', or a damaged one"),
        ("warm --threads two list", 2, "Invalid value for '--threads': 'two' is not a valid whole number."),
        ("snapshot auto --interval nan s list", 2, "Invalid value for '--interval': 'nan' is not a valid number of"
         " seconds."),
        ("snapshot auto --interval inf s list", 2, "Invalid value for '--interval': inf is not in the range"
         " 0<=x<=31622400."),
        ("watch --interval nan list", 2, "Invalid value for '-i' / '--interval': 'nan' is not a valid number of seconds."),
        ("status --min-size 2G --max-size 1G list", 2, "--min-size is larger than --max-size, so that no file has a size"
         " between them"),
        ("bench --size 0", 2, "--size 0 is not a multiple of 2 MiB above 0: not every backing has such a size"),
        ("status --tensor x list", 1, "list: is no model file whose tensors have names: --tensor takes .safetensors, .gguf"
         " and .npy files (--include chooses them)"),
    ],
)  # fmt: skip
def test_an_error_has_the_name_the_reason_and_the_remedy(
    words: str, status: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_text("not a recording, and no model file\n")
    assert _call(*words.split())[::2] == (status, f"prefault: {error}\n")


def test_a_recording_without_a_name_is_refused_before_the_command_runs(tmp_path: Path) -> None:
    for words in (["record", "-o", ""], ["snapshot", "auto", ""]):
        status, _, err = _call(*words, "--", "touch", str(tmp_path / "ran"))
        error = "'': the path of the recording is empty: name a file; a variable in the command may be unset"
        assert (status, err) == (2, f"prefault: {error}\n")
    assert not (tmp_path / "ran").exists()


_HOSTILE = [
    "", " ", "-", "--", "=", ":", "-1", "1e999", "nan", "٣", "0x", "99999999999999999999", "%s{0}", "x" * 5000,
    "a\nb\x1b[31m", "\udcff\udc80", "/dev/null/x", "/proc/self/mem/x", "a:b:c", "../" * 2000, "\u202e",
]  # fmt: skip

_FILLERS = {
    # So short a run that a value which is no error does not cost minutes.
    "prefault bench": ["--quick", "--size", "2 MiB", "--repeats", "1", "--backing", "Anon 4 KiB", "--method", "write"],
    "prefault bench device": ["--quick", "--size", "2 MiB", "--repeats", "1"],
}


def _hostile_calls(path: str) -> Iterator[list[str]]:
    """Yield the words of each call: each value as each argument, and as the value of each option."""
    context = COMMANDS[path]
    words = [*path.split()[1:], *_FILLERS.get(path, [])]
    arguments = [each for each in context.command.params if isinstance(each, click.Argument)]
    for option in context.command.params:
        if isinstance(option, click.Option) and option.required:
            words += [option.opts[0], "/dev/null/x"]
    yield words
    for value in _HOSTILE:
        for at in range(len(arguments)):
            yield [*words, *("/dev/null/x" for _ in range(at)), value]
            yield [*words, "--", *("/dev/null/x" for _ in range(at)), value]
        for option in context.command.params:
            if isinstance(option, click.Option) and not option.is_flag:
                yield [*words, option.opts[0], value, *("/dev/null/x" for each in arguments if each.required)]
                yield [*words, f"{option.opts[0]}={value}"]


@_PARAMETRIZED
def test_hostile_arguments(path: str) -> None:
    """One line a failure, statuses 0, 1 and 2, and no traceback; in a removed directory, where no file can be made."""

    def run() -> None:
        os.chdir(tempfile.mkdtemp())
        os.rmdir(os.getcwd())
        for words in _hostile_calls(path):
            status, _, err = _call(*words)
            assert status in (0, 1, 2), (words, status)
            assert "Traceback" not in err, words
            assert not re.search(r"[\x00-\x09\x0b-\x1f\udc80-\udcff]", err), words
            if status:
                assert re.search(r"^prefault: .|^Usage: ", err, re.MULTILINE), (words, err)

    in_child(run, 90)


def test_bytes_that_are_no_utf8_in_a_real_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefault", b"\xff\x1b[31m"], capture_output=True, check=False, timeout=60,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(rb"prefault: [\x20-\x7e]*\\x1b\[31m[\x20-\x7e]*\n", done.stderr)


# --- signals

_SLOW = """
import os, signal, sys, time
import click
from prefault.cli import cli, main

@cli.command()
def slow():
    try:
        print("started", flush=True)
        while True:
            time.sleep(0.01)  # short: Python does not see a signal that comes just before a system call until that returns
    finally:
        print("given back", flush=True)

cli.get_command = lambda context, name: slow
sys.exit(main(["slow"]))
"""


@pytest.mark.parametrize(
    ("number", "word", "in_background"),
    [(signal.SIGINT, "interrupted", False), (signal.SIGTERM, "terminated", False), (signal.SIGTERM, "terminated", True)],
)
def test_a_signal_ends_a_command_that_gives_back_what_it_holds(number: int, word: str, in_background: bool) -> None:
    """A shell starts a command in the background with SIGINT ignored."""

    def ignored() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignored
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "given back\n", f"\nprefault: {word}\n")


_FORK = """
        if not (pid := os.fork()):
            os.write(writer, b"1")
            while True:
                time.sleep(0.01)
        os.read(reader, 1)
        os.kill(pid, signal.SIGTERM)
        print(os.waitpid(pid, 0)[1])
"""


def test_a_fork_of_a_command_dies_by_sigterm() -> None:
    start, _, rest = _SLOW.partition("        while True:\n")
    code = f"{start}        reader, writer = os.pipe(){_FORK}{rest.partition(chr(10))[2]}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"started\n{signal.SIGTERM:d}\ngiven back\n"
