"""What conftest.py does for every test, seen in a run of pytest of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from support import needs, processes, signals
from support.machine_lock import MachineLock

_TESTS = Path(__file__).parent


def run_pytest(directory: Path, text: str, *command: str) -> str:
    """What pytest prints of a test file with this text, beside our conftest.py. ``command``: what starts pytest."""
    shutil.copy(_TESTS / "conftest.py", directory)
    (directory / "test_it.py").write_text(text)
    arguments: list[str] = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(directory), "-o", f"pythonpath={_TESTS}",
        "--import-mode=importlib", "-p", "no:cacheprovider", str(directory),
    ]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(directory)}  # with a MachineLock of its own: this test holds the other
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, cwd=directory, env=environment)
    return done.stdout + done.stderr


def test_a_test_that_changes_the_machine_runs_alone(tmp_path: Path) -> None:
    both_share = threading.Barrier(2)

    def share() -> None:
        with closing(MachineLock(tmp_path)) as lock:
            lock.share()

    def change() -> None:
        with closing(MachineLock(tmp_path)) as lock:
            lock.share()
            both_share.wait()
            lock.be_alone()

    with closing(MachineLock(tmp_path)) as lock:
        lock.share()
        threads = [threading.Thread(target=change, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert not processes.eventually(lambda: not all(thread.is_alive() for thread in threads), 0.2)
        threads.append(threading.Thread(target=share, daemon=True))
        threads[-1].start()
        assert not processes.eventually(lambda: not threads[-1].is_alive(), 0.2)  # a stream of tests keeps none waiting
        lock.release()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


_SENDS_SIGNALS = """
import signal, subprocess, sys
import pytest

def died_of(number):
    code = f"import signal, time; signal.raise_signal({int(number)}); time.sleep(0.1); print('lives')"
    return -subprocess.run([sys.executable, "-c", code], capture_output=True).returncode

def test_in_this_process():
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGHUP)

def test_in_a_program():
    assert died_of(signal.SIGINT) == signal.SIGINT
    assert died_of(signal.SIGHUP) == signal.SIGHUP
"""


def test_ignored_signals_reach_tests_and_the_programs_that_they_start(tmp_path: Path) -> None:
    found = run_pytest(tmp_path, _SENDS_SIGNALS, "bash", "-c", 'trap "" INT HUP; exec "$@"', "bash")
    assert "2 passed" in found, found


def test_signals_are_ignored_again_afterwards() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.not_ignored():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGINT)
        with signals.not_ignored():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


_SKIPS = """
import pytest
from support import needs

@pytest.mark.parametrize("number", range(3))
def test_three(number):
    needs.missing("only root can mount a tmpfs")

@pytest.mark.skip(reason="of two\\n  lines")
def test_marked():
    pass

@pytest.mark.xfail
def test_known():
    assert False
"""


def test_skipped_tests_are_counted_by_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFAULT_REQUIRE_ALL", raising=False)
    lines = run_pytest(tmp_path, _SKIPS).splitlines()
    at = lines.index("tests  reason")
    assert "skipped tests" in lines[at - 1]
    assert lines[at + 1 : at + 3] == ["    3  only root can mount a tmpfs", "    1  of two lines"]
    assert "4 skipped, 1 xfailed" in lines[at + 3]


def test_nothing_is_printed_when_no_test_was_skipped(tmp_path: Path) -> None:
    found = run_pytest(tmp_path, "def test(): pass")
    assert "1 passed" in found, found
    assert "skipped" not in found


def test_a_test_whose_pages_were_taken_away_runs_again(tmp_path: Path) -> None:
    """At most three times, with new fixtures. And one that fails by itself does not."""
    needs.root("trace the kernel")
    text = """
import os
import pytest
import conftest
from support import file_beds
from support.reclaim_trace import ReclaimTrace

@pytest.fixture(autouse=True)
def own_trace(request):
    request.config.stash[conftest._reclaim_trace].close()
    request.config.stash[conftest._reclaim_trace] = ReclaimTrace([os.getpid()])

directories = []

def test_disturbed(tmp_path):
    assert not directories or tmp_path != directories[-1]
    directories.append(tmp_path)
    path = file_beds.make(tmp_path / "file", 1 << 20)
    if len(directories) < 4:
        file_beds.evict(path)
    assert file_beds.cached_pages(path) == 256

def test_disturbed_each_time(tmp_path):
    path = file_beds.make(tmp_path / "file", 1 << 20)
    file_beds.evict(path)
    assert file_beds.cached_pages(path) == 256

def test_wrong(tmp_path):
    assert file_beds.cached_pages(file_beds.make(tmp_path / "file", 1 << 20)) == 255
"""
    shown = run_pytest(tmp_path, text)
    assert "2 failed, 1 passed, 6 rerun" in shown, shown
    assert "255" in shown
    assert "proactive reclaim took" in shown


_CRASHES = """
import ctypes
import os
import pytest

@pytest.mark.parametrize("number", range(12))
def test_fine(number):
    pass

@pytest.mark.parametrize("number", range(2))
def test_crash(number):
    os.abort()

def test_hangs():
    ctypes.PyDLL(None).sleep(600)  # with the GIL

def test_after():
    pass
"""


def test_a_run_with_tests_that_crash_and_hang_ends_and_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options of make test: other ways to distribute tests wait for ever, or run such a test again."""
    makefile = (_TESTS.parent / "Makefile").read_text()
    (options,) = re.findall(r"^\t.*pytest (-n .*timeout=)\d+$", makefile, re.MULTILINE)
    monkeypatch.setenv("PYTEST_ADDOPTS", f"{options}3")
    shown = run_pytest(tmp_path, _CRASHES)
    assert "3 failed, 13 passed" in shown, shown
    for name in ("test_crash[0]", "test_crash[1]", "test_hangs"):
        assert f"crashed while running 'test_it.py::{name}'" in shown, shown
    assert "rerun" not in shown
