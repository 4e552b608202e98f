"""Many ranges at once: sorted sets of bytes as flat arrays of edges, start and stop in turn, without an object a range.

``array([s0, e0, s1, e1, ...])``, int64, strictly increasing: the ranges are disjoint and do not touch.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import index
from typing import TYPE_CHECKING, Any, TypeAlias

from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MAX_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Numbers: TypeAlias = numpy.typing.NDArray[numpy.int64]


def parse_ranges(ranges: Any, size: int) -> Numbers:
    """What the caller of populate_many means, as edges in bytes; empty ranges left out.

    Raises:
        ValueError, TypeError: a range that is none, or lies outside ``[0, size)``; the message has its index.
    """
    offsets, lengths = _columns(ranges)
    bad = (offsets < 0) | (lengths < 0) | (offsets > size) | (lengths > size - offsets)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(_complaint(at, int(offsets[at]), int(lengths[at]), size))
    some = lengths > 0
    if not some.all():
        offsets, lengths = offsets[some], lengths[some]
    return merged(offsets, offsets + lengths)


def _complaint(at: int, offset: int, length: int, size: int) -> str:
    if offset < 0 or length < 0:
        return f"range {at}, offset {offset} and length {length}, is negative"
    return f"range {at}, offset {offset} and length {length}, lies outside the memory of {size} bytes"


def _columns(ranges: Any) -> tuple[Numbers, Numbers]:
    """Offsets and lengths, as given."""
    import numpy

    if isinstance(ranges, numpy.ndarray):
        return _of_array(ranges)
    if isinstance(ranges, RangeSet):
        edges = numpy.fromiter(chain.from_iterable(ranges), numpy.int64, 2 * len(ranges)).reshape(-1, 2)
        return edges[:, 0], edges[:, 1] - edges[:, 0]
    if isinstance(ranges, str | bytes) or not isinstance(ranges, Iterable):
        raise TypeError(f"ranges are pairs of offset and length, a RangeSet or an array, not {type(ranges).__name__}")
    items = ranges if isinstance(ranges, list | tuple) else list(ranges)
    # Passes in C instead of one in Python. Whatever is out of the ordinary goes the slow way, which says what and where.
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


def merged(starts: Numbers, stops: Numbers) -> Numbers:
    """The edges of the union of ranges in any order; overlapping and touching ones become one."""
    import numpy

    if not len(starts):
        return numpy.empty(0, numpy.int64)
    if (starts[1:] < starts[:-1]).any():
        order = numpy.argsort(starts, kind="stable")
        starts, stops = starts[order], stops[order]
    if (starts[1:] <= stops[:-1]).any():
        reach = numpy.maximum.accumulate(stops)
        first = numpy.concatenate(([True], starts[1:] > reach[:-1]))
        last = numpy.concatenate((first[1:], [True]))
        starts, stops = starts[first], reach[last]
    edges = numpy.empty(2 * len(starts), numpy.int64)
    edges[::2], edges[1::2] = starts, stops
    return edges


def outward(edges: Numbers, block: int) -> Numbers:
    """The whole blocks that hold a byte of the set."""
    starts, stops = edges[::2], edges[1::2]
    return merged(starts - starts % block, stops + -stops % block)


def inward(edges: Numbers, block: int) -> Numbers:
    """The whole blocks inside the set."""
    starts, stops = edges[::2], edges[1::2]
    starts, stops = starts + -starts % block, stops - stops % block
    some = starts < stops
    return merged(starts[some], stops[some])


def common(one: Numbers, other: Numbers) -> Numbers:
    """What is in both sets."""
    return _combined(one, other, 2)


def without(one: Numbers, other: Numbers) -> Numbers:
    """What is in the first set and not in the other."""
    import numpy

    if not len(one) or not len(other):
        return one
    whole = numpy.array([min(one[0], other[0]) - 1, max(one[-1], other[-1]) + 1], numpy.int64)
    return common(one, numpy.concatenate((whole[:1], other, whole[1:])))


def union(one: Numbers, other: Numbers) -> Numbers:
    """What is in either."""
    return _combined(one, other, 1)


def _combined(one: Numbers, other: Numbers, depth: int) -> Numbers:
    """What lies in at least ``depth`` of the two sets: a sweep over the edges of both."""
    import numpy

    if not len(one) or not len(other):
        return numpy.empty(0, numpy.int64) if depth == 2 else numpy.concatenate((one, other))
    at = numpy.concatenate((one, other))
    step = numpy.ones(len(at), numpy.int64)
    step[1 : len(one) : 2] = -1
    step[len(one) + 1 :: 2] = -1
    order = numpy.argsort(at, kind="stable")
    at, inside = at[order], numpy.cumsum(step[order])
    # Where edges coincide only the state after the last of them counts.
    last = numpy.concatenate((at[1:] != at[:-1], [True]))
    at, deep = at[last], inside[last] >= depth
    edges: Numbers = at[numpy.concatenate((deep[:1], deep[1:] != deep[:-1]))]
    return edges


def total(edges: Numbers) -> int:
    """Bytes in the set."""
    return int((edges[1::2] - edges[::2]).sum())


class Ruler:
    """How much of a set lies where, without going through it each time."""

    def __init__(self, edges: Numbers) -> None:
        import numpy

        self._edges = edges
        self._before = numpy.concatenate((edges[:1] * 0, numpy.cumsum(edges[1::2] - edges[::2])))

    def within(self, start: int, stop: int) -> int:
        """Bytes of the set in ``[start, stop)``."""
        return self._below(stop) - self._below(start)

    def count(self, start: int, stop: int) -> int:
        """About how many ranges of the set that are."""
        first, last = self._edges.searchsorted((start, stop))
        return int(last - first + 1) // 2

    def _below(self, at: int) -> int:
        edges = int(self._edges.searchsorted(at))
        rest = at - int(self._edges[edges - 1]) if edges & 1 else 0
        return int(self._before[edges // 2]) + rest if len(self._edges) else 0


def window(edges: Numbers, start: int, stop: int) -> Numbers:
    """The ranges that have a byte in ``[start, stop)``, in whole. A view: nothing is copied."""
    first, last = int(edges.searchsorted(start, "right")), int(edges.searchsorted(stop))
    return edges[first - first % 2 : last + last % 2]


def bridged(edges: Numbers, gap: int) -> list[int]:
    """The set with all gaps filled that are not longer than so many bytes."""
    import numpy

    keep = numpy.ones(len(edges), bool)
    short = numpy.flatnonzero(edges[2::2] - edges[1:-1:2] <= gap)
    keep[2 * short + 1] = keep[2 * short + 2] = False
    found: list[int] = edges[keep].tolist()
    return found


def longer(edges: Numbers, than: int) -> Numbers:
    """The ranges of the set that are longer than so many bytes."""
    import numpy

    return edges[numpy.repeat(edges[1::2] - edges[::2] > than, 2)]


def incore(start: int, vector: bytes | bytearray) -> Numbers:
    """What mincore(2) answered for the pages from the address ``start`` on: those that are in memory."""
    import numpy

    flags = numpy.frombuffer(vector, numpy.int8) & numpy.int8(1)
    changes = numpy.flatnonzero(numpy.diff(flags, prepend=numpy.int8(0), append=numpy.int8(0)))
    return changes.astype(numpy.int64) * PAGE_SIZE + start


def pieces(edges: Numbers, longest: int) -> tuple[Numbers, Numbers]:
    """Starts and lengths of the ranges, those longer than ``longest`` cut at multiples of it."""
    import numpy

    starts, stops = edges[::2], edges[1::2]
    count = (stops - 1) // longest - starts // longest + 1
    if (count == 1).all():
        return starts, stops - starts
    number = numpy.arange(int(count.sum())) - numpy.repeat(numpy.cumsum(count) - count, count)
    first = numpy.repeat(starts // longest, count) + number
    begin = numpy.maximum(numpy.repeat(starts, count), first * longest)
    end = numpy.minimum(numpy.repeat(stops, count), (first + 1) * longest)
    return begin, end - begin


def as_set(edges: Numbers) -> RangeSet:
    """The same as a RangeSet; the numbers are multiples of the page size."""
    return RangeSet.from_edges(edges.tolist())
