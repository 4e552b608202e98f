"""Fault-around: the pages that a fault brings in besides its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefault.device.pages.served_areas import ServedArea, ServerState

_THREADS = 64
"""Threads whose sequence of faults an area remembers."""


class FaultAroundWindows:
    """Windows around faults: aligned and of the first size for random faults, doubled while a thread's faults go forward."""

    def __init__(self, state: ServerState) -> None:
        around = state.device.fault_around
        self._first = 1 if around is None else max(1, around.first // state.page_size)
        self._most = 1 if around is None else max(self._first, around.most // state.page_size)
        if state.pool.capacity is not None:  # a window never takes so much that it drives itself out
            self._most = max(1, min(self._most, state.pool.capacity // 2))
            self._first = min(self._first, self._most)

    @property
    def wanted(self) -> bool:
        """True if a fault may bring in more than its page."""
        return self._most > 1

    def window_of(self, area: ServedArea, page: int, thread: int) -> range:
        """Return the window of a thread's fault, clipped to the area."""
        known = area.windows.pop(thread, None)
        if known is not None and known[0] == page:
            size = min(2 * known[1], self._most)
            start = page
        else:
            size = self._first
            start = page - page % size
        stop = min(start + size, area.last)
        if not area.windows:
            area.windows = {}
        area.windows[thread] = (stop, size)  # the latest is the last of the dict
        if len(area.windows) > _THREADS:
            del area.windows[next(iter(area.windows))]
        return range(max(start, area.first), stop)
