"""What clients ask for, checked: nothing that a client says is taken for granted."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefault.device import protocol
from prefault.device.page_states import DevicePageState
from prefault.device.registry import AreaRecord
from prefault.device.server.driver_calls import FillFailure
from prefault.device.server.eviction import clean, dirty_runs
from prefault.device.server.served_areas import ServedArea, ServedClient, ServerState
from prefault.ipc.transport import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefault.device.server.discards import Discards
    from prefault.device.server.populate_requests import PopulateRequests
    from prefault.device.server.workers import Jobs

MAX_AREAS = 100_000
"""Of one client."""
MAX_POPULATES = 1024
"""That a client may have under way."""
_ADDRESSES = 1 << 56


class Requests:
    """Carries out requests; the replies go to ``say``.

    Attributes:
        say: sends a reply to a client.
        added, removed: told of areas that there are, and are not any more.
        lost: told of a client whose connection ended in the middle of a request.
    """

    def __init__(self, books: ServerState, jobs: Jobs, populates: PopulateRequests, discards: Discards) -> None:
        self._books = books
        self._frames = books.frames
        self._jobs = jobs
        self._populates = populates
        self._discards = discards
        jobs.when_idle = self._close
        self.say: Callable[[ServedClient, protocol.Reply], None]
        self.added: Callable[[ServedArea, int | None], None]
        self.removed: Callable[[ServedArea, bool], None]
        self.lost: Callable[[ServedClient], None]

    def handle(self, client: ServedClient, request: protocol.Request) -> None:
        """Carry out a request, or refuse it. ProtocolError: the client is not to be listened to any more."""
        if not isinstance(request, protocol.Cancel) and client.hears_again(request.id):
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
                    if self._populates.count(client) >= MAX_POPULATES:
                        raise ValueError(f"{MAX_POPULATES} populate requests are under way already")
                    self._populates.start(client, self._area(client, request.area), request)
                case protocol.Cancel():
                    self._populates.cancel(client, request.id)
                case protocol.Discard():
                    self._discard(client, request)
                case protocol.DirtyPages():
                    self._dirty(client, request)
                case protocol.AskStatistics():
                    self._statistics(client, request)
                case protocol.AskLog():
                    area = self._area(client, request.area)
                    self._list(client, request.id, area.counters.asked_for())
        except ValueError as error:
            self.say(client, protocol.Refused(request.id, "value", errno.EINVAL, str(error)))

    def _area(self, client: ServedClient, number: int) -> ServedArea:
        area = client.areas.get(number)
        if area is None:
            raise ValueError(f"there is no area {number} of this client")
        return area

    # --- areas

    def _map(self, client: ServedClient, request: protocol.Map) -> None:
        record = AreaRecord(
            0, request.address, request.offset, request.length, request.access, request.track_dirty
        )  # fmt: skip
        known = client.find(record.address)
        if known is not None:
            record.number = known.number
            if known.record == record:  # asked again, after a restart
                return self.say(client, protocol.Mapped(request.id, known.number))
        self._check(client, record)
        books = self._books
        record.number = books.next_number()
        area = books.new_area(client, record)
        client.opening.append(record)

        def opened(failure: FillFailure | None) -> None:
            client.opening.remove(record)
            if failure is not None:
                area.alive = area.opened = False
                return self.say(client, protocol.Refused(request.id, "device", errno.EIO, failure.message))
            area.opened = True
            if client.gone or client.connection is None:  # nobody would ever know of the area
                area.alive = False  # closed as soon as this call is over
                return self.lost(client)
            books.open_area(area)
            client.record.areas[area.number] = record
            self.added(area, request.cpu)
            return self.say(client, protocol.Mapped(request.id, area.number))

        return self._jobs.call(area, "open", books.device.open, area, then=opened)

    def _check(self, client: ServedClient, record: AreaRecord) -> None:
        books = self._books
        size = books.page_size
        if record.address % books.unit or record.offset % size or record.length % size or not record.length:
            raise ValueError(
                f"an area is whole pages of {size} bytes, not {record.length} bytes from offset {record.offset}"
                f" at {record.address:#x}"
            )
        if record.offset + record.length > self._frames.length:
            raise ValueError(
                f"the device has {self._frames.length} bytes in whole pages: {record.length} bytes from offset"
                f" {record.offset} on are not in it"
            )
        if record.address + record.length > _ADDRESSES:
            raise ValueError(f"{record.address:#x} is no address")
        if record.access == "write" and not books.device.writable:
            raise ValueError("the device is not writable")
        if client.overlaps(record):
            raise ValueError(f"another area of the client is at {record.address:#x}")
        if len(client.areas) + len(client.opening) >= MAX_AREAS:
            raise ValueError(f"the client has {MAX_AREAS} areas, the most that one may have")

    def _unmap(self, client: ServedClient, request: protocol.Unmap) -> None:
        area = client.areas.get(request.area)
        if area is not None:
            self.give_up(area)
        self.say(client, protocol.Done(request.id))  # also to one that asks again, after a restart

    def give_up(self, area: ServedArea, *, quietly: bool = False) -> None:
        """The area is not served any more; its driver hears of it when no call has it.

        ``quietly``: nobody else does: its client is gone, which is said once.
        """
        self._populates.drop(area)
        self._discards.drop(area, FillFailure("driver", errno.ENODEV, "the area was unmapped while it was discarded"))
        self._books.close_area(area)
        area.client.record.areas.pop(area.number, None)
        self.removed(area, quietly)
        if not area.calls:
            self._close(area)

    def _close(self, area: ServedArea) -> None:
        if area.opened:
            area.opened = False
            self._jobs.call(area, "close", self._books.device.close, area, then=_nothing)

    # --- pages

    def _discard(self, client: ServedClient, request: protocol.Discard) -> None:
        area = self._area(client, request.area)
        if not area.first <= request.first <= request.stop <= area.last:
            raise ValueError(
                f"pages {request.first} to {request.stop} are not pages of the area, {area.first} to {area.last}"
            )
        if area.access == "read" and self._books.device.writable:
            raise ValueError("the area is mapped for reading: what others wrote is not its to discard")

        def discarded(failure: FillFailure | None, count: int) -> None:
            if failure is not None:
                self.say(client, protocol.Refused(request.id, "device", failure.number, failure.message))
            else:
                self.say(client, protocol.Discarded(request.id, count))

        self._discards.start(area, range(request.first, request.stop), discarded)

    def _dirty(self, client: ServedClient, request: protocol.DirtyPages) -> None:
        area = self._area(client, request.area)
        if not area.tracks:
            raise ValueError("the area was not mapped with track_dirty")
        with self._books.lock:
            runs = dirty_runs(area, area.pages)
            if request.clear:
                clean(area, runs, self._frames.page_size, self._books.unit)
        self._list(client, request.id, [(run.start, run.stop) for run in runs])

    def _list(self, client: ServedClient, number: int, runs: Sequence[tuple[int, int]]) -> None:
        most = protocol.MAX_RUNS
        for at in range(0, max(1, len(runs)), most):
            self.say(client, protocol.Runs(number, tuple(runs[at : at + most]), at + most < len(runs)))

    def _statistics(self, client: ServedClient, request: protocol.AskStatistics) -> None:
        counters = self._area(client, request.area).counters
        self.say(
            client,
            protocol.Statistics(
                request.id, counters.missing, counters.minor, counters.write_protect, counters.populated_pages,
                counters.supplied_pages, counters.errors, tuple(counters.latency),
            ),
        )  # fmt: skip

    # --- after a restart

    def restore(self, client: ServedClient, record: AreaRecord) -> ServedArea:
        """An area that the last server had: its driver is new, and its dirty pages are not known any more."""
        area = self._books.new_area(client, record)
        if area.tracks:
            for run in self._frames.runs(area.pages, DevicePageState.READY):
                area.dirty[run.start - area.first : run.stop - area.first] = b"\x01" * len(run)
                if area.given:
                    area.given[run.start - area.first : run.stop - area.first] = b"\x01" * len(run)
        self._books.open_area(area)
        area.opened = True
        return area


def _nothing(failure: FillFailure | None) -> None:
    """Nobody asks what became of it; it is logged."""
