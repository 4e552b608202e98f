"""Fences: what is not populated is a SIGSEGV, without shattering the reservation into more mappings than the kernel allows.

The reservation is cut into at most 8192 *extents*. Of each, the stretch from its first open block to its last, the *hull*,
is readable and writable; all else is PROT_NONE. Closed blocks inside a hull are guard regions (MADV_GUARD_INSTALL), which do
not split a mapping, so that an extent is never more than one mapping and the gap after it. Where the memory cannot have
guards (hugetlb; before Linux 6.13, of files before 6.15; locked memory) closed blocks inside a hull are PROT_NONE as well,
and the number of mappings is watched. The measurements behind this: docs/design/sparse.md.
"""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from prefault._kernel import mman
from prefault._system import capabilities
from prefault.engine.discarding import drop
from prefault.errors import OutOfMemoryError
from prefault.sizes import MIB, PAGE_SIZE
from prefault.sparse.advice_vector import advise

Edges: TypeAlias = "Sequence[int] | Numbers"
"""Starts and stops in turn, strictly increasing."""

if TYPE_CHECKING:
    from prefault.sparse.range_arguments import Numbers

_EXTENTS = 8192
_ACCESSIBLE = mman.PROT_READ | mman.PROT_WRITE
_TABLE_SPAN = 2 * MIB
"""What one page table maps on x86-64; elsewhere it is but a threshold."""


