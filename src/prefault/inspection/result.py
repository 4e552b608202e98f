"""The values that describe residency: the state of a page, runs of pages, and the result of one scan."""

import enum
import functools
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefault._kernel.cachestat import PageCache
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE, format_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_MANY = 1024
"""Number of runs from which on importing numpy pays."""


class PageState(enum.IntFlag):
    """The facts about a page that the kernel tells."""

    PRESENT = 1
    """A page-table entry exists: reading does not fault."""
    ALLOCATED = 2
    """Present, and memory of its own lies behind it: not the shared zero page."""
    HUGE = 4
    """Mapped by one entry for a whole huge page (PMD-mapped THP, or hugetlb)."""
    SWAPPED = 8
    """Not present, and the entry is not empty: in swap space, or for a moment under migration; poisoned pages too."""
    FILE = 16
    """Present, and a page of a file or of shared memory: not (or not yet) a private copy."""
    WRITTEN = 32
    """Written since tracking began: soft-dirty, or userfaultfd write-protection in asynchronous mode."""
    GUARD = 64
    """A guard region: any access is a SIGSEGV."""


class PageRun(NamedTuple):
    """Neighbouring pages of equal state: addresses ``[start, stop)``."""

    start: int
    stop: int
    state: PageState


@functools.cache
def _page_states() -> tuple[PageState, ...]:
    """Return every page state. To make them takes as long as a thirtieth of the package's import."""
    return tuple(PageState(value) for value in range(2 * PageState.GUARD))


