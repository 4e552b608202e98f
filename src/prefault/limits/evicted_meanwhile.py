"""File pages that were evicted while others of the same populate call came in: a full page cache evicts its own pages."""

from collections.abc import Sequence
from typing import NamedTuple

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
    kernel splits no huge entry of a file but drops it. So mincore is asked about those that are not there.
    """
    of_files = [demand for demand in demands if demand.use.fills_page_cache]
    whole = sum(demand.stretches.length for demand in of_files)
    enough = max(1, whole // _SHARE, min(whole, _LEAST))
    unmapped = gone = Intervals.union_of(demand.stretches - _present(demand.stretches) for demand in of_files)
    if gone.length >= enough:
        gone -= Intervals.union_of(
            cached_pages(vma, part) or Intervals() for vma in vmas(*gone.span) if (part := gone.clipped(vma.start, vma.stop))
        )
    limits = [*cgroup_cache_limits(), *machine_cache_limits()] if gone.length >= enough else []
    if not limits:
        return None
    tightest = min(limits, key=lambda limit: limit.available_bytes)
    return EvictedPages(gone, unmapped, whole, Shortfall(tightest, whole, whole - gone.length))


def _present(pages: Intervals) -> Intervals:
    if len(pages) == 1:  # without numpy, whose import takes longer than the look
        found = residency_of(PageRange(*pages.span))
        return found.ranges(PageState.PRESENT).shifted(found.range.start)
    rows = occupied(pages.bridged(_NEAR).edges, how=False)
    rows = rows[(rows[:, 2] & int(PageCategory.PRESENT)) != 0]
    return Intervals.from_arrays(rows[:, 0], rows[:, 1])
