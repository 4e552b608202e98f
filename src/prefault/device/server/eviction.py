"""Eviction of pages without losing a write, reclaim by age, and tracking of first writes.

Evicting write-protects a page in every client, reads it, punches it out of the memfd (which removes it from every page
table), and wakes the threads that waited. While a page is EVICTING no client gets a new entry for it, so that protecting the
existing entries is enough.
"""

from __future__ import annotations

import errno
import re
from collections import deque
from typing import Any

from prefault.device.page_states import DevicePageState
from prefault.device.server import fault_resolution
from prefault.device.server.served_areas import ServedArea, ServerState, zeros

_ORDER_MOST = 1024
_DIRTY = re.compile(b"\x01+")
_UNSEEN = re.compile(b"\x00+")


class Eviction:
    """The primitive that evicts pages, and reclaim for devices that are not writable."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._frames = state.frames
        self.evicting = 0
        """Calls of :meth:`evict` under way, in all threads."""
        self._order: deque[range] | None = None
        self._listed = 0  # pages in it
        if state.capacity is not None and not state.device.writable:
            self._order = deque()
            if state.registry.generation:
                self._order.extend(self._frames.runs(range(self._frames.pages), DevicePageState.READY))
                self._listed = sum(map(len, self._order))

    # --- evict

    def evict(self, pages: range, save: Any = None) -> bytes:
        """Implement :meth:`DeviceArea.evict`; from any thread."""
        state = self._state
        if state.device.writable and not state.device.evicts:
            raise RuntimeError(f"{type(state.device).__name__} is writable and evicts: it has to declare evicts = True")
        with state.lock:
            runs = self._frames.runs(pages, DevicePageState.READY)
            protected = []
            try:
                for run in runs:
                    self._frames.mark(run, DevicePageState.EVICTING)
                    protected.append(run)
                    self._protect(run)
            except BaseException:
                for run in protected:
                    self._restore(run)
                raise
            self.evicting += 1
        contents = []
        left = deque(runs)
        try:
            while left:
                content = self._frames.view(left[0]).toreadonly()
                if save is None:
                    contents.append(bytes(content))
                else:
                    save(left[0], content)
                del content
                with state.lock:
                    self._punch_and_wake(left[0])
                    left.popleft()
        finally:
            with state.lock:
                for run in left:
                    self._restore(run)
                if runs:
                    state.changes += 1
                self.evicting -= 1
            state.notify()
        return b"".join(contents)

    def _protect(self, run: range) -> None:
        for area, start, length in self._state.areas_over(run):
            if area.protectable and not fault_resolution.protect(area.fd, start, length, self._state.unit):
                raise OSError(
                    errno.EBUSY,
                    f"process {area.pid} keeps changing its mappings: pages {run.start} to {run.stop - 1} were not evicted",
                )

    def _restore(self, run: range) -> None:
        """Return a run to READY and unprotect it: writers go on."""
        self._frames.mark(run, DevicePageState.READY)
        for area, start, length in self._state.areas_over(run):
            if area.tracks:
                # Clean pages remain protected.
                for dirty in dirty_runs(area, area.overlap(run)):
                    fault_resolution.unprotect(area.fd, area.address(dirty.start), len(dirty) * self._frames.page_size)
            elif area.protectable:
                fault_resolution.unprotect(area.fd, start, length)
            fault_resolution.wake(area.fd, start, length)

    def _punch_and_wake(self, run: range) -> None:
        """Punch the frames of a run, and wake the threads that wait, which fault again; under the lock."""
        self.punch(run)
        for area, start, length in self._state.areas_over(run):
            if area.protectable:
                fault_resolution.unprotect(area.fd, start, length)  # markers in page tables, where there was no entry
            fault_resolution.wake(area.fd, start, length)

    # --- the rest, under the lock

    def punch(self, run: range) -> None:
        """Drop the frames of a run that is FILLING, READY or EVICTING: it becomes MISSING.

        No thread waits for READY pages.
        """
        self._frames.mark(run, DevicePageState.PUNCHING)
        self._frames.punch(run)
        self._frames.mark(run, DevicePageState.MISSING)
        self._state.used -= len(run)

    def mark_supplied(self, run: range) -> None:
        """Mark a run as READY, and append it to the order of reclaim."""
        self._frames.mark(run, DevicePageState.READY)
        if self._order is not None:
            if self._order and self._order[-1].stop == run.start:
                self._order[-1] = range(self._order[-1].start, run.stop)
            else:
                self._order.append(run)
            self._listed += len(run)
            if self._listed > _ORDER_MOST + 2 * (self._state.capacity or 0):
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

    def drop_oldest(self, pages: int, keep: list[range]) -> None:
        """Reclaim so many pages, those that were supplied first, except those in ``keep``; it may find fewer.

        Only for devices that are not writable.
        """
        if self._order is None:
            return
        kept: list[range] = []
        while pages > 0 and self._order:
            oldest = self._order.popleft()
            self._listed -= len(oldest)
            for run in self._frames.runs(oldest, DevicePageState.READY):
                for piece in subtract(run, keep):
                    take = min(len(piece), pages)
                    if take:
                        self.punch(range(piece.start, piece.start + take))
                        pages -= take
            # Pages that stay, because they are kept or being evicted, are as old as they were.
            kept += self._frames.runs(oldest, DevicePageState.READY, DevicePageState.EVICTING)
        self._order.extendleft(reversed(kept))
        self._listed += sum(map(len, kept))

    def discard(self, pages: range) -> int:
        """Punch the READY pages of a range, and return their number. Pages that are FILLING or EVICTING are left alone."""
        count = 0
        with self._state.lock:
            for run in self._frames.runs(pages, DevicePageState.READY):
                self.punch(run)
                count += len(run)
        return count


def subtract(run: range, keep: list[range]) -> list[range]:
    """Return the pieces of a run that lie in none of the runs in ``keep``."""
    pieces = [run]
    for other in keep:
        pieces = [
            part
            for piece in pieces
            for part in (range(piece.start, min(piece.stop, other.start)), range(max(piece.start, other.stop), piece.stop))
            if len(part)
        ]
    return pieces


# --- dirty tracking, under the lock


def mark_dirty(area: ServedArea, page: int) -> None:
    """Record a write to a page of an area that tracks them."""
    area.dirty[page - area.first] = 1


def dirty_runs(area: ServedArea, pages: range) -> list[range]:
    """Return the runs of these pages of the area that were written to."""
    first = area.first
    return [
        range(match.start() + first, match.end() + first)
        for match in _DIRTY.finditer(area.dirty, pages.start - first, pages.stop - first)
    ]


def clear_dirty(area: ServedArea, runs: list[range], page_size: int, unit: int) -> None:
    """Forget the writes to these runs, and write-protect them so that the next one is noticed."""
    for run in runs:
        # Protected first: a thread that writes from now on waits until the page is marked again.
        fault_resolution.protect(area.fd, area.address(run.start), len(run) * page_size, unit)
        area.dirty[run.start - area.first : run.stop - area.first] = bytes(len(run))
