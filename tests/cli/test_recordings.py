"""The commands of recordings: record, replay, snapshot, run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefault.recordings.recording_file import RecordedFile, Recording, load
from support import file_beds, processes, touching
from support.file_beds import PAGE
from support.json_schemas import check_output

PAGES = (3, 70, 135, 400)


def prefault(*arguments: str | Path, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefault", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, errors="surrogateescape", timeout=60, check=False, cwd=directory)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = file_beds.make(tmp_path / os.fsdecode(b"file \xff"), 512 * PAGE)
    file_beds.evict(made)
    return made


@pytest.mark.parametrize("way", ["trace", "residency"])
def test_record_and_replay(way: str, file: Path, tmp_path: Path) -> None:
    if way == "trace":
        touching.tracing()
    recording = tmp_path / "a.rec"
    command = touching.command(touching.BY_READING, file, *PAGES)
    done = prefault("record", "-o", recording, "--way", way, "--files", file, "--", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert f"recorded by {way}" in done.stderr
    assert load(recording).file_bytes >= 4 * PAGE
    file_beds.evict(file)
    done = prefault("replay", recording, "--json", "--idle", "--no-progress")
    assert check_output(done.stdout, "prefault-replay")["complete"] is True
    assert done.returncode == 0
    assert file_beds.cached_pages(file) == 4
    os.utime(file, ns=(0, 0))
    done = prefault("replay", recording)
    assert done.returncode == 1
    assert "1 file changed since and skipped" in done.stdout
    told = check_output(prefault("replay", recording, "--json").stdout, "prefault-replay")
    assert told["changed"] == [{"base64": told["changed"][0]["base64"], "text": f"{tmp_path}/file \ufffd"}]


def test_a_recording_that_comes_by_a_pipe(file: Path, tmp_path: Path) -> None:
    recording = tmp_path / "a.rec"
    file_beds.touch(file, *PAGES)
    assert prefault("snapshot", "save", recording, file).returncode == 0
    file_beds.evict(file)
    with subprocess.Popen(["cat", recording], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        command = [sys.executable, "-m", "prefault", "replay", "/dev/stdin", "--", "sh", "-c", "exit 7"]
        done = subprocess.run(command, stdin=writer.stdout, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert file_beds.cached_pages(file) == 4


def test_the_status_of_the_command_is_passed_on(tmp_path: Path) -> None:
    recording = tmp_path / "a.rec"
    assert prefault("record", "-o", recording, "sh", "-c", "exit 77").returncode == 77
    assert load(recording).command == [b"sh", b"-c", b"exit 77"]
    assert prefault("run", "--keep-cache", "--", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["record", "-o", "a.rec"], 2, "Missing argument"),
        (["record", "--", "true"], 2, "'-o'"),
        (["record", "-o", "nowhere/a.rec", "true"], 2, "nowhere"),
        (["record", "-o", "a.rec", "--evict", "true"], 2, "--files"),
        (["record", "-o", "a.rec", "--root", "x", "true"], 2, "NAME=DIR"),
        (["record", "-o", "a.rec", "/no/such/program"], 1, "/no/such/program: the command cannot be run"),
        (["replay", "nothing.rec"], 2, "nothing.rec"),
        (["replay", "damaged.rec"], 1, "damaged.rec: it is no recording of prefault"),
        (["replay", "damaged.rec", "--budget", "x"], 2, "size"),
        (["snapshot", "restore", "damaged.rec"], 1, "damaged.rec"),
        (["snapshot", "restore", "nothing.rec"], 1, "nothing.rec"),
        (["snapshot", "save", "a.snap"], 2, "PATH"),
        (["run", "--", "true"], 2, "--keep-cache"),
    ],
)
def test_errors_are_one_line_that_names_the_file(arguments: list[str], status: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.rec").write_bytes(b"\x7fELF")
    done = prefault(*arguments, directory=tmp_path)
    assert done.returncode == status
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["damaged.rec"]


def test_names_in_a_recording_do_not_command_the_terminal(tmp_path: Path) -> None:
    recording = tmp_path / "a.rec"
    names = (b"/no/such/\x1b[2J\n", b"/proc/\x1b")
    files = [RecordedFile(name, "", 1, 2, PAGE, 0, [0, PAGE]) for name in names]
    Recording("trace", 0, [], True, [], files, []).save(recording)
    done = prefault("replay", recording)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert "/no/such/\\x1b[2J\\x0a" in done.stdout


def test_snapshot_save_and_restore(file: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache.snap"
    file_beds.touch(file, 1, 5)
    done = prefault("snapshot", "save", snapshot, file, "--json")
    assert check_output(done.stdout, "prefault-snapshot-save")["file_bytes"] == 2 * PAGE
    done = prefault("snapshot", "save", snapshot, file, tmp_path / "missing")
    assert done.returncode == 1
    assert "kept as it is" in done.stderr
    file.read_bytes()
    done = prefault("snapshot", "restore", snapshot, "--exact", "--json")
    told = check_output(done.stdout, "prefault-snapshot-restore")
    assert (told["complete"], told["evicted_bytes"]) == (True, 510 * PAGE)
    assert file_beds.cached_pages(file) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_auto_restores_saves_now_and_again_and_at_the_end(number: int, file: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache.snap"
    file_beds.touch(file, 1, 5)
    assert prefault("snapshot", "save", snapshot, file).returncode == 0
    file_beds.evict(file)
    command = [sys.executable, "-m", "prefault", "snapshot", "auto", str(snapshot), str(file)]
    with subprocess.Popen([*command, "--interval", "0.1"], stderr=subprocess.PIPE, text=True) as auto:
        assert auto.stderr is not None
        assert "restored: 8.0 KiB" in auto.stderr.readline()
        assert file_beds.cached_pages(file) == 2
        file_beds.touch(file, 9)
        assert processes.eventually(lambda: load(snapshot).file_bytes == 3 * PAGE)
        file_beds.touch(file, 11, 13)
        auto.send_signal(number)
        assert auto.wait(20) == 0
    assert load(snapshot).file_bytes == 5 * PAGE


def test_auto_ends_with_a_snapshot_also_when_it_takes_none_before(file: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache.snap"
    snapshot.write_bytes(b"damaged")
    command = [sys.executable, "-m", "prefault", "snapshot", "auto", str(snapshot), str(file), "--interval", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as auto:
        assert auto.stderr is not None
        assert "going on without it" in auto.stderr.readline()
        assert "watching" in auto.stderr.readline()
        file_beds.touch(file, 9)
        time.sleep(0.1)
        auto.terminate()
        assert auto.wait(20) == 0
    assert load(snapshot).file_bytes == PAGE


def test_run_keeps_the_cache(file: Path) -> None:
    file_beds.touch(file, 1)
    program = touching.BY_READING.replace("for page", "import time; time.sleep(0.3)\nfor page") + "time.sleep(0.1)\n"
    done = prefault("run", "--keep-cache", "--", *touching.command(program, file, *PAGES))
    assert done.returncode == 0, done.stderr
    assert " evicted" in done.stderr
    assert done.stdout == ""
    assert file_beds.cached_pages(file) == 1
