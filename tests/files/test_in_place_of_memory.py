"""populate, plan, residency and lock of paths: a mapping of our own and mincore(2) are the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import PageRange, PageState, RangeSet
from prefault.files import in_place_of_memory
from prefault.files.failures import FileFailure
from prefault.files.warm_result import Tally, WarmResult
from support import file_beds
from support.file_beds import PAGE


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, size in {"a": 64 * PAGE, "b": 4 * PAGE + 1}.items():
        file_beds.evict(file_beds.make(tmp_path / name, size))
    return tmp_path


@pytest.mark.parametrize("kind", [str, Path])
def test_populate_brings_in_a_file_as_warm_does(tree: Path, kind: Callable[[Path], Any]) -> None:
    path = kind(tree / "a")
    planned = prefault.plan(path)
    assert "256.0 KiB of 1 file are missing from the page cache, 0 bytes are in it" in str(planned)
    assert file_beds.cached_pages(tree / "a") == 0, "the plan has read"
    result = prefault.populate(path)
    assert isinstance(result, prefault.PopulateResult)
    assert (result.bytes, result.present_bytes, result.access) == (64 * PAGE, 0, "read")
    assert result.seconds > 0
    assert result.threads >= 1
    assert result.method in ("populate", "pread", "readahead")
    assert "into the page cache, 1 file" in str(result)
    assert file_beds.cached_pages(tree / "a") == 64
    again = prefault.populate(path)
    assert (again.bytes, again.present_bytes) == (0, 64 * PAGE)
    assert "256.0 KiB were populated already" in str(again)


def test_populate_takes_a_part_a_tree_and_a_selection(tree: Path) -> None:
    calls: list[tuple[int, int]] = []
    prefault.populate(tree / "b", offset=4 * PAGE, length=1, progress=lambda *done: calls.append(done), threads="auto")
    assert file_beds.cached_pages(tree / "b") == 1
    assert calls
    result = prefault.populate(tree, method="pread", threads=2, rate="1 GiB/s")
    assert result.present_bytes == PAGE
    assert (file_beds.cached_pages(tree / "a"), file_beds.cached_pages(tree / "b")) == (64, 5)
    assert "into the page cache, 2 files" in str(result)
    assert prefault.populate(prefault.select(tree)).present_bytes == 69 * PAGE


def test_a_list_of_paths_is_files_and_not_a_collection(tree: Path) -> None:
    paths: list[str | os.PathLike[str]] = [str(tree / "a"), tree / "b"]
    assert "of 2 files are missing" in str(prefault.plan(paths))
    assert prefault.populate(paths).bytes == 69 * PAGE
    assert (file_beds.cached_pages(tree / "a"), file_beds.cached_pages(tree / "b")) == (64, 5)
    with prefault.lock(tuple(paths)) as lock:
        assert (lock.files, lock.bytes) == (2, 69 * PAGE)
    with pytest.raises(TypeError, match=r"residency takes one file: prefault.status takes several"):
        prefault.residency(paths)


def test_populate_raises_what_warm_lists(tree: Path) -> None:
    with pytest.raises(OSError, match=r"gone: .*ENOENT.*check the path"):
        prefault.populate(tree / "gone")
    with pytest.raises(OSError, match=r"gone: .*\(2 failures: prefault.warm returns them all\); 256.0 KiB were brought in"):
        prefault.populate(prefault.select([tree / "gone", tree / "a", tree / "gone too"]))
    with pytest.raises(OSError, match=r"gone: .*ENOENT"):
        prefault.plan(tree / "gone")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"access": "write"}, "access is None or 'read', not 'write'"),
        ({"rollback": True}, "leave rollback out"),
        ({"huge": "auto"}, "leave huge out"),
        ({"node": 0}, "leave node out"),
        ({"interleave": True}, "leave interleave out"),
        ({"headroom": "maybe"}, "headroom is 'check' or 'ignore'"),
        ({"method": "populate_read"}, "method is one of populate, readahead, pread"),
        ({"threads": 0}, "threads is a number"),
        ({"offset": -1}, "negative|not a"),
    ],
)
def test_options_that_files_do_not_have_are_refused(tree: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        prefault.populate(tree / "a", **options)
    assert file_beds.cached_pages(tree / "a") == 0


def test_residency_tells_what_is_in_the_page_cache(tree: Path) -> None:
    path = tree / "a"
    assert prefault.residency(path).present_bytes == 0
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        for page in (3, 4, 60):
            os.pread(file.fileno(), 1, page * PAGE)
    assert file_beds.cached_pages(path) == 3
    found = prefault.residency(str(path))
    assert (found.present_bytes, found.cached_bytes, found.inspected_bytes) == (3 * PAGE, 3 * PAGE, 64 * PAGE)
    assert found.ranges() == RangeSet([PageRange(3 * PAGE, 5 * PAGE), PageRange(60 * PAGE, 61 * PAGE)])
    assert "12.0 KiB present" in str(found)
    assert found.allocated_bytes is None
    with pytest.raises(ValueError, match="map the file to see its pages in this process"):
        found.bytes_in(PageState.ALLOCATED)
    part = prefault.residency(path, offset=4 * PAGE, length=2 * PAGE)
    assert (part.range, part.present_bytes) == (PageRange(4 * PAGE, 6 * PAGE), PAGE)
    assert part.ranges() == RangeSet([PageRange(0, PAGE)])
    assert prefault.residency(path, offset=100 * PAGE).inspected_bytes == 0


def test_residency_of_what_is_no_single_file_is_refused(tree: Path) -> None:
    with pytest.raises(OSError, match=r"is a directory: prefault.status tells of each file in it"):
        prefault.residency(tree)
    with pytest.raises(TypeError, match=r"prefault.status takes several"):
        prefault.residency(prefault.select(tree))
    with pytest.raises(ValueError, match="leave nodes out"):
        prefault.residency(tree / "a", nodes=True)


def test_files_are_imported_for_the_first_path_only(tree: Path) -> None:
    program = (
        "import sys, prefault\n"
        "prefault.populate(bytearray(10)); prefault.populate([bytearray(10)]); prefault.residency(bytearray(10))\n"
        "assert not [name for name in sys.modules if name.startswith('prefault.files')]\n"
        "prefault.populate(sys.argv[1])\n"
        "assert 'prefault.files' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tree / "a")], check=True, timeout=60)
    assert file_beds.cached_pages(tree / "a") == 64


def _warm_and_then(monkeypatch: pytest.MonkeyPatch, lose: Callable[[], None]) -> None:
    """Let pages go before warming counts what is in the page cache."""
    check = Tally.check

    def lose_and_check(*arguments: Any, **options: Any) -> None:
        lose()
        check(*arguments, **options)

    monkeypatch.setattr(Tally, "check", lose_and_check)


@pytest.mark.parametrize(("lost", "is_few"), [(15, True), (16, False)])
def test_a_few_pages_that_went_fail_no_file(
    lost: int, is_few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 256 pages: fewer than 64 KiB may be those of a kernel that reclaims cold pages all the time."""
    path = file_beds.make(tmp_path / "file", 256 * PAGE)
    file_beds.evict(path)

    def lose() -> None:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file_beds.touch(path, *range(lost, 256))
        assert file_beds.cached_pages(path) == 256 - lost

    _warm_and_then(monkeypatch, lose)
    if is_few:
        result = prefault.populate(path)
        assert result.bytes == (256 - lost) * PAGE
        assert "60.0 KiB evicted again, a few, as the kernel takes cold pages at any time" in str(result)
    else:
        with pytest.raises(OSError, match=r"64.0 KiB of the 1.0 MiB that were read are not in the page cache"):
            prefault.populate(path)
        file_beds.evict(path)
        assert "64.0 KiB evicted again, as memory is short" in str(prefault.populate(path, headroom="ignore"))


def test_the_limit_that_ended_a_call_is_told_whatever_failed_after_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = FileFailure("a", "stopped after 4 KiB", "the limit of a test leaves 4 KiB: raise it")
    ended = WarmResult(failures=(limit, FileFailure("b", "gone", "check the path")), stopped=limit.remedy)
    monkeypatch.setattr(in_place_of_memory, "warm", lambda *_, **__: ended)
    with pytest.raises(prefault.HeadroomError, match=r"a: stopped after 4 KiB: the limit of a test leaves 4 KiB: raise it"):
        prefault.populate(tree / "a")
