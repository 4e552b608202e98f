"""The command as its user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefault._system import hugetlb
from prefault.bench import jsonfile
from prefault.bench.kinds import HUGE_PAGE_BYTES
from prefault.bench.results import Status

_LIMIT_SECONDS = 60


def _prefault(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefault", *arguments], capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False
    )


def test_a_small_run_prints_a_table_and_keeps_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    done = _prefault(
        *(
            "bench",
            "--size",
            "2 MiB",
            "--repeats",
            "2",
            "--backing",
            "anon 4 kib",
            "--sharing",
            "private",
            "--json",
            str(path),
        )
    )
    assert done.returncode == 0, done.stderr
    assert "private Anon 4 KiB" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "0 of 6 cells" in done.stderr
    run = jsonfile.load(path)
    assert [result.cell.method for result in run.results] == [
        *("read", "write", "read/write", "populate_read", "populate_write", "prefault")
    ]
    assert {result.status for result in run.results} == {Status.MEASURED}
    assert run.warmed_up_bytes >= 2 << 20
    assert run.machine.kernel.startswith("Linux")
    assert os.uname().nodename not in run.machine.kernel.split()
    assert not run.interrupted


def test_quick_runs_the_rows_that_matter() -> None:
    done = _prefault("bench", "--quick", "--list")
    assert done.returncode == 0
    assert "256 MiB private Anon 4 KiB, populate_write" in done.stdout.splitlines()


def test_list_names_every_cell() -> None:
    lines = _prefault("bench", "--list").stdout.splitlines()
    assert len(lines) == len(set(lines)) >= 190
    assert "4096 MiB shared hugetlbfs, fallocate+populate_write" in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "populat"], "--method has no value 'populat'; it has: read, write, read/write, populate_read"),
        (["--backing", "disk"], '--backing has no value \'disk\'; it has: "Anon 4 KiB", "Anon THP"'),
        (["--sharing", "public"], "--sharing has no value 'public'; it has: private, shared"),
        (["--sharing", "private", "--method", "fallocate"], "the filters leave no cell"),
        (["--size", "3 MiB"], "is not a multiple of 2 MiB"),
        (["--size", "0"], "is not a multiple of 2 MiB"),
        (["--size", "big"], "'big' is not a size"),
        (["--repeats", "0"], "0 is not in the range"),
        (["--file-directory", "/proc/version"], "is not a directory"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments: list[str], words: str) -> None:
    done = _prefault("bench", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("prefault: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize("path", ["missing/run.json", ".", "/dev/stdout"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path, path: str) -> None:
    done = _prefault("bench", "--json", str(tmp_path / path))  # the whole grid: it would not end in time
    assert done.returncode == 1
    assert done.stderr.startswith("prefault: --json ")
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_commands_and_versions() -> None:
    assert _prefault("--version").stdout.startswith("prefault, version ")
    assert "bench" in _prefault("--help").stdout
    assert _prefault("nonsense").returncode == 2
    assert _prefault().returncode == 2


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [("import prefault", "prefault.bench"), ("import prefault.cli", "rich"), ("import prefault.cli", "numpy")],
)
def test_importing_loads_no_more_than_needed(statement: str, unwanted: str) -> None:
    code = f"import sys; {statement}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- stopping


def _children(pid: int) -> list[int]:
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


def _wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class _Running:
    """A benchmark that would take minutes, in the middle of a cell."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefault", "bench", "--repeats", "1000", "--json", str(path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        _wait(lambda: bool(self._busy_workers()))
        self.workers = self._busy_workers()
        time.sleep(0.5)  # some repetitions

    def _busy_workers(self) -> list[int]:
        """Children that have used some CPU time, beyond what starting takes."""
        found = []
        for pid in _children(self.process.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(fields[11]) + int(fields[12]) > 40:  # utime and stime, in hundredths
                found.append(pid)
        return found

    def stopped(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr; the workers are gone."""
        stdout, stderr = self.process.communicate(timeout=5)
        _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.workers), 10)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., _Running]]:
    running: list[_Running] = []

    def start(*arguments: str) -> _Running:
        running.append(_Running(tmp_path / "run.json", *arguments))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


_ANONYMOUS = (
    "--size",
    "32 MiB",
    "--backing",
    "Anon 4 KiB",
    "--sharing",
    "private",
    "--method",
    "write",
    "--method",
    "read/write",
)


@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [(signal.SIGINT, False, 130), (signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGHUP, True, 129)],
)
def test_a_signal_stops_it_and_what_was_measured_is_kept(
    start: Callable[..., _Running], number: signal.Signals, to_group: bool, status: int
) -> None:
    running = start(*_ANONYMOUS)
    (os.killpg if to_group else os.kill)(running.process.pid, number)
    got, stdout, stderr = running.stopped()
    assert got == status, stderr
    assert "Traceback" not in stderr
    assert "Interrupted: 0 of 2 cells are complete" in stdout
    assert "stopped before its turn" in stdout
    run = jsonfile.load(running.path)
    caught, left = run.results
    assert run.interrupted
    assert (caught.status, left.status) == (Status.STOPPED, Status.STOPPED)
    assert 1 <= len(caught.values_ns) < 1000
    assert caught.reason == f"stopped after {len(caught.values_ns)} of 1000 repetitions"
    assert os.listdir(running.path.parent) == ["run.json"]


def test_many_signals_are_one(start: Callable[..., _Running]) -> None:
    running = start(*_ANONYMOUS)
    deadline = time.monotonic() + 20
    while running.process.poll() is None:  # up to the interpreter's own end
        assert time.monotonic() < deadline
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    status, _, stderr = running.stopped()
    assert status == 130, stderr
    assert json.loads(running.path.read_text())["interrupted"] is True
    assert "Traceback" not in stderr


def test_a_signal_that_the_caller_ignores_does_not_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "prefault", "bench", "--repeats", "20", "--json", str(path), *_ANONYMOUS]
    with subprocess.Popen(
        ["bash", "-c", 'trap "" INT HUP; exec "$@"', "bash", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stderr is not None
            process.stderr.readline()  # the first line of progress
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGHUP)
                time.sleep(0.01)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not jsonfile.load(path).interrupted


def test_the_hugetlb_pool_is_as_before_after_ctrl_c(
    start: Callable[..., _Running], hugetlb_pool: Callable[[int], None]
) -> None:
    hugetlb_pool(0)

    def pages() -> int:
        return hugetlb.read_pool(HUGE_PAGE_BYTES).total

    before = pages()
    running = start("--size", "256 MiB", "--backing", "Memfd 2 MiB", "--sharing", "shared", "--method", "write")
    assert pages() >= before + 128
    running.process.send_signal(signal.SIGINT)
    status, _, _ = running.stopped()
    assert status == 130
    _wait(lambda: pages() == before)
