"""GrowableArray: what it holds, where it lies, and what memory it takes, by pagemap and VmHWM."""

from __future__ import annotations

import array
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, TemporaryFile
from prefault.errors import PopulateError
from prefault.sizes import MIB
from prefault.sparse.growable import GrowableArray
from support import needs, oracle
from support.children import in_child

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def small() -> Iterator[GrowableArray]:
    """float64, at most 64 KiB, in small pages."""
    with GrowableArray(capacity="64 KiB", huge="never") as growing:
        yield growing


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# --- what it holds


def test_append_and_extend() -> None:
    with GrowableArray() as growing:
        assert (len(growing), growing.nbytes, growing.populated_bytes, growing.array.shape) == (0, 0, 0, (0,))
        growing.append(1)
        growing.append(2.5)
        growing.append(numpy.float32(3))
        growing.extend([4, 5.5])
        growing.extend(numpy.arange(6, 8))
        growing.extend(array.array("f", [8, 9]))
        growing.extend(float(number) for number in range(10, 12))
        growing.extend(())
        growing.extend(numpy.empty(0))
        assert growing.array.tolist() == [1, 2.5, 3, 4, 5.5, 6, 7, 8, 9, 10, 11]
        assert growing.array.dtype == numpy.float64
        assert (len(growing), growing.nbytes) == (11, 88)


def test_rows() -> None:
    with GrowableArray("int32", item_shape=(2, 3), capacity="1 MiB") as growing:
        growing.append([[1, 2, 3], [4, 5, 6]])
        growing.append(numpy.ones((2, 3), "int16"))
        growing.extend(numpy.zeros((2, 2, 3), "int32"))
        growing.extend(numpy.full((2, 3), number) for number in range(3))
        assert growing.array.shape == (7, 2, 3)
        assert growing.array[:, 1, 2].tolist() == [6, 1, 0, 0, 0, 1, 2]
        assert growing.array.flags.c_contiguous
        assert growing.capacity == MIB // 24
    with GrowableArray("uint8", item_shape=5) as growing:
        growing.append(bytearray(b"12345"))
        assert growing.array.shape == (1, 5)


def test_other_dtypes() -> None:
    for dtype, items in (
        ("bool", [True, False]), ("complex64", [1, 2.5, 3j]), ("S3", [b"abc", b"d"]), ("<U2", ["ab", "c"]),
        ("M8[s]", [numpy.datetime64(5, "s")]), (">i4", [1, -2]), ("float16", [0.5]), ("uint64", [2**64 - 1, 0]),
        ([("a", "i4"), ("b", "f8")], [(1, 2.5), (3, 4.5)]),
    ):  # fmt: skip
        expected = numpy.array(items, dtype)
        with GrowableArray(dtype, capacity="1 MiB") as growing:
            for item in items:
                growing.append(item)
            growing.extend(items)
            growing.extend(expected)
            growing.append(expected[0])
            assert growing.array.dtype == expected.dtype
            assert growing.array.tolist() == [*expected.tolist() * 3, expected.tolist()[0]]


def test_libraries_take_it_as_an_array(small: GrowableArray) -> None:
    small.extend(range(5))
    assert numpy.asarray(small).tolist() == [0, 1, 2, 3, 4]
    assert numpy.shares_memory(numpy.asarray(small), small.array)
    assert not numpy.shares_memory(numpy.array(small, copy=True), small.array)
    assert numpy.asarray(small, "int8").dtype == numpy.int8
    with pytest.raises(ValueError, match="without a copy"):
        small.__array__("int8", copy=False)
    assert float(numpy.sum(small)) == 10
    small[1] = 7
    small[2:4] = -1
    assert (small[1], small[-1], small[2:4].tolist(), list(small)) == (7, 4, [-1, -1], [0, 7, -1, -1, 4])
    with pytest.raises(IndexError):
        small[5]
    assert 7 in small
    assert prefault.residency(small).present_bytes == PAGE_SIZE
    assert repr(small) == "<GrowableArray of float64, 5 of at most 8192 items, 4.0 KiB populated>"


