"""The pages of a device: every change of a page's state, the count of frames, and reclaim by age."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING

from prefault.device.frames import zeros
from prefault.device.page_runs import append_run, subtract
from prefault.device.page_states import DevicePageState, PageFlag

if TYPE_CHECKING:
    from prefault.device.frames import Frames
    from prefault.device.pages.protections import PageProtections

_ORDER_MOST = 1024
_UNSEEN = re.compile(b"\x00+")
_FILLING = int(DevicePageState.FILLING)
_READY = int(DevicePageState.READY)
_POISONED = int(PageFlag.POISONED)


class PagePool:
    """Owner of the states of a device's pages, and of the number of their frames.

    Its methods are called under the server's lock; only :meth:`begin_one` is not.

    Args:
        frames: of the device.
        capacity: pages that may have a frame at once; None: any number.
        protections: of the pages.
        reclaims: pages may be dropped to make room, in the order in which they were supplied: the device is not writable.
        restarted: a server before this one supplied pages.

    Attributes:
        capacity: as given.
        used: pages that have a frame, or are about to get one.
        evicting: evictions and discards under way, in all threads.
    """

    def __init__(
        self, frames: Frames, capacity: int | None, protections: PageProtections, *, reclaims: bool, restarted: bool
    ) -> None:
        self._frames = frames
        self._protections = protections
        self._states = frames.states
        self._flags = frames.flags
        self.capacity = capacity
        self.used = 0
        self.evicting = 0
        everything = range(frames.pages)
        if restarted:  # else there are none, and reading would allocate the states of a device of any size
            self.used = frames.pages - frames.count(everything, DevicePageState.MISSING)
        self._order: deque[range] | None = deque() if reclaims and capacity is not None else None
        if restarted and self._order is not None:
            self._order.extend(frames.runs(everything, DevicePageState.READY))
        self._listed = sum(map(len, self._order or ()))  # pages in it

    def new_frames(self, pages: int) -> int:
        """Return how many frames are added for so many pages: beyond the capacity others are dropped for them."""
        return pages if self.capacity is None else min(pages, max(0, self.capacity - self.used))

    # --- filling

    def begin_fill(self, pages: range) -> None:
        """Mark pages, all MISSING, as FILLING."""
        self._frames.mark(pages, DevicePageState.FILLING)

    def reserve(self, count: int, keep: list[range]) -> bool:
        """Count frames for pages that are FILLING; return False if the capacity has no room, even after reclaim.

        Pages in ``keep`` are not reclaimed.
        """
        if self.capacity is not None:
            self._drop_oldest(self.used + count - self.capacity, keep)
            if self.used + count > self.capacity:
                return False
        self.used += count
        return True

    def finish_fill(self, pages: range, done: int, reserved: bool) -> None:
        """Mark pages up to ``done`` as READY, and the others as MISSING again; ``reserved``: their frames are counted."""
        ready, lost = range(pages.start, done), range(done, pages.stop)
        if len(ready):
            self.make_ready(ready)
            if self._order is not None:
                self._append(ready)
        if len(lost) and reserved:
            self.punch(lost)
        elif len(lost):
            self._frames.mark(lost, DevicePageState.MISSING)

    def begin_one(self, page: int) -> None:
        """Mark one MISSING page as FILLING, in the loop, which alone changes MISSING pages."""
        self._states[page] = _FILLING

    def finish_one(self, page: int, supplied: bool) -> None:
        """Count the frame of one FILLING page of a device without a capacity, and mark it as READY if it was supplied."""
        self.used += 1
        if supplied:
            self._states[page] = _READY
            if self._flags[page] & _POISONED:  # meanwhile, by another thread of the driver
                self.punch(range(page, page + 1))

    # --- giving frames back

    def begin_eviction(self, pages: range) -> list[range]:
        """Mark the READY ones of these pages as EVICTING; return them in runs."""
        runs = self._frames.runs(pages, DevicePageState.READY)
        for run in runs:
            self._frames.mark(run, DevicePageState.EVICTING)
        return runs

    def make_ready(self, run: range) -> None:
        """Mark pages that were filled, isolated or shot down as READY, but for those that were poisoned meanwhile."""
        self._frames.mark(run, DevicePageState.READY)
        for poisoned in self._protections.poisoned_runs(run):
            self.punch(poisoned)

    def punch(self, run: range) -> None:
        """Drop the frames of a run that is FILLING, READY, EVICTING or ASIDE: it becomes MISSING.

        No thread waits for READY pages.
        """
        self._frames.mark(run, DevicePageState.PUNCHING)
        self._frames.punch(run)
        self._protections.mark_clean(run)
        self._frames.mark(run, DevicePageState.MISSING)
        self.used -= len(run)

    def discard(self, pages: range) -> int:
        """Punch the READY pages of a range, and return their number. Pages that are FILLING or EVICTING are left alone."""
        runs = self._frames.runs(pages, DevicePageState.READY)
        for run in runs:
            self.punch(run)
        return sum(map(len, runs))

    # --- the order of reclaim

    def _append(self, run: range) -> None:
        assert self._order is not None
        append_run(self._order, run)
        self._listed += len(run)
        if self._listed > _ORDER_MOST + 2 * (self.capacity or 0):
            self._remove_duplicates()

    def _remove_duplicates(self) -> None:
        """Keep the last entry of each page in the order: pages that were dropped and supplied again are listed twice."""
        assert self._order is not None
        seen = zeros(self._frames.pages)
        kept: deque[range] = deque()
        for run in reversed(self._order):
            for piece in reversed(self._frames.runs(run, DevicePageState.READY, DevicePageState.EVICTING)):
                fresh = [match.span() for match in _UNSEEN.finditer(seen, piece.start, piece.stop)]
                kept.extendleft(range(*span) for span in reversed(fresh))
                seen[piece.start : piece.stop] = b"\x01" * len(piece)
        self._order, self._listed = kept, sum(map(len, kept))

    def _drop_oldest(self, pages: int, keep: list[range]) -> None:
        """Punch so many READY pages, those that were supplied first, except those in ``keep``; it may find fewer."""
        if self._order is None:
            return
        kept: list[range] = []
        while pages > 0 and self._order:
            oldest = self._order.popleft()
            self._listed -= len(oldest)
            for run in self._frames.runs(oldest, DevicePageState.READY):
                for piece in subtract(run, keep):
                    count = min(len(piece), pages)
                    if count:
                        self.punch(range(piece.start, piece.start + count))
                        pages -= count
            # Pages that stay, because they are kept or being evicted, are as old as they were.
            kept += self._frames.runs(oldest, DevicePageState.READY, DevicePageState.EVICTING)
        self._order.extendleft(reversed(kept))
        self._listed += sum(map(len, kept))
