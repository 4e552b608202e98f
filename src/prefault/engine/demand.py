"""How much memory populating a part of a plan takes."""

from __future__ import annotations

import contextlib
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prefault._kernel import mman, pagemap
from prefault._kernel.cachestat import cachestat
from prefault._system import capabilities
from prefault.engine.planning import Segment
from prefault.inspection.scan import occupied
from prefault.intervals import IntervalMeasure, bridged, common, merged, window, without
from prefault.limits import counts_hugetlb
from prefault.memory.vma import Backing, file_descriptor, vma_at
from prefault.sizes import MIB, PAGE_SIZE

if TYPE_CHECKING:
    from prefault.intervals import Numbers

_ENTRY_BYTES = 512
"""One byte of page table maps this many bytes of memory (8 for 4096)."""
_NEW_TABLES = 3 * PAGE_SIZE
"""Of upper levels, which a first page may need."""
_SHMEM_NODES = 256
"""One byte of the page cache's tree for so many bytes of shared memory (576 for 64 pages), and some more."""
_STEP = 256 * MIB
_NEAR = 2 * MIB
"""A gap that is read as well: a read more costs as much."""
_PRESENT, _SWAPPED, _FILE, _EXCLUSIVE = 0x80, 0x40, 0x20, 0x01  # bits 63, 62, 61 and 56 of an entry of pagemap
_HIGH_BYTE = 7 if sys.byteorder == "little" else 0
_IS_OURS = bytes(byte & (_PRESENT | _FILE | _EXCLUSIVE) == _PRESENT | _EXCLUSIVE for byte in range(256))
_IS_SWAPPED = bytes(byte & (_PRESENT | _SWAPPED) == _SWAPPED for byte in range(256))


