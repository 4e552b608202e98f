"""Page ranges and sets of them: pure arithmetic, no memory is touched."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from operator import index
from typing import NamedTuple, SupportsIndex

from prefault.sizes import PAGE_SIZE


class _Ends(NamedTuple):
    start: int
    stop: int


class PageRange(_Ends):
    """Half-open byte range ``[start, stop)``, both ends on a page boundary. Ordered by start, then by stop.

    The numbers are addresses or offsets; the range does not care. An empty range (``start == stop``) is allowed.

    Raises:
        ValueError: negative, backwards, or an end that is not on a page boundary.
    """

    __slots__ = ()

    def __new__(cls, start: int, stop: int) -> PageRange:
        """A range, its ends checked."""
        if not 0 <= start <= stop:
            raise ValueError(f"not a range: [{start:#x}, {stop:#x})")
        if (start | stop) % PAGE_SIZE:
            raise ValueError(f"not on page boundaries: [{start:#x}, {stop:#x}), pages of {PAGE_SIZE} bytes")
        return super().__new__(cls, start, stop)

    @classmethod
    def outward(cls, start: int, stop: int, page_size: int = PAGE_SIZE) -> PageRange:
        """The smallest range of whole pages that holds every byte of ``[start, stop)``; empty for no byte."""
        if start == stop:
            return cls(start - start % page_size, start - start % page_size)
        return cls(start - start % page_size, stop + -stop % page_size)

    @classmethod
    def inward(cls, start: int, stop: int, page_size: int = PAGE_SIZE) -> PageRange:
        """The largest range of whole pages that holds no byte outside ``[start, stop)``; empty where none fits."""
        first, last = start + -start % page_size, stop - stop % page_size
        return cls(first, max(first, last))

    @property
    def length(self) -> int:
        """Bytes in the range."""
        return self.stop - self.start

    @property
    def pages(self) -> int:
        """Base pages in the range."""
        return (self.stop - self.start) // PAGE_SIZE

    def __bool__(self) -> bool:
        return self.start < self.stop

    def __contains__(self, other: object) -> bool:
        """Whether a byte, or every byte of another range, lies inside."""
        if isinstance(other, PageRange):
            return self.start <= other.start and other.stop <= self.stop
        return isinstance(other, SupportsIndex) and self.start <= index(other) < self.stop

    def __and__(self, other: PageRange) -> PageRange:
        """The common part; empty where there is none."""
        start = max(self.start, other.start)
        return PageRange(start, max(start, min(self.stop, other.stop)))

    def shifted(self, by: int) -> PageRange:
        """The same range ``by`` bytes further on (a multiple of the page size, negative to go back)."""
        return PageRange(self.start + by, self.stop + by)

    def chunks(self, size: int) -> Iterator[PageRange]:
        """The range cut at every multiple of ``size`` bytes (a multiple of the page size), in order.

        Cuts lie at multiples of ``size`` of the *numbers*, not counted from ``start``: chunks of an address range
        then never split a huge page.
        """
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"chunks are whole pages of {PAGE_SIZE} bytes, not {size}")
        start = self.start
        while start < self.stop:
            stop = min(self.stop, start - start % size + size)
            yield PageRange(start, stop)
            start = stop

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.stop:#x})"


_BEYOND = 1 << 65
"""A number after every address."""


class RangeSet:
    """An immutable set of pages, kept as sorted, disjoint, non-adjacent ranges.

    ``|``, ``&``, ``-`` and ``^`` cost time linear in the number of ranges; a membership test is logarithmic.
    """

    __slots__ = ("_edges",)

    def __init__(self, ranges: Iterable[PageRange] = ()) -> None:
        edges: list[int] = []
        for start, stop in sorted(r for r in ranges if r):
            if not edges or start > edges[-1]:
                edges.append(start)
                edges.append(stop)
            elif stop > edges[-1]:
                edges[-1] = stop
        # Start and stop of each range in turn: a million ranges as objects cost seconds, most of them for the garbage
        # collector, so a range is made when it is asked for.
        self._edges = edges

    @classmethod
    def from_edges(cls, edges: Sequence[int]) -> RangeSet:
        """The set with these starts and stops in turn: multiples of the page size, strictly increasing. Not checked."""
        made = cls.__new__(cls)
        made._edges = list(edges)
        return made

    @property
    def length(self) -> int:
        """Bytes in all ranges together."""
        return sum(self._edges[1::2]) - sum(self._edges[::2])

    @property
    def pages(self) -> int:
        """Base pages in all ranges together."""
        return self.length // PAGE_SIZE

    @property
    def span(self) -> PageRange:
        """The smallest range that holds the whole set; ``[0, 0)`` for the empty set."""
        return PageRange(self._edges[0], self._edges[-1]) if self._edges else PageRange(0, 0)

    def __iter__(self) -> Iterator[PageRange]:
        edges = iter(self._edges)
        return map(tuple.__new__, repeat(PageRange), zip(edges, edges, strict=True))

    def __len__(self) -> int:
        """How many ranges, not how many bytes."""
        return len(self._edges) // 2

    def __getitem__(self, index: int) -> PageRange:
        at = range(0, len(self._edges), 2)[index]
        return PageRange(self._edges[at], self._edges[at + 1])

    def __contains__(self, other: SupportsIndex | PageRange) -> bool:
        """Whether a byte, or every byte of a range, is in the set."""
        if isinstance(other, PageRange) and not other:
            return True
        start, stop = other if isinstance(other, PageRange) else (index(other), index(other) + 1)
        after = bisect_right(self._edges, start)
        return after % 2 == 1 and stop <= self._edges[after]

    def __eq__(self, other: object) -> bool:
        return self._edges == other._edges if isinstance(other, RangeSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._edges))

    def __or__(self, other: RangeSet) -> RangeSet:
        return self._combine(other, 0b1110)

    def __and__(self, other: RangeSet) -> RangeSet:
        return self._combine(other, 0b1000)

    def __sub__(self, other: RangeSet) -> RangeSet:
        return self._combine(other, 0b0010)

    def __xor__(self, other: RangeSet) -> RangeSet:
        return self._combine(other, 0b0110)

    def _combine(self, other: RangeSet, keep: int) -> RangeSet:
        """One sweep over the ends of both sets. Bit ``2 * (in other) + (in self)`` of ``keep`` says what stays."""
        mine, theirs = self._ends(), other._ends()
        mine_left, theirs_left = len(mine) - 1, len(theirs) - 1  # but for the sentinels
        kept: list[int] = []
        inside = keep & 1
        one = two = 0
        while one < mine_left or two < theirs_left:
            at = min(mine[one], theirs[two])
            # Where both have an edge, both change at once. An odd number of edges behind us is inside.
            one += mine[one] == at
            two += theirs[two] == at
            state = keep >> ((two & 1) << 1 | one & 1) & 1
            if state != inside:
                inside = state
                kept.append(at)
        return RangeSet.from_edges(kept)

    def _ends(self) -> list[int]:
        return [*self._edges, _BEYOND]

    def shifted(self, by: int) -> RangeSet:
        """The same set ``by`` bytes further on."""
        return RangeSet.from_edges([edge + by for edge in self._edges])

    def __repr__(self) -> str:
        shown = ", ".join(map(str, islice(self, 8)))
        more = f", ... {len(self) - 8} more" if len(self) > 8 else ""
        return f"RangeSet({shown}{more})"
