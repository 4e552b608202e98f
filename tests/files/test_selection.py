"""Selection of files: find(1) is the oracle of a walk, and fnmatch(3) that of patterns."""

from __future__ import annotations

import ctypes
import io
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefault.files.failures import FileFailure
from prefault.files.selection import SelectedFile, SkippedFile, read_list, select
from support import file_beds, needs


def _paths(*given: object, **options: object) -> list[str]:
    return [found.path for found in select(*given, **options) if isinstance(found, SelectedFile)]  # type: ignore[arg-type]


def _failures(*given: object, **options: object) -> list[FileFailure]:
    return [found for found in select(*given, **options) if isinstance(found, FileFailure)]  # type: ignore[arg-type]


def _skipped(*given: object, **options: object) -> list[SkippedFile]:
    skipped: list[SkippedFile] = []
    selection = select(*given, **options, on_skip=skipped.append)  # type: ignore[arg-type]
    assert all(isinstance(found, SelectedFile) for found in selection)
    assert selection.skipped == len(skipped)
    return skipped


def _find(*arguments: object) -> list[str]:
    done = subprocess.run(["find", *map(os.fsencode, map(str, arguments)), "-print0"], capture_output=True, check=True)
    return sorted(os.fsdecode(path) for path in done.stdout.split(b"\0") if path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with names of all kinds, three levels deep."""
    chosen = random.Random(7)
    top = tmp_path / "tree"
    for number in range(60):
        directory = top.joinpath(*(f"d{chosen.randrange(3)}" for _ in range(chosen.randrange(4))))
        directory.mkdir(parents=True, exist_ok=True)
        name = chosen.choice([f"{number}.bin", f"{number} with space", f"{number}\nline", f".{number}", f"{number}.py"])
        (directory / name).write_bytes(bytes(chosen.randrange(10_000)))
    Path(os.fsdecode(os.fsencode(top) + b"/\xff\xfe not utf-8")).write_bytes(b"x")
    return top


def test_a_tree_as_find_lists_it(tree: Path) -> None:
    assert sorted(_paths(tree)) == _find(tree, "-type", "f")
    assert not _failures(tree)


def test_directories_are_counted(tree: Path) -> None:
    selection = select(tree)
    list(selection)
    assert selection.directories == len(_find(tree, "-type", "d"))


def test_sizes_are_those_of_stat(tree: Path) -> None:
    every = list(select(tree))
    assert len(every) == len(_find(tree, "-type", "f")) > 0
    for found in every:
        assert isinstance(found, SelectedFile)
        assert found.size == os.stat(found.path).st_size


@pytest.mark.parametrize("ending", ["", "/", "//"])
def test_a_slash_at_the_end_changes_no_name(tree: Path, ending: str) -> None:
    assert sorted(_paths(f"{tree}{ending}")) == sorted(_paths(tree))


def test_a_path_may_be_bytes(tree: Path) -> None:
    assert sorted(_paths(os.fsencode(tree))) == sorted(_paths(tree))


def test_several_paths_select_each_file_once(tree: Path) -> None:
    one = next(tree.rglob("*.py"))
    assert sorted(_paths([one, tree, tree, one.parent])) == _find(tree, "-type", "f")


def test_hard_links_are_selected_once(tree: Path) -> None:
    one = next(tree.rglob("*.py"))
    os.link(one, tree / "another name")
    assert len(_paths(tree)) == len(_find(tree, "-type", "f")) - 1
    assert len(_paths(tree, each_link=True)) == len(_find(tree, "-type", "f"))


@pytest.mark.parametrize("seed", range(5))
def test_patterns_as_the_c_library_matches_them(tree: Path, seed: int) -> None:
    chosen = random.Random(seed)
    patterns = ["*.py", ".*", "*with*", "[0-4]*", "[!0-4]*", "?.bin", "*\n*", "1*", "*n", "d1"]
    include, exclude = chosen.sample(patterns, 2), chosen.sample(patterns, 2)
    fnmatch = ctypes.CDLL(None).fnmatch

    def matches(name: str, several: list[str]) -> bool:
        return any(fnmatch(os.fsencode(each), os.fsencode(name), 0) == 0 for each in several)

    expected = [
        path for path in _find(tree, "-type", "f")
        if matches(os.path.basename(path), include)
        and not any(matches(part, exclude) for part in Path(path).relative_to(tree.parent).parts)
    ]  # fmt: skip
    assert sorted(_paths(tree, include=include, exclude=exclude)) == expected


def test_a_pattern_with_a_slash_is_compared_with_the_whole_path(tree: Path) -> None:
    assert sorted(_paths(tree, include=[f"{tree}/d1/*.py"])) == _find(tree, "-type", "f", "-path", f"{tree}/d1/*.py")
    without = sorted(_paths(tree, exclude=["*/d1/d0"]))
    assert without == _find(tree, "-type", "f", "-not", "-path", "*/d1/d0/*")


def test_an_excluded_path_is_left_out_though_it_is_named(tree: Path) -> None:
    assert _paths(tree, exclude="tree") == []


def test_limits_of_size(tree: Path) -> None:
    assert sorted(_paths(tree, max_size=5000)) == _find(tree, "-type", "f", "-size", "-5001c")
    assert sorted(_paths(tree, min_size="4 KiB")) == _find(tree, "-type", "f", "-size", "+4095c")
    too_large = _skipped(tree, max_size=5000)
    assert sorted(skipped.path for skipped in too_large) == _find(tree, "-type", "f", "-size", "+5000c")
    assert all("more than the limit of 4.9 KiB" in skipped.reason for skipped in too_large)


@pytest.mark.parametrize("options", [{"max_size": "nine"}, {"min_size": -1}])
def test_a_size_that_is_none_is_refused_at_once(tree: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="size"):
        select(tree, **options)  # type: ignore[arg-type]


def test_links_are_followed_where_asked(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "blob").write_bytes(b"x" * 5000)
    (tree / "to a file").symlink_to(tmp_path / "elsewhere" / "blob")
    (tree / "to a directory").symlink_to(tmp_path / "elsewhere")
    left = _skipped(tree)
    assert sorted(Path(skipped.path).name for skipped in left) == ["to a directory", "to a file"]
    assert all("--follow-links" in str(skipped) for skipped in left)
    followed = _paths(tree, follow_links=True)
    assert len(followed) == len(_paths(tree)) + 1  # one blob by two ways
    assert len(_paths(tree, follow_links=True, each_link=True)) == len(followed) + 1


def test_a_named_link_is_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(tree)
    assert len(_paths(tmp_path / "current")) == len(_paths(tree))


def test_loops_end(tree: Path) -> None:
    before = sorted(_paths(tree))
    (tree / "d0" / "up").symlink_to(tree)
    (tree / "itself").symlink_to("itself")
    assert sorted(_paths(tree, follow_links=True)) == before
    (failure,) = _failures(tree, follow_links=True)
    assert failure.path == str(tree / "itself")
    assert "loop" in str(failure)
    (tree / "itself").unlink()
    for each_link in (False, True):
        (skipped,) = _skipped(tree, follow_links=True, each_link=each_link)
        assert skipped.path == str(tree / "d0" / "up")
        assert "a loop" in skipped.reason


def test_a_dangling_link_is_a_failure(tree: Path) -> None:
    (tree / "dangling").symlink_to("nowhere")
    (failure,) = _failures(tree, follow_links=True)
    assert failure.path == str(tree / "dangling")
    assert "check the path" in failure.remedy


def test_what_has_no_pages_is_skipped_in_a_tree_and_refused_by_name(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tree / "fifo")
    monkeypatch.chdir(tree)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        skipped = {Path(each.path).name: each for each in _skipped(tree)}
        assert skipped.keys() == {"fifo", "socket"}
        assert "a FIFO" in skipped["fifo"].reason
        assert "a socket" in skipped["socket"].reason
        for name in ("fifo", "socket", "/dev/null"):
            (failure,) = _failures(name)
            assert "has no page cache" in failure.reason


def test_nothing_is_opened_but_directories(tree: Path) -> None:
    os.mkfifo(tree / "fifo")  # opening it would wait for a writer for ever
    walk = threading.Thread(target=_paths, args=(tree,), kwargs={"follow_links": True}, daemon=True)
    walk.start()
    walk.join(20)
    assert not walk.is_alive()


def test_a_path_that_is_not_there() -> None:
    missing, strange = _failures(["/nowhere/at all", "with\0nul"])
    assert str(missing).startswith("/nowhere/at all: ")
    assert str(missing).endswith(": No such file or directory: check the path; the file may have been removed meanwhile")
    assert "null" in strange.reason


def test_a_file_that_vanishes_during_the_walk_does_not_stop_it(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}").write_bytes(b"x")
    found = iter(select(tmp_path))
    first = next(found)
    for path in tmp_path.iterdir():
        if str(path) != first.path:
            path.unlink()
    rest = list(found)
    assert all(isinstance(each, FileFailure) and "removed meanwhile" in each.remedy for each in rest)
    assert len(rest) == 49  # the kernel had listed them already


def test_a_directory_that_vanishes_during_the_walk_does_not_stop_it(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    (tmp_path / "z").write_bytes(b"x")
    found = iter(select(tmp_path))
    assert next(found).path == str(tmp_path / "z")  # files come before directories
    (tmp_path / "b" / "file").unlink()
    (tmp_path / "b").rmdir()
    rest = list(found)
    assert sorted(type(each).__name__ for each in rest) == ["FileFailure", "SelectedFile", "SelectedFile"]


def test_an_unreadable_directory_does_not_stop_the_walk(tree: Path) -> None:
    needs.root("become another user")
    (tree / "d0").chmod(0)
    code = (
        "import os, sys; from prefault.files.selection import select\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for found in select('.'): print(type(found).__name__, getattr(found, 'reason', ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tree)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("EACCES" in line for line in lines) == 1
    assert sum(line.startswith("SelectedFile") for line in lines) > 10


def test_one_file_system(tree: Path, small_tmpfs: Iterator[object]) -> None:
    mount = small_tmpfs("64k")  # type: ignore[operator]
    (mount / "file").write_bytes(b"x")
    (tree / "mounted").symlink_to(mount)
    assert str(tree / "mounted" / "file") in _paths(tree, follow_links=True)
    assert str(tree / "mounted" / "file") not in _paths(tree, follow_links=True, same_file_system=True)
    (skipped,) = _skipped(tree, follow_links=True, same_file_system=True)
    assert "another file system" in skipped.reason
    assert _paths(mount, same_file_system=True) == [str(mount / "file")]


def test_a_tree_deeper_than_a_path_is_long(tmp_path: Path) -> None:
    top = tmp_path / "deep"
    top.mkdir()
    before = os.getcwd()
    os.chdir(top)
    try:
        for _ in range(30):
            os.mkdir("n" * 200)
            os.chdir("n" * 200)
        Path("file").touch()
        found = list(select(top))
        assert len(found) == 1
        assert isinstance(found[0], FileFailure)
        assert "longer than" in str(found[0])
    finally:
        os.chdir(before)
        subprocess.run(["rm", "-rf", str(top)], check=True)


def test_a_thousand_levels(tmp_path: Path) -> None:
    for depth in range(1, 1001):
        tmp_path.joinpath(*["d"] * depth).mkdir()
    tmp_path.joinpath(*["d"] * 1000, "file").touch()
    assert len(_paths(tmp_path)) == 1
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_a_list_by_lines_and_by_nul() -> None:
    names = ["plain", "with space", "\udcff not utf-8", "/a/b"]
    for separator, nul in ((b"\n", False), (b"\0", True)):
        for end in (b"", separator, separator * 3):
            raw = separator.join(map(os.fsencode, names)) + end
            assert list(read_list(io.BytesIO(raw), nul=nul)) == names
    assert list(read_list(io.BytesIO(b"a\nb\0c"), nul=True)) == ["a\nb", "c"]
    assert list(read_list(io.BytesIO(b""))) == []


def test_a_long_list_is_read_bit_by_bit() -> None:
    names = [f"{number:>0100}" for number in range(5000)]
    raw = io.BytesIO("\n".join(names).encode())
    found = read_list(raw)
    assert next(found) == names[0]
    assert raw.tell() < 100_000
    assert list(found) == names[1:]


def test_a_list_with_another_separator_is_refused() -> None:
    with pytest.raises(ValueError, match="--nul"):
        list(read_list(io.BytesIO(b"name\0" * 100_000)))
    with pytest.raises(ValueError, match="without --nul"):
        list(read_list(io.BytesIO(b"name\n" * 100_000), nul=True))


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    for directory in range(10):
        (tmp_path / f"{directory}").mkdir()
        for number in range(1000):
            os.close(os.open(tmp_path / f"{directory}" / f"{number:0100}", os.O_CREAT | os.O_WRONLY))
    code = (
        "import sys, tracemalloc; from prefault.files.selection import select; tracemalloc.start()\n"
        "print(sum(1 for _ in select(sys.argv[1])), tracemalloc.get_traced_memory()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    count, most = map(int, done.stdout.split())
    assert count == 10_000
    assert most < 1 << 20, f"{most} bytes for {count} files"


# --- file systems whose files the kernel makes -----------------------------------------------------------------------


@pytest.fixture
def kernel_tree(tmp_path: Path) -> Iterator[Path]:
    """A tree with a file, tracefs, proc and a single file of sysfs in it."""
    top = tmp_path / "tree"
    top.mkdir()
    file_beds.make(top / "file", 3 * file_beds.PAGE)
    (top / "setting").touch()
    with (
        file_beds.mounted(top / "traces", "-t", "tracefs", "prefault-test"),
        file_beds.mounted(top / "proc", "-t", "proc", "prefault-test"),
        file_beds.bound("/sys/kernel/mm/transparent_hugepage/enabled", top / "setting"),
    ):
        assert (top / "traces" / "trace_pipe").exists()
        yield top


def test_file_systems_whose_files_the_kernel_makes_are_left_out_of_a_tree(kernel_tree: Path) -> None:
    skipped = {Path(one.path).name: one.reason for one in _skipped(kernel_tree)}
    assert set(skipped) == {"traces", "proc", "setting"}
    assert "is on tracefs" in skipped["traces"]
    assert "is on proc" in skipped["proc"]
    assert "is on sysfs" in skipped["setting"]
    assert _paths(kernel_tree) == [str(kernel_tree / "file")]


def test_file_systems_whose_files_the_kernel_makes_are_failures_where_they_are_named(kernel_tree: Path) -> None:
    for name in ("traces", "traces/trace_pipe", "proc/self/maps", "setting"):
        (failure,) = _failures(kernel_tree / name)
        assert failure.path == str(kernel_tree / name)
        assert "the kernel makes its files at each read" in failure.reason
        assert failure.remedy == "leave it out"


@pytest.mark.parametrize("verb", ["status", "warm", "evict", "lock"])
def test_verbs_end_soon_on_a_tree_with_files_that_never_end(kernel_tree: Path, verb: str) -> None:
    """To read ``trace_pipe`` waits for ever; kmsg and others of proc as well."""
    code = (
        "import prefault, sys\n"
        f"found = prefault.{verb}(sys.argv[1])\n"
        "print(len(found.files) if isinstance(found.files, list) else found.files, *found.failures)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, kernel_tree], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")
    named = subprocess.run(
        [sys.executable, "-c", code, kernel_tree / "traces" / "trace_pipe"], capture_output=True, text=True, timeout=60
    )
    assert named.stdout.startswith("0 ") or "trace_pipe" in named.stderr
    assert "is on tracefs" in named.stdout + named.stderr
