"""Page ranges and sets of them: pure arithmetic, no memory is touched."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import repeat
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeAlias

from prefault.intervals import Intervals
from prefault.sizes import PAGE_SIZE

if TYPE_CHECKING:
    import numpy


class _Ends(NamedTuple):
    start: int
    stop: int


class PageRange(_Ends):
    """Half-open byte range ``[start, stop)``, both ends on a page boundary. Ordered by start, then by stop.

    The numbers are addresses or offsets. An empty range (``start == stop``) is allowed.

    Raises:
        ValueError: negative, backwards, or an end that is not on a page boundary.
    """

    __slots__ = ()

    def __new__(cls, start: int, stop: int) -> "PageRange":
        """Make a range, and check its ends."""
        if not 0 <= start <= stop:
            raise ValueError(f"not a range: [{start:#x}, {stop:#x})")
        if (start | stop) % PAGE_SIZE:
            raise ValueError(f"not on page boundaries: [{start:#x}, {stop:#x}), pages of {PAGE_SIZE} bytes")
        return super().__new__(cls, start, stop)

    @classmethod
    def outward(cls, start: int, stop: int, page_size: int = PAGE_SIZE) -> "PageRange":
        """Return the smallest range of whole pages that holds every byte of ``[start, stop)``; empty for no byte."""
        if start == stop:
            return cls(start - start % page_size, start - start % page_size)
        return cls(start - start % page_size, stop + -stop % page_size)

    @classmethod
    def inward(cls, start: int, stop: int, page_size: int = PAGE_SIZE) -> "PageRange":
        """Return the largest range of whole pages that holds no byte outside ``[start, stop)``; empty where none fits."""
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
        """Tell whether a byte, or every byte of another range, lies inside."""
        if isinstance(other, PageRange):
            return self.start <= other.start and other.stop <= self.stop
        return isinstance(other, SupportsIndex) and self.start <= index(other) < self.stop

    def __and__(self, other: "PageRange") -> "PageRange":
        """Return the intersection; an empty range where there is none."""
        start = max(self.start, other.start)
        return PageRange(start, max(start, min(self.stop, other.stop)))

    def shifted(self, by: int) -> "PageRange":
        """Return the range ``by`` bytes further on (a multiple of the page size, negative to go back)."""
        return PageRange(self.start + by, self.stop + by)

    def chunks(self, size: int) -> "Iterator[PageRange]":
        """Yield the range cut at every multiple of ``size`` bytes (a multiple of the page size), in order.

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


class RangeSet(Intervals):
    """An immutable set of pages, kept as sorted, disjoint, non-adjacent ranges.

    ``|``, ``&``, ``-`` and ``^`` cost a bisection for each range of the smaller set and one copy; a membership test is
    logarithmic.
    """

    __slots__ = ()

    # A range is made when it is asked for: a million objects cost seconds, most of them for the garbage collector.

    def __init__(self, ranges: Iterable[PageRange] = ()) -> None:
        super().__init__(ranges)

    @property
    def pages(self) -> int:
        """Base pages in all ranges together."""
        return self.length // PAGE_SIZE

    @property
    def span(self) -> PageRange:
        """The smallest range that holds the whole set; ``[0, 0)`` for the empty set."""
        return PageRange(*super().span)

    def __iter__(self) -> Iterator[PageRange]:
        return map(tuple.__new__, repeat(PageRange), super().__iter__())

    def __getitem__(self, index: int) -> PageRange:
        at = range(0, len(self.edges), 2)[index]
        return PageRange(self.edges[at], self.edges[at + 1])

    def __contains__(self, other: SupportsIndex | PageRange) -> bool:
        """Tell whether a byte, or every byte of a range, is in the set."""
        if not isinstance(other, PageRange):
            return super().__contains__(other)
        after = bisect_right(self.edges, other.start)
        return not other or (after & 1 == 1 and other.stop <= self.edges[after])


if TYPE_CHECKING:
    Ranges: TypeAlias = Iterable[tuple[int, int]] | Iterable[PageRange] | RangeSet | numpy.ndarray[Any, Any]
else:  # An array is an iterable of pairs too; typing would compile its name, given as a text, at import.
    Ranges = Iterable[tuple[int, int]] | Iterable[PageRange] | RangeSet
"""Pairs of offset and length, :class:`PageRange`, a :class:`RangeSet`, or an integer array of shape ``(n, 2)``."""