class Residency:
    """The pages of a range at one moment.

    Attributes:
        range: the inspected whole pages, as addresses; of a collection or an array with gaps from its first to its last.
        inspected_bytes: bytes of the inspected pages: of collections and arrays with gaps without what lies between.
        runs: neighbouring pages of equal state, without the pages that have no state at all. Made when first asked for.
        source: ``"pagemap_scan"``, ``"pagemap"`` or ``"mincore"``.
        unknown: the states that this source cannot tell for this memory, each with the reason.
        page_cache: pages of the file behind the memory in the page cache (in base pages), where the memory is a Mapping
            with a file and the kernel has cachestat (Linux 6.5); else None.
        cached_bytes: bytes of the files behind the memory that are in the page cache, mapped here or not; None where there
            is no file, or the kernel does not tell this process.
        node_bytes: bytes on each NUMA node, by its number. None unless it was asked for, and where the kernel does not tell
            this process.
        nodes: number of the NUMA node of each base page, in order: an array of int16, -1 for pages that are not present and
            for zero pages. None where ``node_bytes`` is, and for collections and arrays with gaps.
    """

    def __init__(
        self, pages: PageRange, words: "array[int]", source: str, unknown: dict[PageState, str],
        page_cache: PageCache | None = None,
    ) -> None:  # fmt: skip
        """Wrap ``words``: start, stop and state of each run in turn. Objects are made only when the runs are asked for."""
        self.range = pages
        self.inspected_bytes = pages.length
        self.source = source
        self.unknown = unknown
        self.page_cache = page_cache
        self.cached_bytes = None if page_cache is None else page_cache.cached * PAGE_SIZE
        self.node_bytes: dict[int, int] | None = None
        self.nodes: numpy.typing.NDArray[numpy.int16] | None = None
        self._words = words
        # Not functools.cached_property: before Python 3.12 it has a lock for all objects, which another thread may hold at
        # the moment of a fork, and which stays locked in the child.
        self._runs: list[PageRun] | None = None
        self._sums: dict[int, int] | None = None

    @property
    def runs(self) -> list[PageRun]:
        """Neighbouring pages of equal state, in order of address."""
        if self._runs is None:
            words, make = self._words, tuple.__new__
            rows = zip(words[::3], words[1::3], map(_page_states().__getitem__, words[2::3]), strict=True)
            self._runs = [make(PageRun, row) for row in rows]
        return self._runs

    @property
    def _bytes_by_state(self) -> dict[int, int]:
        """Bytes of the pages of each state; distinct states are few."""
        if self._sums is None:
            self._sums = self._sum_by_state()
        return self._sums

    def _sum_by_state(self) -> dict[int, int]:
        words = self._words
        found: dict[int, int] = {}
        if len(words) >= 3 * _MANY:
            import numpy

            rows = self.rows
            sums = numpy.bincount(rows[:, 2], rows[:, 1] - rows[:, 0])  # of floats: exact for whole pages below 2**65 bytes
            return {state: int(count) for state, count in enumerate(sums.tolist()) if count}
        for start, stop, state in zip(words[::3], words[1::3], words[2::3], strict=True):
            found[state] = found.get(state, 0) + stop - start
        return found

    def bytes_in(self, state: PageState) -> int:
        """Count the bytes of the pages that have every flag of ``state``.

        Raises:
            ValueError: the source cannot tell.
        """
        self._require(state)
        wanted = int(state)
        return sum(count for flags, count in self._bytes_by_state.items() if flags & wanted == wanted)

    @property
    def present_bytes(self) -> int:
        """Bytes that are present."""
        return self.bytes_in(PageState.PRESENT)

    @property
    def allocated_bytes(self) -> int | None:
        """Bytes that are present and allocated; None where the source cannot tell."""
        return None if PageState.ALLOCATED in self.unknown else self.bytes_in(PageState.ALLOCATED)

    @property
    def huge_bytes(self) -> int | None:
        """Bytes mapped by huge entries; None where the source cannot tell."""
        return None if PageState.HUGE in self.unknown else self.bytes_in(PageState.HUGE)

    @property
    def swapped_bytes(self) -> int | None:
        """Bytes in swap space; None where the source cannot tell."""
        return None if PageState.SWAPPED in self.unknown else self.bytes_in(PageState.SWAPPED)

    def ranges(self, state: PageState = PageState.PRESENT) -> RangeSet:
        """Return the pages that have every flag of ``state``, as byte offsets from ``range.start``."""
        self._require(state)
        base, wanted, words = self.range.start, int(state), self._words
        if len(words) >= 3 * _MANY:
            rows, some = self.rows, self.rows[:, 2] & wanted == wanted
            pairs = (rows if some.all() else rows[some])[:, :2] - base
            return RangeSet.from_arrays(pairs[:, 0], pairs[:, 1])
        return RangeSet(
            PageRange(start - base, stop - base)
            for start, stop, flags in zip(words[::3], words[1::3], words[2::3], strict=True)
            if flags & wanted == wanted
        )  # fmt: skip

    def pages(self) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
        """Return one :class:`PageState` for each base page, in order: shape ``(range.pages,)``, dtype uint8."""
        import numpy

        if self.inspected_bytes != self.range.length:
            raise ValueError("pages() needs one range: this is of scattered pages, whose states ranges() tells")
        first, last = ((self.rows[:, column] - self.range.start) // PAGE_SIZE for column in (0, 1))
        states = self.rows[:, 2].astype(numpy.uint8)
        # Differences from page to page, modulo 256. No two runs begin, or end, at the same page.
        changes = numpy.zeros(self.range.pages + 1, numpy.uint8)
        changes[first] += states
        changes[last] -= states
        return numpy.cumsum(changes[:-1], dtype=numpy.uint8)

    @property
    def rows(self) -> "numpy.typing.NDArray[numpy.int64]":
        """The runs as an array of shape ``(n, 3)``: start, stop and state. A view, not a copy."""
        return rows_of(self._words)

    def _require(self, state: PageState) -> None:
        for flag, reason in self.unknown.items():
            if state & flag:
                raise ValueError(f"{flag.name} cannot be told: {reason}")

    def __str__(self) -> str:
        parts = [f"{format_size(self.present_bytes)} present"]
        for name, count in (
            ("allocated", self.allocated_bytes), ("huge", self.huge_bytes), ("swapped", self.swapped_bytes),
        ):  # fmt: skip
            if count or (count == 0 and name == "allocated"):
                parts.append(f"{format_size(count)} {name}")
        if self.cached_bytes is not None:
            parts.append(f"{format_size(self.cached_bytes)} of the file in the page cache")
        parts += [f"{format_size(count)} on node {node}" for node, count in (self.node_bytes or {}).items()]
        return f"{format_size(self.inspected_bytes)}: {', '.join(parts)}"

    def __repr__(self) -> str:
        return f"<Residency of {self.range}, {self} (from {self.source})>"


def rows_of(words: "array[int]") -> "numpy.typing.NDArray[numpy.int64]":
    """View words as rows of three: start, stop, and state or categories. The words cannot grow while the view lives."""
    import numpy

    return numpy.frombuffer(words, numpy.int64).reshape(-1, 3)


def translate_states(words: "array[int]", table: Sequence[int]) -> set[int]:
    """Replace the third word of each row by its entry in ``table``; return the numbers that stood there before."""
    if len(words) >= 3 * _MANY:
        import numpy

        column = rows_of(words)[:, 2]
        found = set(_distinct(column))
        column[:] = numpy.array(table, numpy.int64)[column]
        return found
    numbers = words[2::3]
    words[2::3] = array("Q", map(table.__getitem__, numbers))
    return set(numbers)


def _distinct(flags: "numpy.typing.NDArray[numpy.int64]") -> list[int]:
    """Return the distinct values of a column of states or categories: small numbers."""
    import numpy

    values: list[int] = numpy.flatnonzero(numpy.bincount(flags)).tolist()
    return values
