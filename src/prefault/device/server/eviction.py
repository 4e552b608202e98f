"""Eviction of pages without losing a write.

Evicting write-protects a page in every client, reads it, punches it out of the memfd (which removes it from every page
table), and wakes the threads that waited. While a page is EVICTING no client gets a new entry for it, so that protecting the
existing entries is enough.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Any

from prefault.device.server import fault_resolution
from prefault.device.server.served_areas import ServerState


class Eviction:
    """The primitive that evicts pages."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._frames = state.frames
        self._pool = state.pool

    def evict(self, pages: range, save: Any = None) -> bytes:
        """Implement :meth:`DeviceArea.evict`; from any thread."""
        state = self._state
        if state.device.writable and not state.device.evicts:
            raise RuntimeError(f"{type(state.device).__name__} is writable and evicts: it has to declare evicts = True")
        with state.lock:
            runs = self._pool.begin_eviction(pages)
            try:
                for run in runs:
                    self._protect(run)
            except BaseException:
                for run in runs:
                    self._restore(run)
                raise
            self._pool.evicting += 1
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
                self._pool.evicting -= 1
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
        self._pool.cancel_eviction(run)
        for area, start, length in self._state.areas_over(run):
            if area.tracks:
                # Clean pages remain protected.
                for dirty in area.dirty_runs(area.overlap(run)):
                    fault_resolution.unprotect(area.fd, area.address(dirty.start), len(dirty) * self._frames.page_size)
            elif area.protectable:
                fault_resolution.unprotect(area.fd, start, length)
            fault_resolution.wake(area.fd, start, length)

    def _punch_and_wake(self, run: range) -> None:
        """Punch the frames of a run, and wake the threads that wait, which fault again; under the lock."""
        self._pool.punch(run)
        for area, start, length in self._state.areas_over(run):
            if area.protectable:
                fault_resolution.unprotect(area.fd, start, length)  # markers in page tables, where there was no entry
            fault_resolution.wake(area.fd, start, length)
