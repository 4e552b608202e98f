"""Progress: the function, the bar on a terminal, the lines in the log."""

from __future__ import annotations

import io
import logging
import os
import sys

import pytest

import prefault
from prefault.engine import progress
from prefault.engine.progress import reporting
from prefault.sizes import GIB, MIB


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """Make stderr a terminal. Not a fixture: pytest sets stderr anew between those and the test."""
    stream = _Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "prefault")
    return caplog


def test_a_function_is_called_and_false_is_nobody() -> None:
    def told(done: int, total: int) -> None:
        raise AssertionError((done, total))

    with reporting(told, "populate") as report:
        assert report is told
    with reporting(False, "populate") as report:
        assert report is None


@pytest.mark.parametrize("wrong", [None, 1, "yes"])
def test_anything_else_is_refused_before_anything_is_done(wrong: object) -> None:
    with prefault.Mapping("1 MiB") as memory:
        with pytest.raises(TypeError, match="progress is True, False or a function"):
            prefault.populate(memory, progress=wrong)  # type: ignore[arg-type]
        assert prefault.residency(memory).present_bytes == 0


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = _terminal(monkeypatch)
    caplog.set_level(logging.INFO, "prefault")
    with prefault.Mapping("8 MiB") as memory:
        prefault.populate(memory, progress=True)
    text = terminal.getvalue()
    assert "populate" in text
    assert "8.4/8.4 MB" in text or "8.0/8.0 MiB" in text
    assert not caplog.records


def test_calls_at_the_same_time_share_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    with reporting(True, "one"), reporting(True, "two"):
        display = progress._bars._display
        assert display is not None
        assert {task.description for task in display.tasks} == {"one", "two"}
    assert progress._bars._display is None
    assert terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again, once


def test_the_display_ends_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)

    def fail() -> None:
        with reporting(True, "populate") as report:
            assert report is not None
            report(1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert progress._bars._display is None
    assert terminal.getvalue()


def test_a_forked_child_has_a_display_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    assert terminal.isatty()
    with reporting(True, "parent"):
        child = os.fork()
        if not child:
            status = 1
            try:
                with prefault.Mapping("1 MiB") as memory, reporting(True, "child"):
                    assert progress._bars._display is not None
                    assert [task.description for task in progress._bars._display.tasks] == ["child"]
                    prefault.populate(memory, progress=True)
                    status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_elsewhere_lines_are_logged(every_line: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(True, "warm") as report:
        assert report is not None
        report(1 * GIB, 4 * GIB)
        report(4 * GIB, 4 * GIB)
    first, last = [record.getMessage() for record in every_line.records]
    assert first.startswith("warm: 1.0 GiB of 4.0 GiB, ")
    assert first.endswith(" left")
    assert last.startswith("warm: 4.0 GiB in ")
    assert {record.levelname for record in every_line.records} == {"INFO"}
    assert capsys.readouterr().err == ""


def test_lines_are_seconds_apart_and_short_calls_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "prefault")
    with reporting(True, "populate") as report:
        assert report is not None
        for done in range(1000):
            report(done, 1000)
    assert not caplog.records


def test_without_stderr_lines_are_logged(monkeypatch: pytest.MonkeyPatch, every_line: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # pythonw, and some daemons
    with prefault.Mapping("8 MiB") as memory:
        prefault.populate(memory, progress=True)
    assert "populate: 8.0 MiB in " in every_line.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.7, "60 s"), (99.4, "99 s"), (200, "3:20 min"), (3599, "59:59 min"), (3900, "1:05 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


def test_sparse_memory_tells_how_far_many_ranges_are() -> None:
    seen: list[tuple[int, int]] = []
    with prefault.SparseMemory("256 MiB", block=MIB) as memory:
        ranges = [(at * MIB, MIB) for at in range(0, 256, 2)]
        memory.populate_many(ranges, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (128 * MIB, 128 * MIB)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {128 * MIB}