def test_extending_by_itself(small: GrowableArray) -> None:
    small.extend([1, 2, 3])
    small.extend(small)
    small.extend(small.array[::-1])
    small.extend(number + 10 for number in small)  # those that there are when it starts
    first = [1, 2, 3, 1, 2, 3, 3, 2, 1, 3, 2, 1]
    assert small.array.tolist() == first + [number + 10 for number in first]
    old = small.array
    small.shrink(6)
    small.extend(old[4:10])  # source and destination overlap
    assert small.array.tolist() == [*first[:6], *first[4:10]]


# --- where it lies


def test_items_never_move() -> None:
    with GrowableArray(capacity="256 MiB") as growing:
        growing.append(1.0)
        view = growing.array
        address = view.ctypes.data
        assert address == growing.memory.range.start
        for _ in range(40):
            growing.extend(numpy.full(100_000, 2.0))
            assert growing.array.ctypes.data == address
        view[0] = 5
        assert (growing[0], len(view), len(growing)) == (5, 1, 4_000_001)
        assert growing.array[1:].min() == growing.array.max(initial=0, where=numpy.arange(4_000_001) > 0) == 2
        del view


def test_views_keep_it_open(small: GrowableArray) -> None:
    small.append(1)
    view = small.array
    with pytest.raises(BufferError):
        small.close()
    small.append(2)  # nothing has changed
    assert (small.closed, small.array.tolist(), view.tolist()) == (False, [1, 2], [1])
    del view
    small.close()
    small.close()
    assert small.closed
    assert repr(small) == "<GrowableArray of float64, closed>"


def test_views_outlive_an_array_that_is_forgotten() -> None:
    growing = GrowableArray(capacity="64 KiB")
    growing.extend(range(100))
    view = growing.array
    del growing
    gc.collect()
    assert view.tolist() == list(range(100))
    del view
    with pytest.raises(ZeroDivisionError), GrowableArray(capacity="64 KiB") as growing:  # noqa: PT012
        growing.append(1)
        view = growing.array
        raise ZeroDivisionError
    assert growing.closed
    assert view.tolist() == [1]
    del view


# --- what memory it takes


def present(growing: GrowableArray) -> list[bool]:
    return oracle.present(growing.memory.range.start, growing.memory.range.length)


def test_pages_are_there_before_the_items(small: GrowableArray) -> None:
    assert not any(present(small))
    steps = set()
    for length in range(1, 8192 + 1):
        small.append(length)
        steps.add(small.populated_bytes)
        if length % 512 in (0, 1):
            pages = present(small)
            populated = small.populated_bytes // PAGE_SIZE
            assert pages == [True] * populated + [False] * (16 - populated)
            # Half ahead, and never beyond the capacity.
            assert small.nbytes <= small.populated_bytes <= min(2 * small.nbytes + PAGE_SIZE, 65536)
    assert small.array.tolist() == list(range(1, 8193))
    assert len(steps) <= 6  # and not 16: a populate call costs more than a page


