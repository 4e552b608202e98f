"""Page faults: read from userfaultfds, sorted, and answered from READY pages or by the driver."""

from __future__ import annotations

import os
from functools import partial
from time import monotonic_ns
from typing import TYPE_CHECKING

from prefault._kernel.userfaultfd import (
    MESSAGE,
    MESSAGE_BYTES,
    UFFD_EVENT_PAGEFAULT,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    ForkEvent,
    decode,
)
from prefault.device.driver import RETRY, Device
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution
from prefault.device.pages.counters import LOG_MOST
from prefault.device.pages.fills import Fill
from prefault.device.pages.served_areas import ServedArea, ServedClient, ServerState, access_of
from prefault.device.server.driver_calls import DriverCalls

if TYPE_CHECKING:
    from prefault.device.pages.fault_around import FaultAroundWindows
    from prefault.device.pages.page_tables import PageTables
    from prefault.device.server.discards import Discards
    from prefault.device.server.workers import Jobs
    from prefault.device.server.write_requests import WriteRequests

_BATCH = 64
_AGAIN_NS = 500_000
"""Nanoseconds to go on reading one userfaultfd. On one CPU the thread that was answered runs at once, and may fault again
before the loop continues: to read again takes 2 us less than epoll. Other clients wait meanwhile."""
_READY = int(DevicePageState.READY)
_MISSING = int(DevicePageState.MISSING)
_FILLING = int(DevicePageState.FILLING)
_TAKEN = (int(DevicePageState.EVICTING), int(DevicePageState.ASIDE))

_unpack = MESSAGE.unpack_from


