"""Isolation of pages: the steps by which the server takes pages from all clients without losing a write.

Isolating marks READY pages as EVICTING, after which no client gets a new entry, and write-protects the entries that there
are. From then on the content does not change: it can be saved, copied aside, dropped, or put back.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from prefault.device.page_runs import subtract
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution

if TYPE_CHECKING:
    from prefault.device.pages.huge_pages import HugePages
    from prefault.device.pages.served_areas import ServedArea, ServerState

_PIECES_FOR_THREADS = 8
"""Pieces from which on two threads copy them."""
_log = logging.getLogger("prefault.device")
_LOOK_S = 0.0005


class Isolation:
    """The steps; :class:`Eviction` and :class:`ShootDown` are made of them. All but the copying hold the server's lock."""

    def __init__(self, state: ServerState, huge: HugePages) -> None:
        self._state = state
        self._huge = huge
        self._frames = state.frames
        self._pool = state.pool
        self._copying = 0
        self._stopped = False
        """Threads that are copying content back, outside of the lock."""

    def check(self) -> None:
        """Raise RuntimeError unless the device may act on pages that clients write."""
        device = self._state.device
        if device.writable and not device.evicts:
            raise RuntimeError(f"{type(device).__name__} is writable and evicts: it has to declare evicts = True")

    def isolate(self, pages: range) -> list[range]:
        """Isolate the READY ones of these pages, and return them in runs; OSError (EBUSY): none is isolated."""
        with self._state.lock:
            runs = self._pool.begin_eviction(pages)
            try:
                for run in runs:
                    self.write_protect(run)
            except BaseException:
                for run in runs:
                    self.put_back(run)
                raise
            return runs

    def write_protect(self, run: range) -> None:
        """Write-protect the entries of all clients; under the lock. OSError (EBUSY): one keeps changing its mappings."""
        for area, start, length in self._state.areas_over(run):
            if area.protectable and not self._huge.protect(area, start, length):
                raise OSError(
                    errno.EBUSY,
                    f"process {area.pid} keeps changing its mappings: pages {run.start} to {run.stop - 1} were not"
                    " write-protected",
                )

    def put_back(self, run: range) -> None:
        """Return EVICTING pages to READY and remove the protection that isolating added: writers go on."""
        with self._state.lock:
            self._pool.make_ready(run)
            self.unprotect(run)

    def unprotect(self, run: range) -> None:
        """Remove write protection where the next write need not be noticed, and wake the threads that wait; under the lock.

        Clean pages, where writes are tracked, and read-only ones stay protected.
        """
        for area, start, length in self._state.areas_over(run):
            if area.protectable:
                self._unprotect(area, area.overlap(run))
            fault_resolution.wake(area.fd, start, length)

    def _unprotect(self, area: ServedArea, pages: range) -> None:
        pieces = area.dirty_runs(pages) if area.tracks else [pages]
        if self._state.protections.in_use:
            pieces = [part for piece in pieces for part in self._state.protections.writable_runs(piece)]
        for piece in pieces:
            self._huge.unprotect(area, area.address(piece.start), len(piece) * self._frames.page_size)

    def resume(self, area: ServedArea) -> None:
        """Settle the write protection of an area that a server left which died in the middle of changing it.

        Threads that wait are woken by the caller.
        """
        if area.protectable:
            self._huge.arm(area, area.start, area.length)  # some of it may be so already, none may not be registered
        if not self._state.protections.in_use:
            self._huge.unprotect(area, area.start, area.length)
        elif area.protectable:
            with self._state.lock:
                for run in self._frames.runs(area.pages, DevicePageState.READY):
                    # Flags come before entries: a server may have died between them.
                    for piece in subtract(run, self._state.protections.writable_runs(run)):
                        size = len(piece) * self._frames.page_size
                        fault_resolution.protect(area.fd, area.address(piece.start), size, self._state.unit)
                    self._unprotect(area, run)

    def drop(self, run: range) -> None:
        """Give the frames of EVICTING pages back, and wake the threads that wait, which fault again."""
        with self._state.lock:
            self._pool.punch(run)
            self._wake(run)

    def _wake(self, run: range) -> None:
        for area, start, length in self._state.areas_over(run):
            if area.protectable:
                self._huge.unprotect(area, start, length)  # markers in page tables, where there was no entry
            fault_resolution.wake(area.fd, start, length)

    # --- the copy aside

    def move_aside(self, run: range) -> None:
        """Move the content of EVICTING pages to the copy aside: no client has an entry any more.

        Raises:
            OSError: ENOSPC: there is no memory for the copy. Some of the pages are moved.
        """
        self._for_pieces(run, self._move_piece_aside)

    def _move_piece_aside(self, piece: range) -> None:
        self._frames.copy_aside(piece)
        with self._state.lock:
            self._frames.mark(piece, DevicePageState.ASIDE)
            self._frames.punch(piece)

    def move_back(self, run: range) -> list[range]:
        """Copy the content of ASIDE pages back to their frames, and return them: EVICTING, until :meth:`end_aside`.

        Pages for which there is no memory are lost, and not among them.
        """
        self._for_pieces(run, self._move_piece_back)
        return self._frames.runs(run, DevicePageState.EVICTING)

    def _move_piece_back(self, piece: range) -> None:
        with self._state.lock:
            self._copying += 1
        try:
            self._frames.copy_back(piece)
        except OSError as error:
            self.lose(piece, f"there was no memory to put their content back: {error.strerror}")
        else:
            with self._state.lock:
                self._frames.mark(piece, DevicePageState.EVICTING)  # which a crash leaves as they are
                self._frames.forget_aside(piece)
        finally:
            with self._state.lock:
                self._copying -= 1

    def _for_pieces(self, run: range, act: Callable[[range], None]) -> None:
        """Act on the pieces of a run, in two threads if there are many: copying keeps neither the GIL nor the lock."""
        pieces = self._frames.chunks(run)
        if self._stopped or len(pieces) < _PIECES_FOR_THREADS or len(os.sched_getaffinity(0)) < 2:
            for piece in pieces:
                act(piece)
            return
        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(act, piece) for piece in pieces]:
                done.result()

    def end_aside(self, run: range, *, ready: bool) -> None:
        """End ASIDE: the pages are READY, with what their frames hold, or MISSING. Then wake the threads that wait."""
        if not len(run):
            return
        with self._state.lock:
            if ready:
                self._pool.make_ready(run)
            else:
                self._pool.punch(run)
            self._frames.forget_aside(run)
            self._wake(run)

    def restore(self, run: range) -> None:
        """Return ASIDE and EVICTING pages of a run to READY with the content that they had."""
        for piece in self._frames.runs(run, DevicePageState.EVICTING):
            self.put_back(piece)
        for piece in self._frames.runs(run, DevicePageState.ASIDE):
            for moved in self.move_back(piece):
                self.end_aside(moved, ready=True)

    def stop(self) -> None:
        """Take the server's lock for good, and restore all pages, at the end.

        Threads of the driver that act on pages stop at the lock. One that is copying content back is waited for: it would
        write into pages which clients have by then.
        """
        while True:
            self._state.lock.acquire()
            if not self._copying:
                break
            self._state.lock.release()
            time.sleep(_LOOK_S)
        self._stopped = True  # this thread has the lock from now on: others would wait for it
        self.restore(range(self._frames.pages))

    def lose(self, run: range, why: str) -> None:
        """Poison isolated pages for which there is no memory any more: their content is lost, and touching them says so."""
        _log.error("device %s: pages %d to %d are lost: %s", self._state.name, run.start, run.stop - 1, why)
        with self._state.lock:
            self._state.protections.poison(run, why)
            self.end_aside(run, ready=False)
