"""Scattered pages of one buffer: strided arrays, and populate_many on any buffer."""

from __future__ import annotations

import mmap
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

import prefault
from prefault._kernel import mman
from prefault._system import capabilities
from prefault.engine.scattered.row_queue import RowQueue
from prefault.memory import borrow
from prefault.sizes import KIB, MIB, PAGE_SIZE
from support import needs, oracle
from support.regions import Region

_PAGES = 16384


@pytest.fixture
def mapping() -> Iterator[prefault.Mapping]:
    """64 MiB in base pages, of which nothing is populated."""
    with prefault.Mapping("64 MiB", huge="never") as fresh:
        yield fresh


def _bytes_of(mapping: prefault.Mapping) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]:
    return mapping.ndarray().view(numpy.uint8)


def _present(mapping: prefault.Mapping) -> list[int]:
    return [index for index, there in enumerate(oracle.present(mapping.range.start, len(mapping))) if there]


def test_a_column_brings_in_its_pages_and_not_what_lies_between(mapping: prefault.Mapping) -> None:
    column = _bytes_of(mapping)[: 5461 * 3 * PAGE_SIZE].reshape(-1, 3 * PAGE_SIZE)[:, PAGE_SIZE + 7]
    result = prefault.populate(column)
    assert _present(mapping) == list(range(1, 5461 * 3, 3))
    assert result.bytes == 5461 * PAGE_SIZE
    assert prefault.populate(column).present_bytes == 5461 * PAGE_SIZE
    found = prefault.residency(column)
    assert found.inspected_bytes == found.present_bytes == 5461 * PAGE_SIZE
    with pytest.raises(ValueError, match="scattered"):
        found.pages()


