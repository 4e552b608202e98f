"""Which pages were written, noted by the kernel alone: write-protection in asynchronous mode (Linux 6.7)."""

from __future__ import annotations

from array import array

from prefault._kernel import pagemap
from prefault._kernel.pagemap import PageCategory
from prefault._system.kept_files import KeptFile
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import GIB

_REGIONS = 1024
_WORDS = 3  # of a struct page_region
_SCAN_BYTES = 96  # sizeof(struct pm_scan_arg), by which the kernel tells its versions apart
_GONE = int(PageCategory.PRESENT | PageCategory.SWAPPED)

_pagemap = KeptFile("/proc/self/pagemap")


def written(address: int, length: int, *, clear: bool) -> RangeSet:
    """The pages of a range, every page of which was write-protected once, that are not any more: as addresses.

    Besides those that are present and written that is what has no entry and no mark at all: such a page was written, and
    then taken out of the page table, to swap space perhaps; a page that was never touched has its mark. With ``clear`` they
    are protected again, each in one step with being looked at, so that no write falls in between.
    """
    written = int(PageCategory.WRITTEN)
    found = _scan(address, address + length, mask=written, inverted=0, clear=clear)
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
        # See residency.py for why not walk_end.
        start = argument.end if count < _REGIONS else words[count * _WORDS - 2]
    return found
