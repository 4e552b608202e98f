"""Pages that are in memory according to mincore(2): mapped by this process or not."""

from __future__ import annotations

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
    import numpy

    starts, stops = [], []
    for whole in mapped:
        for part in whole.chunks(_STEP):
            flags = numpy.frombuffer(mman.mincore(part.start, part.length), numpy.int8) & numpy.int8(1)
            changes = numpy.flatnonzero(numpy.diff(flags, prepend=numpy.int8(0), append=numpy.int8(0)))
            starts.append(changes[::2] * PAGE_SIZE + part.start)
            stops.append(changes[1::2] * PAGE_SIZE + part.start)
    return RangeSet.from_arrays(numpy.concatenate(starts), numpy.concatenate(stops)) if starts else RangeSet()
