"""Pages that are scattered in one kind of memory: which are populated, and what populating the others takes."""

from __future__ import annotations

from typing import NamedTuple

from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities
from prefault.engine.planning import Segment
from prefault.engine.populated_pages import cannot_undo
from prefault.engine.rollback import is_memory_file
from prefault.inspection.mincore import resident_in
from prefault.inspection.scan import occupied
from prefault.intervals import Intervals
from prefault.limits.demand import Demand
from prefault.limits.memory_use import MemoryUse
from prefault.ranges import PageRange
from prefault.sizes import MIB

NEAR = 4 * MIB
"""A gap that is scanned as well: one more call costs more than to walk it, page tables full of guards included."""

_PRESENT, _SWAPPED = int(PageCategory.PRESENT), int(PageCategory.SWAPPED)
_COPY_PENDING = int(PageCategory.PFNZERO | PageCategory.FILE)


class ScatteredLook(NamedTuple):
    """State of scattered pages before a call.

    Attributes:
        before: the pages that are populated.
        kept: these, and pages in swap or under migration: a rollback leaves them.
        resident: pages of a memory file that are in memory, mapped by this process or not.
    """

    before: Intervals
    kept: Intervals
    resident: Intervals


def pages_of(segment: Segment) -> Intervals:
    """Return the pages of a segment that are to be populated, as addresses."""
    return Intervals([(segment.start, segment.stop)]) if segment.pages is None else segment.pages


def look_at(segment: Segment, *, rollback: bool) -> ScatteredLook:
    """Return the state of the pages of a segment.

    Raises:
        PopulateError: ``rollback`` is asked for, and the kernel does not tell which pages this process has.
    """
    pages = pages_of(segment)
    if not rollback and not _tells_pages():
        return ScatteredLook(Intervals(), Intervals(), _resident_pages(segment, pages))
    before, kept = scattered_pages_before(segment, pages)
    return ScatteredLook(before, kept, _resident_pages(segment, pages))


def scattered_pages_before(segment: Segment, pages: Intervals) -> tuple[Intervals, Intervals]:
    """Return what :func:`prefault.engine.populated_pages.pages_before` does, of many ranges in one segment."""
    if not _tells_pages():
        raise cannot_undo(segment)
    rows = occupied(pages.bridged(NEAR).edges)
    populated = (rows[:, 2] & _PRESENT) != 0
    if segment.method.access == "write" and not segment.target.shared:
        populated &= (rows[:, 2] & _COPY_PENDING) == 0
    held = populated | ((rows[:, 2] & _SWAPPED) != 0)
    before, kept = (Intervals.from_arrays(rows[some, 0], rows[some, 1]) & pages for some in (populated, held))
    return before, kept


def _tells_pages() -> bool:
    return capabilities.PAGEMAP_SCAN.available or capabilities.PAGEMAP.available


def _resident_pages(segment: Segment, pages: Intervals) -> Intervals:
    """Return the pages among some of a segment that are in memory already if it is a memory file's; see ``file_pages``."""
    if not is_memory_file(segment):
        return Intervals()
    return resident_in([PageRange(*span) for span in pages.bridged(NEAR)])


def scattered_demand(
    segment: Segment, look: ScatteredLook, fd: int | None, *, guarded: bool = False, nodes: tuple[int, ...] = ()
) -> Demand:  # fmt: skip
    """Return the demand of the pages of a segment that are missing."""
    pages = pages_of(segment)
    missing = pages - look.before - look.resident if segment.target.shared else pages - look.before
    return _ScatteredDemand(segment.use._replace(guarded=guarded, nodes=nodes), pages, missing, fd)


class _ScatteredDemand(Demand):
    """The demand of ranges scattered in one segment, whose missing pages are known."""

    def __init__(self, use: MemoryUse, pages: Intervals, missing: Intervals, fd: int | None) -> None:
        # A full disk is an error and kills no process; the part of a file's holes that lies in the ranges is not counted.
        super().__init__(use._replace(allocates=False), missing, fd, pages)

    def memory(self, start: int, stop: int) -> int:
        takes = self.use.copies or self.use.fills_shmem
        return self.missing_bytes(start, stop) if takes else super().memory(start, stop)

    def unallocated(self, start: int, stop: int) -> int:
        return self.missing_bytes(start, stop)
