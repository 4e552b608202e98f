"""The arithmetic on edges, against Python's sets."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE
from prefault.sparse import protection, range_arguments

pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12)


def _numbers(ranges: list[tuple[int, int]]) -> set[int]:
    return {number for offset, length in ranges for number in range(offset, offset + length)}


def _of(ranges: list[tuple[int, int]]) -> range_arguments.Numbers:
    return range_arguments.parse_ranges(ranges, 100)


def _members(found: object) -> set[int]:
    flat = [int(at) for at in found]  # type: ignore[attr-defined]
    assert flat == sorted(set(flat)), "edges are strictly increasing"
    return {number for start, stop in zip(flat[::2], flat[1::2], strict=True) for number in range(start, stop)}


@given(pairs, st.integers(0, 80), st.integers(1, 40))
def test_a_window_is_the_ranges_that_reach_into_it(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    whole = range_arguments.parse_ranges(ranges, 100)
    expected = [
        at for low, high in zip(whole[::2], whole[1::2], strict=True) if low < start + length and high > start
        for at in (low, high)
    ]  # fmt: skip
    assert range_arguments.window(whole, start, start + length).tolist() == expected


@given(pairs, pairs)
def test_the_algebra_of_sets(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = _of(one), _of(other)
    assert _members(a) == _numbers(one)
    assert _members(range_arguments.union(a, b)) == _numbers(one) | _numbers(other)
    assert _members(range_arguments.common(a, b)) == _numbers(one) & _numbers(other)
    assert _members(range_arguments.without(a, b)) == _numbers(one) - _numbers(other)
    assert range_arguments.total(a) == len(_numbers(one))


@given(pairs, st.integers(1, 9))
def test_blocks(ranges: list[tuple[int, int]], block: int) -> None:
    every, some = _numbers(ranges), _of(ranges)
    whole = [range(at, at + block) for at in range(0, 100, block)]
    assert _members(range_arguments.outward(some, block)) == {n for b in whole if every & set(b) for n in b}
    assert _members(range_arguments.inward(some, block)) == {n for b in whole if set(b) <= every for n in b}
    starts, lengths = range_arguments.pieces(some, block)
    assert [n for start, length in zip(starts, lengths, strict=True) for n in range(start, start + length)] == sorted(every)
    assert all(start // block == (start + length - 1) // block for start, length in zip(starts, lengths, strict=True))


@given(pairs, st.integers(0, 80), st.integers(0, 40), st.integers(0, 8))
def test_measuring(ranges: list[tuple[int, int]], start: int, length: int, gap: int) -> None:
    every, some = _numbers(ranges), _of(ranges)
    assert range_arguments.IntervalMeasure(some).within(start, start + length) == len(
        every & set(range(start, start + length))
    )
    bridged = _members(range_arguments.bridged(some, gap))
    assert every <= bridged
    for number in bridged - every:
        low = max(n for n in every if n < number)
        high = min(n for n in every if n > number)
        assert high - low - 1 <= gap
    assert _members(range_arguments.longer(some, 4)) == {
        n for low, high in zip(some[::2], some[1::2], strict=True) if high - low > 4 for n in range(low, high)
    }


@given(pairs, pairs)
def test_the_books_of_an_extent(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    from array import array

    a, b = array("q", _of(one).tolist()), _of(other).tolist()
    assert _members(protection._missing(a, b)) == _numbers(other) - _numbers(one)
    assert _members(protection._present(a, b)) == _numbers(other) & _numbers(one)
    assert _members(protection._add(array("q", a), b)) == _numbers(one) | _numbers(other)
    assert _members(protection._subtract(array("q", a), b)) == _numbers(one) - _numbers(other)


def test_mincore() -> None:
    assert range_arguments.incore(8 * PAGE_SIZE, bytes([1, 0, 0x81, 3, 2])).tolist() == [
        8 * PAGE_SIZE, 9 * PAGE_SIZE, 10 * PAGE_SIZE, 12 * PAGE_SIZE,
    ]  # fmt: skip
    assert len(range_arguments.incore(0, bytes(4))) == 0


@pytest.mark.parametrize(
    "ranges",
    [
        [(8, 4), (0, 2), (2, 2), (1, 1), (9, 0)],
        ((8, 4), (0, 4)),
        [[8, 4], (0, 4)],
        iter([(8, 4), (0, 4)]),
        numpy.array([[8, 4], [0, 4]]),
        numpy.array([[8, 4], [0, 4]], numpy.uint8),
        numpy.array([[8, 4], [0, 4]], numpy.uint64),
        [(numpy.int64(8), numpy.int32(4)), (0, 4)],
    ],
)
def test_what_ranges_may_be(ranges: object) -> None:
    assert range_arguments.parse_ranges(ranges, 100).tolist() == [0, 4, 8, 12]


def test_ranges_of_pages() -> None:
    some = [PageRange(PAGE_SIZE, 3 * PAGE_SIZE), PageRange(8 * PAGE_SIZE, 9 * PAGE_SIZE)]
    expected = [PAGE_SIZE, 3 * PAGE_SIZE, 8 * PAGE_SIZE, 9 * PAGE_SIZE]
    assert range_arguments.parse_ranges(some, 1 << 20).tolist() == expected
    assert range_arguments.parse_ranges(RangeSet(some), 1 << 20).tolist() == expected
    assert range_arguments.parse_ranges([some[0], (8 * PAGE_SIZE, PAGE_SIZE)], 1 << 20).tolist() == expected
    for empty in ((), [], RangeSet(), numpy.empty((0, 2), int), [(5, 0)]):
        assert range_arguments.parse_ranges(empty, 100).tolist() == []


@pytest.mark.parametrize(
    ("ranges", "error", "complaint"),
    [
        ([(0, 1), (-1, 4)], ValueError, "range 1, offset -1 and length 4, is negative"),
        ([(0, -1)], ValueError, "range 0.* is negative"),
        ([(0, 1), (4, 4), (99, 2)], ValueError, "range 2, offset 99 and length 2, lies outside the memory of 100 bytes"),
        ([(101, 0)], ValueError, "range 0.*outside"),
        ([((1 << 63) - 1, (1 << 63) - 1)], ValueError, "range 0.*outside"),
        ([(0, 1), (1 << 70, 1)], ValueError, "range 1 is beyond any memory"),
        ([(0, 1), (0, 1.5)], ValueError, r"range 1, \(0, 1.5\), is not a pair"),
        ([(0, 1), (0, True)], ValueError, "range 1"),
        ([(0, 1), "ab"], ValueError, "range 1"),
        ([(0, 1), (1, 2, 3)], ValueError, "range 1"),
        ([0, 1], ValueError, "range 0, 0, is not a pair"),
        ([(0, 1), None], ValueError, "range 1, None"),
        ("ab", TypeError, "not str"),
        (7, TypeError, "not int"),
        (numpy.array([0.5, 1.0]), TypeError, "holds integers"),
        (numpy.array([[True, False]]), TypeError, "holds integers"),
        (numpy.array([0, 1]), ValueError, r"shape \(n, 2\)"),
        (numpy.zeros((2, 3), int), ValueError, r"shape \(n, 2\)"),
        (numpy.array([[0, 1], [1 << 63, 1]], numpy.uint64), ValueError, "range 1.*beyond any memory"),
    ],
)
def test_what_ranges_may_not_be(ranges: object, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        range_arguments.parse_ranges(ranges, 100)


@pytest.mark.parametrize("as_array", [True, False])
def test_a_million_ranges_with_a_bad_one_in_the_middle(as_array: bool) -> None:
    ranges = numpy.empty((1_000_000, 2), numpy.int64)
    ranges[:, 0] = numpy.arange(1_000_000)
    ranges[:, 1] = 1
    ranges[500_000] = -5, 3
    with pytest.raises(ValueError, match="range 500000, offset -5"):
        range_arguments.parse_ranges(ranges if as_array else [tuple(pair) for pair in ranges.tolist()], 1 << 40)
