"""Replay: the recorded pages come back, no others, and what changed is skipped."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from prefault._kernel import ioprio
from prefault.files.cached_pages import cached_ranges
from prefault.files.open_file import OpenFile
from prefault.recordings.recorder import record_command
from prefault.recordings.recording_file import RecordedFile, Recording, RecordingError
from prefault.recordings.replaying import replay
from support import file_beds, fuse_files, needs, touching
from support.children import in_child
from support.file_beds import PAGE

MIB = 1 << 20
PAGES = (3, 70, 135, 400)


def recorded(path: Path, *pages: int, root: str = "") -> RecordedFile:
    found = path.stat()
    name = os.fsencode(path.name if root else path)
    return RecordedFile(name, root, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, touching.edges_of(*pages))


def recording_of(*files: RecordedFile) -> Recording:
    return Recording("trace", 0, [], True, [], list(files), [])


def cached(path: Path) -> set[int]:
    """Pages that are cached, as a mincore of another process sees them."""
    with OpenFile(path) as file:
        found = {at // PAGE for part in cached_ranges(file) for at in range(part.start, part.stop, PAGE)}
    assert len(found) == file_beds.cached_pages(path)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = file_beds.make(tmp_path / os.fsdecode(b"file \xff"), 512 * PAGE)
    file_beds.evict(made)
    return made


def test_exactly_the_recorded_pages_come_back(file: Path) -> None:
    result = replay(recording_of(recorded(file, *PAGES)))
    assert cached(file) == set(PAGES)
    assert (result.bytes, result.present_bytes, result.skipped_bytes, result.files) == (4 * PAGE, 0, 0, 1)
    assert result.complete
    again = replay(recording_of(recorded(file, *PAGES)))
    assert (again.bytes, again.present_bytes, again.files) == (0, 4 * PAGE, 1)


def test_what_a_command_touched_is_there_after_replay_and_it_waits_for_no_disk(tmp_path: Path) -> None:
    touching.tracing()
    path = file_beds.make(tmp_path / "file", 4096 * PAGE)
    pages = random.Random(3).sample(range(4096), 200)
    command = touching.command(touching.BY_MAPPING, path, *pages)
    file_beds.evict(path)
    recording = record_command(command, way="trace").recording
    file_beds.evict(path)
    cold = touching.major_faults(command)
    file_beds.evict(path)
    mine = recording_of(*(each for each in recording.files if each.path == os.fsencode(path)))
    replay(mine)
    warm = touching.major_faults(command)
    assert cold >= 200
    assert warm <= cold * 5 / 100
    assert mine.file_bytes == 200 * PAGE


_SHIFTED = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
size, block = os.path.getsize(sys.argv[1]), 1 << 21
start = libc.mmap(None, size + 2 * block, 0, 0x22, -1, 0)
start += -start % block + 4096
assert libc.mmap(start, size, 1, 0x11, os.open(sys.argv[1], os.O_RDONLY), 0) == start
for page in sys.argv[2:]:
    ctypes.string_at(start + int(page) * 4096, 1)
"""
"""Touches a file that is mapped as libraries are: its large folios lie across the windows of fault-around."""


def test_pages_that_the_kernel_maps_together_with_others_are_recorded(tmp_path: Path) -> None:
    """Since Linux 6.18 a fault maps a large folio whole, and the touches of its other pages are no events."""
    touching.tracing()
    path = file_beds.make(tmp_path / "file", 4096 * PAGE)
    # The second page of each pair is in one folio with the first, and begins a window that nothing else touches.
    pages = [page for page in range(4096) if page % 32 in (14, 15)]
    command = touching.command(_SHIFTED, path, *pages)
    file_beds.evict(path)
    recording = record_command(command, way="trace").recording
    mine = [each for each in recording.files if each.path == os.fsencode(path)]
    assert [page for page in pages if page * PAGE not in mine[0].ranges] == []
    file_beds.evict(path)
    assert replay(recording_of(*mine)).complete
    before = cached(path)
    touching.major_faults(command)
    assert cached(path) == before  # with read-ahead, one page that is missing would bring in many


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_a_file_that_changed_is_skipped_and_counted(change: str, file: Path) -> None:
    before = recorded(file, *PAGES)
    other = file_beds.make(file.parent / "other", 4 * PAGE)
    file_beds.evict(other)
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if change == "size":
        os.truncate(file, 400 * PAGE)
        os.utime(file, ns=times)
    elif change == "time":
        os.utime(file, ns=(times[0], times[1] + 1))
    else:
        new = file_beds.make(file.parent / "new", 512 * PAGE)
        os.utime(new, ns=times)
        os.rename(new, file)
    file_beds.evict(file)
    result = replay(recording_of(before, recorded(other, 1)))
    assert cached(file) == set()
    assert cached(other) == {1}
    assert result.changed == (str(file),)
    assert (result.skipped_bytes, result.files, result.complete) == (4 * PAGE, 1, False)
    if change == "time":
        assert replay(recording_of(before), check_time=False).complete


