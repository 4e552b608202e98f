"""Pages that a strided array touches: a column, or every thousandth row, without what lies between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from prefault.intervals import Intervals
from prefault.sizes import PAGE_SIZE


class Strides(NamedTuple):
    """Layout of an array with gaps.

    Attributes:
        first: address of its first item, by index; with negative strides not the lowest.
        itemsize: bytes of an item.
        shape: items in each dimension, none of them 0.
        strides: bytes from one item to the next, in each dimension.
    """

    first: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def touched_pages(layout: Strides, whole: tuple[int, int]) -> Intervals:
    """Return the base pages that hold a byte of the array, as addresses.

    Args:
        layout: of the array.
        whole: addresses from its lowest byte to the end of its highest.

    Time and memory grow with the number of these pages, and not with that of the items. Arrays whose items overlap in
    uncommon ways (``as_strided``) count as all that they span.
    """
    start = layout.first + sum((count - 1) * by for count, by in zip(layout.shape, layout.strides, strict=True) if by < 0)
    length = layout.itemsize
    outer: list[tuple[int, int]] = []
    for by, count in sorted((abs(by), count) for count, by in zip(layout.shape, layout.strides, strict=True) if count > 1):
        # A gap shorter than a page leaves no page out, so all that it separates is one run.
        if not outer and by - length < PAGE_SIZE:
            length += (count - 1) * by
        elif by:
            outer.append((by, count))
    pages = (whole[1] - whole[0]) // PAGE_SIZE + 2
    if not outer or math.prod(count for _, count in outer) > 4 * pages:
        return Intervals([whole]).outward(PAGE_SIZE)
    return _runs(start, length, outer)


def _runs(start: int, length: int, outer: Sequence[tuple[int, int]]) -> Intervals:
    import numpy

    starts = numpy.array([start], numpy.int64)
    for by, count in outer:
        starts = (numpy.arange(count, dtype=numpy.int64)[:, None] * by + starts[None, :]).reshape(-1)
    stops = starts + length
    stops += -stops % PAGE_SIZE
    starts -= starts % PAGE_SIZE
    return Intervals.from_arrays(starts, stops)
