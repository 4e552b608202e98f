"""Taking pages back, so that no write is lost; and hearing of first writes.

Evict: write-protect a page in every client, read it, punch it out of the memfd (which takes it out of every page table), and
wake who waited. While a page is EVICTING no client gets a new entry for it, so that protecting those that exist is enough.
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
    """The primitive that takes pages back, and what the framework does with it."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._frames = state.frames
        self.evicting = 0
        """Calls of :meth:`evict` under way, in whichever thread."""
        self._order: deque[range] | None = None
        self._listed = 0  # pages in it
        if state.capacity is not None and not state.device.writable:
            self._order = deque()
            if state.registry.generation:
                self._order.extend(self._frames.runs(range(self._frames.pages), DevicePageState.READY))
                self._listed = sum(map(len, self._order))

    # --- evict

    def evict(self, pages: range, save: Any = None) -> bytes:
        """See :meth:`DeviceArea.evict`. From any thread."""
        state = self._state
        if state.device.writable and not state.device.evicts:
            raise RuntimeError(f"{type(state.device).__name__} is writable and evicts: it has to say so, with evicts = True")
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
        """They stay: whoever may write goes on writing."""
        self._frames.mark(run, DevicePageState.READY)
        for area, start, length in self._state.areas_over(run):
            if area.tracks:
                # Pages that nobody wrote to remain protected.
                for dirty in dirty_runs(area, area.overlap(run)):
                    fault_resolution.unprotect(area.fd, area.address(dirty.start), len(dirty) * self._frames.page_size)
            elif area.protectable:
                fault_resolution.unprotect(area.fd, start, length)
            fault_resolution.wake(area.fd, start, length)

    def _punch_and_wake(self, run: range) -> None:
        """Their frames go, and who waited faults again. Under the lock."""
        self.punch(run)
        for area, start, length in self._state.areas_over(run):
            if area.protectable:
                fault_resolution.unprotect(area.fd, start, length)  # what is left of it in page tables without entries
            fault_resolution.wake(area.fd, start, length)

    # --- the rest, under the lock

    def punch(self, run: range) -> None:
        """Pages whose content nobody misses are gone: FILLING, READY or EVICTING before. No one waits for READY ones."""
        self._frames.mark(run, DevicePageState.PUNCHING)
        self._frames.punch(run)
        self._frames.mark(run, DevicePageState.MISSING)
        self._state.used -= len(run)

    def mark_supplied(self, run: range) -> None:
        """The driver supplied them, in this order."""
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
        """Pages that were given back and supplied again are in the order several times: the last one counts."""
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
        """Make room for so many pages by dropping those that were supplied first, but for those in ``keep``.

        Only for devices that nobody can write to. There may be less room than that afterwards.
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
            # What of it is still there, for this reason or that, is as old as it was.
            kept += self._frames.runs(oldest, DevicePageState.READY, DevicePageState.EVICTING)
        self._order.extendleft(reversed(kept))
        self._listed += sum(map(len, kept))

    def discard(self, pages: range) -> int:
        """Give pages back that are READY; how many there were. Those that are being filled or evicted are left."""
        count = 0
        with self._state.lock:
            for run in self._frames.runs(pages, DevicePageState.READY):
                self.punch(run)
                count += len(run)
        return count


def subtract(run: range, keep: list[range]) -> list[range]:
    """The parts of a run that lie in none of the others."""
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
    """It is being written to."""
    area.dirty[page - area.first] = 1


def dirty_runs(area: ServedArea, pages: range) -> list[range]:
    """Those of the pages, which the area maps, that were written to."""
    first = area.first
    return [
        range(match.start() + first, match.end() + first)
        for match in _DIRTY.finditer(area.dirty, pages.start - first, pages.stop - first)
    ]


def clear_dirty(area: ServedArea, runs: list[range], page_size: int, unit: int) -> None:
    """Hear of the next writes to them again."""
    for run in runs:
        # Protected first: whoever writes from now on waits until it is marked again.
        fault_resolution.protect(area.fd, area.address(run.start), len(run) * page_size, unit)
        area.dirty[run.start - area.first : run.stop - area.first] = bytes(len(run))
