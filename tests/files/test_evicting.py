"""Eviction: fincore(1) is the oracle of what stays."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

import prefault
from prefault.files.evicting import EvictedFile, evict_ranges
from prefault.files.open_file import OpenFile
from support import file_beds
from support.file_beds import PAGE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return file_beds.make(tmp_path / "file", 64 * PAGE + 7)


def test_a_file_is_dropped_and_its_content_stays(file: Path) -> None:
    before = file.read_bytes()
    result = prefault.evict(file)
    assert (result.files, result.pages, result.evicted_pages, result.left_pages) == (1, 65, 65, 0)
    assert file_beds.cached_pages(file) == 0
    assert file.read_bytes() == before
    assert "0 bytes" not in str(result)
    assert not result.left


def test_a_tree(tmp_path: Path) -> None:
    for number in range(20):
        file_beds.make(tmp_path / f"{number}", number * PAGE)
    calls: list[tuple[int, int]] = []
    result = prefault.evict(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert (result.files, result.evicted_bytes, result.left_bytes) == (20, 190 * PAGE, 0)
    assert len(calls) == 20
    assert calls[-1] == (190 * PAGE, 190 * PAGE)
    assert prefault.evict(tmp_path).evicted_pages == 0  # idempotent


@pytest.mark.parametrize(
    ("start", "stop", "gone"),
    [
        (0, 10 * PAGE, 10),
        (1, 10 * PAGE, 9),  # only whole pages
        (0, 10 * PAGE - 1, 9),
        (60 * PAGE, None, 5),  # the last page is whole where the range reaches the end
        (60 * PAGE, 64 * PAGE + 7, 5),
        (60 * PAGE, 64 * PAGE + 6, 4),
        (60 * PAGE, 900 * PAGE, 5),
        (900 * PAGE, None, 0),
        (5, 6, 0),
    ],
)
def test_ranges_of_whole_pages(tmp_path: Path, start: int, stop: int | None, gone: int) -> None:
    file = file_beds.make(tmp_path / "file", 64 * PAGE + 7)
    file_beds.evict(file)
    file_beds.touch(file, *range(65))  # page by page: small folios
    result = prefault.evict(file, ranges=[(start, stop)])
    assert (result.pages, result.evicted_pages) == (gone, gone)
    assert file_beds.cached_pages(file) == 65 - gone


def test_dirty_pages_stay_and_are_told_of_unless_synced(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(b"x" * 8 * PAGE)
    result = prefault.evict(file)
    if result.left:  # else they were written in time
        (left,) = result.left
        assert "--sync" in left.reason
    with file.open("r+b") as opened:
        opened.write(b"y" * 8 * PAGE)
    result = prefault.evict(file, sync=True)
    assert result.left_pages == 0
    assert file_beds.cached_pages(file) == 0
    assert file.read_bytes()[: 8 * PAGE] == b"y" * 8 * PAGE


def test_pages_that_are_mapped_stay(file: Path) -> None:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)  # else a fault maps its neighbours
        assert mapped[5 * PAGE : 5 * PAGE + 8] == (5 * PAGE).to_bytes(8, "little")
        result = prefault.evict(file)
        (left,) = result.left
        assert result.left_pages == left.left_pages == file_beds.cached_pages(file) >= 1
        assert "mapped" in left.reason
        assert str(file) in str(left)
    assert prefault.evict(file).left == []


def test_files_in_memory_alone_are_told_of(small_tmpfs: object) -> None:
    path = small_tmpfs("1m") / "file"  # type: ignore[operator]
    path.write_bytes(b"x" * 4 * PAGE)
    result = prefault.evict(path)
    (left,) = result.left
    assert (result.evicted_pages, left.left_pages) == (0, 4)
    assert "in memory alone" in left.reason
    assert path.read_bytes() == b"x" * 4 * PAGE


def test_a_block_device(tmp_path: Path) -> None:
    image = file_beds.make(tmp_path / "image", 1 << 20)
    with file_beds.loop_device(image) as device, device.open("rb") as opened:  # the last close would drop its pages
        opened.read(1 << 20)
        assert prefault.status(device).cached_pages
        result = prefault.evict(device, sync=True)
        assert result.files == 1
        assert prefault.status(device).cached_pages == result.left_pages


def test_failures_do_not_stop_the_others(file: Path) -> None:
    result = prefault.evict([file.parent / "not there", file, "/dev/null"])
    assert result.evicted_pages == 65
    assert len(result.failures) == 2
    assert "2 failures" in str(result)


def test_a_file_that_shrinks_meanwhile(file: Path) -> None:
    with OpenFile(file) as opened:
        os.truncate(file, 3 * PAGE)
        found = evict_ranges(opened, [(0, None)])
    assert isinstance(found, EvictedFile)
    assert found.pages == 3
    assert found.size == 3 * PAGE


def test_a_wrong_progress_is_refused_before_anything_is_evicted(file: Path) -> None:
    with pytest.raises(TypeError, match="progress"):
        prefault.evict(file, progress="yes")  # type: ignore[arg-type]
    assert file_beds.cached_pages(file) == 65
