"""Sets of numbers (bytes, addresses) as sorted, disjoint, half-open intervals, without an object for each interval.

Few :class:`Intervals` are combined by bisection in plain Python, many by the functions at the end, the one numpy kernel.
Both work on *edges*, start and stop of each interval in turn, strictly increasing.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import eq, index
from typing import TYPE_CHECKING, Self, SupportsIndex, TypeAlias

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Numbers: TypeAlias = numpy.typing.NDArray[numpy.int64]

_MANY = 64
"""Edges of the smaller of two sets from which on numpy is faster than bisection."""

_MANY_TO_IMPORT = 2048
"""Edges from which on numpy is worth its import."""

_BEYOND_INT64 = 1 << 63

_NONE = array("Q")


class Intervals:
    """An immutable set of numbers below 2**64, kept as sorted, disjoint intervals that do not touch.

    ``|``, ``&``, ``-`` and ``^`` cost a bisection for each interval of the smaller set and one copy; a membership test is
    logarithmic. The set is false when it is empty, and its ``len`` is the number of intervals.

    Args:
        pairs: start and stop of intervals in any order; overlapping and touching ones become one, empty ones are left out.
    """

    __slots__ = ("edges",)

    edges: array[int]
    """Start and stop of each interval in turn. Not to be changed."""

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        edges: list[int] = []
        for start, stop in sorted(pairs):
            if start >= stop:
                continue
            if not edges or start > edges[-1]:
                edges.append(start)
                edges.append(stop)
            elif stop > edges[-1]:
                edges[-1] = stop
        self.edges = array("Q", edges)

    @classmethod
    def from_edges(cls, edges: Sequence[int]) -> Self:
        """Make the set with these starts and stops in turn, which must be strictly increasing. Not checked."""
        return cls._with(array("Q", edges))

    @classmethod
    def from_ascending(cls, starts: array[int], stops: array[int]) -> Self:
        """Make the set of intervals in ascending order, none of them empty; those that touch become one."""
        if len(starts) <= 1:
            return cls._with(starts + stops)
        if any(map(eq, starts[1:], stops)):
            return cls._with(Intervals(zip(starts, stops, strict=True)).edges)
        edges = array("Q", bytes(2 * starts.itemsize * len(starts)))
        edges[::2], edges[1::2] = starts, stops
        return cls._with(edges)

    @classmethod
    def from_arrays(cls, starts: Numbers, stops: Numbers) -> Self:
        """Make the union of intervals in any order, none of them empty."""
        return cls._with_numbers(_merged(starts, stops))

    @classmethod
    def union_of(cls, sets: Iterable[Intervals]) -> Self:
        """Make the union of any number of sets."""
        some = [one for one in sets if one.edges]
        if len(some) <= 1:
            return cls._with(some[0].edges if some else _NONE)
        edges = array("Q")
        for one in some:
            edges += one.edges
        if not _is_many(edges, edges):
            return cls._with(Intervals(_pairs(edges)).edges)
        numbers = cls._with(edges).to_numpy()
        return cls.from_arrays(numbers[::2], numbers[1::2])

    @classmethod
    def _with(cls, edges: array[int]) -> Self:
        made = cls.__new__(cls)
        made.edges = edges
        return made

    @classmethod
    def _with_numbers(cls, edges: Numbers) -> Self:
        made = array("Q")
        made.frombytes(edges.view("u1").data)  # one copy; array("Q", edges.tobytes()) is two
        return cls._with(made)

    def to_numpy(self) -> Numbers:
        """Return the edges as a read-only array, without a copy."""
        import numpy

        edges = numpy.frombuffer(self.edges, numpy.int64)
        edges.flags.writeable = False
        return edges

    # --- the set

    @property
    def length(self) -> int:
        """Count of the numbers in all intervals together."""
        edges = self.edges
        if len(edges) <= 2:  # most sets of populated pages: of one page, none or all of it
            return edges[1] - edges[0] if edges else 0
        if _is_many(edges, edges):
            starts, stops = self._columns()
            return int((stops - starts).sum())
        return sum(edges[1::2]) - sum(edges[::2])

    @property
    def span(self) -> tuple[int, int]:
        """The smallest interval that holds the whole set; ``(0, 0)`` for the empty set."""
        return (self.edges[0], self.edges[-1]) if self.edges else (0, 0)

    def __len__(self) -> int:
        """Count the intervals, not the numbers in them."""
        return len(self.edges) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return _pairs(self.edges)

    def __contains__(self, number: SupportsIndex) -> bool:
        return bisect_right(self.edges, index(number)) & 1 == 1

    def __eq__(self, other: object) -> bool:
        return self.edges == other.edges if isinstance(other, Intervals) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.edges.tobytes())

    def __or__(self, other: Intervals) -> Self:
        few, many = _by_length(self.edges, other.edges)
        if _is_many(few, many):
            return self._with_numbers(_combined(self.to_numpy(), other.to_numpy(), 1))
        return self._with(_united(many, few))

    def __and__(self, other: Intervals) -> Self:
        if self._is_apart(other):
            return self._with(_NONE)
        few, many = _by_length(self.edges, other.edges)
        if _is_many(few, many):
            if few == many:  # a comparison is far cheaper than a sort
                return self
            return self._with_numbers(_combined(self.to_numpy(), other.to_numpy(), 2))
        return self._with(_shared(many, few))

    def __sub__(self, other: Intervals) -> Self:
        if self._is_apart(other):
            return self
        few, many = _by_length(self.edges, other.edges)
        if _is_many(few, many):
            return self._with_numbers(_without(self.to_numpy(), other.to_numpy()))
        return self._with(_cut(many, few) if many is self.edges else _outside(many, few))

    def __xor__(self, other: Intervals) -> Self:
        return self - other | other - self

    def isdisjoint(self, other: Intervals) -> bool:
        """Tell whether the sets have no number in common."""
        return self._is_apart(other) or not (self & other)

    def _is_apart(self, other: Intervals) -> bool:
        """Tell whether one set ends before the other one begins, or is empty."""
        mine, theirs = self.edges, other.edges
        return not mine or not theirs or mine[0] >= theirs[-1] or theirs[0] >= mine[-1]

    # --- derived sets

    @property
    def hull(self) -> Self:
        """The smallest interval that holds the whole set, as a set."""
        return self if len(self.edges) <= 2 else self._with(array("Q", (self.edges[0], self.edges[-1])))

    def shifted(self, by: int) -> Self:
        """Return the set ``by`` further on; negative: back."""
        if _is_many(self.edges, self.edges):
            return self._with_numbers(self.to_numpy() + by)
        return self._with(array("Q", [edge + by for edge in self.edges]))

    def outward(self, block: int) -> Self:
        """Return the whole blocks that hold a number of the set."""
        if not _is_many(self.edges, self.edges):
            return self._with(Intervals((start - start % block, stop + -stop % block) for start, stop in self).edges)
        starts, stops = self._columns()
        return self.from_arrays(starts - starts % block, stops + -stops % block)

    def inward(self, block: int) -> Self:
        """Return the whole blocks inside the set."""
        if not _is_many(self.edges, self.edges):
            return self._with(Intervals((start + -start % block, stop - stop % block) for start, stop in self).edges)
        starts, stops = self._columns()
        starts, stops = starts + -starts % block, stops - stops % block
        some = starts < stops
        return self.from_arrays(starts[some], stops[some])

    def window(self, start: int, stop: int) -> Self:
        """Return the intervals that have a number in ``[start, stop)``, in whole."""
        first, last = bisect_right(self.edges, start), bisect_left(self.edges, stop)
        return self._with(self.edges[first - first % 2 : last + last % 2])

    def clipped(self, start: int, stop: int) -> Self:
        """Return the part of the set in ``[start, stop)``; the empty set for a backward interval."""
        return self._with(_shared(self.edges, array("Q", (start, stop))) if start < stop else _NONE)

    def end_after(self, number: int) -> int | None:
        """Return the end of the interval that holds a number; None where none does."""
        after = bisect_right(self.edges, number)
        return self.edges[after] if after & 1 else None

    def bridged(self, gap: int) -> Self:
        """Return the set with all gaps filled that are not longer than ``gap``."""
        import numpy

        edges = self.to_numpy()
        keep = numpy.ones(len(edges), bool)
        short = numpy.flatnonzero(edges[2::2] - edges[1:-1:2] <= gap)
        keep[2 * short + 1] = keep[2 * short + 2] = False
        return self._with_numbers(edges[keep])

    def longer(self, than: int) -> Self:
        """Return the intervals that are longer than ``than``."""
        if not _is_many(self.edges, self.edges):
            return self._with(array("Q", [at for pair in _pairs(self.edges) if pair[1] - pair[0] > than for at in pair]))
        starts, stops = self._columns()
        some = stops - starts > than
        return self.from_arrays(starts[some], stops[some])

    def batches(self, count: int) -> Iterator[Self]:
        """Yield the set in sets of at most ``count`` intervals."""
        for first in range(0, len(self.edges), 2 * count):
            yield self._with(self.edges[first : first + 2 * count])

    def pieces(self, longest: int) -> tuple[Numbers, Numbers]:
        """Return starts and lengths of the intervals, those longer than ``longest`` cut at multiples of it."""
        import numpy

        starts, stops = self._columns()
        count = (stops - 1) // longest - starts // longest + 1
        if (count == 1).all():
            return starts, stops - starts
        number = numpy.arange(int(count.sum())) - numpy.repeat(numpy.cumsum(count) - count, count)
        first = numpy.repeat(starts // longest, count) + number
        begin = numpy.maximum(numpy.repeat(starts, count), first * longest)
        end = numpy.minimum(numpy.repeat(stops, count), (first + 1) * longest)
        return begin, end - begin

    def _columns(self) -> tuple[Numbers, Numbers]:
        edges = self.to_numpy()
        return edges[::2], edges[1::2]

    def __repr__(self) -> str:
        shown = ", ".join(f"[{start:#x}, {stop:#x})" for start, stop in islice(_pairs(self.edges), 8))
        more = f", ... {len(self) - 8} more" if len(self) > 8 else ""
        return f"{type(self).__name__}({shown}{more})"


# --- few intervals: an odd number of edges before a place is inside of the set


def _pairs(edges: Iterable[int]) -> Iterator[tuple[int, int]]:
    ends = iter(edges)
    return zip(ends, ends, strict=True)


def _is_many(few: array[int], many: array[int]) -> bool:
    enough = _MANY if "numpy" in sys.modules else _MANY_TO_IMPORT
    return len(few) >= enough and few[-1] < _BEYOND_INT64 and many[-1] < _BEYOND_INT64


def _by_length(one: array[int], other: array[int]) -> tuple[array[int], array[int]]:
    return (one, other) if len(one) <= len(other) else (other, one)


def _united(many: array[int], few: array[int]) -> array[int]:
    found, at = array("Q"), 0
    for start, stop in _pairs(few):
        low, high = bisect_left(many, start, at), bisect_right(many, stop, at)
        found += many[at:low]
        if not low & 1:
            found.append(start)
        if not high & 1:
            found.append(stop)
        at = high
    found += many[at:]
    return found


def _shared(many: array[int], few: array[int]) -> array[int]:
    found = array("Q")
    for start, stop in _pairs(few):
        low, high = bisect_right(many, start), bisect_left(many, stop)
        if low & 1:
            found.append(start)
        found += many[low:high]
        if high & 1:
            found.append(stop)
    return found


def _cut(many: array[int], few: array[int]) -> array[int]:
    """Return the larger set without the smaller one."""
    found, at = array("Q"), 0
    for start, stop in _pairs(few):
        low, high = bisect_left(many, start, at), bisect_right(many, stop, at)
        found += many[at:low]
        if low & 1:
            found.append(start)
        if high & 1:
            found.append(stop)
        at = high
    found += many[at:]
    return found


def _outside(many: array[int], few: array[int]) -> array[int]:
    """Return the smaller set without the larger one."""
    found = array("Q")
    for start, stop in _pairs(few):
        low, high = bisect_right(many, start), bisect_left(many, stop)
        if not low & 1:
            found.append(start)
        found += many[low:high]
        if not high & 1:
            found.append(stop)
    return found


# --- many intervals: the numpy kernel


def _merged(starts: Numbers, stops: Numbers) -> Numbers:
    """Return the edges of the union of intervals in any order; overlapping and touching ones become one."""
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


def _without(one: Numbers, other: Numbers) -> Numbers:
    """Return the first set without the other one, all given as edges; neither is empty."""
    import numpy

    whole = numpy.array([min(one[0], other[0]) - 1, max(one[-1], other[-1]) + 1], numpy.int64)
    return _combined(one, numpy.concatenate((whole[:1], other, whole[1:])), 2)


def _combined(one: Numbers, other: Numbers, depth: int) -> Numbers:
    """Return the numbers that lie in at least ``depth`` of two sets, neither empty: a sweep over the edges of both."""
    import numpy

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
