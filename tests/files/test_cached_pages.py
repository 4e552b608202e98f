"""Cached pages of a file: which, how many, and when the kernel does not say."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefault import PageRange, RangeSet
from prefault._kernel import mman
from prefault._system import capabilities
from prefault.files import cached_pages
from prefault.files.cached_pages import cached_count, cached_ranges
from prefault.files.failures import CannotTellError
from prefault.files.open_file import OpenFile
from prefault.testing import without
from support import file_beds, needs, oracle
from support.children import Child
from support.file_beds import PAGE

MIB = 1 << 20


@pytest.fixture(params=["disk", "overlay", "disk without cachestat"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that reads from a disk."""
    with ExitStack() as stack:
        if request.param == "overlay":
            yield stack.enter_context(file_beds.overlay(tmp_path))
        else:
            if request.param != "disk":
                stack.enter_context(without("cachestat"))
            yield tmp_path


def _set(*pages: int) -> RangeSet:
    return RangeSet(PageRange(page * PAGE, (page + 1) * PAGE) for page in pages)


def test_exactly_the_pages_that_were_read(directory: Path) -> None:
    path = file_beds.make(directory / "file", 40 * MIB + 1)
    last = 40 * MIB // PAGE
    file_beds.evict(path)
    pages = (0, 1, 5, 4095, 4096, 4097, 8191, last)
    file_beds.touch(path, *pages)
    with OpenFile(path) as file:
        assert cached_ranges(file) == _set(*pages)
        count = cached_count(file)
        assert (count.pages, count.bytes, count.reason) == (len(pages), len(pages) * PAGE, "")
        assert count.pages == file_beds.cached_pages(path)
        assert cached_ranges(file, PAGE + 1, 6 * PAGE) == _set(1, 5)
        assert cached_count(file, PAGE + 1, 6 * PAGE).pages == 2
        assert cached_ranges(file, 41 * MIB, 50 * MIB) == RangeSet()
        path.read_bytes()
        assert cached_ranges(file) == RangeSet([PageRange(0, (last + 1) * PAGE)])
        file_beds.evict(path)
        assert cached_ranges(file) == RangeSet()
        assert cached_count(file).pages == 0


