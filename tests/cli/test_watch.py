"""``prefault watch``: lines, one frame, recordings, a terminal, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefault.cli import main
from prefault.cli.watch import taking
from prefault.pictures.watch_recording import read_recording
from support import needs
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


def _on_a_terminal(arguments: list[str], **environment: str) -> str:
    """Run `prefault watch` on a terminal to its end, and return what it wrote."""
    mine, terminal = pty.openpty()
    command = [sys.executable, "-m", "prefault", "watch", *arguments]
    with subprocess.Popen(command, stdout=terminal, env={**os.environ, **environment}) as process:
        os.close(terminal)
        seen = b""
        with open(mine, "rb", buffering=0) as output, contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := output.read(4096):
                seen += part
        assert process.wait(60) == 0
    return seen.decode()


def test_a_dumb_terminal_gets_lines(tree: Path) -> None:
    """One that cannot go back would get the last frame only."""
    seen = _on_a_terminal(["-i", "0.05", "-n", "3", str(tree)], TERM="dumb")
    assert seen.count("present (100.0 %)") == 3
    assert "\x1b" not in seen


@pytest.mark.parametrize("arguments", [["--once"], ["-n", "1"]])
def test_a_terminal_without_unicode_gets_a_picture_too(tree: Path, arguments: list[str]) -> None:
    seen = _on_a_terminal([*arguments, str(tree)], PYTHONIOENCODING="ascii")
    assert "######" in seen
    assert "all present" in seen


def test_a_resized_terminal_keeps_nothing_of_an_earlier_picture(tree: Path) -> None:
    seen = _on_a_terminal(["-n", "2", "-i", "0.05", str(tree)])
    _, drawn, after = re.split(r"\x1b\[\?1049[hl]", seen)  # into the alternate screen, and out of it
    assert drawn.count("present (100.0 %)") == 2
    assert after.count("present (100.0 %)") == 1  # the last one stays


def test_another_process_of_the_same_pid_is_not_shown() -> None:
    needs.root("choose the next pid")
    last_pid = Path("/proc/sys/kernel/ns_last_pid")
    with MappedProcess() as other, taking((), other.pid) as take:
        assert take()
        other.kill()
        for _ in range(100):
            try:
                last_pid.write_text(str(other.pid - 1))
            except OSError as error:
                needs.missing(f"the kernel lets nobody choose a pid: {error}")
            with MappedProcess() as reused:
                if reused.pid == other.pid:
                    with pytest.raises(ProcessLookupError, match="has ended meanwhile"):
                        take()
                    return
    needs.missing("the pid was taken by others each time")


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
