"""Sorted sets of bytes as flat numpy arrays of edges, start and stop in turn, without an object for each interval.

``array([s0, e0, s1, e1, ...])``, int64, strictly increasing: the intervals are disjoint and do not touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from prefault.sizes import PAGE_SIZE

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Numbers: TypeAlias = numpy.typing.NDArray[numpy.int64]


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


class IntervalMeasure:
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
