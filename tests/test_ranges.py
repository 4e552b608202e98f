"""PageRange and RangeSet against plain sets of page numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault import PAGE_SIZE, PageRange, RangeSet

_HUGE = 2 << 20
_PAGES = 48
"""The numbers that the model counts to. Small, so that ranges meet, touch and overlap often."""


def _of_pages(first: int, stop: int) -> PageRange:
    return PageRange(first * PAGE_SIZE, stop * PAGE_SIZE)


def _pages(ranges: Iterable[PageRange]) -> set[int]:
    return {page for r in ranges for page in range(r.start // PAGE_SIZE, r.stop // PAGE_SIZE)}


def _holds(one: PageRange, other: object) -> bool:
    return other in one  # for mypy: a range is a tuple of numbers, so it would say that no range can be in one


_page_ranges = st.tuples(st.integers(0, _PAGES), st.integers(0, _PAGES)).map(lambda ends: _of_pages(min(ends), max(ends)))
_range_lists = st.lists(_page_ranges, max_size=10)
_sizes = st.sampled_from([PAGE_SIZE, 2 * PAGE_SIZE, 5 * PAGE_SIZE, _HUGE])
_numbers = st.integers(0, 3 * _HUGE)


# --- PageRange


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (-PAGE_SIZE, 0, "not a range"),
        (PAGE_SIZE, 0, "not a range"),
        (1, PAGE_SIZE, "not on page boundaries"),
        (0, PAGE_SIZE - 1, "not on page boundaries"),
    ],
)
def test_refused_ranges_of_pages(start: int, stop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PageRange(start, stop)


def test_a_range_is_a_value() -> None:
    one = _of_pages(1, 3)
    assert one == _of_pages(1, 3) != _of_pages(1, 4)
    assert len({one, _of_pages(1, 3)}) == 1
    assert sorted([_of_pages(2, 3), _of_pages(1, 4), one]) == [one, _of_pages(1, 4), _of_pages(2, 3)]
    assert str(_of_pages(1, 2)) == f"[{PAGE_SIZE:#x}, {2 * PAGE_SIZE:#x})"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(one, protocol)) == one
    assert copy.deepcopy(one) == one
    with pytest.raises(AttributeError):
        one.start = 0  # type: ignore[misc]


@given(_page_ranges)
def test_length_and_truth(one: PageRange) -> None:
    assert one.pages == len(_pages([one]))
    assert one.length == one.pages * PAGE_SIZE
    assert bool(one) == bool(_pages([one]))


@given(_page_ranges, _page_ranges, st.integers(0, _PAGES * PAGE_SIZE))
def test_common_part_and_membership(one: PageRange, other: PageRange, byte: int) -> None:
    assert _pages([one & other]) == _pages([one]) & _pages([other])
    assert (byte in one) == (byte // PAGE_SIZE in _pages([one]))
    if other:
        assert _holds(one, other) == (_pages([other]) <= _pages([one]))


def test_membership_of_numbers_of_other_libraries() -> None:
    import numpy

    pages = RangeSet([_of_pages(1, 2)])
    assert numpy.int64(PAGE_SIZE) in pages
    assert numpy.int64(2 * PAGE_SIZE) not in pages
    assert numpy.uint64(PAGE_SIZE) in pages[0]


@given(_page_ranges, st.integers(-_PAGES, _PAGES))
def test_shifted(one: PageRange, by: int) -> None:
    if one.start + by * PAGE_SIZE < 0:
        with pytest.raises(ValueError, match="not a range"):
            one.shifted(by * PAGE_SIZE)
    else:
        moved = one.shifted(by * PAGE_SIZE)
        assert _pages([moved]) == {page + by for page in _pages([one])}
        assert moved.length == one.length
    with pytest.raises(ValueError, match="page boundaries"):
        one.shifted(1)


@given(_page_ranges, st.integers(1, 12))
def test_chunks_cut_at_multiples(one: PageRange, pages: int) -> None:
    size = pages * PAGE_SIZE
    chunks = list(one.chunks(size))
    assert [page for chunk in chunks for page in sorted(_pages([chunk]))] == sorted(_pages([one]))
    assert all(0 < chunk.length <= size for chunk in chunks)
    assert all(chunk.stop % size == 0 for chunk in chunks[:-1])
    assert len({page // pages for page in _pages([one])}) == len(chunks)


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1])
def test_chunks_are_whole_pages(size: int) -> None:
    with pytest.raises(ValueError, match="chunks are whole pages"):
        list(_of_pages(0, 4).chunks(size))


@given(_numbers, _numbers, _sizes)
def test_outward_and_inward(a: int, b: int, page_size: int) -> None:
    start, stop = min(a, b), max(a, b)
    # The pages near the ends: outward takes those that share a byte, inward those that lie inside.
    pages = [(first, first + page_size) for first in (*_around(start, page_size), *_around(stop, page_size))]
    out = PageRange.outward(start, stop, page_size)
    into = PageRange.inward(start, stop, page_size)
    assert out.start % page_size == out.stop % page_size == into.start % page_size == 0
    for first, last in pages:
        assert _holds(out, PageRange(first, last)) == (first < stop and start < last and start < stop)
        assert _holds(into, PageRange(first, last)) == (start <= first and last <= stop)
    assert (out.length == 0) == (start == stop)
    assert into.length % page_size == 0
    assert _holds(out, into) or not into


def _around(number: int, page_size: int) -> range:
    first = max(0, number // page_size - 2) * page_size
    return range(first, first + 5 * page_size, page_size)


# --- RangeSet


@given(_range_lists)
def test_a_set_is_canonical(ranges: list[PageRange]) -> None:
    made = RangeSet(ranges)
    assert _pages(made) == _pages(ranges)
    assert list(made) == sorted(made)
    assert all(made)
    assert all(left.stop < right.start for left, right in zip(made, list(made)[1:], strict=False))
    assert made == RangeSet(reversed(ranges))
    assert hash(made) == hash(RangeSet(reversed(ranges)))
    assert [made[index] for index in range(len(made))] == list(made)
    assert bool(made) == bool(_pages(ranges))


@given(_range_lists, _range_lists)
def test_set_operations(left: list[PageRange], right: list[PageRange]) -> None:
    one, other = RangeSet(left), RangeSet(right)
    mine, theirs = _pages(left), _pages(right)
    for result, expected in (
        (one | other, mine | theirs),
        (one & other, mine & theirs),
        (one - other, mine - theirs),
        (one ^ other, mine ^ theirs),
    ):
        assert _pages(result) == expected
        assert result == RangeSet(_of_pages(page, page + 1) for page in expected)  # canonical, too
    assert (one == other) == (mine == theirs)
    assert _pages(one) == mine  # unchanged


@given(_range_lists)
def test_measures(ranges: list[PageRange]) -> None:
    made, pages = RangeSet(ranges), _pages(ranges)
    assert made.pages == len(pages)
    assert made.length == len(pages) * PAGE_SIZE
    expected = _of_pages(min(pages), max(pages) + 1) if pages else PageRange(0, 0)
    assert made.span == expected


@given(_range_lists, st.integers(0, (_PAGES + 1) * PAGE_SIZE), _page_ranges)
def test_membership(ranges: list[PageRange], byte: int, other: PageRange) -> None:
    made, pages = RangeSet(ranges), _pages(ranges)
    assert (byte in made) == (byte // PAGE_SIZE in pages)
    assert (other in made) == (_pages([other]) <= pages)


@given(_range_lists, st.integers(0, _PAGES))
def test_a_set_shifted(ranges: list[PageRange], by: int) -> None:
    made = RangeSet(ranges)
    moved = made.shifted(by * PAGE_SIZE)
    assert _pages(moved) == {page + by for page in _pages(ranges)}
    assert moved.shifted(-by * PAGE_SIZE) == made


def test_a_set_is_a_value() -> None:
    made = RangeSet([_of_pages(0, 1), _of_pages(4, 6)])
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(made, protocol))
        assert again == made
        assert 5 * PAGE_SIZE in again
    assert copy.deepcopy(made) == made
    assert made != [_of_pages(0, 1), _of_pages(4, 6)]
    assert repr(made) == "RangeSet([0x0, 0x1000), [0x4000, 0x6000))"
    many = RangeSet(_of_pages(2 * page, 2 * page + 1) for page in range(10))
    assert repr(many).endswith(", ... 2 more)")


@given(st.lists(st.integers(0, 50), unique=True).map(sorted))
def test_a_set_from_edges(pages: list[int]) -> None:
    edges = [page * PAGE_SIZE for page in pages[: len(pages) // 2 * 2]]
    pairs = [PageRange(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    made = RangeSet.from_edges(edges)
    assert made == RangeSet(pairs)
    assert all(type(one) is PageRange for one in made)
    assert [at in made for at in range(0, 51 * PAGE_SIZE, PAGE_SIZE)] == [
        any(at in one for one in pairs) for at in range(0, 51 * PAGE_SIZE, PAGE_SIZE)
    ]