class BlockProtection:
    """Which blocks of a reservation may be touched. Everything is shut at first, and mapped PROT_NONE.

    Offsets count from the start of the reservation, in whole blocks. The caller holds a lock.
    """

    def __init__(self, address: int, length: int, block: int, *, merges: bool) -> None:
        """``merges``: whether the kernel joins neighbouring mappings of equal protection (of hugetlb it does not)."""
        self._address = address
        self._extent = block
        # A page table is what any block takes, so filling the rest of it with guards costs little.
        while self._extent < _TABLE_SPAN or self._extent * _EXTENTS < length:
            self._extent *= 2
        self._open: dict[int, array[int]] = {}
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

    # --- what is open

    def runs(self) -> list[int]:
        """What is open, as edges in order; neighbours are joined within extents only."""
        return [at for extent in sorted(self._open) for at in self._open[extent]]

    def first_shut(self, start: int, stop: int) -> int | None:
        """The first byte of ``[start, stop)`` that is shut."""
        while start < stop:
            edges = self._open.get(start // self._extent)
            at = bisect_right(edges, start) if edges is not None else 0
            if edges is None or not at & 1:
                return start
            start = edges[at]
        return None

    # --- opening

    def open(self, wanted: Edges, added: list[int]) -> None:
        """Make blocks accessible. Those that were not before are ``added``, before anything is done.

        Raises:
            OutOfMemoryError: the kernel has no room for the page tables or the mappings. Nothing is open then that was not.
        """
        accessible: list[int] = []
        guard: list[int] = []
        unguard: list[int] = []
        fresh: dict[int, array[int]] = {}
        for extent, part in self._by_extent(wanted):
            edges = self._open.get(extent, _NONE)
            new = _missing(edges, part) if edges else list(part)
            if not new:
                continue
            both = _add(array("q", edges), new) if edges else array("q", part)
            fresh[extent] = both
            added += new
            if not self._guards:
                accessible += new
                unguard += new if self._guarded else ()
                continue
            if not edges:
                guard += new[1:-1]
                accessible += (new[0], new[-1])
                continue
            low, high = edges[0], edges[-1]
            for start, stop in _pairs(new):
                if low <= start < high:
                    unguard += (start, stop)
                    accessible += (start, stop)
            for start, stop in zip(both[1:-1:2], both[2:-1:2], strict=True):
                if not low <= start < high:
                    guard += (start, stop)
            if both[0] < low:
                accessible += (both[0], low)
            if both[-1] > high:
                accessible += (high, both[-1])
        if not added:
            return
        self._check_mappings(added, fresh)
        try:
            self._keep(fresh)
            self._advise(guard, mman.MADV_GUARD_INSTALL)
            if unguard:
                self._advise(unguard, mman.MADV_GUARD_REMOVE)
                # Markers leave a page table that keeps a huge page out; emptying the range frees it (since Linux 6.14).
                self._drop(pair for pair in _pairs(unguard) if pair[1] - pair[0] >= _TABLE_SPAN)
            self._protect(_joined(sorted(_pairs(accessible))), _ACCESSIBLE)
        except BaseException as error:
            self.close(added)
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise OutOfMemoryError(
                    errno.ENOMEM,
                    "the kernel has no memory for page tables, or no room for another mapping (vm.max_map_count):"
                    " nothing was populated",
                    address=self._address + added[0], offset=added[0],
                ) from error  # fmt: skip
            raise

    def _check_mappings(self, added: Edges, fresh: dict[int, array[int]]) -> None:
        if self._guards:
            return  # two for each extent at most
        if self._cuts is None:
            mappings = 2 * (self._runs + sum((len(e) - len(self._open.get(x, _NONE))) // 2 for x, e in fresh.items()))
        else:
            mappings = len(self._cuts.union(added))
        if mappings > self._most:
            raise OutOfMemoryError(
                errno.ENOMEM,
                f"{mappings} separate mappings would be needed, and this memory may have {self._most} (half of"
                " vm.max_map_count): populate less scattered blocks, make the blocks larger, or raise vm.max_map_count",
                address=self._address + added[0], offset=added[0],
            )  # fmt: skip
        if self._cuts is not None:
            self._cuts.update(added)

    # --- shutting

    def shut(self, start: int, stop: int) -> None:
        """Forbid access to whatever is open in ``[start, stop)``, for :meth:`close` or :meth:`settle` to follow."""
        hulls: list[int] = []
        for extent, part in self._by_extent((start, stop)):
            edges = self._open.get(extent)
            if edges is not None:
                low, high = max(part[0], edges[0]), min(part[1], edges[-1])
                if low < high:
                    hulls += (low, high)
        parts = list(_joined(_pairs(hulls)))
        if self._cuts is not None:
            self._cuts.update(at for pair in parts for at in pair)
        self._protect(parts, mman.PROT_NONE)

    def settle(self, start: int, stop: int) -> None:
        """After :meth:`shut`: what is still open there may be touched again."""
        parts: list[tuple[int, int]] = []
        for extent, part in self._by_extent((start, stop)):
            edges = self._open.get(extent)
            if edges is None:
                continue
            if self._guards:
                hull = max(part[0], edges[0]), min(part[1], edges[-1])
                parts += (hull,) if hull[0] < hull[1] else ()
            else:
                parts += _pairs(_present(edges, part))
        self._protect(_joined(parts), _ACCESSIBLE)

    def close(self, unwanted: Edges) -> None:
        """Shut blocks for good: no page of them is left in our page tables, and the tables go back where they are empty.

        Guards are installed anew where blocks are shut already. Who punches a hole into a memory file while another process
        touches the page takes the guard away from everybody (seen on 6.18: truncation of a folio that is mapped just then
        drops all markers). So this comes after the hole.
        """
        guard: list[int] = []
        outside: list[int] = []
        fresh: dict[int, array[int]] = {}
        for extent, part in self._by_extent(unwanted):
            edges = self._open.get(extent)
            if edges is None:
                continue
            left = _subtract(array("q", edges), part)
            fresh[extent] = left
            if not self._guards:
                outside += _present(edges, part)
            elif not left:
                outside += (edges[0], edges[-1])
            else:
                if left[0] > edges[0]:
                    outside += (edges[0], left[0])
                if left[-1] < edges[-1]:
                    outside += (left[-1], edges[-1])
                guard += _missing(left, _present((left[0], left[-1]), part))
        parts = list(_joined(_pairs(outside)))
        self._protect(parts, mman.PROT_NONE)
        if guard:
            try:
                self._advise(guard, mman.MADV_GUARD_INSTALL)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOMEM):
                    raise
                # Locked since, or no memory for a page table. From here on without guards.
                self._guards = False
                self._protect(_joined(_pairs(guard)), mman.PROT_NONE)
                self._drop(_pairs(guard))
        if self._guarded and parts:
            self._advise([at for pair in parts for at in pair], mman.MADV_GUARD_REMOVE)
        self._drop(parts)
        self._keep(fresh)

    def _drop(self, parts: Iterable[tuple[int, int]]) -> None:
        for start, stop in parts:
            drop(self._address + start, stop - start)

    # --- the kernel

    def _protect(self, parts: Iterable[tuple[int, int]], protection: int) -> None:
        for start, stop in parts:
            mman.mprotect(self._address + start, stop - start, protection)

    def _advise(self, edges: Edges, advice: int) -> None:
        advise(self._address, edges, advice)

    # --- books

    def _keep(self, fresh: dict[int, array[int]]) -> None:
        for extent, edges in fresh.items():
            self._runs += (len(edges) - len(self._open.get(extent, _NONE))) // 2
            if edges:
                self._open[extent] = edges
            else:
                self._open.pop(extent, None)

    def _by_extent(self, edges: Edges) -> Iterator[tuple[int, Edges]]:
        """The part of a set in each extent that it touches."""
        size = self._extent
        if len(edges) > 2:
            yield from self._by_extent_many(edges)
            return
        for start, stop in _pairs(edges):
            start, stop = int(start), int(stop)
            for extent in range(start // size, -(-stop // size)):
                yield extent, (max(start, extent * size), min(stop, extent * size + size))

    def _by_extent_many(self, edges: Edges) -> Iterator[tuple[int, Edges]]:
        import numpy

        from prefault.sparse.range_arguments import pieces

        starts, lengths = pieces(numpy.asarray(edges, numpy.int64), self._extent)
        flat = numpy.empty(2 * len(starts), numpy.int64)
        flat[::2], flat[1::2] = starts, starts + lengths
        extents = starts // self._extent
        first = numpy.flatnonzero(numpy.concatenate(([True], extents[1:] != extents[:-1])))
        bounds = [*first.tolist(), len(starts)]
        every = flat.tolist()
        for extent, low, high in zip(extents[first].tolist(), bounds, bounds[1:], strict=False):
            yield extent, every[2 * low : 2 * high]


_NONE: array[int] = array("q")


def _pairs(edges: Iterable[int]) -> Iterator[tuple[int, int]]:
    ends = iter(edges)
    return zip(ends, ends, strict=True)


def _joined(parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted parts, those that touch made one."""
    pending: tuple[int, int] | None = None
    for start, stop in parts:
        if pending is not None and pending[1] == start:
            pending = pending[0], stop
        else:
            if pending is not None:
                yield pending
            pending = start, stop
    if pending is not None:
        yield pending


# An odd number of edges before a place is inside of the set.


def _add(edges: array[int], part: Edges) -> array[int]:
    for start, stop in _pairs(part):
        low, high = bisect_left(edges, start), bisect_right(edges, stop)
        edges[low:high] = array("q", (() if low & 1 else (start,)) + (() if high & 1 else (stop,)))
    return edges


def _subtract(edges: array[int], part: Edges) -> array[int]:
    for start, stop in _pairs(part):
        low, high = bisect_left(edges, start), bisect_right(edges, stop)
        edges[low:high] = array("q", ((start,) if low & 1 else ()) + ((stop,) if high & 1 else ()))
    return edges


def _missing(edges: Edges, part: Edges) -> list[int]:
    """What of ``part`` is not in the set."""
    found: list[int] = []
    for start, stop in _pairs(part):
        low, high = bisect_right(edges, start), bisect_left(edges, stop)
        found += () if low & 1 else (start,)
        found += edges[low:high]
        found += () if high & 1 else (stop,)
    return found


def _present(edges: Edges, part: Edges) -> list[int]:
    """What of ``part`` is in the set."""
    found: list[int] = []
    for start, stop in _pairs(part):
        low, high = bisect_right(edges, start), bisect_left(edges, stop)
        found += (start,) if low & 1 else ()
        found += edges[low:high]
        found += (stop,) if high & 1 else ()
    return found


def _max_map_count() -> int:
    with open("/proc/sys/vm/max_map_count") as file:
        return int(file.read())