class Faults:
    """Answers the messages of userfaultfds."""

    def __init__(
        self, state: ServerState, page_tables: PageTables, calls: DriverCalls, jobs: Jobs, discards: Discards,
        windows: FaultAroundWindows, write_requests: WriteRequests,
    ) -> None:  # fmt: skip
        self._state = state
        self._page_tables = page_tables
        self._jobs = jobs
        self._discards = discards
        self._discarding = discards.active
        self._windows = windows
        self._write_requests = write_requests
        self._held = state.held.active
        self._flags = state.frames.flags
        self._parked = state.parked.by_page
        # A driver that takes no pool has no other thread that could supply a page.
        self._alone = type(state.device).start is Device.start
        self._lock = state.lock
        self._states = state.frames.states
        self._size = state.page_size
        self._shift = state.page_size.bit_length() - 1
        self._huge = page_tables.huge
        self._around = windows.wanted or state.device.huge_faults
        self._buffer = bytearray(_BATCH * MESSAGE_BYTES)
        self._heartbeat = state.frames.heartbeat
        self._recent: ServedClient | None = None
        self._fill_one = calls.fill_one
        self._begin_one = state.pool.begin_one
        self._finish_one = state.pool.finish_one
        self._map_one = page_tables.map_one
        # Without a capacity, windows and workers a fault is answered in few steps, except in the device's partial last page.
        self._fast_path = state.pool.capacity is None and not jobs.threaded and not self._around
        self._blamed = state.registry.blamed
        self._tail = state.frames.pages - 1 if state.frames.tail else -1

    def read(self, client: ServedClient) -> None:
        """Read and answer the faults of a client, until none is left or others have waited long enough."""
        self._recent = client
        heartbeat, buffer, read_into = self._heartbeat, self._buffer, client.read_into
        until = 0
        try:
            while True:
                try:
                    size = read_into(buffer)
                except OSError:
                    return self._state.schedule_removal(client)
                if size is None:
                    return None  # all read; or the thread was killed meanwhile, or another event made it go on
                now = monotonic_ns()
                area = client.last
                event, flags, address, thread = _unpack(buffer)
                if size == MESSAGE_BYTES and event == UFFD_EVENT_PAGEFAULT and area and area.start <= address < area.stop:
                    self._answer_one(area, (address - area.base) >> self._shift, flags, thread, now)
                else:
                    self._answer(client, size, now)
                if client.gone:
                    return None
                if not until:
                    until = now + _AGAIN_NS
                elif now > until:
                    return None
                # Should the client have made it blocking just now, the loop stops here until its next fault. The warden ends
                # that, as it does for a driver that does not return.
                heartbeat[0] = now
        finally:
            heartbeat[0] = 0

    def take_recent(self) -> ServedClient | None:
        """Return the client whose faults were answered last since the last call, if any."""
        recent, self._recent = self._recent, None
        return recent

    def _answer(self, client: ServedClient, size: int, now: int) -> None:
        if size == MESSAGE_BYTES:
            event, flags, address, thread = _unpack(self._buffer)
            if event == UFFD_EVENT_PAGEFAULT:
                area = client.find(address)
                if area is None:
                    return self._stray(client, address)
                return self._answer_one(area, (address - area.base) >> self._shift, flags, thread, now)
        return self._answer_many(client, size, now)

    # In as few steps as possible, since a thread waits for it.
    def _answer_one(self, area: ServedArea, page: int, flags: int, thread: int, now: int) -> None:
        if flags & UFFD_PAGEFAULT_FLAG_WP:
            return self._resolve_write(area, page, now)
        if self._states[page] != _MISSING:
            counters = area.counters
            with self._lock:
                state = self._states[page]
                if state == _READY:
                    counters.minor += 1
                    if self._around:
                        self._map(area, page, flags & UFFD_PAGEFAULT_FLAG_WRITE != 0, thread)
                    else:
                        log = counters.log
                        log.append(page)
                        if len(log) > LOG_MOST:
                            counters.trim_log()
                        self._map_one(area, page, flags & UFFD_PAGEFAULT_FLAG_WRITE != 0)
                    counters.latency[((monotonic_ns() - now) // 1000).bit_length()] += 1
                    return None
                if state != _MISSING:
                    # An eviction or shoot-down wakes all threads at its end, under the lock that is held now: so after this.
                    if state == _FILLING:
                        self._wait(area, page, flags & UFFD_PAGEFAULT_FLAG_WRITE != 0, now)
                    return None
        # MISSING. Other threads of the driver change that as well, by DevicePool.supply; see _begin_one and Jobs.start.
        if self._discarding and self._discards.defer_fault(area, page):
            return None
        if self._held:
            with self._lock:
                if self._state.held.defer(page, partial(self._page_tables.wake, area, page)):
                    return None
        if self._fast_path and not self._blamed and page != self._tail and not self._flags[page]:
            return self._supply_one(area, page, flags, now)
        return self._supply(area, page, bool(flags & UFFD_PAGEFAULT_FLAG_WRITE), thread, now)

    def _answer_many(self, client: ServedClient, size: int, now: int) -> None:
        """Answer several faults: sorted, each page once, and neighbours together."""
        wanted: dict[tuple[int, int], tuple[ServedArea, int, int]] = {}
        messages = bytes(self._buffer[:size])
        for at in range(0, size, MESSAGE_BYTES):
            event, flags, address, thread = _unpack(messages, at)
            if event != UFFD_EVENT_PAGEFAULT:
                _discard_event(messages, at)
                continue
            area = client.find(address)
            if area is None:
                self._stray(client, address)
                continue
            page = (address - area.base) >> self._shift
            if flags & UFFD_PAGEFAULT_FLAG_WP:
                self._resolve_write(area, page, now)
                continue
            known = wanted.get((area.start, page))
            wanted[area.start, page] = (area, flags | known[1] if known else flags, thread)
        runs: list[tuple[ServedArea, int, int]] = []
        rest = []
        with self._lock:
            for start, page in sorted(wanted):
                area, flags, thread = wanted[start, page]
                if self._states[page] != _READY or self._around or area.tracks:
                    rest.append((area, page, flags, thread))
                    continue
                area.counters.minor += 1
                area.counters.log_run(page, page + 1)
                if runs and runs[-1][0] is area and runs[-1][2] == page:
                    runs[-1] = (area, runs[-1][1], page + 1)
                else:
                    runs.append((area, page, page + 1))
            for area, first, stop in runs:
                self._page_tables.map(area, range(first, stop))
                for _ in range(first, stop):
                    area.counters.record_latency(monotonic_ns() - now)
        for area, page, flags, thread in rest:
            if area.alive:
                self._answer_one(area, page, flags, thread, now)

    # --- under the lock

    def _map(self, area: ServedArea, page: int, write: bool, thread: int) -> None:
        """Map a READY page, and the other READY pages of its window."""
        first, stop = page, page + 1
        if self._around:
            window, frames = self._window(area, page, thread), self._state.frames
            first, stop = frames.run_before(page, window.start), frames.run_at(page, window.stop)[1]
        area.counters.log_run(first, stop)
        if self._huge.in_use and self._huge.chunk_at(area, page) == range(first, stop):
            self._page_tables.map(area, range(first, stop))
            return
        if stop - first > 1:
            self._page_tables.map(area, range(first, page))
            self._page_tables.map(area, range(page + 1, stop))
        # The page itself last: its result wakes, and if it had an entry already the thread is woken as well.
        self._page_tables.map_one(area, page, write=write)

    def _wait(self, area: ServedArea, page: int, write: bool, now: int) -> None:
        area.counters.missing += 1
        area.counters.log_run(page, page + 1)
        fill = self._jobs.fill_of(page)
        if fill is None:
            self._state.parked.park(area, page, write, now)
        else:
            fill.waiting.append((area, page, write, now))

    def _resolve_write(self, area: ServedArea, page: int, now: int) -> None:
        """Answer a write to a write-protected page: the first one in an area that tracks, or one during an eviction."""
        with self._lock:
            if self._states[page] in _TAKEN:
                return None  # the eviction or shoot-down wakes it
            area.counters.write_protect += 1
            protections = self._state.protections
            asks = protections.in_use and protections.is_read_only(page)
            if not asks:
                protections.mark_written(range(page, page + 1))
                if area.tracks:
                    area.dirty[page - area.first] = 1
                fault_resolution.unprotect(area.fd, area.address(page), self._size)
        if asks:  # not under the lock: another thread of the driver may act on pages while this one waits for it
            return self._write_requests.ask(area, page, now)
        area.counters.record_latency(monotonic_ns() - now)
        return None

    def _window(self, area: ServedArea, page: int, thread: int) -> range:
        """Return the pages that a fault shall bring in, its own among them."""
        chunk = self._huge.chunk_at(area, page) if self._huge.in_use else None
        return self._windows.window_of(area, page, thread) if chunk is None else chunk

    # --- not under the lock

    def _supply(self, area: ServedArea, page: int, write: bool, thread: int, now: int) -> None:
        """Have the driver supply a MISSING page, and its window; only the loop starts fills."""
        area.counters.missing += 1
        pages = range(page, page + 1)
        if self._around:
            window, frames = self._window(area, page, thread), self._state.frames
            with self._lock:
                pages = range(frames.run_before(page, window.start), frames.run_at(page, window.stop)[1])
            _, pages = self._discards.split_at(page, pages)
            with self._lock:
                _, pages = self._state.held.split_at(page, pages)
        area.counters.log_run(pages.start, pages.stop)
        alone = len(pages) == 1
        fill = Fill(area, pages, access_of(write), single=alone, keep=[], finished=self._filled, around=not alone)
        fill.waiting.append((area, page, write, now))
        self._jobs.start(fill)

    def _supply_one(self, area: ServedArea, page: int, flags: int, now: int) -> None:
        """Have the driver supply one MISSING page in the loop at once: a third of the time of a :class:`Fill`."""
        counters = area.counters
        counters.missing += 1
        log = counters.log
        log.append(page)
        if len(log) > LOG_MOST:
            counters.trim_log()
        write = flags & UFFD_PAGEFAULT_FLAG_WRITE != 0
        rounds = 0
        if self._alone:
            self._begin_one(page)
        else:
            with self._lock:  # another thread of the driver may have been faster
                if self._states[page] != _MISSING:
                    return self._page_tables.wake(area, page)
                if self._held and self._state.held.defer(page, partial(self._page_tables.wake, area, page)):
                    return None
                self._begin_one(page)
                rounds = self._state.parked.rounds
        failure = self._fill_one(area, page, "write" if write else "read", now)
        with self._lock:
            self._finish_one(page, failure is None)
            if failure is None:
                self._map_one(area, page, write)
                if self._parked:
                    self._page_tables.answer_parked(range(page, page + 1))
        if failure is not None:
            fill = Fill(area, range(page, page + 1), access_of(write), single=True, keep=[], finished=self._filled)
            fill.waiting.append((area, page, write, now))
            fill.rounds = rounds
            return self._jobs.failed(fill, None if failure is RETRY else failure)
        counters.supplied_pages += 1
        counters.latency[((monotonic_ns() - now) // 1000).bit_length()] += 1
        return None

    def _filled(self, fill: Fill) -> Fill | None:
        around = not fill.single and fill.done > fill.pages.start and fill.area.alive
        if around:
            self._page_tables.map(fill.area, range(fill.pages.start, fill.done))
        left = self._page_tables.answer_waiting(fill, around)
        if left is None:
            return None
        # The window could not be supplied. The page that was touched may be supplied alone.
        area, page, write, now = left
        alone = Fill(area, range(page, page + 1), access_of(write), single=True, keep=[], finished=self._filled)
        alone.waiting.append((area, page, write, now))
        return alone

    def _stray(self, client: ServedClient, address: int) -> None:
        """Poison an address that is registered but lies in no area: after Unmap, as a rule. Nothing else would answer it."""
        unit = self._state.unit
        result = fault_resolution.poison_run(client.record.userfaultfd, address & -unit, unit, unit)
        if result.gone:
            self._state.schedule_removal(client)


def _discard_event(messages: bytes, at: int) -> None:
    """Read an event that no client asks for, since its cause waits until it is read."""
    try:
        event = decode(messages, at)
    except OSError:
        return
    if isinstance(event, ForkEvent):
        os.close(event.descriptor)