def test_every_ten_thousandth_item(mapping: prefault.Mapping) -> None:
    items = _bytes_of(mapping).view(numpy.int64)[::10_000]
    prefault.populate(items, rollback=True)
    assert _present(mapping) == sorted({at * 80_000 // PAGE_SIZE for at in range(len(items))})


def test_the_plan_tells_pages_and_ranges(mapping: prefault.Mapping) -> None:
    plan = prefault.plan(_bytes_of(mapping).view(numpy.int64)[::10_000])
    assert plan.length == 839 * PAGE_SIZE
    assert "in 839 ranges" in str(plan)
    assert not _present(mapping)


def test_offset_and_length_cut_a_strided_array(mapping: prefault.Mapping) -> None:
    view = _bytes_of(mapping)[:: 4 * PAGE_SIZE]
    prefault.populate(view, offset="1 MiB", length="1 MiB")
    assert _present(mapping) == list(range(256, 512, 4))


def test_dense_arrays_are_populated_as_before(mapping: prefault.Mapping) -> None:
    square = _bytes_of(mapping).reshape(8192, 8192)
    prefault.populate(square[::-1].T)
    assert len(_present(mapping)) == _PAGES


def test_a_scattered_array_is_locked_and_unlocked(mapping: prefault.Mapping) -> None:
    view = _bytes_of(mapping)[:: 1 * MIB]
    assert prefault.lock(view).bytes == 64 * PAGE_SIZE
    data = mapping.range.start
    assert ["lo" in oracle.vma_flags(data + at) for at in (0, PAGE_SIZE, MIB, MIB + PAGE_SIZE)] == [True, False] * 2
    assert prefault.unlock(view) == 64 * PAGE_SIZE
    assert "lo" not in oracle.vma_flags(data)


# --- populate_many


@pytest.mark.parametrize("seed", range(6))
def test_random_ranges_bring_in_their_pages(mapping: prefault.Mapping, seed: int) -> None:
    choose = random.Random(seed)
    ranges = [(choose.randrange(0, 63 * MIB), choose.randrange(0, 64 * KIB)) for _ in range(choose.choice([1, 50, 3000]))]
    wanted = {
        page for offset, length in ranges if length
        for page in range(offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE + 1)
    }  # fmt: skip
    before = set(choose.sample(range(_PAGES), 100))
    for page in before:
        prefault.populate(mapping, offset=page * PAGE_SIZE, length=PAGE_SIZE)
    given = numpy.array(ranges) if choose.random() < 0.5 else ranges
    result = prefault.populate_many(mapping, given, threads=choose.choice([1, 2]))
    assert set(_present(mapping)) == wanted | before
    assert result.bytes == len(wanted - before) * PAGE_SIZE
    assert result.present_bytes == len(wanted & before) * PAGE_SIZE


@pytest.mark.parametrize("kind", ["memfd", "file", "private file"])
def test_other_kinds_of_memory(kind: str) -> None:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        file.truncate(16 * MIB)
        if kind == "memfd":
            memory: prefault.Mapping | mmap.mmap = prefault.Mapping("16 MiB", backing=prefault.Memfd())
        else:
            flags = mmap.MAP_SHARED if kind == "file" else mmap.MAP_PRIVATE
            memory = mmap.mmap(file.fileno(), 16 * MIB, flags=flags)
        with memory:
            with borrow(memory) as borrowed:
                address = borrowed.address
            result = prefault.populate_many(memory, [(at * 256 * KIB, 1) for at in range(64)])
            there = [index for index, one in enumerate(oracle.present(address, 16 * MIB)) if one]
            assert set(there) >= set(range(0, 4096, 64))
            assert result.bytes + result.present_bytes == 64 * PAGE_SIZE


def test_hugetlb_memory_is_populated_in_whole_huge_pages(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(4)
    with prefault.Mapping("8 MiB", backing=prefault.Hugetlb("2 MiB")) as memory:
        result = prefault.populate_many(memory, [(5, 1), (2 * MIB - 1, 1), (4 * MIB + 7, 1)])
        assert result.bytes == 4 * MIB
        assert oracle.present_bytes(memory.range.start, 8 * MIB) == 4 * MIB


def test_bad_ranges_are_named_and_nothing_is_done(mapping: prefault.Mapping) -> None:
    with pytest.raises(ValueError, match="range 1, offset 67108864 and length 1, lies outside"):
        prefault.populate_many(mapping, [(0, 1), (64 * MIB, 1)])
    with pytest.raises(TypeError, match="ranges are pairs"):
        prefault.populate_many(mapping, 7)  # type: ignore[arg-type]
    assert not _present(mapping)


def test_no_ranges_are_no_work(mapping: prefault.Mapping) -> None:
    assert prefault.populate_many(mapping, []).bytes == 0
    assert prefault.populate_many(mapping, [(5, 0)]).bytes == 0


def test_sparse_memory_has_its_own() -> None:
    with prefault.SparseMemory("16 MiB") as memory, pytest.raises(TypeError, match="its own populate_many"):
        prefault.populate_many(memory, [(0, 1)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rollback", [False, True])
def test_a_page_that_fails_is_found_and_what_came_before_counted(rollback: bool, threads: int) -> None:
    pages = 4000
    with Region(pages) as region:
        region.protect(3001, 1, 0)
        ranges = [(page * PAGE_SIZE, PAGE_SIZE) for page in range(1, pages, 4)]
        with pytest.raises(prefault.ProtectionError) as caught:
            prefault.populate_many(region, ranges, rollback=rollback, threads=threads)
        assert caught.value.offset == 3001 * PAGE_SIZE
        there = {index for index, one in enumerate(oracle.present(region.address, pages * PAGE_SIZE)) if one}
        assert caught.value.populated_bytes == len(there) * PAGE_SIZE
        if rollback:
            assert not there
        else:
            assert there >= set(range(1, 3001, 4))
            assert all(page % 4 == 1 for page in there)


def test_the_rest_stays_when_a_call_is_undone() -> None:
    memory = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    data = numpy.frombuffer(memory, numpy.uint8)
    data[5 * PAGE_SIZE] = 7  # between two ranges
    data[8 * PAGE_SIZE] = 8  # in a range

    def stop(done: int, total: int) -> None:
        data[6 * PAGE_SIZE] = 6  # between two ranges, meanwhile
        raise ZeroDivisionError(done, total)

    with pytest.raises(ZeroDivisionError) as caught:
        prefault.populate_many(data, [(page * PAGE_SIZE, 1) for page in range(0, _PAGES, 4)], rollback=True, progress=stop)
    assert [index for index, there in enumerate(oracle.present(data.ctypes.data, data.nbytes)) if there] == [5, 6, 8]
    assert (data[5 * PAGE_SIZE], data[6 * PAGE_SIZE], data[8 * PAGE_SIZE]) == (7, 6, 8)
    assert "discarded again" in caught.value.__notes__[0]


def test_what_others_touch_above_a_page_that_failed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.capability(capabilities.GUARD_REGIONS)
    with Region(64) as region:
        mman.madvise(region.page(30), PAGE_SIZE, mman.MADV_GUARD_INSTALL)
        finish = RowQueue.finish

        def touched_meanwhile(queue: RowQueue, chunk: Any, failed: int | None = None) -> None:
            prefault.populate(region.part(40, 1))
            finish(queue, chunk, failed)

        monkeypatch.setattr(RowQueue, "finish", touched_meanwhile)
        with pytest.raises(prefault.GuardPageError):
            prefault.populate_many(region, [(page * PAGE_SIZE, 1) for page in range(0, 64, 2)], rollback=True)
        assert [page for page, there in enumerate(oracle.present(region.address, 64 * PAGE_SIZE)) if there] == [40]