def test_growing_meets_no_fault() -> None:
    piece = numpy.ones(8 * PAGE_SIZE // 8)
    with GrowableArray(capacity="1 MiB", huge="never", step="512 KiB") as growing:
        growing.append(1)
        assert sum(present(growing)) == 128
        growing.extend(piece)
        before = oracle.minor_faults()
        for _ in range(10):
            growing.extend(piece)
        assert oracle.minor_faults() - before < 10  # and not 80


def test_steps_are_a_small_part_of_large_arrays() -> None:
    with GrowableArray("uint8", capacity="400 MiB") as growing:
        growing.extend(numpy.ones(300 * MIB, "uint8"))
        smaps = oracle.smaps(growing.memory.range.start)
        assert smaps["Rss"] == growing.populated_bytes <= 1.016 * growing.nbytes
        if growing.populated_bytes % (2 * MIB) == 0:
            assert smaps["AnonHugePages"] == smaps["Rss"]


def test_the_capacity_costs_nothing() -> None:
    before = status("VmRSS")
    with GrowableArray(capacity="1 TiB") as growing:
        growing.append(1)
        assert growing.capacity == 2**37
        assert status("VmRSS") - before < 16 * MIB


def test_a_capacity_that_ends_inside_a_huge_page(small_tmpfs: Callable[[str], Path]) -> None:
    backing = TemporaryFile(small_tmpfs("2m"))
    for source in ("anonymous", backing):
        with GrowableArray("uint8", capacity="3 MiB", huge="advise", backing=source) as growing:
            growing.append(1)
            assert growing.populated_bytes == 2 * MIB
            if source == "anonymous":
                growing.extend(numpy.ones(3 * MIB - 1, "uint8"))
                assert growing.array.sum() == 3 * MIB
                assert growing.populated_bytes == 4 * MIB  # whole blocks
            else:
                with pytest.raises(PopulateError):
                    growing.extend(numpy.ones(3 * MIB - 1, "uint8"))
                assert growing.array.tolist() == [1]


@pytest.mark.parametrize("step", [None, 1, "16 KiB"])
def test_shrink_discards_whole_steps(step: int | str | None) -> None:
    with GrowableArray(capacity="256 KiB", huge="never", step=step) as growing:
        growing.extend(range(30_000))
        view = growing.array
        for length in (20_000, 19_999, 5_000, 513, 512, 1, 0):
            growing.shrink(length)
            assert len(growing) == length
            assert sum(present(growing)) == -(-length // 512)
            assert growing.array.tolist() == list(range(length))
        # What the old view shows: zeros.
        assert not view[:30_000].any()
        growing.extend(range(600))
        assert growing.array.tolist() == view[:600].tolist() == list(range(600))
        growing.shrink(600)
        growing.shrink(numpy.int64(520))
        assert view[519:600].tolist() == list(range(519, 600))  # the rest of a page that is still in use
        del view


def test_shrink_gives_huge_pages_back_whole() -> None:
    with GrowableArray("uint8", capacity="16 MiB") as growing:
        if growing.memory.range.start % (2 * MIB):
            needs.missing("no huge page fits")
        growing.extend(numpy.ones(9 * MIB, "uint8"))
        growing.shrink(5 * MIB)
        assert oracle.smaps(growing.memory.range.start)["Rss"] == growing.populated_bytes == 6 * MIB
        assert growing.array.all()


@pytest.mark.parametrize("length", [-1, 4, 2**70])
def test_shrink_refuses_a_larger_length(small: GrowableArray, length: int) -> None:
    small.extend([1, 2, 3])
    with pytest.raises(ValueError, match=f"an array of 3 items cannot be shrunk to {length}"):
        small.shrink(length)
    with pytest.raises(TypeError):
        small.shrink(1.0)  # type: ignore[arg-type]
    assert len(small) == 3


def peak_of_growing(data: int) -> tuple[int, int]:
    """In a child: the growth of VmHWM while growing to ``data`` bytes by pieces, and the sum of all items."""
    piece = numpy.ones(MIB // 8)

    def grow() -> tuple[int, int]:
        with GrowableArray() as growing:
            growing.append(1)
            growing.shrink(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
            before = status("VmHWM")
            for _ in range(data // MIB):
                growing.extend(piece)
            return status("VmHWM") - before, int(growing.array.sum())

    return in_child(grow)


def test_the_peak_is_the_data() -> None:
    peak, items = peak_of_growing(256 * MIB)
    assert items == 256 * MIB // 8
    assert peak <= 1.02 * 256 * MIB + MIB


# --- processes


def test_a_fork_has_a_copy_of_its_own(small: GrowableArray) -> None:
    small.extend(range(1000))

    def child() -> list[float]:
        small[0] = -1
        small.extend(range(3000))
        small.shrink(2000)
        return [len(small), *small.array[[0, 999, 1999]].tolist()]

    assert in_child(child) == [2000, -1, 999, 999]
    assert small.array.tolist() == list(range(1000))
    small.extend(range(1000))
    assert len(small) == 2000
