"""File pages that were evicted while others of the same populate call came in: a full page cache evicts its own pages."""

from collections.abc import Sequence
from typing import NamedTuple

from prefault._kernel import mman
from prefault._kernel.pagemap import PageCategory
from prefault.inspection.page_cache import cached_pages
from prefault.inspection.result import PageState
from prefault.inspection.scan import occupied, residency_of
from prefault.intervals import Intervals
from prefault.limits.demand import Demand
from prefault.limits.limit import Shortfall
from prefault.limits.memory_limits import cgroup_cache_limits, machine_cache_limits
from prefault.memory.vma import vmas
from prefault.ranges import PageRange
from prefault.sizes import KIB, MIB

_NEAR = 4 * MIB
"""A gap between scattered pages that is scanned as well: one more scan costs more."""

_STEP = 64 * MIB
"""Bytes for one system call, between which Ctrl-C works."""

_SHARE = 64
_LEAST = 64 * KIB
"""Bytes that must be gone, and the share of all pages. Fewer are no proof that memory is too small: a kernel with DAMON at
work takes single cold pages at any time, a few of ten thousand."""


class EvictedPages(NamedTuple):
    """Pages of a populate call that are gone at its end.

    Attributes:
        pages: their addresses.
        unmapped: these, and others that only left the page tables.
        whole_bytes: bytes of all pages of files in the call.
        shortfall: the tightest limit on page cache, and what it left in fact.
    """

    pages: Intervals
    unmapped: Intervals
    whole_bytes: int
    shortfall: Shortfall


def evicted_meanwhile(demands: Sequence[Demand]) -> EvictedPages | None:
    """Return the pages of files that were evicted by the end of a call; None if none were, or just a few.

    Reclaim takes pages out of the page tables first, so that these tell, in a scan. Pages may leave them in other ways: the
    kernel splits no huge entry of a file but drops it. So mincore is asked about those that are not there. Where it does not
    tell (another user's file, or one without a name), these are populated once more, which reads only what was evicted.
    """
    of_files = [demand for demand in demands if demand.use.fills_page_cache]
    whole = sum(demand.stretches.length for demand in of_files)
    enough = enough_to_tell(whole)
    unmapped = _unmapped(of_files)
    gone, untold = _not_cached(unmapped) if unmapped.length >= enough else (Intervals(), Intervals())
    if untold and (gone | untold).length >= enough and _populated(untold):
        # Those that did not fit are gone again, or others for them.
        unmapped = _unmapped(of_files)
        gone = Intervals.union_of(_not_cached(unmapped))
    limits = [*cgroup_cache_limits(), *machine_cache_limits()] if gone.length >= enough else []
    if not limits:
        return None
    tightest = min(limits, key=lambda limit: limit.available_bytes)
    return EvictedPages(gone, unmapped, whole, Shortfall(tightest, whole, whole - gone.length))


def enough_to_tell(whole: int) -> int:
    """Return the bytes that must be gone of ``whole`` bytes of pages before memory counts as too small."""
    return max(1, whole // _SHARE, min(whole, _LEAST))


def _unmapped(demands: Sequence[Demand]) -> Intervals:
    return Intervals.union_of(demand.stretches - _present(demand.stretches) for demand in demands)


def _not_cached(unmapped: Intervals) -> tuple[Intervals, Intervals]:
    """Return the pages that the page cache lacks, and those of which the kernel does not tell."""
    gone, untold = [], []
    for vma in vmas(*unmapped.span) if unmapped else ():
        if part := unmapped.clipped(vma.start, vma.stop):
            cached = cached_pages(vma, part)
            if cached is None:
                untold.append(part)
            else:
                gone.append(part - cached)
    return Intervals.union_of(gone), Intervals.union_of(untold)


def _populated(pages: Intervals) -> bool:
    """Populate pages for reading; return False where the kernel does not: before Linux 5.14, or where a file has shrunk."""
    try:
        for stretch in (PageRange(*span) for span in pages):
            for part in stretch.chunks(_STEP):
                mman.madvise(part.start, part.length, mman.MADV_POPULATE_READ)
    except OSError:
        return False
    return True


def _present(pages: Intervals) -> Intervals:
    if len(pages) == 1:  # without numpy, whose import takes longer than the look
        found = residency_of(PageRange(*pages.span))
        return found.ranges(PageState.PRESENT).shifted(found.range.start)
    rows = occupied(pages.bridged(_NEAR).edges, how=False)
    rows = rows[(rows[:, 2] & int(PageCategory.PRESENT)) != 0]
    return Intervals.from_arrays(rows[:, 0], rows[:, 1])
