"""The ranges that a caller of populate_many or discard_many gives, as :class:`~prefault.intervals.Intervals`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import index
from typing import TYPE_CHECKING, Any

from prefault.intervals import Intervals
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MAX_SIZE

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from prefault.intervals import Numbers


def parse_ranges(ranges: Any, size: int) -> Intervals:
    """Return the union of the ranges, in bytes.

    Raises:
        ValueError, TypeError: an item is no range, or lies outside ``[0, size)``; the message has its index.
    """
    offsets, lengths = _columns(ranges)
    bad = (offsets < 0) | (lengths < 0) | (offsets > size) | (lengths > size - offsets)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(_complaint(at, int(offsets[at]), int(lengths[at]), size))
    some = lengths > 0
    if not some.all():
        offsets, lengths = offsets[some], lengths[some]
    return Intervals.from_arrays(offsets, offsets + lengths)


def _complaint(at: int, offset: int, length: int, size: int) -> str:
    if offset < 0 or length < 0:
        return f"range {at}, offset {offset} and length {length}, is negative"
    return f"range {at}, offset {offset} and length {length}, lies outside the memory of {size} bytes"


def _columns(ranges: Any) -> tuple[Numbers, Numbers]:
    """Return offsets and lengths, as given."""
    import numpy

    if isinstance(ranges, numpy.ndarray):
        return _of_array(ranges)
    if isinstance(ranges, RangeSet):
        edges = ranges.to_numpy()
        return edges[::2], edges[1::2] - edges[::2]
    if isinstance(ranges, str | bytes) or not isinstance(ranges, Iterable):
        raise TypeError(f"ranges are pairs of offset and length, a RangeSet or an array, not {type(ranges).__name__}")
    items = ranges if isinstance(ranges, list | tuple) else list(ranges)
    # Passes in C instead of one in Python. Anything out of the ordinary takes the slow way, whose errors say what and where.
    if set(map(type, items)) <= {tuple, list} and set(map(len, items)) <= {2}:
        numbers: Iterable[Any] = chain.from_iterable(items)
        if set(map(type, numbers)) <= {int}:
            try:
                pairs = numpy.fromiter(chain.from_iterable(items), numpy.int64, 2 * len(items)).reshape(-1, 2)
            except OverflowError:
                return _one_by_one(items)
            return pairs[:, 0], pairs[:, 1]
    return _one_by_one(items)


def _of_array(ranges: numpy.typing.NDArray[Any]) -> tuple[Numbers, Numbers]:
    import numpy

    if ranges.dtype.kind not in "iu":
        raise TypeError(f"an array of ranges holds integers, not {ranges.dtype}")
    if ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ValueError(f"an array of ranges has the shape (n, 2), offset and length, not {ranges.shape}")
    if ranges.dtype == numpy.uint64:  # the only one that does not fit into int64
        huge = (ranges > numpy.uint64(MAX_SIZE)).any(axis=1)
        if huge.any():
            at = int(huge.argmax())
            raise ValueError(f"range {at}, offset {ranges[at, 0]} and length {ranges[at, 1]}, is beyond any memory")
    pairs = ranges.astype(numpy.int64)
    return pairs[:, 0], pairs[:, 1]


def _one_by_one(items: Iterable[Any]) -> tuple[Numbers, Numbers]:
    import numpy

    found: list[int] = []
    for at, item in enumerate(items):
        try:
            if isinstance(item, PageRange):
                offset, length = item.start, item.length
            else:
                offset, length = item
                if isinstance(offset, bool) or isinstance(length, bool):
                    raise TypeError("a bool is no number of bytes")
                offset, length = index(offset), index(length)
        except (TypeError, ValueError) as error:
            text = repr(item)
            shown = text if len(text) <= 80 else f"{text[:77]}..."
            raise ValueError(f"range {at}, {shown}, is not a pair of whole numbers, offset and length") from error
        if not (-MAX_SIZE <= offset <= MAX_SIZE and -MAX_SIZE <= length <= MAX_SIZE):
            raise ValueError(f"range {at} is beyond any memory")
        found += (offset, length)
    pairs = numpy.array(found, numpy.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