def test_files_that_are_gone_or_cannot_be_read_are_no_error_of_the_others(file: Path, tmp_path: Path) -> None:
    gone = recorded(file, 1)
    file.rename(tmp_path / "elsewhere")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    other = file_beds.make(tmp_path / "other", 4 * PAGE)
    file_beds.evict(other)
    result = replay(
        recording_of(gone, recorded(tmp_path / "directory", 1), recorded(tmp_path / "fifo", 1), recorded(other, 2))
    )
    assert cached(other) == {2}
    assert result.missing == (str(file),)
    assert [failure.path for failure in result.failures] == [str(tmp_path / "directory"), str(tmp_path / "fifo")]


@pytest.mark.parametrize(("size", "failing", "latency"), [(4, (2.5, 2.75), 0), (48, (32, 33), 0), (48, (32, 33), 0.02)])
def test_pages_that_cannot_be_read_are_a_failure(
    size: int, failing: tuple[float, float], latency: float, tmp_path: Path
) -> None:
    needs.fuse()
    with fuse_files.mounted(tmp_path / "mount", {"file": size * MIB}, latency_s=latency) as bed:
        bed.fail(*(int(edge * MIB) for edge in failing))
        path = bed / "file"
        found = path.stat()
        edges = [0, size * MIB]
        entry = RecordedFile(
            os.fsencode(path), "", found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, edges
        )  # fmt: skip
        result = replay(recording_of(entry))
        came = file_beds.cached_pages(path) * PAGE
    assert [failure.path for failure in result.failures] == [str(path)]
    assert "EIO" in result.failures[0].reason
    assert came < size * MIB
    assert (result.bytes, result.bytes + result.skipped_bytes) == (came, size * MIB)
    assert (result.files, result.complete) == (0, False)


def test_a_large_file_with_holes_is_complete(tmp_path: Path) -> None:
    path = file_beds.make(tmp_path / "sparse", 16 * MIB + 5)
    with path.open("r+b") as file:
        file.truncate(48 * MIB + 5)
    file_beds.evict(path)
    entry = recorded(path)
    entry.edges.extend([0, 48 * MIB + PAGE])
    result = replay(recording_of(entry))
    assert (result.changed, result.failures, result.files, result.complete) == ((), (), 1, True)
    assert (result.bytes, result.skipped_bytes) == (48 * MIB + PAGE, 0)


def test_a_limit_of_threads_is_an_error_that_names_it(file: Path) -> None:
    needs.root("become another user, for whom the limit holds")
    recording = recording_of(recorded(file, *PAGES))

    def limited() -> tuple[int | None, str]:
        replay(recording_of())
        user = 65000 + os.getpid() % 500
        os.setresuid(user, user, user)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        with pytest.raises(OSError, match="ulimit -u") as refused:
            replay(recording)
        return refused.value.errno, str(refused.value)

    number, text = in_child(limited)
    assert number == errno.EAGAIN, text


