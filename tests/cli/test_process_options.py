"""The output of commands about a process: a table, JSON by its schema, and what goes to stderr."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from prefault import processes
from prefault.cli.options import process_options
from prefault.cli.options.process_options import run_status, run_warm
from prefault.processes import SkippedMapping
from support import needs, oracle
from support.children import in_child
from support.json_schemas import check_output
from support.mapped_process import MappedProcess


@pytest.fixture
def other() -> Iterator[MappedProcess]:
    with MappedProcess() as process:
        yield process


def test_the_table_has_a_row_for_each_mapping(other: MappedProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_status(other.pid, as_json=False) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["address", "size", "present", "allocated", "huge", "swapped", "locked", "mapping"]
    assert any(line.endswith("[heap]") for line in lines)
    assert any(line.split()[-1] == "[vvar]" and "?" in line.split() for line in lines)
    assert f"all of process {other.pid} (" in out
    assert "?: device memory" in out
    assert err == ""


@pytest.mark.parametrize("ranges", [False, True])
def test_status_in_json(other: MappedProcess, capsys: pytest.CaptureFixture[str], ranges: bool) -> None:
    start = other.map(8 * oracle.PAGE)
    other.do(f"store({start} + {2 * oracle.PAGE})")
    assert run_status(other.pid, as_json=True, ranges=ranges) == 0
    document = check_output(capsys.readouterr().out, "prefault-status-process")
    (mapping,) = (one for one in document["mappings"] if one["start"] <= start < one["stop"])
    assert mapping["present_bytes"] >= oracle.PAGE
    if ranges:
        page = start + 2 * oracle.PAGE - mapping["start"]
        assert any(first <= page < last for first, last in mapping["present"])


def test_warm_in_words_and_in_json(other: MappedProcess, capsys: pytest.CaptureFixture[str]) -> None:
    start = other.map(64 * oracle.PAGE)
    assert run_warm(other.pid, ["[anonymous]"], as_json=False, untouched=True) == 0
    assert "brought in to" in capsys.readouterr().out
    assert oracle.present_bytes(start, 64 * oracle.PAGE, other.pid) == 64 * oracle.PAGE
    assert run_warm(other.pid, (), as_json=True) == 0
    document = check_output(capsys.readouterr().out, "prefault-warm-process")
    assert "[vvar]" in [one["name"] for one in document["skipped"]]


def test_a_budget_that_ends_it_is_partly_done(other: MappedProcess, capsys: pytest.CaptureFixture[str]) -> None:
    other.map(64 * oracle.PAGE)
    assert run_warm(other.pid, ["[anonymous]"], as_json=False, untouched=True, budget="4 KiB") == 1
    assert "the budget of 4.0 KiB is used up" in capsys.readouterr().err


def test_thousands_of_failures_are_a_few_lines(
    other: MappedProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = processes.status(other.pid).mappings[0]
    gone = tuple(SkippedMapping(mapping, "it was unmapped meanwhile", failed=True) for _ in range(5000))
    result = processes.warm(other.pid, budget=0)._replace(skipped=gone, stopped="")
    monkeypatch.setattr(process_options, "warm", lambda *_, **__: result)
    assert run_warm(other.pid, (), as_json=False) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[-1] == f"prefault: 4992 more mappings of process {other.pid}: it was unmapped meanwhile"


def test_a_name_that_nothing_has_is_a_wrong_call(other: MappedProcess) -> None:
    with pytest.raises(click.UsageError, match="'libnothing'"):
        run_warm(other.pid, ["libnothing"], as_json=False)


def test_another_user_gets_the_sums_and_the_reason(other: MappedProcess, capfd: pytest.CaptureFixture[str]) -> None:
    needs.root("become another user")

    def look() -> int:
        os.setuid(65534)
        return run_status(other.pid, as_json=False)

    assert in_child(look) == 1
    out, err = capfd.readouterr()
    assert "?" in out.splitlines()[-1].split()
    assert "not permitted to user 65534" in err


def test_without_cap_sys_ptrace_the_right_that_is_missing_is_said() -> None:
    """As in a container, whose root lacks that capability: process 1 has it, so its memory is not shown."""
    needs.root("drop a capability")
    libc = ctypes.CDLL(None)
    # prctl(2): PR_CAPBSET_DROP of CAP_SYS_PTRACE, which the program that is executed then lacks.
    done = subprocess.run(
        [sys.executable, "-m", "prefault", "status", "--pid", "1"], preexec_fn=lambda: libc.prctl(24, 19, 0, 0, 0),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "without CAP_SYS_PTRACE: run it with that capability (in a container: --cap-add SYS_PTRACE)" in done.stderr
