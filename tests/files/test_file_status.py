"""Status of files: fincore(1) is the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefault
from prefault.files.file_status import FileStatus, each_status
from prefault.testing import without
from support import file_beds, needs
from support.file_beds import PAGE


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of several sizes, some cached, some in part, some not."""
    top = tmp_path / "tree"
    (top / "below").mkdir(parents=True)
    for name, size in {"whole": 9 * PAGE, "part": 40 * PAGE + 5, "below/none": 3 * PAGE, "empty": 0, "one byte": 1}.items():
        file_beds.make(top / name, size)
    for name in ("part", "below/none"):
        file_beds.evict(top / name)
    file_beds.touch(top / "part", 3, 4, 20, 40)
    return top


@pytest.mark.parametrize("how", ["cachestat", "mincore"])
def test_each_file_as_fincore_counts_it(tree: Path, how: str) -> None:
    with without(*(["cachestat"] if how == "mincore" else [])):
        found = prefault.status(tree)
    assert not found.failures
    assert {file.path for file in found.files} == {str(path) for path in tree.rglob("*") if path.is_file()}
    for file in found.files:
        assert file.cached_pages == (file_beds.cached_pages(Path(file.path)) if file.size else 0), file.path
        assert file.size == os.stat(file.path).st_size
        assert file.pages == -(-file.size // PAGE)
    assert found.cached_pages == sum(file.cached_pages or 0 for file in found.files)
    assert found.directories == 2
    assert found.unknown == 0


def test_ranges_of_cached_pages(tree: Path) -> None:
    (file,) = prefault.status(tree / "part", pages=True).files
    assert file.ranges is not None
    missing = file.missing()
    assert missing is not None
    for page in (3, 4, 20, 40):
        assert page * PAGE in file.ranges
        assert page * PAGE not in missing
    assert file.ranges.pages == file.cached_pages == file_beds.cached_pages(tree / "part")
    assert file.ranges.pages + missing.pages == file.pages


def test_only_the_ranges_that_are_asked_for(tree: Path) -> None:
    (file,) = prefault.status(tree / "part", ranges=[(3 * PAGE, 5 * PAGE), (20 * PAGE + 1, 20 * PAGE + 2)], pages=True).files
    assert (file.pages, file.cached_pages) == (3, 3)
    assert file.ranges is not None
    assert file.ranges.pages == 3
    (file,) = prefault.status(tree / "part", ranges=[(40 * PAGE, None)]).files
    assert (file.pages, file.cached_pages) == (1, 1)
    (file,) = prefault.status(tree / "part", ranges=[(80 * PAGE, None)]).files
    assert (file.pages, file.cached_pages) == (0, 0)


@pytest.mark.parametrize("given", [(-1, 5), (5, 4)])
def test_a_wrong_range_is_refused(tree: Path, given: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a range"):
        prefault.status(tree, ranges=[given])


def test_arguments_that_are_no_ranges_and_no_paths(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"not a range of a file: '0': give \(start, stop\)"):
        prefault.status(tree, ranges="0-5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an iterable of them, not int"):
        prefault.status(3)  # type: ignore[arg-type]


def test_dirty_pages(tmp_path: Path) -> None:
    path = file_beds.make(tmp_path / "file", 8 * PAGE)
    with path.open("r+b") as file:
        file.write(b"x" * 3 * PAGE)
    (found,) = prefault.status(path).files
    if found.dirty_pages == 0:
        pytest.skip("the file system has written the pages already")
    assert found.dirty_pages == 3


def test_failures_do_not_stop_the_others(tree: Path) -> None:
    found = prefault.status([tree / "whole", tree / "not there", tree / "empty"])
    assert [Path(file.path).name for file in found.files] == ["whole", "empty"]
    assert [Path(failure.path).name for failure in found.failures] == ["not there"]
    assert "1 failure" in str(found)


def test_a_file_that_vanishes_before_it_is_opened(tree: Path) -> None:
    selection = prefault.select(sorted(tree.rglob("*")))
    found = each_status(selection)
    next(found)
    for path in tree.rglob("*"):
        if path.is_file():
            path.unlink()
    rest = list(found)
    assert rest
    assert all(isinstance(each, prefault.FileFailure) for each in rest)


def test_a_selection_with_patterns(tree: Path) -> None:
    found = prefault.status(prefault.select(tree, include=["n*"]))
    assert [Path(file.path).name for file in found.files] == ["none"]


def test_overlay_files_are_looked_at_with_care(tmp_path: Path) -> None:
    with file_beds.overlay(tmp_path) as merged:
        for number in range(3):
            file_beds.make(tmp_path / "lower" / f"{number}", 5 * PAGE)
        found = prefault.status(merged)
        assert [file.cached_pages for file in found.files] == [5, 5, 5]


def test_another_users_files_are_not_told(tmp_path: Path) -> None:
    needs.root("become another user")
    for number in range(3):
        file_beds.make(tmp_path / f"{number}", 5 * PAGE)
    tmp_path.chmod(0o755)
    code = (
        "import os, prefault; prefault.status('.')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "found = prefault.status('.')\n"
        "assert found.unknown == 3, found\n"
        "assert all('only to its owner' in file.reason for file in found.files), found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    if "unknown == 3" in done.stderr and not _hides_page_cache():
        needs.missing("this kernel tells everyone of every file's page cache (before Linux 6.14)")
    assert done.returncode == 0, done.stderr


def _hides_page_cache() -> bool:
    major, minor = map(int, os.uname().release.split(".")[:2])
    return (major, minor) >= (6, 14)


def test_files_of_proc_are_failures() -> None:
    found = prefault.status("/proc/self/status")
    assert not found.files
    assert "is on proc" in str(*found.failures)


def test_missing_needs_ranges() -> None:
    assert FileStatus("f", 5, 1, 1, 0).missing() is None
    assert FileStatus("f", 5, 1, None, None).cached_bytes is None


@pytest.mark.parametrize("given", ["tree", "one in a list", "several", "each link"])
def test_each_file_once_however_it_is_counted(tree: Path, given: str) -> None:
    """Hard links, files that vanish between listing and opening, and several trees: the quick count leaves them aside."""
    for number in range(20):
        file_beds.make(tree / f"{number:02}", number * PAGE + 1)
        file_beds.evict(tree / f"{number:02}") if number % 3 else None
    for number in range(0, 20, 4):
        os.link(tree / f"{number:02}", tree / "below" / f"again {number}")
    os.symlink("00", tree / "link")
    os.mkfifo(tree / "fifo")
    chosen = {
        "tree": prefault.select(tree), "one in a list": prefault.select([tree]),
        "several": prefault.select([tree, tree / "below"]), "each link": prefault.select(tree, each_link=True),
    }[given]  # fmt: skip
    found = list(each_status(chosen))
    assert all(isinstance(file, FileStatus) for file in found)
    assert len(found) == 25 + (5 if given == "each link" else 0)
    for file in found:
        assert isinstance(file, FileStatus)
        size = os.stat(file.path).st_size
        assert (file.size, file.pages) == (size, -(-size // PAGE))
        assert file.cached_pages == (file_beds.cached_pages(Path(file.path)) if size else 0), file.path
    assert chosen.skipped == 2


def test_rules_of_the_selection_hold_for_quick_counts(tree: Path) -> None:
    for number in range(5):
        file_beds.make(tree / f"{number}.bin", number * PAGE)
    for rules, count in (
        ({"include": ["*.bin"]}, 5), ({"exclude": ["*.bin"]}, 5), ({"min_size": 3 * PAGE}, 5), ({"max_size": PAGE}, 4),
    ):  # fmt: skip
        assert len(prefault.status(prefault.select(tree, **rules)).files) == count, rules


def test_no_descriptor_is_left_open(tree: Path, no_leaks: None) -> None:
    several = each_status(prefault.select(tree))
    next(several)
    next(several)
    del several
