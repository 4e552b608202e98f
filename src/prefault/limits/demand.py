"""Demand of a populate call: the memory, huge pages and disk space that populating takes."""

from __future__ import annotations

import contextlib
import os
import sys
from array import array
from collections.abc import Iterator, Sequence

from prefault._kernel import fiemap, mman, pagemap
from prefault._kernel.cachestat import cachestat
from prefault._system import capabilities, proc
from prefault.inspection.page_cache import KnownFiles, cached_in
from prefault.inspection.scan import occupied
from prefault.intervals import Intervals
from prefault.limits.memory_limits import NO_LIMIT, cgroup_cache_limits, counts_hugetlb, machine_cache_limits
from prefault.limits.memory_use import MemoryUse
from prefault.memory.vma import Backing, Vma, file_descriptor, vm_flags, vma_at, vmas
from prefault.ranges import PageRange
from prefault.sizes import MIB, PAGE_SIZE

_ENTRY_BYTES = 512
"""One byte of page table maps this many bytes of memory (8 for 4096)."""
_NEW_TABLES = 3 * PAGE_SIZE
"""Page tables of upper levels, which a first page may need."""
_SHMEM_NODES = 256
"""One byte of the page cache's tree for so many bytes of shared memory (576 for 64 pages), and some more."""
_STEP = 256 * MIB
_NEAR = 2 * MIB
"""Largest gap that is read as well: one more read costs as much."""
_PRESENT, _SWAPPED, _FILE, _GUARD, _EXCLUSIVE = 0x80, 0x40, 0x20, 0x04, 0x01  # bits 63, 62, 61, 58, 56 of pagemap
_HIGH_BYTE = 7 if sys.byteorder == "little" else 0
_IS_OURS = bytes(byte & (_PRESENT | _FILE | _EXCLUSIVE) == _PRESENT | _EXCLUSIVE for byte in range(256))
_IS_SWAPPED = bytes(byte & (_PRESENT | _SWAPPED | _GUARD) == _SWAPPED for byte in range(256))


