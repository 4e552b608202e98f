"""Dirty pages as the kernel records them without the server: write-protection in asynchronous mode (Linux 6.7)."""

from __future__ import annotations

from prefault._kernel import pagemap
from prefault._kernel.pagemap import PageCategory
from prefault.inspection.pagemap_scan import scan
from prefault.ranges import RangeSet

_WRITTEN = int(PageCategory.WRITTEN)
_GONE = int(PageCategory.PRESENT | PageCategory.SWAPPED)


def written_pages(address: int, length: int, *, clear: bool) -> RangeSet:
    """Return the addresses of written pages in a range whose pages were all write-protected once.

    Written are pages that are present without write-protection, and pages with neither an entry nor a marker: the latter
    were written and then left the page table, for swap space perhaps, whereas an untouched page keeps its marker.
    ``clear`` protects the pages again, atomically with the scan of each, so that no write is lost in between.
    """
    flags = pagemap.PM_SCAN_CHECK_WPASYNC | (pagemap.PM_SCAN_WP_MATCHING if clear else 0)
    found = RangeSet()
    for mask, inverted in ((_WRITTEN, 0), (_GONE, _GONE)):
        words = scan((address, address + length), mask, inverted, 0, 0, flags)
        found |= RangeSet.from_ascending(words[::3], words[1::3])
    return found
