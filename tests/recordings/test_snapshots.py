"""Snapshots of the page cache, and commands that leave it as it was."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefault.files.cached_pages import cached_ranges
from prefault.files.open_file import OpenFile
from prefault.recordings import cache_keeping, snapshots
from prefault.recordings.cache_keeping import run_keeping_cache
from prefault.recordings.opened_files import NamedFile
from prefault.recordings.recording_file import Recording, load
from prefault.recordings.replaying import replay
from prefault.recordings.snapshots import save_snapshot, save_snapshots, take_snapshot
from prefault.recordings.trace_instance import TraceRefusedError
from support import file_beds, needs, touching
from support.children import in_child
from support.file_beds import PAGE


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    directory = tmp_path / "tree"
    (directory / "sub").mkdir(parents=True)
    for name in ("one", "sub/two", "sub/three"):
        file_beds.evict(file_beds.make(directory / name, 64 * PAGE))
    file_beds.touch(directory / "one", 1, 5)
    file_beds.touch(directory / "sub/two", 60)
    return directory


def cached(path: Path) -> set[int]:
    with OpenFile(path) as file:
        found = {at // PAGE for part in cached_ranges(file) for at in range(part.start, part.stop, PAGE)}
    assert len(found) == file_beds.cached_pages(path)
    return found


def test_a_snapshot_has_what_is_cached_and_restores_it(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache.snap"
    saved = save_snapshot(target, [tree])
    assert saved.written
    assert saved.recording == load(target)
    assert {os.fsdecode(file.path).removeprefix(f"{tree}/"): file.edges for file in saved.recording.files} == {
        "one": touching.edges_of(1, 5),
        "sub/two": touching.edges_of(60),
        "sub/three": [],
    }
    for name in ("one", "sub/two"):
        file_beds.evict(tree / name)
    (tree / "sub/three").read_bytes()
    assert replay(target).complete
    assert [file_beds.cached_pages(tree / name) for name in ("one", "sub/two", "sub/three")] == [2, 1, 64]
    result = replay(target, exact=True)
    assert [file_beds.cached_pages(tree / name) for name in ("one", "sub/two", "sub/three")] == [2, 1, 0]
    assert result.evicted_bytes == 64 * PAGE


def test_a_partial_snapshot_replaces_no_full_one(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache.snap"
    full = save_snapshot(target, [tree]).recording
    partial = save_snapshot(target, [tree, tmp_path / "not mounted yet"])
    assert not partial.written
    assert not partial.recording.complete
    assert "not mounted yet" in partial.recording.notes[0]
    assert load(target) == full
    other = tmp_path / "other.snap"
    assert save_snapshot(other, [tree, tmp_path / "not mounted yet"]).written
    assert save_snapshot(other, [tree, tmp_path / "not mounted yet"]).written  # a partial one replaces a partial one
    assert save_snapshot(other, [tree]).written
    other.write_bytes(b"damaged")
    assert save_snapshot(other, [tree, tmp_path / "not mounted yet"]).written


def test_a_file_system_that_is_not_mounted_makes_a_snapshot_partial(tree: Path, tmp_path: Path) -> None:
    """Its directory is there, and empty."""
    target, below = tmp_path / "cache.snap", tree / "mounted"
    with file_beds.mounted(below, "-t", "tmpfs", "-o", "size=1M", "prefault-test"):
        (below / "sub").mkdir()
        for name in ("four", "sub/five"):
            file_beds.make(below / name, PAGE)
        full = save_snapshot(target, [tree])
        assert full.written
    partial = save_snapshot(target, [tree])
    assert not partial.written
    assert "all 2 files of a file system are gone" in partial.recording.notes[0]
    assert load(target) == full.recording
    assert save_snapshot(target, [tree / "one"]).written  # other paths: nothing is known to be lost
    full.recording.save(target)
    below.rmdir()
    assert not save_snapshot(target, [tree]).written
    below.mkdir()
    file_beds.make(below / "four", PAGE)  # the file system may have got another device number
    assert save_snapshot(target, [tree]).written


def test_a_snapshot_is_renewed_though_all_files_have_new_names(tree: Path, tmp_path: Path) -> None:
    """As after VACUUM FULL, or when checkpoints are rotated."""
    target = tmp_path / "cache.snap"
    assert save_snapshot(target, [tree]).written
    for name in ("one", "sub/two", "sub/three"):
        (tree / name).rename(tree / f"{name} of tomorrow")
    assert save_snapshot(target, [tree]).written
    assert {os.path.basename(file.path) for file in load(target).files} == {
        b"one of tomorrow", b"two of tomorrow", b"three of tomorrow",
    }  # fmt: skip
    (tree / "sub").rename(tmp_path / "sub")
    (tree / "one of tomorrow").unlink()
    assert save_snapshot(target, [tree]).written  # all were removed, and their file system is there
    assert load(target).files == []


def test_a_partial_snapshot_does_not_replace_a_full_one_that_is_saved_meanwhile(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "cache.snap"
    look = snapshots._full_one
    looked = threading.Event()

    def look_slowly(path: Path) -> Recording | None:
        found = look(path)
        if threading.current_thread() is partial:
            looked.set()
            time.sleep(0.5)
        return found

    monkeypatch.setattr(snapshots, "_full_one", look_slowly)
    partial = threading.Thread(target=save_snapshot, args=(target, [tree, tmp_path / "not mounted yet"]))
    partial.start()
    assert looked.wait(10)
    assert save_snapshot(target, [tree]).written
    partial.join()
    assert load(target).complete


def test_files_of_other_users_make_a_snapshot_partial(tree: Path) -> None:
    needs.root("become another user")
    for directory in (tree, *tree.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    for path in tree.rglob("*"):
        path.chmod(0o755)
    (tree / "one").read_bytes()

    def as_nobody() -> tuple[bool, list[str]]:
        os.setresuid(file_beds.NOBODY, file_beds.NOBODY, file_beds.NOBODY)
        taken = take_snapshot([tree])
        return taken.complete, taken.notes

    complete, notes = in_child(as_nobody)
    assert not complete
    assert any("one" in note for note in notes)


def test_snapshots_are_saved_at_each_interval_and_at_the_end() -> None:
    waited: list[float | None] = []
    saved: list[int] = []

    def wait(seconds: float | None) -> bool:
        waited.append(seconds)
        return len(waited) == 3

    save_snapshots(lambda: saved.append(len(waited)), wait, 300)
    assert waited == [300.0] * 3
    assert saved == [1, 2, 3]
    waited.clear()
    saved.clear()
    save_snapshots(lambda: saved.append(1), lambda seconds: seconds is None, 0)
    assert saved == [1]


def test_ctrl_c_while_a_snapshot_is_saved_is_followed_by_the_last_one() -> None:
    saved: list[str] = []

    def save() -> None:
        saved.append("begun")
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append("done")

    save_snapshots(save, lambda _: False)
    assert saved == ["begun", "begun", "done"]


def test_files_that_are_removed_meanwhile_do_not_make_a_snapshot_partial(tree: Path) -> None:
    """As the temporary files of a database: listed, and gone when they are looked at."""
    program = (
        "import os, sys\nprint('ready', flush=True)\n"
        "while True:\n"
        "    for number in range(50): open(f'{sys.argv[1]}/{number}', 'w').close()\n"
        "    os.mkdir(sys.argv[1] + '/directory')\n"
        "    os.rmdir(sys.argv[1] + '/directory')\n"
        "    for number in range(50): os.unlink(f'{sys.argv[1]}/{number}')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tree / "sub")], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            taken = [take_snapshot([tree]) for _ in range(300)]
        finally:
            other.kill()
    assert [one.notes for one in taken if not one.complete] == []
    assert all(len(one.files) >= 3 for one in taken)


@pytest.mark.parametrize("way", ["trace", "residency"])
def test_a_command_leaves_the_page_cache_as_it_was(way: str, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree / "one"
    if way == "trace":
        touching.tracing()
        command = touching.command(touching.BY_READING, path, 5, 9, 33)
    else:

        def refuse(*_: object) -> None:
            raise TraceRefusedError(1, "refused")

        monkeypatch.setattr(cache_keeping, "TraceInstance", refuse)
        program = touching.BY_READING.replace("for page", "import time; time.sleep(0.5)\nfor page")
        command = touching.command(program + "time.sleep(0.2)\n", path, 5, 9, 33)
    kept = run_keeping_cache(command)
    assert kept.way == way
    assert kept.status == 0
    assert file_beds.cached_pages(path) == 2
    assert kept.evicted_bytes >= 2 * PAGE
    assert kept.stayed_bytes == 0 or way == "residency"


def test_what_a_command_wrote_is_evicted_and_what_it_evicted_comes_back(tree: Path) -> None:
    touching.tracing()
    path, new = tree / "one", tree / "new"
    script = (
        f"exec 3<'{path}'; sleep 0.5; dd if='{path}' of='{new}' bs=4096 iflag=nocache 2>/dev/null;"
        f" dd of='{path}' oflag=nocache conv=notrunc,fdatasync count=0 2>/dev/null; exit 3"
    )
    kept = run_keeping_cache(["sh", "-c", script])
    assert kept.status == 3
    assert new.read_bytes() == path.read_bytes()
    file_beds.evict(new)
    file_beds.evict(path)
    file_beds.touch(path, 1, 5)
    kept = run_keeping_cache(["sh", "-c", script])
    assert kept.restored_bytes == 2 * PAGE
    assert file_beds.cached_pages(path) == 2
    assert file_beds.cached_pages(new) == 0


@pytest.mark.parametrize("is_noted", ["before", "meanwhile", "after"])
def test_pages_that_a_command_evicts_and_reads_again_are_as_they_were(
    is_noted: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the keeper gets to noting what of the file is cached."""
    touching.tracing()
    path = tree / "one"  # pages 1 and 5 are cached
    note = cache_keeping._Keeper._note

    def note_late(self: cache_keeping._Keeper, file: NamedFile) -> None:
        time.sleep(0.5 if is_noted == "after" and file.path == str(path) else 0)
        note(self, file)

    monkeypatch.setattr(cache_keeping._Keeper, "_note", note_late)
    wait_s = 0.3 if is_noted == "before" else 0
    program = (
        "import os, sys, time\nfd = os.open(sys.argv[1], os.O_RDONLY)\ntime.sleep(float(sys.argv[2]))\n"
        "def evict(): os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)\n"
        "def read(*pages):\n    for page in pages: os.pread(fd, 1, page * 4096)\n"
        "evict(); read(1, 9, 20)\n"  # 1 was cached before, 9 was not
        "evict(); read(1, 9, 30)\n"
        "evict(); read(9)\n"
        "read(1)\n"
    )
    for _ in range(3):
        kept = run_keeping_cache([sys.executable, "-S", "-E", "-c", program, str(path), str(wait_s)])
        assert kept.status == 0
        assert cached(path) == {1, 5}
        assert kept.restored_bytes >= PAGE  # 5, and what reclaim took meanwhile
        assert kept.evicted_bytes >= PAGE  # 9
        assert kept.lost_events == 0


def test_pages_that_another_process_has_mapped_stay_and_are_counted(tree: Path) -> None:
    touching.tracing()
    path = tree / "sub/three"
    # The page is brought in by the command, and locked by this process meanwhile.
    script = f"dd if='{path}' of=/dev/null bs=4096 count=1 2>/dev/null; echo; read answer"
    program = (
        "import sys; from prefault.recordings.cache_keeping import run_keeping_cache\n"
        "kept = run_keeping_cache(['sh', '-c', sys.argv[1]]); print(kept.stayed_bytes)"
    )
    with subprocess.Popen([sys.executable, "-c", program, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        keeper.stdout.readline()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            assert memory[0] is not None
            keeper.stdin.write(b"\n")
            keeper.stdin.flush()
            assert int(keeper.stdout.readline()) >= PAGE
            assert file_beds.cached_pages(path) >= 1
