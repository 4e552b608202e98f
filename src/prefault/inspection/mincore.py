"""Pages that are in memory according to mincore(2): mapped by this process or not."""

from __future__ import annotations

from array import array

from prefault._kernel import mman
from prefault.memory.vma import vmas
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, PAGE_SIZE

_STEP = 256 * MIB
"""Bytes of one call, so that Ctrl-C is answered."""


def resident(pages: PageRange) -> RangeSet:
    """Return the pages that are in memory: those of a shared mapping whether this process has mapped them or not."""
    # mincore refuses a range with a hole in it.
    return resident_in([pages & PageRange(vma.start, vma.stop) for vma in vmas(pages.start, pages.stop)])


def resident_in(mapped: list[PageRange]) -> RangeSet:
    """Return the pages of mapped ranges, ascending and without holes, that are in memory.

    Raises:
        OSError: a range with a hole.
    """
    starts, stops = array("Q"), array("Q")
    for whole in mapped:
        for part in whole.chunks(_STEP):
            append_runs(mman.mincore(part.start, part.length), part.start, starts, stops)
    return RangeSet.from_ascending(starts, stops)


_LOWEST_BIT = bytes(value & 1 for value in range(256))


def append_runs(flags: bytearray, at: int, starts: array[int], stops: array[int]) -> int:
    """Append the runs of resident pages, the first page of ``flags`` being at ``at``; return how many pages that are.

    Without numpy: its import takes longer than to look at a thousand files, and memory that may just have run short.
    """
    flags = flags.translate(_LOWEST_BIT)  # only the lowest bit of each byte counts
    begin = flags.find(1)
    while begin >= 0:
        end = flags.find(0, begin)
        end = len(flags) if end < 0 else end
        starts.append(at + begin * PAGE_SIZE)
        stops.append(at + end * PAGE_SIZE)
        begin = flags.find(1, end)
    return flags.count(1)
