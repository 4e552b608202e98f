"""Dirty pages as the kernel records them without the server: write-protection in asynchronous mode (Linux 6.7)."""

from __future__ import annotations

from array import array

from prefault._kernel import pagemap
from prefault._kernel.pagemap import PageCategory
from prefault._system.kept_files import KeptFile
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import GIB

_REGIONS = 1024
_WORDS = 3  # of a struct page_region
_SCAN_BYTES = 96  # sizeof(struct pm_scan_arg), from which the kernel infers its version
_GONE = int(PageCategory.PRESENT | PageCategory.SWAPPED)

_pagemap = KeptFile("/proc/self/pagemap")


def written_pages(address: int, length: int, *, clear: bool) -> RangeSet:
    """Return the addresses of written pages in a range whose pages were all write-protected once.

    Written are pages that are present without write-protection, and pages with neither an entry nor a marker: the latter
    were written and then left the page table, for swap space perhaps, whereas an untouched page keeps its marker.
    ``clear`` protects the pages again, atomically with the scan of each, so that no write is lost in between.
    """
    written_pages = int(PageCategory.WRITTEN)
    found = _scan(address, address + length, mask=written_pages, inverted=0, clear=clear)
    found += _scan(address, address + length, mask=_GONE, inverted=_GONE, clear=clear)
    return RangeSet(found)


def _scan(start: int, stop: int, *, mask: int, inverted: int, clear: bool) -> list[PageRange]:
    found: list[PageRange] = []
    words = array("Q", bytes(_REGIONS * _WORDS * 8))
    flags = pagemap.PM_SCAN_CHECK_WPASYNC | (pagemap.PM_SCAN_WP_MATCHING if clear else 0)
    argument = pagemap.PmScanArg(
        size=_SCAN_BYTES, flags=flags, vec=words.buffer_info()[0], vec_len=_REGIONS, category_mask=mask,
        category_inverted=inverted,
    )  # fmt: skip
    while start < stop:
        argument.start, argument.end = start, min(stop, start + GIB)
        count = _pagemap.ioctl(pagemap.PAGEMAP_SCAN, argument)
        found += [PageRange(words[at], words[at + 1]) for at in range(0, count * _WORDS, _WORDS)]
        # inspection/scan.py says why walk_end is not used.
        start = argument.end if count < _REGIONS else words[count * _WORDS - 2]
    return found
