"""Free extents of an address space, first fit: the lowest one that is large enough."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class FreeExtents:
    """Free extents of ``[0, length)``, in units of ``unit``; the last unit may be a part of one.

    An allocation costs a step for each *size* of free extents, not for each extent: extents of one size are in a heap.

    Args:
        length: of the address space.
        unit: alignment of all extents.
        taken: start and size of the extents that are taken already, in ascending order.
    """

    def __init__(self, length: int, unit: int, taken: Iterable[tuple[int, int]] = ()) -> None:
        self._length = length
        self._unit = unit
        self._stops: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._heaps: dict[int, list[int]] = {}
        """Starts of the extents of each size, lowest first; among them those that have another size by now, or are taken."""
        end = 0
        for start, size in taken:
            self._add(end, start)
            end = self._end(start, size)
        self._add(end, length)

    @property
    def largest(self) -> int:
        """Size of the largest free extent; 0: all is taken."""
        return max((stop - start for start, stop in self._stops.items()), default=0)

    def find(self, size: int) -> int | None:
        """Return the start of the first free extent that has ``size``, or None."""
        return min((heap[0] for heap in self._usable(size)), default=None)

    def take(self, start: int, size: int) -> None:
        """Take ``[start, start + size)``, rounded up to units; ``start`` is one that :meth:`find` returned."""
        stop = self._remove(start)
        self._add(self._end(start, size), stop)

    def give(self, start: int, size: int) -> None:
        """Give back an extent that was taken; it joins its free neighbours."""
        end = self._end(start, size)
        before = self._starts.get(start)
        if before is not None:
            self._remove(before)
            start = before
        if end in self._stops:
            end = self._remove(end)
        self._add(start, end)

    def _end(self, start: int, size: int) -> int:
        return min(start + size + -size % self._unit, self._length)

    def _add(self, start: int, stop: int) -> None:
        if start < stop:
            self._stops[start], self._starts[stop] = stop, start
            heapq.heappush(self._heaps.setdefault(stop - start, []), start)

    def _remove(self, start: int) -> int:
        stop = self._stops.pop(start)
        del self._starts[stop]
        return stop

    def _usable(self, size: int) -> list[list[int]]:
        """Return the heaps of the sizes that are large enough, each with a free extent of its size on top."""
        found = []
        for each, heap in list(self._heaps.items()):
            if each < size:
                continue
            while heap and self._stops.get(heap[0]) != heap[0] + each:
                heapq.heappop(heap)
            if heap:
                found.append(heap)
            else:
                del self._heaps[each]
        return found