def test_roots_find_the_files_of_another_host(file: Path, tmp_path: Path) -> None:
    below = recorded(file, *PAGES, root="model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = file_beds.make(elsewhere / file.name, 512 * PAGE)
    os.utime(copy, ns=(0, file.stat().st_mtime_ns))
    file_beds.evict(copy)
    assert replay(recording_of(below)).missing == (f"model:{file.name}",)
    result = replay(recording_of(below), roots={"model": elsewhere})
    assert result.complete
    assert cached(copy) == set(PAGES)
    assert cached(file) == set()


def test_below_a_root_no_link_leads_out_of_it(file: Path, tmp_path: Path) -> None:
    """A recording of somebody else makes replay open no other files."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    inside = file_beds.make(root / "sub" / "inside", 512 * PAGE)
    os.utime(inside, ns=(0, file.stat().st_mtime_ns))
    file_beds.evict(inside)
    (root / "out").symlink_to(file)
    (root / "up").symlink_to("..")
    (root / "in").symlink_to("sub/inside")
    outside = recorded(file, *PAGES, root="model")
    found = [
        RecordedFile(os.fsencode(name), "model", 0, 0, outside.size, outside.modified_ns, outside.edges)
        for name in ("out", f"up/{file.name}", "in")
    ]
    result = replay(recording_of(*found), roots={"model": root})
    assert cached(file) == set()
    assert cached(inside) == set(PAGES)
    assert result.files == 1
    assert [failure.path for failure in result.failures] == ["model:out", f"model:up/{file.name}"]
    assert all("out of its root" in failure.reason for failure in result.failures)


def test_devices_and_files_that_the_kernel_makes_are_not_opened(file: Path, tmp_path: Path) -> None:
    needs.root("make a device")
    device = tmp_path / "device"
    os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(240, 200))  # without a driver: to open it were ENXIO
    made = RecordedFile(b"/sys/kernel/mm/transparent_hugepage/enabled", "", 0, 0, PAGE, 0, [0, PAGE])
    result = replay(recording_of(recorded(device, 1), made, recorded(file, 1)), check_time=False)
    assert cached(file) == {1}
    reasons = {failure.path: failure.reason for failure in result.failures}
    assert "is a block device" in reasons[str(device)]
    assert "sysfs" in reasons[os.fsdecode(made.path)]


def test_two_names_of_one_file_are_brought_in_once(file: Path) -> None:
    other = file.parent / "other name"
    os.link(file, other)
    result = replay(recording_of(recorded(file, *PAGES), recorded(other, *PAGES)), threads=1)
    assert cached(file) == set(PAGES)
    assert (result.bytes, result.present_bytes, result.files) == (4 * PAGE, 4 * PAGE, 2)


def test_a_recording_of_many_files(file: Path) -> None:
    gone = [RecordedFile(b"/no/such/file %d" % number, "", 0, 0, PAGE, 0, [0, PAGE]) for number in range(50_000)]
    result = replay(recording_of(*gone, recorded(file, 1)))
    assert len(result.missing) == len(gone)
    assert (result.bytes, result.skipped_bytes) == (PAGE, len(gone) * PAGE)
    assert cached(file) == {1}


@pytest.mark.parametrize("budget", [0, 1, PAGE, 3 * PAGE + 5, 8 * PAGE])
def test_the_budget_is_not_exceeded(budget: int, file: Path, tmp_path: Path) -> None:
    other = file_beds.make(tmp_path / "other", 16 * PAGE)
    file_beds.evict(other)
    result = replay(recording_of(recorded(file, *PAGES), recorded(other, 1, 3, 5)), budget=budget)
    brought = len(cached(file)) + len(cached(other))
    assert brought == min(7, budget // PAGE)
    assert result.bytes == brought * PAGE
    assert result.skipped_bytes == (7 - brought) * PAGE
    assert result.complete == (budget >= 7 * PAGE)


def test_exact_evicts_what_is_not_recorded(file: Path) -> None:
    file.read_bytes()
    result = replay(recording_of(recorded(file, *PAGES)), exact=True)
    assert cached(file) == set(PAGES)
    assert result.evicted_bytes == (512 - 4) * PAGE


def test_progress_is_told_up_to_the_whole(file: Path) -> None:
    told: list[tuple[int, int]] = []
    replay(recording_of(recorded(file, *PAGES)), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4 * PAGE, 4 * PAGE)


def test_what_progress_raises_ends_the_replay(file: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(recording_of(recorded(file, *PAGES)), progress=stop)


def test_idle_threads_read_in_the_idle_class(file: Path) -> None:
    """The class of this thread stays; that of the reading threads is seen by the priority that they inherit to nobody."""
    seen: list[int] = []

    def look() -> tuple[int, list[int]]:
        from prefault.recordings import replaying

        original = replaying.read_pages

        def looking(*arguments: object) -> int:
            seen.append(ioprio.ioprio_get(ioprio.IOPRIO_WHO_PROCESS, 0) >> ioprio.IOPRIO_CLASS_SHIFT)
            return original(*arguments)  # type: ignore[arg-type]

        replaying.read_pages = looking  # type: ignore[assignment]
        replay(recording_of(recorded(file, *PAGES)), idle=True)
        return ioprio.ioprio_get(ioprio.IOPRIO_WHO_PROCESS, 0) >> ioprio.IOPRIO_CLASS_SHIFT, seen

    own, reading = in_child(look)
    assert own != ioprio.IOPRIO_CLASS_IDLE
    assert reading == [ioprio.IOPRIO_CLASS_IDLE]


def test_arguments_that_are_none(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        replay(recording_of(), threads=0)
    with pytest.raises(ValueError, match="size"):
        replay(recording_of(), budget="much")
    with pytest.raises(RecordingError, match="no recording"):
        replay(file)
    with pytest.raises(FileNotFoundError):
        replay(tmp_path / "nothing.rec")
    with pytest.raises(ValueError, match="UTF-8"):
        replay(recording_of(), roots={"\udcff": tmp_path})


def test_files_that_shrink_and_vanish_meanwhile(tmp_path: Path) -> None:
    """Seeded: no exception, no hang, whatever other processes do to the files."""
    files = [file_beds.make(tmp_path / f"{number}", 64 * PAGE) for number in range(40)]
    recording = recording_of(*(recorded(path, *range(0, 64, 2)) for path in files))
    program = (
        "import os, random, sys\nsource = random.Random(5)\nprint('ready', flush=True)\n"
        "for _ in range(2000):\n"
        "    path = source.choice(sys.argv[1:])\n"
        "    try:\n"
        "        os.truncate(path, source.randrange(64) * 4096) if source.random() < 0.9 else os.unlink(path)\n"
        "    except OSError: pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, *map(str, files)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for _ in range(20):
            result = replay(recording, check_time=False)
            assert result.bytes + result.present_bytes + result.skipped_bytes <= recording.file_bytes
            assert not result.failures
        other.send_signal(signal.SIGKILL)
