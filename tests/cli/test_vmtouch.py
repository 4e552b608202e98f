"""Each row of docs/vmtouch.md: prefault does what vmtouch does, beside vmtouch itself where that is installed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import file_beds
from support.file_beds import PAGE

_PAGE = (Path(__file__).parent.parent.parent / "docs" / "vmtouch.md").read_text()
_VMTOUCH = shutil.which("vmtouch")


def _run(*arguments: object, status: int = 0, stdin: bytes = b"") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefault", *map(str, arguments)], capture_output=True, timeout=60, input=stdin
    )  # fmt: skip
    assert done.returncode == status, (arguments, done.stderr)
    return os.fsdecode(done.stdout)


def _peer(*arguments: object, stdin: bytes = b"") -> tuple[int, int, int]:
    """Run vmtouch: files, pages that it counts as resident, touched or evicted, and all pages; skip without it."""
    if _VMTOUCH is None:
        pytest.skip("vmtouch is not installed")
    done = subprocess.run([_VMTOUCH, *map(str, arguments)], capture_output=True, timeout=60, check=True, input=stdin)
    text = os.fsdecode(done.stdout)
    files = re.search(r"Files: (\d+)", text)
    pages = re.search(r"Pages: (\d+)(?:/(\d+))?", text)
    assert files is not None
    assert pages is not None
    return int(files[1]), int(pages[1]), int(pages[2] or pages[1])


def _vmtouch_status(*arguments: object) -> int | None:
    """Return the exit status of vmtouch; None without it."""
    if _VMTOUCH is None:
        return None
    return subprocess.run([_VMTOUCH, *map(str, arguments)], capture_output=True, timeout=60).returncode


def _kv(*arguments: object, stdin: bytes = b"", status: int = 0) -> dict[str, float]:
    (line,) = _run(*arguments, "-o", "kv", stdin=stdin, status=status).splitlines()
    return {key: float(value) for key, value in (pair.split("=") for pair in line.split())}


def _same(*arguments: object, stdin: bytes = b"", ours: tuple[object, ...] | None = None) -> tuple[int, int, int]:
    """Compare the status of the two programs for the same arguments; return it."""
    found = _kv("status", *(arguments if ours is None else ours), stdin=stdin)
    counted = int(found["Files"]), int(found["ResidentPages"]), int(found["TotalPages"])
    if _VMTOUCH is not None:
        assert _peer(*arguments, stdin=stdin) == counted
    return counted


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "below" / ".git").mkdir(parents=True)
    sizes = {
        "a.bin": 30 * PAGE + 1,
        "b.txt": 5 * PAGE,
        "below/c.bin": 9 * PAGE,
        "below/.git/d": PAGE,
        "with space\n": 2 * PAGE,
    }
    for name, size in sizes.items():
        file_beds.make(top / name, size)
    file_beds.evict(top / "a.bin")
    file_beds.touch(top / "a.bin", 3, 4, 30)
    return top


def _wait(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, f"waited too long: {what}"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _locked_bytes(pid: int) -> int:
    found = re.search(r"^VmLck:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@contextmanager
def _daemon(*arguments: object, pid_file: Path, status: int = 0) -> Iterator[int]:
    """Start ``prefault lock --daemon``; it is ended at the end of the block, by SIGTERM, and leaves no pid file."""
    try:
        _run("lock", "-d", "-P", pid_file, *arguments, status=status)
        _wait(lambda: pid_file.exists() and bool(pid_file.read_text().strip()), "the pid file")
        pid = int(pid_file.read_text())
        yield pid
        os.kill(pid, signal.SIGTERM)
        _wait(lambda: not _is_alive(pid), "the end of the daemon")
        assert not pid_file.exists()
    finally:
        for pid in _processes_with(str(pid_file)):  # also one that should not have started
            os.kill(pid, signal.SIGKILL)


def _processes_with(argument: str) -> Iterator[int]:
    """Yield the processes that were started with an argument."""
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in command_line.read_bytes().split(b"\0"):
                yield int(command_line.parent.name)


def _status(tree: Path, tmp_path: Path) -> None:
    assert _same(tree) == (5, 20, 48)


def _warm(tree: Path, tmp_path: Path) -> None:
    found = _kv("warm", tree)
    assert (found["Files"], found["TouchedPages"], found["TotalPages"]) == (5, 28, 48)
    assert _same(tree) == (5, 48, 48)
    if _VMTOUCH is not None:
        assert _peer("-t", tree)[::2] == (5, 48)
    assert _kv("warm", tree)["TouchedPages"] == 0  # only what is missing
    file_beds.evict(tree / "a.bin")
    assert _kv("warm", "-p", "8k-20k", tree / "a.bin")["TouchedPages"] == 3


def _evict(tree: Path, tmp_path: Path) -> None:
    assert _kv("evict", tree)["EvictedPages"] == 20
    assert _same(tree) == (5, 0, 48)


def _lock(tree: Path, tmp_path: Path) -> None:
    running = subprocess.Popen([sys.executable, "-m", "prefault", "lock", str(tree)], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        assert re.fullmatch(r"locked: 192\.0 KiB in 5 files, by process \d+\n", running.stdout.readline())
        assert _locked_bytes(running.pid) == 48 * PAGE
        assert _kv("evict", tree, status=1)["EvictedPages"] == 0
        assert _same(tree) == (5, 48, 48)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
    assert _kv("evict", tree)["EvictedPages"] == 48


def _daemon_and_pid_file(tree: Path, tmp_path: Path) -> None:
    with _daemon(tree, pid_file=tmp_path / "pid") as pid:
        assert _locked_bytes(pid) == 48 * PAGE  # all of it, when the command has returned
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        refused = subprocess.run(
            [sys.executable, "-m", "prefault", "lock", "-d", "-P", tmp_path / "pid", tree], capture_output=True, text=True
        )
        assert refused.returncode == 1
        assert f"is held by process {pid}" in refused.stderr
        assert refused.stderr.count("\n") == 1


def _stale_pid_file(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1\n")
    with _daemon("--no-wait", tree, pid_file=tmp_path / "pid") as pid:
        assert pid != 1
        _wait(lambda: _locked_bytes(pid) == 48 * PAGE, "the locks")


def _max_size(tree: Path, tmp_path: Path) -> None:
    found = _kv("status", "-m", "20k", tree)
    assert (found["Files"], found["ResidentPages"], found["TotalPages"]) == (3, 8, 8)
    if _VMTOUCH is not None:
        assert _peer("-m", "20k", tree) == (5, 8, 8)  # it counts the files that it skips


def _range(tree: Path, tmp_path: Path) -> None:
    for given in ("16k-40k", "-20k", "100k-", "20k", "1-2", "-"):
        _same("-p", given, tree / "a.bin")
    assert _same("-p", "12k-20k", tree / "a.bin") == (1, 2, 2)
    assert _same("-p", "1M-", tree) == (5, 0, 0)
    assert _kv("status", "-p", "0", tree / "a.bin")["TotalPages"] == 0
    if _VMTOUCH is not None:
        assert _peer("-p", "0", tree / "a.bin") == (1, 3, 31)  # for it that is no end


def _follow(tree: Path, tmp_path: Path) -> None:
    (tree / "link").symlink_to(file_beds.make(tmp_path / "elsewhere", 7 * PAGE))
    (tree / "loop").symlink_to(tree)
    assert _same(tree) == (5, 20, 48)
    assert _same("-f", tree) == (6, 27, 55)
    (tree / "again").symlink_to(tree / "b.txt")
    assert _kv("status", "-f", tree)["Files"] == 6
    if _VMTOUCH is not None:
        assert _peer("-f", tree) == (7, 32, 60)
        assert _peer(tree / "again") == (0, 0, 0)
        assert _peer("-f", tree / "again") == (1, 5, 5)
    assert _kv("status", tree / "again")["Files"] == 1


def _one_file_system(tree: Path, tmp_path: Path) -> None:
    with file_beds.mounted(tree / "mounted", "-t", "tmpfs", "none") as mounted:
        (mounted / "file").write_bytes(b"x" * 3 * PAGE)
        assert _same(tree) == (6, 23, 51)
        assert _same("-F", tree) == (5, 20, 48)
        (tree / "link").symlink_to(mounted / "file")
        assert _kv("status", "-F", "-f", tree)["Files"] == 6
        if _VMTOUCH is not None:
            assert _peer("-F", "-f", tree) == (5, 20, 48)
            assert _peer("-F", tree, mounted) == (5, 20, 48)
        assert _kv("status", "-F", tree, mounted)["Files"] == 6


def _each_link(tree: Path, tmp_path: Path) -> None:
    os.link(tree / "b.txt", tree / "below" / "again")
    assert _same(tree) == (5, 20, 48)
    assert _same("-h", tree, ours=("--each-link", tree)) == (6, 25, 53)
    assert _kv("status", tree / "a.bin", tree / "a.bin")["Files"] == 1
    found = _kv("status", tree, tree)
    assert (found["Files"], found["Directories"]) == (5, 6)
    if _VMTOUCH is not None:
        assert _peer(tree / "a.bin", tree / "a.bin") == (2, 6, 62)


def _exclude(tree: Path, tmp_path: Path) -> None:
    assert _same("-i", "*.bin", "-i", ".git", tree) == (2, 7, 7)


def _include(tree: Path, tmp_path: Path) -> None:
    assert _same("-I", "*.bin", "-I", "d", tree) == (3, 13, 41)


def _batch(tree: Path, tmp_path: Path) -> None:
    listed = f"{tree / 'b.txt'}\n{tree / 'below'}\n".encode()
    assert _same("-b", "-", stdin=listed) == (3, 15, 15)
    (tmp_path / "list").write_bytes(listed)
    assert _same("-b", tmp_path / "list") == (3, 15, 15)
    _run("status", "-b", tmp_path / "none", status=2)
    assert _vmtouch_status("-b", tmp_path / "none") in (0, None)


def _nul(tree: Path, tmp_path: Path) -> None:
    listed = subprocess.run(["find", tree, "-type", "f", "-print0"], capture_output=True, check=True).stdout
    assert _same("-0", "-b", "-", stdin=listed) == (5, 20, 48)
    _run("status", "-0", tree, status=2)
    assert _vmtouch_status("-0", tree) in (0, None)


def _verbose(tree: Path, tmp_path: Path) -> None:
    text = _run("status", "-v", tree / "b.txt")
    assert f"{tree / 'b.txt'}: 20.0 KiB of 20.0 KiB (100 %) [OOOOO]" in text
    text = _run("status", "-v", tree / "a.bin")
    assert f"12.0 KiB of 124.0 KiB (9.68 %) [   OO{' ' * 25}O]" in text


def _quiet(tree: Path, tmp_path: Path) -> None:
    for command in ("status", "warm", "evict"):
        assert _run(command, "-q", tree) == ""
        done = subprocess.run([sys.executable, "-m", "prefault", command, "-q", "/nowhere"], capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def _key_values(tree: Path, tmp_path: Path) -> None:
    found = _kv("status", tree)
    assert list(found) == [
        "Files", "Directories", "ResidentPages", "TotalPages", "ResidentSize", "TotalSize", "ResidentPercent", "Elapsed",
    ]  # fmt: skip
    assert found["Directories"] == 3
    assert found["ResidentSize"] == 20 * PAGE
    assert found["ResidentPercent"] == 41.7
    assert "EvictedPages" in _kv("evict", tree)
    assert "TouchedPages" in _kv("warm", tree)


_ROWS: dict[str, Callable[[Path, Path], None]] = {
    "vmtouch PATH...": _status,
    "-t": _warm,
    "-e": _evict,
    "-l": _lock,
    "-L": _lock,
    "-d": _daemon_and_pid_file,
    "-m SIZE": _max_size,
    "-p RANGE": _range,
    "-f": _follow,
    "-F": _one_file_system,
    "-h": _each_link,
    "-i PATTERN": _exclude,
    "-I PATTERN": _include,
    "-b FILE": _batch,
    "-0": _nul,
    "-w": _stale_pid_file,
    "-P FILE": _stale_pid_file,
    "-v": _verbose,
    "-q": _quiet,
    "-o kv": _key_values,
}


@pytest.mark.parametrize("row", _ROWS)
def test_a_row(row: str, tree: Path, tmp_path: Path) -> None:
    _ROWS[row](tree, tmp_path)


def test_exit_statuses(tree: Path) -> None:
    """What the page says of both."""
    for arguments, theirs, ours in ((["/nowhere", tree], 0, 1), (["-p", "5k-4k", tree], 1, 2), ([], 1, 2)):
        assert _vmtouch_status(*arguments) in (theirs, None)
        _run("status", *arguments, status=ours)
    assert _vmtouch_status("-w", "-l", tree) in (1, None)


def test_the_table_has_a_test_for_each_row_and_no_empty_cell() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|(.+)\|(.+)\|$", _PAGE, re.MULTILINE)
    assert [flag for flag, *_ in rows] == list(_ROWS)
    for _, ours, difference in rows:
        assert ours.strip()
        assert difference.strip()


def test_each_flag_of_the_installed_vmtouch_is_in_the_table() -> None:
    if _VMTOUCH is None:
        pytest.skip("vmtouch is not installed")
    done = subprocess.run([_VMTOUCH], capture_output=True, text=True)
    flags = set(re.findall(r"^  (-\w)", done.stdout, re.MULTILINE))
    assert len(flags) >= 18
    assert flags <= {row[:2] for row in _ROWS}
