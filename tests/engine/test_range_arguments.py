"""The ranges that populate_many and discard_many take, and those that they refuse."""

from __future__ import annotations

import numpy
import pytest

from prefault.engine.scattered.range_arguments import parse_ranges
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE


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
def test_accepted_ranges(ranges: object) -> None:
    assert list(parse_ranges(ranges, 100)) == [(0, 4), (8, 12)]


def test_ranges_of_pages() -> None:
    some = [PageRange(PAGE_SIZE, 3 * PAGE_SIZE), PageRange(8 * PAGE_SIZE, 9 * PAGE_SIZE)]
    assert list(parse_ranges(some, 1 << 20)) == some
    assert list(parse_ranges(RangeSet(some), 1 << 20)) == some
    assert list(parse_ranges([some[0], (8 * PAGE_SIZE, PAGE_SIZE)], 1 << 20)) == some
    for empty in ((), [], RangeSet(), numpy.empty((0, 2), int), [(5, 0)]):
        assert not parse_ranges(empty, 100)


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
def test_refused_ranges(ranges: object, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        parse_ranges(ranges, 100)


@pytest.mark.parametrize("as_array", [True, False])
def test_a_million_ranges_with_a_bad_one_in_the_middle(as_array: bool) -> None:
    ranges = numpy.empty((1_000_000, 2), numpy.int64)
    ranges[:, 0] = numpy.arange(1_000_000)
    ranges[:, 1] = 1
    ranges[500_000] = -5, 3
    with pytest.raises(ValueError, match="range 500000, offset -5"):
        parse_ranges(ranges if as_array else [tuple(pair) for pair in ranges.tolist()], 1 << 40)
