"""Protection: touching an unpopulated block is a SIGSEGV, without more mappings than the kernel allows.

The reservation is cut into at most 8192 *extents*. In each, the stretch from its first unprotected block to its last, the
*hull*, is readable and writable; all else is PROT_NONE. Protected blocks inside a hull are guard regions
(MADV_GUARD_INSTALL), which do not split a mapping, so that an extent is never more than one mapping and the gap after it.
Where the memory cannot have guards (hugetlb; before Linux 6.13, of files before 6.15; locked memory) protected blocks inside
a hull are PROT_NONE as well, and mappings are counted. The measurements behind this: docs/design/sparse.md.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable
from typing import TypeAlias

from prefault._kernel import mman
from prefault._system import capabilities
from prefault.engine.discarding import drop
from prefault.engine.scattered.advice_vector import advise
from prefault.errors import OutOfMemoryError
from prefault.intervals import Intervals
from prefault.sizes import MIB, PAGE_SIZE

_EXTENTS = 8192
_ACCESSIBLE = mman.PROT_READ | mman.PROT_WRITE
_TABLE_SPAN = 2 * MIB
"""Bytes that one page table maps on x86-64; elsewhere it serves as a threshold only."""

_NONE = Intervals()

BlocksByExtent: TypeAlias = dict[int, Intervals]
"""Blocks, in whole, by the number of the extent in which they lie."""


class BlockProtection:
    """The unprotected blocks of a reservation. At first every block is protected, and mapped PROT_NONE.

    Offsets count from the start of the reservation, in whole blocks. The caller holds a lock.
    """

    def __init__(self, address: int, length: int, block: int, *, merges: bool) -> None:
        """Protect a mapping; ``merges``: the kernel joins its parts of equal protection (not those of hugetlb)."""
        self._address = address
        self._extent = block
        # Any block takes a whole page table, so filling the rest of it with guards costs little.
        while self._extent < _TABLE_SPAN or self._extent * _EXTENTS < length:
            self._extent *= 2
        self._unprotected: BlocksByExtent = {}
        self._guards = merges and block < self._extent and self._can_guard()
        self._guarded = self._guards  # from then on, also when guards are refused later
        self._runs = 0
        # Boundaries that stay for ever where mappings do not merge.
        self._cuts: set[int] | None = None if merges else set()
        self._most = _max_map_count() // 2

    def _can_guard(self) -> bool:
        # Asked of this very memory: files can have guards since Linux 6.15 only, and locked memory never.
        if not capabilities.GUARD_REGIONS.available:
            return False
        try:
            mman.madvise(self._address, PAGE_SIZE, mman.MADV_GUARD_INSTALL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        mman.madvise(self._address, PAGE_SIZE, mman.MADV_GUARD_REMOVE)
        return True

    @property
    def unprotected(self) -> Intervals:
        """The blocks that may be touched."""
        return Intervals.union_of(self._unprotected[extent] for extent in sorted(self._unprotected))

    def first_protected(self, start: int, stop: int) -> int | None:
        """Return the first byte of ``[start, stop)`` that is protected, if any."""
        while start < stop:
            end = self._unprotected.get(start // self._extent, _NONE).end_after(start)
            if end is None:
                return start
            start = end
        return None

    def by_extent(self, blocks: Intervals) -> BlocksByExtent:
        """Return blocks by the extent in which they lie, as the other methods take them."""
        size = self._extent
        start, stop = blocks.span
        if stop <= start - start % size + size:
            return {start // size: blocks} if blocks else {}
        if len(blocks) > 1:
            return self._many_by_extent(blocks)
        return {
            extent: Intervals.from_edges((max(start, extent * size), min(stop, extent * size + size)))
            for extent in range(start // size, -(-stop // size))
        }

    def _many_by_extent(self, blocks: Intervals) -> BlocksByExtent:
        import numpy

        starts, lengths = blocks.pieces(self._extent)
        edges = numpy.empty(2 * len(starts), numpy.int64)
        edges[::2], edges[1::2] = starts, starts + lengths
        extents = starts // self._extent
        first = numpy.flatnonzero(numpy.concatenate(([True], extents[1:] != extents[:-1])))
        bounds = [*(2 * first).tolist(), len(edges)]
        every = array("Q", edges.tobytes())
        return {
            extent: Intervals.from_edges(every[low:high])
            for extent, low, high in zip(extents[first].tolist(), bounds, bounds[1:], strict=False)
        }

    def protected_among(self, blocks: BlocksByExtent) -> BlocksByExtent:
        """Return the blocks of ``blocks`` that are protected."""
        there = self._unprotected
        if there.keys().isdisjoint(blocks):
            return blocks
        found = {extent: part - there.get(extent, _NONE) for extent, part in blocks.items()}
        return {extent: part for extent, part in found.items() if part}

    # --- to unprotect

    def unprotect(self, blocks: BlocksByExtent) -> None:
        """Make blocks accessible, all of which are protected: see :meth:`protected_among`.

        Raises:
            OutOfMemoryError: the kernel has no room for the page tables or the mappings. The blocks are protected then.
        """
        if not blocks:
            return
        accessible: list[Intervals] = []
        guard: list[Intervals] = []
        unguard: list[Intervals] = []
        fresh = dict(blocks)
        for extent, part in blocks.items():
            before = self._unprotected.get(extent)
            if before is not None:
                fresh[extent] = before | part
            if not self._guards:
                accessible.append(part)
                unguard += (part,) if self._guarded else ()
            elif before is None:
                accessible.append(part.hull)
                guard.append(Intervals.from_edges(part.edges[1:-1]))  # the gaps
            else:
                after = fresh[extent]
                added, inside = after.hull - before.hull, part & before.hull
                accessible += (added, inside)
                guard.append(added - after)
                unguard.append(inside)
        self._check_mappings(blocks, fresh)
        try:
            self._keep(fresh)
            self._advise(Intervals.union_of(guard), mman.MADV_GUARD_INSTALL)
            if unguarded := Intervals.union_of(unguard):
                self._advise(unguarded, mman.MADV_GUARD_REMOVE)
                # Markers leave a page table that keeps a huge page out; emptying the range frees it (since Linux 6.14).
                self._drop(unguarded.longer(_TABLE_SPAN - 1))
            self._set_protection(Intervals.union_of(accessible), _ACCESSIBLE)
        except BaseException as error:
            self.protect(blocks)
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                offset = _first(blocks)
                raise OutOfMemoryError(
                    errno.ENOMEM,
                    "the kernel has no memory for page tables, or no room for another mapping (vm.max_map_count):"
                    " nothing was populated",
                    address=self._address + offset, offset=offset,
                ) from error  # fmt: skip
            raise

    def _check_mappings(self, added: BlocksByExtent, fresh: BlocksByExtent) -> None:
        if self._guards:
            return  # two for each extent at most
        cuts = self._cuts
        if cuts is None:
            mappings = 2 * (self._runs + sum(len(after) - self._count(extent) for extent, after in fresh.items()))
        else:
            cuts = cuts.union(*(part.edges for part in added.values()))
            mappings = len(cuts)
        if mappings > self._most:
            offset = _first(added)
            raise OutOfMemoryError(
                errno.ENOMEM,
                f"{mappings} separate mappings would be needed, and this memory may have {self._most} (half of"
                " vm.max_map_count): populate less scattered blocks, make the blocks larger, or raise vm.max_map_count",
                address=self._address + offset, offset=offset,
            )  # fmt: skip
        self._cuts = cuts

    # --- to protect

    def suspend(self, blocks: BlocksByExtent) -> None:
        """Forbid access to the unprotected blocks among these until :meth:`resume`, or for good by :meth:`protect`."""
        parts = Intervals.union_of(
            part & self._unprotected[extent].hull for extent, part in blocks.items() if extent in self._unprotected
        )
        if self._cuts is not None:
            self._cuts.update(parts.edges)
        self._set_protection(parts, mman.PROT_NONE)

    def resume(self, blocks: BlocksByExtent) -> None:
        """Undo :meth:`suspend` for the blocks among these that are unprotected still."""
        parts: list[Intervals] = []
        for extent, part in blocks.items():
            if extent in self._unprotected:
                unprotected = self._unprotected[extent]
                parts.append(part & (unprotected.hull if self._guards else unprotected))
        self._set_protection(Intervals.union_of(parts), _ACCESSIBLE)

    def protect(self, blocks: BlocksByExtent) -> None:
        """Protect blocks for good: no page of them is left in the page tables, and empty tables are freed.

        Guards are installed anew where blocks are protected already. A process that punches a hole into a memory file while
        another one touches the page takes the guards of every process away (seen on 6.18: truncation of a folio that is
        mapped just then drops all markers). So this comes after the hole.
        """
        guard: list[Intervals] = []
        outside: list[Intervals] = []
        fresh: BlocksByExtent = {}
        for extent, part in blocks.items():
            before = self._unprotected.get(extent)
            if before is None:
                continue
            fresh[extent] = after = before - part
            if self._guards:
                outside.append(before.hull - after.hull)
                guard.append((part & after.hull) - after)
            else:
                outside.append(before & part)
        parts, guarded = Intervals.union_of(outside), Intervals.union_of(guard)
        self._set_protection(parts, mman.PROT_NONE)
        try:
            self._advise(guarded, mman.MADV_GUARD_INSTALL)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOMEM):
                raise
            # Locked since, or no memory for a page table. From here on without guards.
            self._guards = False
            self._set_protection(guarded, mman.PROT_NONE)
            self._drop(guarded)
        if self._guarded and parts:
            self._advise(parts, mman.MADV_GUARD_REMOVE)
        self._drop(parts)
        self._keep(fresh)

    # --- the kernel

    def _drop(self, parts: Iterable[tuple[int, int]]) -> None:
        for start, stop in parts:
            drop(self._address + start, stop - start)

    def _set_protection(self, parts: Intervals, protection: int) -> None:
        for start, stop in parts:
            mman.mprotect(self._address + start, stop - start, protection)

    def _advise(self, parts: Intervals, advice: int) -> None:
        if parts:
            advise(parts.shifted(self._address), advice)

    # --- the state by extent

    def _count(self, extent: int) -> int:
        return len(self._unprotected.get(extent, _NONE))

    def _keep(self, fresh: BlocksByExtent) -> None:
        for extent, unprotected in fresh.items():
            self._runs += len(unprotected) - self._count(extent)
            if unprotected:
                self._unprotected[extent] = unprotected
            else:
                self._unprotected.pop(extent, None)


def _first(blocks: BlocksByExtent) -> int:
    return min(part.span[0] for part in blocks.values())


def _max_map_count() -> int:
    with open("/proc/sys/vm/max_map_count") as file:
        return int(file.read())
