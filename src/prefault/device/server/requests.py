"""Requests of clients, validated: no value in a request is trusted."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefault.device import protocol
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution
from prefault.device.pages.fills import FillFailure
from prefault.device.pages.served_areas import ServedArea, ServedClient, ServerState
from prefault.device.registry import AreaRecord
from prefault.ipc.transport import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefault.device.device_pool import DeviceObject
    from prefault.device.pages.eviction import Eviction
    from prefault.device.server.discards import Discards
    from prefault.device.server.fault_polling import FaultPolling
    from prefault.device.server.populate_requests import PopulateRequests
    from prefault.device.server.workers import Jobs

MAX_AREAS = 100_000
"""Areas of one client."""
MAX_POPULATES = 1024
"""Populate requests that a client may have under way."""
MAX_CONTROLS = 256
"""Control requests that a client may have under way."""
_ADDRESSES = 1 << 56


class Requests:
    """Carries out the requests of clients.

    Args:
        reply: sends a reply to a client.
        lost: called with a client whose connection ended while the driver opened an area for it.
    """

    def __init__(
        self, state: ServerState, jobs: Jobs, populate_requests: PopulateRequests, discards: Discards, eviction: Eviction,
        fault_polling: FaultPolling, *, reply: Callable[[ServedClient, protocol.Reply], None],
        lost: Callable[[ServedClient], None],
    ) -> None:  # fmt: skip
        self._state = state
        self._frames = state.frames
        self._jobs = jobs
        self._populate_requests = populate_requests
        self._discards = discards
        self._evict = eviction.evict
        self._fault_polling = fault_polling
        self._area_table = state.registry.area_table
        self._reply = reply
        self._lost = lost

    def handle(self, client: ServedClient, request: protocol.Request) -> None:
        """Carry out a request, or refuse it. ProtocolError: the client broke the protocol, and is to be disconnected."""
        if not isinstance(request, protocol.Cancel) and client.is_repeated(request.id):
            return
        try:
            match request:
                case protocol.Hello():
                    raise ProtocolError("Hello comes once")
                case protocol.Map():
                    self._map(client, request)
                case protocol.Unmap():
                    self._unmap(client, request)
                case protocol.Populate():
                    if self._populate_requests.count(client) >= MAX_POPULATES:
                        raise ValueError(f"{MAX_POPULATES} populate requests are under way already")
                    self._populate_requests.start(self._area(client, request.area), request)
                case protocol.Cancel():
                    self._populate_requests.cancel(client, request.id)
                case protocol.Discard():
                    self._discard(client, request)
                case protocol.Undo():
                    area = self._area(client, request.area)
                    self._populate_requests.undo(area, [area.checked(*run) for run in request.runs])
                    self._reply(client, protocol.Done(request.id))
                case protocol.DirtyPages():
                    self._dirty(client, request)
                case protocol.AskStatistics():
                    self._statistics(client, request.id, self._area(client, request.area).counters.totals())
                case protocol.AskObjectStatistics():
                    self._statistics(client, request.id, self._state.object_totals(request.name))
                case protocol.FindObject():
                    with self._state.lock:
                        found = self._state.objects.find(request.name)
                    self._reply(client, protocol.ObjectFound(request.id, found))
                case protocol.AskLog():
                    area = self._area(client, request.area)
                    self._list(client, request.id, area.counters.access_runs())
                case protocol.Control():
                    self._control(client, request)
        except FileNotFoundError as error:  # of an object
            self._reply(client, protocol.Refused(request.id, "device", errno.ENOENT, str(error.strerror)))
        except ValueError as error:
            self._reply(client, protocol.Refused(request.id, "value", errno.EINVAL, str(error)))

    def _area(self, client: ServedClient, number: int) -> ServedArea:
        area = client.areas.get(number)
        if area is None:
            raise ValueError(f"there is no area {number} of this client")
        return area

    # --- areas

    def _map(self, client: ServedClient, request: protocol.Map) -> None:
        placed = request.object
        record = AreaRecord(
            0, request.address, request.offset, request.length, request.access, request.track_dirty, placed is not None
        )  # fmt: skip
        known = client.find(record.address)
        if known is not None:
            record.number = known.number
            if known.record == record:  # repeated after a restart
                return self._reply(client, protocol.Mapped(request.id, known.number))
        self._check(client, record, placed)
        state = self._state
        record.row = self._area_table.reserve()
        if placed is not None and not self._acquire_object(placed):
            self._area_table.clear(record.row)
            message = f"object {placed.name!r} has been deleted, or made anew, since it was looked up"
            return self._reply(client, protocol.Refused(request.id, "stale", errno.ESTALE, message))
        record.number = state.next_number()
        area = ServedArea(record, client, state, self._evict)
        client.opening.append(record)
        self._jobs.acquire_client(client)

        def opened(failure: FillFailure | None) -> None:
            client.opening.remove(record)
            if failure is not None:
                self._area_table.clear(record.row)
                area.alive = area.opened = False
                state.release_object(area)
                self._jobs.release_client(client)
                return self._reply(client, protocol.Refused(request.id, "device", failure.number, failure.message))
            area.opened = True
            if client.gone or client.connection is None:  # no reply can name the area
                self._area_table.clear(record.row)
                area.alive = False  # closed as soon as this call is over
                return self._lost(client)
            state.open_area(area)
            if request.cpu is not None:
                self._fault_polling.colocate(area.number, request.cpu)
            return self._reply(client, protocol.Mapped(request.id, area.number))

        return self._jobs.call(area, "open", then=opened)

    def _acquire_object(self, placed: DeviceObject) -> bool:
        """Count an area of an object; return False if it is not there any more."""
        state = self._state
        with state.lock:
            if placed != state.objects.at(placed.offset // state.page_size):
                return False
            state.objects.acquire(placed)
            return True

    def _check(self, client: ServedClient, record: AreaRecord, placed: DeviceObject | None) -> None:
        state = self._state
        size = state.page_size
        if record.address % state.unit or record.offset % size or record.length % size or not record.length:
            raise ValueError(
                f"an area is whole pages of {size} bytes, not {record.length} bytes from offset {record.offset}"
                f" at {record.address:#x}"
            )
        if record.offset + record.length > self._frames.length:
            raise ValueError(
                f"the device has {self._frames.length} bytes in whole pages: {record.length} bytes from offset"
                f" {record.offset} on are not in it"
            )
        if placed is not None and not (
            placed.offset <= record.offset and (record.offset + record.length) // size <= placed.pages(size).stop
        ):
            raise ValueError(f"{record.length} bytes from offset {record.offset} on are not in object {placed.name[:200]!r}")
        if record.address + record.length > _ADDRESSES:
            raise ValueError(f"{record.address:#x} is no address")
        if record.access == "write" and not state.device.writable:
            raise ValueError("the device is not writable")
        if client.overlaps(record):
            raise ValueError(f"another area of the client is at {record.address:#x}")
        if len(client.areas) + len(client.opening) >= MAX_AREAS:
            raise ValueError(f"the client has {MAX_AREAS} areas, the maximum")

    def _unmap(self, client: ServedClient, request: protocol.Unmap) -> None:
        area = client.areas.get(request.area)
        if area is not None:
            self.release_area(area)
            del client.record.areas[area.number]
            self._area_table.clear(area.record.row)
            self.close_area(area)
        self._reply(client, protocol.Done(request.id))  # idempotent: clients repeat it after a restart

    def release_area(self, area: ServedArea) -> None:
        """Stop serving an area. :meth:`close_area` follows when it is in the table no more.

        A driver whose ``close`` ends its process ends one server then, and not each server after it.
        """
        self._populate_requests.drop(area)
        with self._state.lock:
            self._state.parked.drop(area)
        self._discards.drop(area, FillFailure("driver", errno.ENODEV, "the area was unmapped while it was discarded"))
        self._state.close_area(area)
        self._fault_polling.separate(area.number)

    def close_area(self, area: ServedArea) -> None:
        """Have the driver close a released area, as soon as no call has it."""
        self._jobs.close(area)

    # --- pages

    def _discard(self, client: ServedClient, request: protocol.Discard) -> None:
        area = self._area(client, request.area)
        pages = area.checked(request.first, request.stop)
        if area.access == "read" and self._state.device.writable:
            raise ValueError("the area is mapped for reading: its client may not discard the writes of others")

        def discarded(failure: FillFailure | None, count: int) -> None:
            if failure is not None:
                self._reply(client, protocol.Refused(request.id, "device", failure.number, failure.message))
            else:
                self._reply(client, protocol.Discarded(request.id, count))

        self._discards.start(area, pages, discarded)

    def _dirty(self, client: ServedClient, request: protocol.DirtyPages) -> None:
        area = self._area(client, request.area)
        if not area.tracks:
            raise ValueError("the area was not mapped with track_dirty")
        with self._state.lock:
            runs = area.dirty_runs(area.pages)
            for run in runs if request.clear else ():
                # Protected first: a thread that writes from now on waits until the page is marked again.
                size = len(run) * self._frames.page_size
                if fault_resolution.protect(area.fd, area.address(run.start), size, self._state.unit):
                    area.dirty[run.start - area.first : run.stop - area.first] = bytes(len(run))
        self._list(client, request.id, [(run.start, run.stop) for run in runs])

    def _list(self, client: ServedClient, number: int, runs: Sequence[tuple[int, int]]) -> None:
        most = protocol.MAX_RUNS
        for at in range(0, max(1, len(runs)), most):
            self._reply(client, protocol.Runs(number, tuple(runs[at : at + most]), at + most < len(runs)))

    def _statistics(self, client: ServedClient, number: int, totals: tuple[int, ...]) -> None:
        missing, minor, write_protect, populated, supplied, errors, *latency = totals
        self._reply(
            client,
            protocol.Statistics(number, missing, minor, write_protect, populated, supplied, errors, tuple(latency)),
        )

    # --- the driver's own

    def _control(self, client: ServedClient, request: protocol.Control) -> None:
        if client.controls >= MAX_CONTROLS:
            raise ValueError(f"{MAX_CONTROLS} control requests are under way already")

        def answered(answer: bytes | FillFailure) -> None:
            if isinstance(answer, bytes):
                self._reply(client, protocol.ControlReply(request.id, answer))
            else:
                self._reply(client, protocol.Refused(request.id, "device", answer.number, answer.message))

        self._jobs.control(client, request.request, answered)

    # --- after a restart

    def restore(self, client: ServedClient, record: AreaRecord) -> ServedArea:
        """Return an area of the last server, open: the driver is new, and all its READY pages count as dirty."""
        area = ServedArea(record, client, self._state, self._evict)
        for run in self._frames.runs(area.pages, DevicePageState.READY) if area.tracks else ():
            area.mark_dirty(run)
            area.mark_entries(run)
        self._state.open_area(area)
        area.opened = True
        if area.object is not None:
            self._state.objects.acquire(area.object)
        self._jobs.acquire_client(client)
        return area
