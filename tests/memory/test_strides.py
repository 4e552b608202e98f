"""Pages that strided arrays touch, against a mark for every byte."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest

from prefault.memory.strides import Strides, touched_pages
from prefault.sizes import GIB, PAGE_SIZE


def _layout(view: numpy.ndarray[Any, Any]) -> tuple[Strides, tuple[int, int]]:
    low, high = numpy.lib.array_utils.byte_bounds(view)
    return Strides(view.ctypes.data, view.itemsize, view.shape, view.strides), (low, high)


def _by_marks(whole: numpy.ndarray[Any, Any], view: numpy.ndarray[Any, Any]) -> set[int]:
    """Write to every item, and see which pages have changed."""
    whole.view(numpy.uint8)[...] = 0
    view[...] = 0x0101
    low = whole.ctypes.data
    changed = numpy.flatnonzero(whole.reshape(-1).view(numpy.uint8))
    return set(((changed + low) // PAGE_SIZE).tolist())


def _by_strides(view: numpy.ndarray[Any, Any]) -> set[int]:
    return {page for start, stop in touched_pages(*_layout(view)) for page in range(start // PAGE_SIZE, stop // PAGE_SIZE)}


@pytest.mark.parametrize("seed", range(60))
def test_random_views_touch_what_a_store_touches(seed: int) -> None:
    choose = random.Random(seed)
    shape = choose.choice([(300_000,), (60, 5000), (5000, 60), (40, 9, 900), (3, 2, 5, 9000)])
    whole = numpy.zeros(shape, numpy.uint16)
    index = []
    for count in shape:
        step = choose.choice([1, 1, 2, 3, 7, 100, 2500, -1, -2, -3000])
        start, stop = sorted((choose.randrange(count), choose.randrange(1, count + 1)))
        index.append(slice(start, max(stop, start + 1), step) if step > 0 else slice(stop, start, step))
    view = whole[tuple(index)]
    if choose.random() < 0.3:
        view = view.T
    if view.size:
        assert _by_strides(view) == _by_marks(whole, view)


def test_overlapping_items_count_as_all_that_they_span() -> None:
    whole = numpy.zeros(1 << 20, numpy.uint16)
    windows = numpy.lib.stride_tricks.sliding_window_view(whole, 1000, writeable=True)[::5000]
    assert _by_strides(windows) == _by_marks(whole, windows)
    strange = numpy.lib.stride_tricks.as_strided(whole, (85, 85, 85), (8192, 8194, 8196))
    assert sum(84 * stride for stride in strange.strides) < whole.nbytes  # beyond it, the marks would be other memory's
    assert _by_strides(strange) >= _by_marks(whole, strange)


def test_a_large_column_takes_no_object_for_each_row() -> None:
    rows = 8192  # of 1 GiB each, in no memory at all
    pages = touched_pages(Strides(PAGE_SIZE + 8, 8, (rows,), (GIB,)), (PAGE_SIZE + 8, PAGE_SIZE + 16 + (rows - 1) * GIB))
    assert len(pages) == rows
    assert pages.length == rows * PAGE_SIZE
    many = 64 * GIB // (4 * PAGE_SIZE)
    pages = touched_pages(Strides(0, 8, (many, 2), (4 * PAGE_SIZE, 8)), (0, 64 * GIB))
    assert len(pages) == many
    assert pages.length == many * PAGE_SIZE