class Demand:
    """A segment of the plan and what of it is missing, which says what populating it takes.

    Args:
        segment: where, how and on what it is populated.
        missing: the pages that are not populated, as addresses, start and stop in turn, ascending.
        fd: of the file behind it, where there is one: it makes counting exact.
    """

    __slots__ = ("_copies", "_missing", "_of_file", "fd", "segment")

    def __init__(self, segment: Segment, missing: array[int], fd: int | None = None) -> None:
        self.segment = segment
        self._missing = missing
        self.fd = segment.target.fd if segment.target.fd is not None else fd
        backing, shared = segment.backing, segment.target.shared
        lives = backing is not None and backing not in (Backing.SPECIAL, Backing.HUGETLB)
        # A private page that is written is a page of our own, and a page of shmem is memory whoever maps it. What is mapped
        # of a file on a disk can be taken back at any time.
        self._copies = lives and not shared and segment.method.access == "write"
        self._of_file = lives and backing is not None and backing.is_shmem

    @property
    def length(self) -> int:
        """Bytes of the part."""
        return self.segment.length

    def covered_bytes(self, start: int, stop: int) -> int:
        """Bytes of the part in ``[start, stop)``."""
        return stop - start

    def missing_bytes(self, start: int, stop: int) -> int:
        """Bytes of the pages that are not populated."""
        return sum(last - first for first, last in self._between(start, stop))

    def at_most(self, start: int, stop: int) -> int:
        """Memory that populating ``[start, stop)`` takes at most, without a look at the pages."""
        backing, missing = self.segment.backing, self.missing_bytes(start, stop)
        if backing is None or backing in (Backing.SPECIAL, Backing.HUGETLB):
            return missing if backing is Backing.HUGETLB and counts_hugetlb() else 0
        # Pages that are present may still be shared with the other side of a fork, and are copied then.
        pages = (self.covered_bytes(start, stop) if self._copies else 0) + (missing if self._of_file else 0)
        if not self._copies and not self.segment.target.shared:
            pages += missing  # in swap
        return pages + _overhead(missing, self._of_file) if missing or pages else 0

    def memory(self, start: int, stop: int) -> int:
        """Memory that populating ``[start, stop)`` takes, page tables not counted: by a look at every page."""
        backing = self.segment.backing
        if backing is None or backing in (Backing.SPECIAL, Backing.HUGETLB):
            return self.at_most(start, stop)
        if not self._is_permitted(start):
            return 0
        needed = self._not_in_memory(start, stop) if self._of_file else 0
        if self._copies:
            needed += self._not_ours(start, stop)
        elif not self.segment.target.shared:
            needed += sum(_count_entries(first, last, _IS_SWAPPED) or 0 for first, last in self._between(start, stop))
        return needed

    def overhead(self, start: int, stop: int) -> int:
        """Page tables and the like for it."""
        missing = self.missing_bytes(start, stop)
        taken = self.segment.backing not in (None, Backing.SPECIAL, Backing.HUGETLB)
        return _overhead(missing, self._of_file) if missing and taken else 0

    def _between(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The missing pages of ``[start, stop)``, as far as the file reaches."""
        target, missing = self.segment.target, self._missing
        if target.fd is not None:
            stop = min(stop, target.file_size + -target.file_size % target.page_size - target.file_base)
        index = bisect_right(missing, start) & ~1
        while index < len(missing) and missing[index] < stop:
            first, last = max(start, missing[index]), min(stop, missing[index + 1])
            if first < last:
                yield first, last
            index += 2

    def unallocated(self) -> int:
        """Bytes of the missing pages that the file does not have, in memory or in swap."""
        return self._not_in_memory(self.segment.start, self.segment.stop, swapped=False)

    def _not_in_memory(self, start: int, stop: int, *, swapped: bool = True) -> int:
        """Bytes of the missing pages that the file has not in memory: nowhere, or (if ``swapped``) in swap."""
        vma = vma_at(start)
        if vma is None:
            return 0
        fd = self.fd if self.fd is not None else file_descriptor(vma)
        base = vma.file_offset - vma.start
        return sum(_not_cached(fd, first, last, base, swapped) for first, last in self._between(start, stop))

    def _not_ours(self, start: int, stop: int) -> int:
        ours = _count_entries(start, stop, _IS_OURS)
        if ours is not None:
            return stop - start - ours
        return sum(_not_resident(first, last) for first, last in self._between(start, stop))

    def _is_permitted(self, start: int) -> bool:
        """Whether the kernel will not refuse the first page anyway: the answer is no matter of memory then."""
        vma = vma_at(start)
        if vma is None or vma.start > start:
            return False
        return vma.writable if self.segment.method.access == "write" else vma.readable


class ScatteredDemand(Demand):
    """Many stretches of one kind, between which other memory lies: only they count.

    Args:
        segment: from the first of them to the last.
        pages: the stretches.
        missing: what of them is not populated.
        fd: see :class:`Demand`.
    """

    __slots__ = ("_lacking", "_pages", "_stretches")

    def __init__(self, segment: Segment, pages: Numbers, missing: Numbers, fd: int | None = None) -> None:
        super().__init__(segment, array("Q", missing.tobytes()), fd)
        self._stretches, self._pages, self._lacking = pages, IntervalMeasure(pages), IntervalMeasure(missing)

    @property
    def length(self) -> int:
        """Bytes of the stretches."""
        return self._pages.within(self.segment.start, self.segment.stop)

    def covered_bytes(self, start: int, stop: int) -> int:
        """Bytes of the stretches in ``[start, stop)``."""
        return self._pages.within(start, stop)

    def missing_bytes(self, start: int, stop: int) -> int:
        """Bytes of the pages that are not populated."""
        return self._lacking.within(start, stop)

    def at_most(self, start: int, stop: int) -> int:
        """Memory that populating the stretches takes at most: each may need a page table of its own."""
        most = super().at_most(start, stop)
        tables = min(self._lacking.count(start, stop), (stop - start) // (2 * MIB) + 2) * PAGE_SIZE
        return most + tables if most else 0

    def memory(self, start: int, stop: int) -> int:
        """Memory that populating the stretches takes: by a look at every page."""
        return sum(super(ScatteredDemand, self).memory(first, last) for first, last in self._clipped(start, stop))

    def unallocated(self) -> int:
        """Bytes of the missing pages that the files do not have, in memory or in swap."""
        whole = self.segment.start, self.segment.stop
        return sum(self._not_in_memory(first, last, swapped=False) for first, last in self._clipped(*whole))

    def _clipped(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        edges = window(self._stretches, start, stop).tolist()
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            yield max(first, start), min(last, stop)


def demands_of(segments: Sequence[Segment], populated: array[int], fd: int | None) -> list[Demand]:
    """Make the parts of a plan: one for each segment, or for each kind of many segments of few kinds.

    Args:
        segments: in order of address, without gaps.
        populated: what of them needs no population, as :func:`prefault.inspection.scan.populated_before` gives it.
        fd: see :class:`Demand`.
    """
    if len(segments) == 1:
        (segment,) = segments
        return [Demand(segment, missing_from(segment.start, segment.stop, populated), fd)]
    import numpy

    whole = numpy.array([segments[0].start, segments[-1].stop], numpy.int64)
    there = numpy.array(populated, numpy.int64)
    missing = without(whole, merged(there[::2], there[1::2]))
    kinds: dict[tuple[object, ...], list[Segment]] = {}
    parts: list[Demand] = []
    for segment in segments:
        if _is_like_its_kind(segment):
            kinds.setdefault(segment[2:5], []).append(segment)
        else:
            parts.append(Demand(segment, array("Q", window(missing, segment.start, segment.stop).tobytes()), fd))
    for alike in kinds.values():
        starts, stops = (numpy.fromiter((item[at] for item in alike), numpy.int64, len(alike)) for at in (0, 1))
        pages = merged(starts, stops)
        parts.append(ScatteredDemand(alike[0]._replace(stop=alike[-1].stop), pages, common(missing, pages), fd))
    return parts


def _is_like_its_kind(segment: Segment) -> bool:
    """Whether method, target and backing say all, so that its limits are those of every segment with the same ones."""
    return segment.method.advice is not None and segment.backing not in (Backing.HUGETLB, Backing.TMPFS)


def _overhead(missing: int, of_file: bool) -> int:
    return missing // _ENTRY_BYTES + _NEW_TABLES + (missing // _SHMEM_NODES if of_file else 0)


def _count_entries(start: int, stop: int, wanted: bytes) -> int | None:
    """Bytes of the pages whose pagemap entry is wanted by its highest byte; None where pagemap cannot be read."""
    if not capabilities.PAGEMAP.available:
        return None
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # this process gave up root
        return None
    try:
        pages = 0
        for at, end in _with_pages(start, stop):
            entries = pagemap.read_pagemap(fd, at // PAGE_SIZE, (end - at) // PAGE_SIZE)
            pages += entries[_HIGH_BYTE :: pagemap.ENTRY_BYTES].translate(wanted).count(1)
        return pages * PAGE_SIZE
    finally:
        os.close(fd)


def _with_pages(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield stretches that hold every present or swapped page of a range, none of them too long for one read.

    Reading the entries of an empty range takes seconds for each TiB; PAGEMAP_SCAN passes over what is empty in milliseconds.
    """
    spans = [start, stop]
    if stop - start > _STEP and capabilities.PAGEMAP_SCAN.available:
        rows = occupied(spans, how=False)
        spans = bridged(merged(rows[:, 0], rows[:, 1]), _NEAR)
    for first, last in zip(spans[::2], spans[1::2], strict=True):
        for at in range(first, last, _STEP):
            yield at, min(last, at + _STEP)


def _not_resident(start: int, stop: int) -> int:
    try:
        return sum(
            mman.mincore(at, min(stop, at + _STEP) - at).count(0) * PAGE_SIZE for at in range(start, stop, _STEP)
        )  # fmt: skip
    except OSError:  # unmapped meanwhile: the kernel will say so
        return 0


def _not_cached(fd: int | None, start: int, stop: int, base: int, swapped: bool) -> int:
    """By cachestat where it answers: mincore takes pages that fallocate allocated, and nobody touched, for missing."""
    if fd is not None and capabilities.CACHESTAT.available:
        with contextlib.suppress(OSError):
            cache = cachestat(fd, start + base, stop - start)
            return stop - start - (cache.cached + (0 if swapped else cache.evicted)) * PAGE_SIZE
    return _not_resident(start, stop)


def missing_from(start: int, stop: int, populated: array[int]) -> array[int]:
    """The rest of ``[start, stop)``: pairs of addresses, as :func:`prefault.inspection.scan.populated_before` gives them."""
    return array("Q", (start, *populated, stop))
