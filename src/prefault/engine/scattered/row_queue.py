"""The chunks of a call on many ranges of one kind of memory: rows of an array, without an object for each range."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.engine.chunk_queue import Chunk, ChunkQueue, PlaceOf
from prefault.engine.planning import Plan, Segment
from prefault.engine.scattered.advice_vector import AdviceVector
from prefault.engine.scattered.scattered_pages import pages_of, scattered_pages_before
from prefault.intervals import Intervals
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB

_PIECE = 4 * MIB
_UNDONE_AT_ONCE = 512


class _Rows(Chunk):
    """Rows of a vector, from number ``first`` to the one before ``stop``."""

    def __init__(self, queue: RowQueue, first: int, stop: int) -> None:
        self.pages = PageRange(*queue.vector.span(first, stop))
        self.stop = stop
        self._length = int(queue.vector.lengths[first:stop].sum())
        self._queue = queue
        self._first = first

    @property
    def length(self) -> int:
        """See :class:`~prefault.engine.chunk_queue.Chunk`: without what lies between the rows."""
        return self._length

    def populate_at_once(self) -> bool:
        """See :class:`~prefault.engine.chunk_queue.Chunk`."""
        advice = self._queue.plan.segments[0].method.advice
        if advice is None or not capabilities.PROCESS_MADVISE.available:
            return False
        with contextlib.suppress(OSError), own_process() as pidfd:
            self._first = self._queue.vector.advise(pidfd, self._first, self.stop, advice)
        return self._first == self.stop

    def parts(self) -> Iterator[tuple[PageRange, Segment]]:
        """See :class:`~prefault.engine.chunk_queue.Chunk`: the rows that are not populated yet."""
        for number in range(self._first, self.stop):
            yield PageRange(*self._queue.vector.span(number, number + 1)), self._queue.plan.segments[0]


class RowQueue(ChunkQueue):
    """Hands out many ranges of one segment as rows of a vector.

    Args:
        plan: of one segment.
        place_of: names the place of a page that fails; None: its offset in all.
    """

    def __init__(self, plan: Plan, place_of: PlaceOf | None = None) -> None:
        self._pages = pages_of(plan.segments[0])
        super().__init__(plan, self._pages.length, f", in one of {len(self._pages)} ranges", place_of)
        self.vector = AdviceVector(*self._pages.pieces(max(_PIECE, plan.segments[0].target.page_size)))
        self._at = 0
        self._untried: list[tuple[int, int]] = []
        """Addresses of rows that were handed out, and lie above a page that failed in their chunk."""

    def take(self, size: int) -> _Rows | None:
        """See :class:`~prefault.engine.chunk_queue.ChunkQueue`."""
        with self._lock:
            first = self._at
            if first == len(self.vector):
                return None
            self._at = self.vector.stop_of(first, size)
            return _Rows(self, first, self._at)

    def finish(self, chunk: Chunk, failed: int | None = None) -> None:
        """See :class:`~prefault.engine.chunk_queue.ChunkQueue`."""
        assert isinstance(chunk, _Rows)
        with self._lock:
            if failed is None:
                self.done_bytes += chunk.length
                return
            above = int(self.vector.starts.searchsorted(failed, side="right"))
            if above < chunk.stop:
                self._untried.append(self.vector.span(above, chunk.stop))

    def tried(self) -> Iterator[tuple[RangeSet, RangeSet]]:
        """See :class:`~prefault.engine.chunk_queue.ChunkQueue`. The page tables tell which are populated.

        Only pages that were tried, lest others lose what they touch; and a few ranges at a time: finding out what to discard
        takes memory, at a moment when there may be none left.
        """
        if not self._at:
            return
        (segment,) = self.plan.segments
        tried = self._pages & Intervals([self.vector.span(0, self._at)]) - Intervals(self._untried)
        for part in tried.batches(_UNDONE_AT_ONCE):
            populated, _ = scattered_pages_before(segment, part)
            yield RangeSet.from_edges(part.edges), RangeSet.from_edges(populated.edges)
