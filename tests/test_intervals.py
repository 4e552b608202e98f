"""Intervals against Python's sets of numbers: with numpy and without."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault import intervals
from prefault.intervals import Intervals
from prefault.ranges import RangeSet
from prefault.sizes import PAGE_SIZE

_pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12).map(
    lambda ranges: [(start, start + length) for start, length in ranges]
)


@pytest.fixture(params=["bisection", "numpy"], autouse=True, scope="module")
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Combine sets in the one way and in the other, however small they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_MANY", 1 if request.param == "numpy" else 1 << 60)
        yield


def _numbers(pairs: list[tuple[int, int]]) -> set[int]:
    return {number for start, stop in pairs for number in range(start, stop)}


def _members(found: Intervals) -> set[int]:
    edges = list(found.edges)
    assert edges == sorted(set(edges)), "edges are strictly increasing"
    assert found.edges.typecode == "Q"
    return _numbers(list(found))


def _canonical(numbers: set[int]) -> Intervals:
    return Intervals((number, number + 1) for number in numbers)


@given(_pairs, _pairs)
def test_the_algebra_of_sets(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = Intervals(one), Intervals(other)
    mine, theirs = _numbers(one), _numbers(other)
    assert _members(a) == mine
    for found, expected in ((a | b, mine | theirs), (a & b, mine & theirs), (a - b, mine - theirs), (a ^ b, mine ^ theirs)):
        assert _members(found) == expected
        assert found == _canonical(expected)
        assert hash(found) == hash(_canonical(expected))
    assert a.isdisjoint(b) == mine.isdisjoint(theirs)
    assert _members(a) == mine  # unchanged
    assert _members(b) == theirs


@given(st.lists(_pairs, max_size=5))
def test_the_union_of_many_sets(several: list[list[tuple[int, int]]]) -> None:
    assert Intervals.union_of(map(Intervals, several)) == _canonical(set().union(*map(_numbers, several)))


@given(_pairs, st.integers(0, 80))
def test_measures_of_a_set(pairs: list[tuple[int, int]], number: int) -> None:
    some, every = Intervals(pairs), _numbers(pairs)
    assert some.length == len(every)
    assert some.span == ((min(every), max(every) + 1) if every else (0, 0))
    assert _members(some.hull) == (set(range(min(every), max(every) + 1)) if every else set())
    assert bool(some) == bool(every)
    assert len(some) == len(list(some))
    assert (number in some) == (number in every)
    assert (numpy.int64(number) in some) == (number in every)
    assert some.end_after(number) == next((stop for start, stop in some if start <= number < stop), None)


@given(_pairs)
def test_ways_to_make_a_set(pairs: list[tuple[int, int]]) -> None:
    some = Intervals(pairs)
    ends = numpy.array([pair for pair in pairs if pair[0] < pair[1]], numpy.int64).reshape(-1, 2)
    assert Intervals.from_arrays(ends[:, 0], ends[:, 1]) == some
    assert Intervals.from_edges(list(some.edges)) == some
    cut = [part for start, stop in some for part in ((start, start + 1), (start + 1, stop)) if part[0] < part[1]]
    for parts in (list(some), cut):  # apart, and touching
        assert Intervals.from_ascending(*(array("Q", [part[end] for part in parts]) for end in (0, 1))) == some
    assert some.to_numpy().tolist() == list(some.edges)
    assert not some.to_numpy().flags.writeable


@given(_pairs, st.integers(0, 80), st.integers(1, 40))
def test_a_window_is_the_intervals_that_reach_into_it(pairs: list[tuple[int, int]], start: int, length: int) -> None:
    some = Intervals(pairs)
    stop = start + length
    expected = [(low, high) for low, high in some if low < stop and high > start]
    assert list(some.window(start, stop)) == expected


@given(_pairs, st.integers(1, 9))
def test_blocks(pairs: list[tuple[int, int]], block: int) -> None:
    every, some = _numbers(pairs), Intervals(pairs)
    whole = [range(at, at + block) for at in range(0, 100, block)]
    assert _members(some.outward(block)) == {n for b in whole if every & set(b) for n in b}
    assert _members(some.inward(block)) == {n for b in whole if set(b) <= every for n in b}
    starts, lengths = some.pieces(block)
    assert [n for start, length in zip(starts, lengths, strict=True) for n in range(start, start + length)] == sorted(every)
    assert all(start // block == (start + length - 1) // block for start, length in zip(starts, lengths, strict=True))


@given(_pairs, st.integers(0, 80), st.integers(0, 40))
def test_a_part_between_two_numbers(pairs: list[tuple[int, int]], start: int, length: int) -> None:
    some = Intervals(pairs)
    stop = start + length
    assert _members(some.clipped(start, stop)) == _numbers(pairs) & set(range(start, stop))
    assert not some.clipped(stop, start)


@given(_pairs, st.integers(0, 8))
def test_filled_gaps(pairs: list[tuple[int, int]], gap: int) -> None:
    every, bridged = _numbers(pairs), _members(Intervals(pairs).bridged(gap))
    assert every <= bridged
    for number in bridged - every:
        low = max(n for n in every if n < number)
        high = min(n for n in every if n > number)
        assert high - low - 1 <= gap
    for low, high in zip(sorted(every), sorted(every)[1:], strict=False):
        assert high - low - 1 > gap or set(range(low, high)) <= bridged


@given(_pairs, st.integers(0, 30), st.integers(1, 4))
def test_derived_sets(pairs: list[tuple[int, int]], by: int, count: int) -> None:
    some = Intervals(pairs)
    assert _members(some.shifted(by)) == {number + by for number in _numbers(pairs)}
    assert some.shifted(by).shifted(-by) == some
    assert list(some.longer(4)) == [(low, high) for low, high in some if high - low > 4]
    batches = list(some.batches(count))
    assert [pair for batch in batches for pair in batch] == list(some)
    assert all(len(batch) == count for batch in batches[:-1])


def test_addresses_beyond_signed_numbers() -> None:
    """The vsyscall page lies above 2**63, where numpy's signed numbers would wrap."""
    top = 0xFFFFFFFFFF600000
    page = RangeSet.from_edges([top, top + PAGE_SIZE])
    below = RangeSet.from_edges([0, PAGE_SIZE])
    assert list((page | below) - page) == list(below)
    assert (page & page).span == (top, top + PAGE_SIZE)
    assert top in page


def test_the_class_of_a_result_is_that_of_the_left_side() -> None:
    pages, plain = RangeSet.from_edges([0, PAGE_SIZE]), Intervals([(0, 1 << 20)])
    assert type(pages & plain) is RangeSet
    assert type(plain - pages) is Intervals
    assert (pages & plain) == pages
    assert repr(plain) == "Intervals([0x0, 0x100000))"
