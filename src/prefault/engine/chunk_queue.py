"""The chunks of a populate call: in which order threads take them, and which are done."""

from __future__ import annotations

import abc
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from prefault.engine.attempts import LONG, can_advise, populate_long, populate_whole
from prefault.engine.planning import NO_FALLOCATE, Plan, Segment
from prefault.engine.populated_pages import populated_pages
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, format_size

_MANY_SEGMENTS = 64
_SEGMENTS_AT_ONCE = 1024
_PART = 64 * MIB
"""Bytes that one call of a method populates at most, which holds the mmap lock meanwhile."""


PlaceOf: TypeAlias = Callable[[int], tuple[int, str]]
"""Return the address that the offset of an address is counted from, and a continuation of the offset in messages."""


class Chunk(abc.ABC):
    """Pages that one thread populates at once.

    Attributes:
        pages: from the first page to the end of the last one.
    """

    pages: PageRange

    @property
    def length(self) -> int:
        """Bytes to populate."""
        return self.pages.length

    @abc.abstractmethod
    def populate_at_once(self) -> bool:
        """Populate the chunk by vectors, if that is faster; return whether the kernel says that all is populated."""

    @abc.abstractmethod
    def parts(self) -> Iterable[tuple[PageRange, Segment]]:
        """Return the parts of the chunk that single calls of their segments' methods populate, in order of address."""


class ChunkQueue(abc.ABC):
    """Hands out the chunks of a populate call in order of address, and records which are done.

    Attributes:
        plan: what is carried out; its methods may change on the way (:meth:`replace`).
        length: bytes to populate.
        done_bytes: bytes in the chunks that are done.
        by_vectors: every method is an advice that this kernel takes for vectors of ranges.
    """

    by_vectors = False

    def __init__(self, plan: Plan, length: int, place: str, place_of: PlaceOf | None = None) -> None:
        self.plan = plan
        self.length = length
        self._place = place
        self._place_of = place_of
        self.done_bytes = 0
        self._lock = threading.Lock()

    def place_of(self, address: int, origin: int) -> tuple[int, str]:
        """Return the origin of the offset of a page that failed, and a continuation of ``offset 5`` in the message."""
        return (origin, self._place) if self._place_of is None else self._place_of(address)

    @abc.abstractmethod
    def take(self, size: int) -> Chunk | None:
        """Return the next chunk, of about ``size`` bytes; None after the last."""

    @abc.abstractmethod
    def finish(self, chunk: Chunk, failed: int | None = None) -> None:
        """Record that this thread is done with its chunk: all of it, or up to the page that ``failed``."""

    @abc.abstractmethod
    def tried(self) -> Iterator[tuple[RangeSet, RangeSet]]:
        """Yield the pages of the chunks that were handed out, in parts, and those of each part that are populated."""

    def replace(self, segment: Segment, without: Segment) -> None:
        """Populate a segment by a method without fallocate from now on, and say so in the notes."""
        with self._lock:
            segments = tuple(without if other is segment else other for other in self.plan.segments)
            notes = tuple(dict.fromkeys((*self.plan.notes, NO_FALLOCATE)))
            self.plan = self.plan._replace(segments=segments, notes=notes)


class PlanChunk(Chunk):
    """A part of one segment, or several whole segments."""

    def __init__(self, pages: PageRange, segments: tuple[Segment, ...]) -> None:
        self.pages = pages
        self.segments = segments

    def populate_at_once(self) -> bool:
        """See :class:`Chunk`: for long parts and several segments."""
        segment, *others = self.segments
        if others:
            return populate_whole(self.segments)
        return self.pages.length > LONG and can_advise(segment.method) and populate_long(segment, *self.pages)

    def parts(self) -> Iterator[tuple[PageRange, Segment]]:
        """See :class:`Chunk`."""
        for segment in self.segments:
            pages = self.pages & PageRange(segment.start, segment.stop)
            for part in pages.chunks(max(_PART, segment.target.page_size)):
                yield part, segment


class PlanQueue(ChunkQueue):
    """Hands out the segments of a plan, which fill its range."""

    def __init__(self, plan: Plan, place_of: PlaceOf | None = None) -> None:
        super().__init__(plan, plan.length, f" of {format_size(plan.length)}", place_of)
        self._taken: list[PageRange] = []
        self._done: list[PageRange] = []
        self._index = 0
        self._at = plan.segments[0].start
        self._open: dict[int, PlanChunk] = {}
        """By thread: the chunk that it is at work on."""
        self.by_vectors = all(can_advise(method) for method in {segment.method for segment in plan.segments})
        # Few segments are taken one by one, so that nothing above a page that fails is populated.
        self._joins_segments = self.by_vectors and len(plan.segments) >= _MANY_SEGMENTS
        self._stops = [segment.stop for segment in plan.segments]

    def take(self, size: int) -> PlanChunk | None:
        """Return the next chunk, cut at a multiple of ``size`` to split no huge page; None after the last."""
        with self._lock:
            segments = self.plan.segments
            if self._at == segments[self._index].stop:
                if self._index + 1 == len(segments):
                    return None
                self._index += 1
                self._at = segments[self._index].start
            segment = segments[self._index]
            size = max(size, segment.target.page_size)
            end, last = self._at - self._at % size + size, self._index + 1
            if self._joins_segments and self._at == segment.start and segment.stop < end:
                last = max(last, min(self._index + _SEGMENTS_AT_ONCE, bisect_right(self._stops, end, self._index)))
            chunk = PlanChunk(PageRange(self._at, min(self._stops[last - 1], end)), segments[self._index : last])
            self._at, self._index = chunk.pages.stop, last - 1
            self._open[threading.get_ident()] = chunk
            self._taken.append(chunk.pages)
            return chunk

    def finish(self, chunk: Chunk, failed: int | None = None) -> None:
        """See :class:`ChunkQueue`. Several segments that failed are not recorded: pages above may be populated as well."""
        start, stop = chunk.pages
        with self._lock:
            if failed is not None and len(self._open[threading.get_ident()].segments) > 1:
                return
            done = PageRange(start, stop if failed is None else failed)
            self._done.append(done)
            self.done_bytes += done.length
            del self._open[threading.get_ident()]  # last: after Ctrl-C in between, tried() still finds the chunk

    def tried(self) -> Iterator[tuple[RangeSet, RangeSet]]:
        """See :class:`ChunkQueue`. Of chunks that were not recorded, only the page tables tell what has become of them."""
        caught = (populated_pages(chunk.segments, chunk.pages) for chunk in self._open.values())
        yield RangeSet(self._taken), RangeSet.union_of([RangeSet(self._done), *caught])
