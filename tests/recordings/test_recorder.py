"""Recording: the pages that a command touched, no more and no fewer, and nothing that stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefault.recordings import trace_instance
from prefault.recordings.recorder import WayChoice, record_command
from prefault.recordings.recording_file import RecordedFile, Recording, load
from prefault.recordings.trace_instance import TraceInstance, TraceRefusedError
from support import file_beds, needs, processes, touching
from support.children import in_child
from support.file_beds import PAGE

PAGES = (3, 70, 71 + 64, 400)


@pytest.fixture
def tracing() -> None:
    touching.tracing()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = file_beds.make(tmp_path / os.fsdecode(b"file \xff"), 512 * PAGE)
    file_beds.evict(made)
    return made


def _of(recording: Recording, path: Path) -> RecordedFile | None:
    found = [each for each in recording.files if each.path == os.fsencode(path)]
    return found[0] if found else None


def _instances() -> list[str]:
    path, mounted = trace_instance._open_tracefs()
    try:
        return [name for name in os.listdir(f"{path}/instances") if name.startswith(f"prefault-{os.getpid()}-")]
    finally:
        if mounted >= 0:
            os.close(mounted)


@pytest.mark.parametrize("program", [touching.BY_MAPPING, touching.BY_READING])
@pytest.mark.usefixtures("tracing")
def test_the_trace_has_exactly_the_touched_pages_of_a_cold_file(program: str, file: Path) -> None:
    done = record_command(touching.command(program, file, *PAGES), way="trace")
    found = _of(done.recording, file)
    assert found is not None
    assert found.edges == touching.edges_of(*PAGES)
    assert (found.size, found.inode, found.root) == (file.stat().st_size, file.stat().st_ino, "")
    assert (done.status, done.recording.way, done.recording.complete) == (0, "trace", True)
    assert not _instances()


@pytest.mark.usefixtures("tracing")
def test_the_trace_has_touched_pages_of_a_warm_file(file: Path) -> None:
    """The window of a fault-around is mapped whole where it is cached: the kernel tells no more."""
    file.read_bytes()
    found = _of(record_command(touching.command(touching.BY_READING, file, *PAGES), way="trace").recording, file)
    assert found is not None
    assert found.edges == touching.edges_of(*PAGES)
    found = _of(record_command(touching.command(touching.BY_MAPPING, file, 100), way="trace").recording, file)
    assert found is not None
    assert 100 * PAGE in found.ranges
    assert found.bytes <= 64 * 1024


@pytest.mark.usefixtures("tracing")
def test_grandchildren_are_traced_and_other_processes_are_not(file: Path, tmp_path: Path) -> None:
    other = file_beds.make(tmp_path / "other", 8 * PAGE)
    with subprocess.Popen(
        ["sh", "-c", f"while :; do cat '{other}'; done"], stdout=subprocess.DEVNULL, start_new_session=True
    ) as busy:
        try:
            done = record_command(["sh", "-c", 'sh -c "cat $0 | wc -c" >/dev/null; exit 7', str(other) + "x"], way="trace")
            inner = touching.command(touching.BY_READING, file, 5)
            traced = record_command(["sh", "-c", '"$@"; exit 7', "sh", *inner], way="trace")
        finally:
            os.killpg(busy.pid, signal.SIGKILL)
    assert _of(done.recording, other) is None
    found = _of(traced.recording, file)
    assert found is not None
    assert found.edges == touching.edges_of(5)
    assert traced.status == 7


@pytest.mark.usefixtures("tracing")
def test_files_of_an_overlay_are_found(tmp_path: Path) -> None:
    with file_beds.overlay(tmp_path) as merged:
        below = file_beds.make(tmp_path / "lower" / "file", 64 * PAGE)
        file_beds.evict(below)
        done = record_command(touching.command(touching.BY_MAPPING, merged / "file", 7), way="trace")
        found = _of(done.recording, merged / "file")
        assert found is not None
        assert found.edges == touching.edges_of(7)


def test_residency_records_the_pages_that_came(file: Path) -> None:
    file_beds.touch(file, 9)
    done = record_command(touching.command(touching.BY_MAPPING, file, 9, *PAGES), way="residency", files=[file])
    found = _of(done.recording, file)
    assert found is not None
    assert found.edges == touching.edges_of(*PAGES)
    assert done.recording.way == "residency"
    assert "may have been touched or not" in " ".join(done.recording.notes)


@pytest.mark.parametrize("way", ["trace", "residency"])
def test_files_can_be_evicted_first(way: WayChoice, file: Path) -> None:
    if way == "trace":
        touching.tracing()
    file.read_bytes()
    command = touching.command(touching.BY_MAPPING, file, *PAGES)
    found = _of(record_command(command, way=way, files=[file.parent], evict=True).recording, file)
    assert found is not None
    assert found.edges == touching.edges_of(*PAGES)


def test_residency_finds_files_that_are_mapped(file: Path) -> None:
    """Without being told their names; /proc is looked at every 20 ms."""
    program = f"import time\n{touching.BY_MAPPING.replace('sum(', 'time.sleep(0.5); sum(')}\ntime.sleep(0.2)"
    found = _of(record_command(touching.command(program, file, *PAGES), way="residency").recording, file)
    assert found is not None
    assert found.edges == touching.edges_of(*PAGES)


def test_paths_below_a_root_are_relative(file: Path, tmp_path: Path) -> None:
    done = record_command(
        touching.command(touching.BY_READING, file, 1), way="residency", files=[file], evict=True,
        roots={"model": tmp_path, "all": "/"},
    )  # fmt: skip
    found = [each for each in done.recording.files if each.root == "model"]
    assert [each.path for each in found] == [b"file \xff"]


@pytest.mark.parametrize("way", ["trace", "residency"])
def test_a_command_that_cannot_be_run_is_an_error_that_names_it(way: str, tmp_path: Path) -> None:
    if way == "trace":
        touching.tracing()
    before = processes.children(os.getpid())
    with pytest.raises(FileNotFoundError, match="no such program"):
        record_command(["no such program"], way=way)  # type: ignore[arg-type]
    with pytest.raises(PermissionError, match="cannot be run"):
        record_command([str(tmp_path)], way=way)  # type: ignore[arg-type]
    assert processes.children(os.getpid()) == before


def test_a_death_by_signal_is_a_status() -> None:
    assert record_command(["sh", "-c", "kill -9 $$"], way="residency").status == 128 + signal.SIGKILL


def test_an_ordinary_user_is_told_that_tracing_needs_root() -> None:
    needs.root("become another user")

    def as_nobody() -> tuple[str, str]:
        os.setresuid(file_beds.NOBODY, file_beds.NOBODY, file_beds.NOBODY)
        try:
            record_command(["true"], way="trace")
        except OSError as error:
            return record_command(["true"]).recording.way, str(error)
        raise AssertionError("an ordinary user can trace")

    way, says = in_child(as_nobody)
    assert way == "residency"
    assert "run as root, or record by residency" in says


@pytest.mark.usefixtures("tracing")
def test_an_instance_of_a_killed_recorder_is_removed_by_the_next_one() -> None:
    program = (
        "import os, signal\nfrom prefault.recordings.trace_instance import TraceInstance\n"
        "TraceInstance([os.getpid()])\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program])
    assert killed.wait() == -signal.SIGKILL
    path, mounted = trace_instance._open_tracefs()
    try:
        left = [name for name in os.listdir(f"{path}/instances") if name.startswith(f"prefault-{killed.pid}-")]
        assert len(left) == 1
        with TraceInstance([os.getpid()]):
            names = os.listdir(f"{path}/instances")
            assert left[0] not in names
            assert any(name.startswith(f"prefault-{os.getpid()}-") for name in names)
        assert not _instances()
    finally:
        if mounted >= 0:
            os.close(mounted)


@pytest.mark.usefixtures("tracing")
def test_unknown_tracepoints_are_refused_and_leave_nothing() -> None:
    with pytest.raises(TraceRefusedError, match="cannot be used"):
        TraceInstance([os.getpid()], ["no_such_event"])
    assert not _instances()


@pytest.mark.usefixtures("tracing")
def test_an_instance_that_somebody_looks_into_is_no_error() -> None:
    trace = TraceInstance([os.getpid()])
    instance = os.path.basename(trace._path)
    reader = os.open(os.path.join(trace._path, "trace"), os.O_RDONLY)
    trace.stop()
    assert instance in _instances()
    os.close(reader)
    path, mounted = trace_instance._open_tracefs()
    os.rmdir(os.path.join(path, "instances", instance))
    if mounted >= 0:
        os.close(mounted)


def test_a_note_on_a_file_whose_name_is_no_utf_8(file: Path, tmp_path: Path) -> None:
    needs.root("become another user")
    for directory in (file, *file.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    file.chmod(0)

    def as_nobody() -> list[str]:
        os.setresuid(file_beds.NOBODY, file_beds.NOBODY, file_beds.NOBODY)
        found = record_command(["true"], way="residency", files=[file]).recording
        found.save("/dev/null")
        return found.notes

    assert "file \\xff could not be looked at" in in_child(as_nobody)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("way", ["trace", "residency"])
def test_signals_go_to_the_command_and_the_recording_is_written(number: int, way: str, file: Path, tmp_path: Path) -> None:
    if way == "trace":
        touching.tracing()
    ready = tmp_path / "ready"
    command = (
        f"{touching.BY_READING}\nimport signal, time, pathlib\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(9))\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"
    )
    program = (
        "import os, sys\nfrom prefault.recordings.recorder import WayChoice, record_command\n"
        "done = record_command(sys.argv[4:], way=sys.argv[1], files=[sys.argv[3]])\n"
        "done.recording.save(sys.argv[2])\nsys.exit(done.status)\n"
    )
    output = tmp_path / "out.rec"
    arguments = touching.command(command, file, *PAGES)
    with subprocess.Popen([sys.executable, "-c", program, way, str(output), str(file), *arguments]) as recorder:
        assert processes.eventually(ready.exists)
        recorder.send_signal(number)
        assert recorder.wait(20) == 9
    found = _of(load(output), file)
    assert found is not None
    assert found.edges == touching.edges_of(*PAGES)
