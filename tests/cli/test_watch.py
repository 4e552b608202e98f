"""``prefault watch``: lines, one frame, recordings, a terminal, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefault.cli import main
from prefault.pictures.watch_recording import read_recording
from support.json_schemas import check_output
from support.mapped_process import MappedProcess

_MIB = 1 << 20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    for name, length in (("one", _MIB), ("two", 2 * _MIB)):
        (folder / name).write_bytes(os.urandom(length))
    return folder


def test_one_frame_has_a_line_for_each_file(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", str(tree)]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("3.0 MiB of 3.0 MiB present (100.0 %), 2 rows")
    assert {row.split()[-1] for row in rows} == {str(tree / "one"), str(tree / "two")}


def test_frames_are_lines_where_there_is_no_terminal(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "-n", "3", "-i", "0.05", str(tree)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_recording_of_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MappedProcess() as other:
        start = other.map(64 * 4096)
        other.do(f"store({start})")
        record = tmp_path / "frames"
        assert main(["watch", "--pid", str(other.pid), "-n", "2", "-i", "0.05", "--record", str(record)]) == 0
    (first, second) = read_recording(record)
    assert "[heap]" in {row.name for row in first.rows.values()}
    assert len(second.rows) >= len(first.rows) - 1


def test_json_lines_on_stdout(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", "--json", str(tree)]) == 0
    frame = check_output(capsys.readouterr().out, "prefault-watch")
    assert len(frame["rows"]) == 2


def test_a_terminal_gets_a_picture_and_ctrl_c_ends_it(tree: Path) -> None:
    mine, terminal = pty.openpty()
    command = [sys.executable, "-m", "prefault", "watch", "-i", "0.1", str(tree)]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True) as process:
        os.close(terminal)
        seen = b""
        deadline = time.monotonic() + 60
        while "█".encode() not in seen and time.monotonic() < deadline:
            seen += os.read(mine, 4096)
        process.send_signal(signal.SIGINT)
        try:
            while os.read(mine, 4096):
                pass
        except OSError:  # EIO: the other side is closed
            pass
        finally:
            os.close(mine)
        assert process.wait(60) == 0
    assert b"present (100.0 %)" in seen


def test_a_dumb_terminal_gets_lines(tree: Path) -> None:
    """One that cannot go back would get the last frame only."""
    mine, terminal = pty.openpty()
    command = [sys.executable, "-m", "prefault", "watch", "-i", "0.05", "-n", "3", str(tree)]
    with subprocess.Popen(command, stdout=terminal, env={**os.environ, "TERM": "dumb"}) as process:
        os.close(terminal)
        with open(mine, "rb", buffering=0) as output:
            seen = b""
            with contextlib.suppress(OSError):  # EIO: the other side is closed
                while part := output.read(4096):
                    seen += part
        assert process.wait(60) == 0
    assert seen.count(b"present (100.0 %)") == 3
    assert b"\x1b" not in seen


def test_an_earlier_recording_stays_where_there_is_nothing_to_record(tmp_path: Path) -> None:
    record = tmp_path / "frames"
    record.write_text("of value")
    with MappedProcess() as other:
        other.kill()
        assert main(["watch", "--once", "--pid", str(other.pid), "--record", str(record)]) == 1
    assert record.read_text() == "of value"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--pid", "1", "/"], ["/no/such/file"], ["--pid", "0"], ["-i", "0", "/"], ["-i", "nan", "/"], ["-i", "inf", "/"]],
)
def test_wrong_calls(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", *arguments]) == 2
    assert capsys.readouterr().err.startswith("prefault: ")


def test_a_process_that_is_gone_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with MappedProcess() as other:
        other.kill()
        assert main(["watch", "--once", "--pid", str(other.pid)]) == 1
    assert f"no process has the pid {other.pid}" in capsys.readouterr().err


def test_a_recording_that_cannot_be_written(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", "--record", str(tree / "no" / "where"), str(tree)]) == 1
    assert "No such file" in capsys.readouterr().err