class Demand:
    """Memory that is to be populated and its missing pages, which tell what populating it takes.

    Args:
        use: place, kind and access; of many stretches, from the start of the first to the end of the last.
        missing: addresses of the pages that are not populated.
        fd: descriptor of the file behind it, if ``use`` has none: it makes counting exact.
        stretches: the memory, where it is many stretches of one kind: memory between them does not count; None: all of it.
    """

    __slots__ = ("_missing", "stretches", "use")

    def __init__(
        self, use: MemoryUse, missing: Intervals, fd: int | None = None, stretches: Intervals | None = None
    ) -> None:
        self.use = use if fd is None or use.fd is not None else use._replace(fd=fd)
        self.stretches = Intervals([(use.start, use.stop)]) if stretches is None else stretches
        self._missing = missing

    def missing_bytes(self, start: int, stop: int) -> int:
        """Return the bytes of the pages in ``[start, stop)`` that are not populated."""
        return self._between(start, stop).length

    def at_most(self, start: int, stop: int) -> int:
        """Return the bytes of memory that populating ``[start, stop)`` takes at most, without reading any page's state."""
        use, gaps = self.use, self._between(start, stop)
        missing = gaps.length
        if not use.takes_memory:
            return missing if use.backing is Backing.HUGETLB and counts_hugetlb() else 0
        # Pages that are present may still be shared with the other side of a fork, and are copied then.
        # And locked page cache counts as reclaimable until it is locked.
        whole = use.copies or use.pins_page_cache
        pages = (self.stretches.clipped(start, stop).length if whole else 0) + (missing if use.fills_shmem else 0)
        if not use.copies and not use.shared:
            pages += missing  # in swap
        if not missing and not pages:
            return 0
        # Each gap may need a page table of its own.
        tables = min(len(gaps), (stop - start) // (2 * MIB) + 2) * PAGE_SIZE if len(gaps) > 1 else 0
        return pages + tables + _overhead(missing, use.fills_shmem)

    def memory(self, start: int, stop: int) -> int:
        """Return the bytes of memory that populating ``[start, stop)`` takes, page tables not counted: reads every page."""
        if not self.use.takes_memory:
            return self.at_most(start, stop)
        return sum(self._memory(first, last) for first, last in self.stretches.clipped(start, stop))

    def overhead(self, start: int, stop: int) -> int:
        """Return the bytes of page tables, and of the page cache's tree, that populating ``[start, stop)`` takes."""
        missing = self.missing_bytes(start, stop)
        return _overhead(missing, self.use.fills_shmem) if missing and self.use.takes_memory else 0

    def unallocated(self, start: int, stop: int) -> int:
        """Return the bytes of the missing pages in ``[start, stop)`` that the file does not have, in memory or in swap."""
        if self.use.backing is Backing.HUGETLB:  # mincore knows only the page tables there
            return self.missing_bytes(start, stop)
        return sum(self._not_in_memory(first, last, swapped=False) for first, last in self.stretches.clipped(start, stop))

    def missing_in(self, vma: Vma) -> Intervals:
        """Return the pages of a mapping that are not populated; none where the kernel refuses the access anyway."""
        permitted = self.use.guarded or (vma.writable if self.use.access == "write" else vma.readable)
        return self._between(max(self.use.start, vma.start), min(self.use.stop, vma.stop)) if permitted else Intervals()

    def _between(self, start: int, stop: int) -> Intervals:
        """Return the missing pages of ``[start, stop)``, as far as the file reaches."""
        use = self.use
        if use.file_size is not None:
            stop = min(stop, use.file_size + -use.file_size % use.page_size - use.file_base)
        return self._missing.clipped(start, stop)

    def _memory(self, start: int, stop: int) -> int:
        use = self.use
        if not self._is_permitted(start):
            return 0
        needed = self._not_in_memory(start, stop) if use.fills_shmem else 0
        if use.pins_page_cache:
            parts = (vma for vma in vmas(start, stop) if "lo" not in vm_flags(vma.start))
            needed += sum(min(vma.stop, stop) - max(vma.start, start) for vma in parts)
        if use.copies:
            needed += self._not_ours(start, stop)
        elif not use.shared:
            needed += sum(_count_entries(first, last, _IS_SWAPPED) or 0 for first, last in self._between(start, stop))
        return needed

    def _not_in_memory(self, start: int, stop: int, *, swapped: bool = True) -> int:
        """Count the bytes of the missing pages that the file has not in memory: nowhere, or (if ``swapped``) in swap."""
        needed = 0
        known: dict[tuple[int, int], int | None] = {}
        for vma in vmas(start, stop):
            fd, file = self.use.fd, (vma.device, vma.inode)
            if fd is None:
                if file not in known:
                    known[file] = file_descriptor(vma)
                fd = known[file]
            base = vma.file_offset - vma.start
            spans = self._between(max(start, vma.start), min(stop, vma.stop))
            needed += sum(_not_cached(fd, first, last, base, swapped) for first, last in spans)
        return needed

    def _not_ours(self, start: int, stop: int) -> int:
        ours = _count_entries(start, stop, _IS_OURS)
        if ours is not None:
            return stop - start - ours
        return sum(_not_resident(first, last) for first, last in self._between(start, stop))

    def _is_permitted(self, start: int) -> bool:
        """Return False if the kernel refuses the first page anyway: its error says more."""
        vma = vma_at(start)
        if vma is None or vma.start > start:
            return False
        if self.use.guarded:
            return True
        return vma.writable if self.use.access == "write" else vma.readable


def demands_of(uses: Sequence[MemoryUse], populated: Intervals, fd: int | None) -> list[Demand]:
    """Make the demands of a plan: one for each segment, or for each kind of many segments of few kinds.

    Args:
        uses: in order of address, without gaps.
        populated: addresses of the pages that need no population.
        fd: descriptor of the file behind those that have none.
    """
    missing = Intervals([(uses[0].start, uses[-1].stop)]) - populated
    if len(uses) == 1:
        return [Demand(uses[0], missing, fd)]
    kinds: dict[tuple[object, ...], list[MemoryUse]] = {}
    demands: list[Demand] = []
    for use in uses:
        if _is_like_its_kind(use):
            kinds.setdefault(use.kind, []).append(use)
        else:
            demands.append(Demand(use, missing.clipped(use.start, use.stop), fd))
    for alike in kinds.values():
        starts, stops = array("Q", [use.start for use in alike]), array("Q", [use.stop for use in alike])
        stretches = Intervals.from_ascending(starts, stops)
        demands.append(Demand(alike[0]._replace(stop=alike[-1].stop), missing & stretches, fd, stretches))
    return demands


def _is_like_its_kind(use: MemoryUse) -> bool:
    """Return whether the limits of one segment of a kind are those of every segment of that kind."""
    return not use.allocates and not use.locks and use.backing not in (Backing.HUGETLB, Backing.TMPFS)


# --- demands that draw on the same limit


def missing_in_all(demands: Sequence[Demand]) -> int:
    """Return the bytes of all missing pages."""
    return sum(demand.missing_bytes(demand.use.start, demand.use.stop) for demand in demands)


def memory_of_all(demands: Sequence[Demand]) -> int:
    """Return the bytes of memory that populating takes, page tables not counted: reads every page."""
    return sum(demand.memory(demand.use.start, demand.use.stop) for demand in demands)


def length_of_all(demands: Sequence[Demand]) -> int:
    """Return the bytes of all of the memory."""
    return sum(demand.stretches.length for demand in demands)


def unallocated_in_all(demands: Sequence[Demand]) -> int:
    """Return the bytes that the files behind shared memory lack, and those of private huge pages that are missing.

    A file that is mapped twice lacks its pages once. Where a hugetlb file is out of reach nothing is counted, so that
    nothing is refused.
    """
    needed = 0
    lacking: dict[object, int] = {}
    holes: dict[object, int | None] = {}
    for demand in demands:
        use = demand.use
        if use.backing is Backing.HUGETLB and not use.shared and use.access == "write":
            needed += demand.missing_bytes(use.start, use.stop)
            continue
        for part in use.files():
            if part.holes_bytes is not None or use.backing is not Backing.HUGETLB:
                holes[part.file] = part.holes_bytes
                lacking[part.file] = lacking.get(part.file, 0) + demand.unallocated(part.start, part.stop)
    return needed + sum(count if (most := holes[file]) is None else min(count, most) for file, count in lacking.items())


def uncached_in_all(demands: Sequence[Demand]) -> int:
    """Return the bytes of files on disks that the page cache lacks for sure, each page of a file once.

    Once more is lacking than any limit leaves, the rest counts as lacking: to ask mincore about 1 TiB takes 25 s.
    """
    enough = min((limit.available_bytes for limit in (*cgroup_cache_limits(), *machine_cache_limits())), default=NO_LIMIT)
    needed = 0
    seen: dict[tuple[int, int], Intervals] = {}
    files = KnownFiles()
    for demand in demands:
        for vma in vmas(demand.use.start, demand.use.stop):
            missing = demand.missing_in(vma)
            if not missing or not files.takes_page_cache(vma):
                continue
            file, base, size = (vma.device, vma.inode), vma.file_offset - vma.start, files.size(vma)
            before = seen.get(file, Intervals())
            offsets = missing.shifted(base) - before
            seen[file] = before | offsets
            if size is not None:  # pages beyond the end fail, for which populate has another error
                offsets = offsets.clipped(0, size + -size % PAGE_SIZE)
            for pages in (PageRange(*span) for span in offsets.shifted(-base)):
                for part in pages.chunks(_STEP):
                    cached = None if needed > enough else cached_in(vma, part, unmapped=True, files=files)
                    if needed > enough or cached is not None:
                        needed += part.length - (cached or 0)
    return needed


def holes_on_disk(demands: Sequence[Demand]) -> int:
    """Return the bytes of the holes that fallocate is to fill in files on a disk, each hole once."""
    needed = 0
    files: dict[object, list[tuple[int, int, int]]] = {}
    for use in (demand.use for demand in demands):
        if use.fd is not None:
            status = os.fstat(use.fd)
            stop = use.stop + use.file_base if use.file_size is None else min(use.stop + use.file_base, use.file_size)
            files.setdefault((status.st_dev, status.st_ino), []).append((use.start + use.file_base, stop, use.fd))
    for spans in files.values():
        at = 0
        for start, stop, fd in sorted(spans):
            if max(at, start) < stop:
                needed += sum(last - first for first, last in fiemap.holes(fd, max(at, start), stop))
                at = stop
    return needed


def unlocked_in_all(demands: Sequence[Demand]) -> int:
    """Return the bytes that are not locked yet: the kernel counts none twice."""
    return sum(
        demand.stretches.length
        - sum(
            min(vma.stop, demand.use.stop) - max(vma.start, demand.use.start)
            for vma in vmas(demand.use.start, demand.use.stop)
            if "lo" in vm_flags(vma.start)
        )
        for demand in demands
    )


# --- the state of pages


def _overhead(missing: int, of_file: bool) -> int:
    return missing // _ENTRY_BYTES + _NEW_TABLES + (missing // _SHMEM_NODES if of_file else 0)


def _count_entries(start: int, stop: int, wanted: bytes) -> int | None:
    """Count the bytes of the pages whose pagemap entry is wanted by its highest byte; None if pagemap cannot be read."""
    if not capabilities.PAGEMAP.available:
        return None
    with contextlib.suppress(OSError), proc.opened_proc("/proc/self/pagemap") as fd:  # OSError: this process gave up root
        pages = 0
        for at, end in _with_pages(start, stop):
            entries = pagemap.read_pagemap(fd, at // PAGE_SIZE, (end - at) // PAGE_SIZE)
            pages += entries[_HIGH_BYTE :: pagemap.ENTRY_BYTES].translate(wanted).count(1)
        return pages * PAGE_SIZE
    return None


def _with_pages(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield stretches that hold every present or swapped page of a range, none of them too long for one read.

    Reading the entries of an empty range takes seconds for each TiB; PAGEMAP_SCAN passes over what is empty in milliseconds.
    """
    spans = Intervals([(start, stop)])
    if stop - start > _STEP and capabilities.PAGEMAP_SCAN.available:
        rows = occupied(spans.edges, how=False)
        spans = Intervals.from_arrays(rows[:, 0], rows[:, 1]).bridged(_NEAR)
    for first, last in spans:
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
    """Count the bytes that the page cache lacks: to mincore, pages that fallocate allocated are missing until touched."""
    if fd is not None and capabilities.CACHESTAT.available:
        with contextlib.suppress(OSError):
            cache = cachestat(fd, start + base, stop - start)
            return stop - start - (cache.cached + (0 if swapped else cache.evicted)) * PAGE_SIZE
    return _not_resident(start, stop)