def test_random_pages(directory: Path) -> None:
    seeded = random.Random(6)
    path = file_beds.make(directory / "file", 4 * MIB)
    for _ in range(5):
        file_beds.evict(path)
        pages = seeded.sample(range(4 * MIB // PAGE), seeded.randrange(1, 300))
        file_beds.touch(path, *pages)
        with OpenFile(path) as file:
            start, stop = sorted(seeded.sample(range(4 * MIB // PAGE), 2))
            assert cached_ranges(file) == _set(*pages)
            assert cached_ranges(file, start * PAGE, stop * PAGE) == _set(*(page for page in pages if start <= page < stop))


def test_only_the_lowest_bit_of_a_page_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = file_beds.make(tmp_path / "file", 5 * PAGE)
    monkeypatch.setattr(mman, "mincore", lambda _start, _length: bytearray([1, 0, 0x81, 3, 2]))
    with OpenFile(path) as file:
        assert cached_ranges(file) == _set(0, 2, 3)


def test_dirty_pages_are_told(tmp_path: Path) -> None:
    needs.capability(capabilities.CACHESTAT)
    path = file_beds.make(tmp_path / "file", 8 * PAGE)
    with OpenFile(path) as file, path.open("r+b") as writer:
        assert cached_count(file).dirty == 0
        writer.write(b"x" * 2 * PAGE)
        writer.flush()
        count = cached_count(file)
        assert (count.dirty or 0) + (count.writeback or 0) in (0, 2)  # the kernel may have written them by now
        assert count.source == "cachestat"


def test_empty_and_sparse_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with OpenFile(path) as file:
        assert cached_ranges(file) == RangeSet()
        assert cached_count(file).pages == 0
    needs.capability(capabilities.CACHESTAT)
    os.truncate(path, 8 << 40)  # without cachestat, each of its 2**31 pages would be looked up
    file_beds.touch(path, 3, (5 << 40) // PAGE)
    with OpenFile(path) as file:
        assert cached_ranges(file) == _set(3, (5 << 40) // PAGE)
        assert cached_count(file).pages == 2


def test_a_file_that_shrinks_meanwhile_raises_no_sigbus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_beds.make(tmp_path / "file", 8 * MIB)
    mincore = mman.mincore

    def shrink(start: int, length: int) -> bytearray:
        os.truncate(path, PAGE)
        return mincore(start, length)

    monkeypatch.setattr(mman, "mincore", shrink)
    with OpenFile(path) as file:
        assert cached_ranges(file) == _set(0)


def test_tmpfs(small_tmpfs: Callable[[str], Path]) -> None:
    path = file_beds.make(small_tmpfs("2m") / "file", 3 * PAGE)
    os.truncate(path, 10 * PAGE)
    with OpenFile(path) as file:
        assert file.file_system == "tmpfs"
        assert cached_ranges(file) == _set(0, 1, 2)
        assert cached_count(file).pages == 3


def test_hugetlbfs_tells_a_count_only(tmp_path: Path, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(3)
    with file_beds.mounted(tmp_path / "huge", "-t", "hugetlbfs", "prefault-test") as directory:
        path = directory / "file"
        path.touch()
        os.truncate(path, 2 * needs.HUGE)
        with OpenFile(path) as file:
            assert cached_ranges(file) == RangeSet()
            with path.open("r+b") as writer, mmap.mmap(writer.fileno(), needs.HUGE) as memory:
                memory[0] = 1
                assert cached_count(file).pages == needs.HUGE // PAGE
                with pytest.raises(CannotTellError, match="not which"):
                    cached_ranges(file, 0, needs.HUGE)
                assert cached_count(file, 0, needs.HUGE).pages is None
            with path.open("r+b") as writer, mmap.mmap(writer.fileno(), 2 * needs.HUGE) as memory:
                memory[needs.HUGE] = 1
            assert cached_ranges(file, 1, 2) == RangeSet([PageRange(0, needs.HUGE)])


def test_block_devices(tmp_path: Path) -> None:
    image = file_beds.make(tmp_path / "image", 4 * MIB)
    # Open all the time: the last to close a block device drops its pages.
    with file_beds.loop_device(image) as device, OpenFile(device) as file:
        file_beds.evict(device)
        assert cached_ranges(file) == RangeSet()
        file_beds.touch(device, 7, 300)
        found = cached_ranges(file)
        assert _set(7, 300) - found == RangeSet()
        assert cached_count(file).pages == found.pages


def test_files_of_proc_cannot_be_mapped() -> None:
    with OpenFile("/proc/self/status") as file:
        file.size = 100  # as those of sysfs have one
        mapped = cached_pages._mapped(file, PageRange(0, PAGE))
        with pytest.raises(CannotTellError, match="proc does not let this file be mapped"):
            mapped.__enter__()


def test_another_users_file_is_not_told_of(tmp_path: Path) -> None:
    """mincore claims that all of it is resident; nothing of it is."""
    needs.root("become another user")
    path = file_beds.make(tmp_path / "file", MIB)
    file_beds.evict(path)
    for directory in (tmp_path, *tmp_path.parents):
        if directory == tmp_path or directory.name.startswith(("pytest-", "popen-")):
            directory.chmod(0o755)

    def look() -> tuple[object, str]:
        os.setresuid(file_beds.NOBODY, file_beds.NOBODY, file_beds.NOBODY)
        with OpenFile(path) as file:
            try:
                return cached_ranges(file).pages, ""
            except CannotTellError as error:
                return cached_count(file).pages, str(error)

    with Child(look) as child:
        pages, reason = child.result()
    assert pages is None
    assert str(path) in reason
    assert "only to its owner" in reason
    path.chmod(0o666)
    file_beds.touch(path, 3)
    with Child(look) as child:
        assert child.result() == (1, "")
    path.read_bytes()
    with Child(look) as child:
        assert child.result() == (MIB // PAGE, "")


def test_nothing_is_left_open(tmp_path: Path, no_leaks: None) -> None:
    path = file_beds.make(tmp_path / "file", MIB)
    mappings = oracle.mappings()
    with OpenFile(path) as file:
        for _ in range(20):
            cached_ranges(file)
    assert oracle.mappings() <= mappings + 1
