"""A command that is started in two steps, and what ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefault.recordings import held_command
from prefault.recordings.held_command import HeldCommand
from support import processes

IGNORES = ["sh", "-c", "trap '' INT TERM; touch \"$0\"; while :; do sleep 0.1; done"]

PROGRAM = """
import pathlib, sys, time
from prefault.recordings import held_command
from prefault.recordings.held_command import HeldCommand
held_command._STOP_S, held_command._ABANDON_S = float(sys.argv[2]), float(sys.argv[3])
ready, ignores = pathlib.Path(sys.argv[4]), sys.argv[5:]
try:
    with HeldCommand([*ignores, str(ready)]) as held:
        print(held.pid, flush=True)
        if sys.argv[1] == "interruptible":
            with held.interruptible():
                ready.touch()
                time.sleep(60)
        held.release()
        if sys.argv[1] == "wait":
            print(held.wait(), flush=True)
        else:
            while not ready.exists(): time.sleep(0.01)
            print("leaving", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


class _Holder:
    """Starts a process that holds a command; a context manager that ends both."""

    def __init__(self, what: str, stop_s: float, abandon_s: float, ready: Path) -> None:
        arguments = [what, str(stop_s), str(abandon_s), str(ready), *IGNORES]
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.pid = int(self.output.readline())
        assert processes.eventually(ready.exists)

    def ended(self) -> list[str]:
        """Return what the process still printed, after it ended and its command is gone."""
        assert self.process.wait(20) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(self.pid, 0)
        return self.output.read().split()

    def goes_on(self) -> bool:
        with pytest.raises(subprocess.TimeoutExpired):
            self.process.wait(0.3)
        return True

    def __enter__(self) -> _Holder:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()


def test_a_command_that_ignores_sigterm_is_killed_at_the_end_of_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_command, "_ABANDON_S", 0.3)
    with HeldCommand([*IGNORES, str(tmp_path / "ready")]) as held:
        held.release()
        assert processes.eventually((tmp_path / "ready").exists)
    with pytest.raises(ProcessLookupError):
        os.kill(held.pid, 0)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_command_that_was_never_released_does_not_run(tmp_path: Path) -> None:
    with HeldCommand(["touch", str(tmp_path / "ready")]) as held:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(held.pid, 0)
    assert not (tmp_path / "ready").exists()


def test_ctrl_c_kills_a_command_that_is_being_ended(tmp_path: Path) -> None:
    with _Holder("leave", 60, 60, tmp_path / "ready") as holder:
        assert holder.output.readline() == "leaving\n"
        assert holder.goes_on()
        holder.process.send_signal(signal.SIGINT)
        assert holder.ended() == []


def test_a_command_that_ignores_a_sigterm_that_was_passed_on_is_killed_after_a_while(tmp_path: Path) -> None:
    with _Holder("wait", 0.5, 60, tmp_path / "ready") as holder:
        holder.process.send_signal(signal.SIGTERM)
        assert holder.ended() == [str(128 + signal.SIGKILL)]


def test_ctrl_c_after_sigterm_kills_at_once_and_ctrl_c_alone_does_not(tmp_path: Path) -> None:
    with _Holder("wait", 60, 60, tmp_path / "ready") as holder:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            holder.process.send_signal(number)
            assert holder.goes_on()
        holder.process.send_signal(signal.SIGINT)
        assert holder.ended() == [str(128 + signal.SIGKILL)]


def test_ctrl_c_is_answered_before_the_command_is_released(tmp_path: Path) -> None:
    with _Holder("interruptible", 60, 60, tmp_path / "ready") as holder:
        holder.process.send_signal(signal.SIGINT)
        assert holder.ended() == ["interrupted"]
