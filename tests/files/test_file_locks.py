"""Locks of files: smaps and the locked bytes of the process are the oracle, and eviction has to leave the pages."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import prefault
from support import cgroups, file_beds, needs
from support.children import Child
from support.file_beds import PAGE


def _locked_bytes() -> int:
    found = re.search(r"^VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "below").mkdir(parents=True)
    for name, size in {"a": 9 * PAGE, "b": 4 * PAGE + 1, "below/c": 30 * PAGE, "empty": 0}.items():
        file_beds.evict(file_beds.make(top / name, size))
    return top


def test_pages_are_brought_in_and_stay(tree: Path) -> None:
    before = _locked_bytes()
    with prefault.lock(tree) as locked:
        assert isinstance(locked, prefault.FileLock)
        assert (locked.files, locked.bytes) == (3, 44 * PAGE)
        assert _locked_bytes() == before + 44 * PAGE
        result = prefault.evict(tree)
        assert result.evicted_pages == 0
        assert result.left_pages == 44
        assert file_beds.cached_pages(tree / "below" / "c") == 30
    assert locked.closed
    assert _locked_bytes() == before
    assert prefault.evict(tree).left_pages == 0
    locked.close()  # idempotent


def test_ranges(tree: Path) -> None:
    calls: list[tuple[int, int]] = []
    given = [(PAGE, 2 * PAGE), (8 * PAGE, None)]
    with prefault.lock(tree / "a", ranges=given, progress=lambda *done: calls.append(done)) as locked:
        assert locked.bytes == 2 * PAGE
        assert calls[-1] == (2 * PAGE, 2 * PAGE)
        prefault.evict(tree / "a")
        assert file_beds.cached_pages(tree / "a") == 2
    with prefault.lock(tree / "a", offset=PAGE, length=1) as locked:
        assert locked.bytes == PAGE
    with prefault.lock(tree / "a", offset=8 * PAGE) as locked:
        assert locked.bytes == PAGE


def test_a_buffer_is_locked_as_before() -> None:
    array = numpy.zeros(3 * PAGE, "uint8")
    result = prefault.lock(array)
    assert isinstance(result, prefault.LockResult)
    prefault.unlock(array)


@pytest.mark.parametrize(("target", "options"), [("/etc/passwd", {"access": "write"}), ("/etc/passwd", {"headroom": "no"})])
def test_wrong_options_are_refused(target: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"access|headroom"):
        prefault.lock(target, **options)  # type: ignore[call-overload]


def test_ranges_of_a_buffer_are_refused() -> None:
    with pytest.raises(TypeError, match="offset="):
        prefault.lock(bytearray(10), ranges=[(0, 1)])  # type: ignore[arg-type]


def test_failures_do_not_stop_the_others(tree: Path) -> None:
    (tree / "fifo").unlink(missing_ok=True)
    with prefault.lock(prefault.select([tree / "a", tree / "gone", "/dev/null"])) as locked:
        assert locked.files == 1
        assert len(locked.failures) == 2
        assert "2 failures" in str(locked)


def test_a_single_path_that_cannot_be_locked_is_an_exception(tree: Path) -> None:
    with pytest.raises(OSError, match="ENOENT"):
        prefault.lock(tree / "gone")
    with pytest.raises(OSError, match="a character device"):
        prefault.lock("/dev/null")


def test_a_file_that_shrinks_is_a_failure_and_no_sigbus(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file shrinks when all are mapped, just before they are locked."""
    from prefault.files import file_locks

    allowed = file_locks._ensure_allowed

    def shrink(total: int, needed: int) -> None:
        os.truncate(tree / "below" / "c", 2 * PAGE)
        allowed(total, needed)

    monkeypatch.setattr(file_locks, "_ensure_allowed", shrink)
    with prefault.lock(tree) as locked:
        (failure,) = locked.failures
        assert failure.path == str(tree / "below" / "c")
        assert "shrank to 8.0 KiB" in failure.reason
        assert (locked.files, locked.bytes) == (2, 14 * PAGE)


def test_the_limit_on_locked_memory_is_checked_before_anything_is_read(tree: Path) -> None:
    needs.root("give up the right to lock as much as there is")
    code = (
        "import os, resource, prefault\n"
        "from prefault.files import in_place_of_memory  # which this user may not be able to read\n"
        f"resource.setrlimit(resource.RLIMIT_MEMLOCK, ({10 * PAGE}, {10 * PAGE}))\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "with prefault.lock('a') as locked: assert locked.files == 1, locked\n"
        "try: prefault.lock('.')\n"
        "except prefault.HeadroomError as error: print(error.limit, error)\n"
    )
    tree.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RLIMIT_MEMLOCK locking takes 176.0 KiB")
    assert "ulimit -l" in done.stdout
    assert file_beds.cached_pages(tree / "below" / "c") == 0


def test_a_memory_cgroup_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 30)

    def lock() -> str:
        try:
            prefault.lock(path)
        except prefault.HeadroomError as error:
            return str(error)
        return "locked"

    with cgroups.groups() as make:
        group = make(256 << 20)
        with Child(group.inside(lock)) as child:
            answer = child.result(60)
        assert "locking takes 1.0 GiB" in answer
        assert str(group.directory) in answer
        assert group.killed == 0


def test_too_many_mappings_lock_nothing(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}").write_bytes(b"x" * PAGE)
    code = (
        "import mmap, prefault\n"
        "from prefault.files import in_place_of_memory\n"
        "most = int(open('/proc/sys/vm/max_map_count').read())\n"
        "if most > 200_000: print('vm.max_map_count'); raise SystemExit\n"
        "from prefault._kernel import mman\n"
        f"start = mman.mmap(0, (most - 150) * {PAGE}, 0, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS)\n"
        f"for page in range(0, most - 150, 2): mman.mprotect(start + page * {PAGE}, {PAGE}, mman.PROT_READ)\n"
        "try: prefault.lock('.')\n"
        "except OSError as error: print(error)\n"
        "print(open('/proc/self/status').read())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vm.max_map_count" in done.stdout
    if "nothing is locked" in done.stdout:
        assert re.search(r"VmLck:\s+0 kB", done.stdout)


def test_children_do_not_inherit_locks(tree: Path) -> None:
    with prefault.lock(tree / "a"), Child(_locked_bytes) as child:
        assert child.result(20) == 0


def test_the_soft_limit_of_this_process_is_not_touched(tree: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    prefault.lock(tree).close()
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == before
