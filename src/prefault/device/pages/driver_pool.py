"""The pages of a device as its driver acts on them: one object for each server, passed to ``Device.start``."""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Final

from prefault.device.device_pool import Access, ClientProcess, DeviceObject, DevicePool, Save
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution
from prefault.device.pages.shoot_down import ServedShootDown

if TYPE_CHECKING:
    from prefault.device.pages.eviction import Eviction
    from prefault.device.pages.isolation import Isolation
    from prefault.device.pages.page_tables import PageTables
    from prefault.device.pages.served_areas import ServerState

RESERVED_NAMES: Final = "prefault."
"""Beginning of the names of kept memory that are the framework's."""
_LOOK_S: Final = 0.0005
_BUSY: Final = (DevicePageState.FILLING, DevicePageState.EVICTING, DevicePageState.ASIDE)
"""States of pages that a thread of the driver has at the moment."""


class ServedPool(DevicePool):
    """The device's pages in the server."""

    def __init__(
        self, state: ServerState, eviction: Eviction, isolation: Isolation, page_tables: PageTables, *, threaded: bool
    ) -> None:
        self.page_size = state.page_size
        self.capacity = state.pool.capacity
        self._state = state
        self._frames = state.frames
        self._eviction = eviction
        self._isolation = isolation
        self._page_tables = page_tables
        self._loop = None if threaded else threading.get_ident()
        """The thread in which all calls of the driver run, if there is only one."""

    @property
    def pages(self) -> range:
        """Numbers of all pages of the device."""
        return range(self._frames.pages)

    @property
    def reclaiming_for(self) -> list[range]:
        """Pages of the populate request that room is made for: see :meth:`DevicePool.reclaiming_for`."""
        return self._state.reclaiming_for

    def ready(self, pages: range) -> list[range]:
        """Return the runs of these pages that are supplied now: see :meth:`DevicePool.ready`."""
        self._state.check_pages(pages)
        return self._state.reclaimable(pages)

    def dirty(self, pages: range) -> list[range]:
        """Return the runs of pages that clients may have written to: see :meth:`DevicePool.dirty`."""
        self._state.check_pages(pages)
        with self._state.lock:
            return self._state.protections.dirty_runs(pages)

    def evict(self, pages: range, save: Save | None = None) -> bytes:
        """Evict supplied pages: see :meth:`DevicePool.evict`."""
        self._state.check_pages(pages)
        return self._eviction.evict(pages, save)

    def writeback(self, pages: range, save: Save) -> int:
        """Save dirty pages: see :meth:`DevicePool.writeback`."""
        self._state.check_pages(pages)
        return self._eviction.writeback(pages, save)

    def supply(self, pages: range, write: Save | None = None) -> int:
        """Bring missing pages in: see :meth:`DevicePool.supply`."""
        self._state.check_pages(pages)
        with self._state.lock:
            cured = self._state.protections.cure(pages)
            runs = self._frames.runs(pages, DevicePageState.MISSING)
        try:
            return self._supply_runs(runs, write)
        except BaseException:
            with self._state.lock:
                for poisoned, reason in cured:
                    for run in self._frames.runs(poisoned, DevicePageState.MISSING):
                        self._state.protections.poison(run, reason)
            raise

    def _supply_runs(self, runs: list[range], write: Save | None) -> int:
        supplied = 0
        for run in runs:
            left = self._begin_fills(run)
            try:
                while left:
                    self._supply(left[0], write)
                    supplied += len(left.pop(0))
            finally:
                with self._state.lock:
                    for piece in left[1:]:  # the first one is finished
                        self._finish(piece, piece.start, reserved=False)
        return supplied

    def _begin_fills(self, run: range) -> list[range]:
        """Mark the missing pages of a run as FILLING, once nobody shoots them down; return them in runs."""
        until = time.monotonic() + self._state.device.timeout_s / 2
        while True:
            with self._state.lock:
                holders = self._state.held.holders(run)
                if not holders:
                    left = self._frames.runs(run, DevicePageState.MISSING)  # the loop may have been faster with some
                    for piece in left:
                        self._state.pool.begin_fill(piece)
                    return left
            if threading.get_ident() in holders:
                raise RuntimeError(f"this thread shoots some of {run} down: they can be supplied before or after")
            if time.monotonic() > until:
                raise OSError(errno.EBUSY, f"some of {run} are being shot down, and that does not end")
            time.sleep(_LOOK_S)

    def _supply(self, run: range, write: Save | None) -> None:
        """Supply a run of pages that are FILLING."""
        state, done = self._state, run.start
        with state.lock:
            reserved = state.pool.reserve(len(run), [])
        try:
            if not reserved:
                raise OSError(
                    errno.ENOSPC,
                    f"the device's capacity of {self.capacity} pages has no room for {len(run)} more:"
                    f" {state.pool.used} are taken",
                )
            self._frames.secure(run)
            if write is not None:
                write(run, self._frames.view(run))
            self._frames.clear_tail(run)
            done = run.stop
        finally:
            with state.lock:
                self._finish(run, done, reserved)

    def _finish(self, run: range, done: int, reserved: bool) -> None:
        self._state.pool.finish_fill(run, done, reserved)
        self._page_tables.answer_parked(range(run.start, done))
        self._fault_again(range(done, run.stop))

    def retry(self, pages: range) -> None:
        """Ask the driver again for pages: see :meth:`DevicePool.retry`."""
        self._state.check_pages(pages)
        with self._state.lock:
            self._fault_again(pages)

    def _fault_again(self, pages: range) -> None:
        """Wake the threads that wait for pages which the driver could not supply, and have populates ask it again."""
        for area, page, _, _ in self._state.parked.take(pages):
            if area.alive:
                self._page_tables.wake(area, page)
        self._state.parked.rounds += 1
        self._state.changes += 1
        self._state.notify()

    def protect(self, pages: range, access: Access) -> None:
        """Set whether clients may write to pages: see :meth:`DevicePool.protect`."""
        self._state.check_pages(pages)
        if access not in ("read", "write"):
            raise ValueError(f"access is 'read' or 'write', not {access!r}")
        self._isolation.check()
        state = self._state
        with state.lock:
            if access == "write":
                return self._allow_writes(pages)
            before = state.protections.not_read_only_runs(pages)
            # First: an entry that is made from now on has the new protection.
            state.protections.set(pages, "read")
            try:
                for run in self._frames.runs(pages, DevicePageState.READY):
                    self._isolation.write_protect(run)
            except OSError:
                for run in before:
                    self._allow_writes(run)
                raise
            return None

    def _allow_writes(self, pages: range) -> None:
        self._state.protections.set(pages, "write")
        for run in self._frames.runs(pages, DevicePageState.READY):
            self._isolation.unprotect(run)

    def prefer_huge(self, pages: range, huge: bool = True) -> None:
        """Have chunks be huge pages: see :meth:`DevicePool.prefer_huge`."""
        self._state.check_pages(pages)
        self._page_tables.huge.prefer(pages, huge)

    def poison(self, pages: range, reason: str = "") -> None:
        """Drop the content of pages, and fail each touch: see :meth:`DevicePool.poison`."""
        self._state.check_pages(pages)
        state = self._state
        with state.lock:
            state.protections.poison(pages, reason)
            for run in self._frames.runs(pages, DevicePageState.READY):
                state.pool.punch(run)
                for area, start, length in state.areas_over(run):
                    fault_resolution.wake(area.fd, start, length)
            self._fault_again(pages)

    def shoot_down(self, pages: range) -> ServedShootDown:
        """Take the entries of all clients for pages away: see :meth:`DevicePool.shoot_down`."""
        self._state.check_pages(pages)
        waits = threading.get_ident() != self._loop
        return ServedShootDown(self._state, self._isolation, pages, waits=waits)

    def keep(self, name: str, length: int) -> memoryview:
        """Return memory that survives the server: see :meth:`DevicePool.keep`."""
        if isinstance(name, str) and name.startswith(RESERVED_NAMES):
            raise ValueError(f"names of kept memory that begin with {RESERVED_NAMES!r} are the framework's: {name!r}")
        return self._frames.kept.keep(name, length)

    # --- objects and clients

    def create_object(self, name: str, length: int) -> DeviceObject:
        """Make an object: see :meth:`DevicePool.create_object`."""
        state = self._state
        with state.lock:
            made = state.objects.place(name, length)
            self._check_idle(made)
            self._drop_pages(made)  # supplied for clients that mapped them without a name
            state.objects.add(made)
        return made

    def delete_object(self, name: str) -> None:
        """Delete an object: see :meth:`DevicePool.delete_object`."""
        state = self._state
        with state.lock:
            found = state.objects.find(name)
            self._check_idle(found)
            # First: killed in between, a server leaves pages behind that the next object at this place does not get.
            state.remove_object(found)
            self._drop_pages(found)

    def _check_idle(self, place: DeviceObject) -> None:
        """Raise OSError EBUSY if pages are being supplied or evicted, for clients that mapped them without a name."""
        busy = self._frames.runs(place.pages(self.page_size), *_BUSY)
        if busy:
            raise OSError(
                errno.EBUSY, f"object {place.name!r}: page {busy[0].start} of the device is being supplied or taken away"
            )

    def _drop_pages(self, place: DeviceObject) -> None:
        pages, state = place.pages(self.page_size), self._state
        state.protections.set(pages, "write")
        state.protections.cure(pages)
        if state.pool.discard(pages):
            state.changes += 1

    def object(self, name: str) -> DeviceObject:
        """Return the object of a name."""
        with self._state.lock:
            return self._state.objects.find(name)

    def objects(self) -> list[DeviceObject]:
        """Return all objects."""
        with self._state.lock:
            return self._state.objects.all()

    def object_at(self, page: int) -> DeviceObject | None:
        """Return the object that a page belongs to."""
        with self._state.lock:
            return self._state.objects.at(page)

    def clients(self) -> list[ClientProcess]:
        """Return the processes that are connected."""
        return [client.process for client in list(self._state.clients.values())]
