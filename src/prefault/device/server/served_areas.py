"""Who maps what: the clients of a server and their areas, as the server knows them."""

from __future__ import annotations

import io
import itertools
import mmap
import socket
import threading
from bisect import bisect_right, insort
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from prefault._kernel import mman
from prefault.device.driver import Access, Device, DeviceArea
from prefault.device.page_states import DevicePageState
from prefault.device.registry import AreaRecord, ClientRecord, Registry
from prefault.device.server.counters import Counters

if TYPE_CHECKING:
    from prefault.device.frames import Frames

_start = attrgetter("start")
_FILLING = int(DevicePageState.FILLING)


_LARGE = 1 << 20
_NUMBER_BITS = 40
"""Of an area's number; above these is which server gave it."""


def zeros(count: int) -> mmap.mmap | bytearray:
    """So many zeros; many of them cost what is written to them, as an area may have a terabyte."""
    if count < _LARGE:
        return bytearray(count)
    return mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mman.MAP_NORESERVE)


class ServedArea(DeviceArea):
    """An area in the server, and what its driver sees of it.

    Attributes:
        start, stop: addresses in the client.
        base: where page 0 of the device would be.
        fd: the client's userfaultfd.
        tracks: first writes are heard of: pages are filled in write-protected.
        protectable: registered for write protection.
        dirty: a byte a page of the area, if it tracks.
        poisoned: pages whose entries say poison.
        counters: statistics and log.
        calls: driver calls that have the area now; it is closed at the driver when there are none.
        alive: False once it is given up, or its client gone.
    """

    def __init__(
        self, record: AreaRecord, client: ServedClient, state: ServerState, evict: Callable[[range, Any], bytes]
    ) -> None:
        self.record = record
        self.client = client
        self.number = record.number
        self.offset, self.length, self.access = record.offset, record.length, record.access
        self.pid, self.uid = client.record.pid, client.record.uid
        self.start, self.stop = record.address, record.address + record.length
        self.base = record.address - record.offset
        self.fd = client.record.userfaultfd
        self.first = record.offset // state.page_size
        self.last = (record.offset + record.length) // state.page_size
        self.tracks = record.track_dirty
        self.protectable = record.track_dirty or (state.device.evicts and record.access == "write")
        self.dirty = zeros(self.last - self.first) if self.tracks else bytearray()
        # Where the kernel tracks alone, only we know that a page had an entry before: see Entries.map().
        self.had_entry = zeros(self.last - self.first) if self.tracks and not state.device.evicts else bytearray()
        self.poisoned: set[int] = set()
        self.counters = Counters()
        self.windows: dict[int, tuple[int, int]] = {}
        self.calls = 0
        self.alive = True
        self.opened = False
        self._state = state
        self._evict = evict

    def address(self, page: int) -> int:
        """Of a page of the device, in the client."""
        return self.base + page * self._state.page_size

    def overlap(self, pages: range) -> range:
        """Those of the pages that it maps."""
        first, last = max(self.first, pages.start), min(self.last, pages.stop)
        return range(first, max(first, last))

    # --- what the driver calls

    @property
    def pages(self) -> range:
        """The device's pages that it maps."""
        return range(self.first, self.last)

    def frame(self, page: int) -> memoryview:
        """The memory of a page that the driver was asked for."""
        frames = self._state.frames
        if not 0 <= page < frames.pages or frames.states[page] != _FILLING:
            raise ValueError(f"page {page} is not one that the driver was asked for just now: it is not to be written")
        return frames.view_one(page)

    def frames(self, pages: range) -> memoryview:
        """The memory of pages that the driver was asked for."""
        self._state.check_pages(pages)
        if len(pages) and self._state.frames.run_at(pages.start, pages.stop) != (DevicePageState.FILLING, pages.stop):
            raise ValueError(f"{pages} are not all pages that the driver was asked for just now: they are not to be written")
        return self._state.frames.view(pages)

    def ready(self, pages: range) -> list[range]:
        """Those of the pages that are supplied now."""
        self._state.check_pages(pages)
        return self._state.frames.runs(pages, DevicePageState.READY)

    def evict(self, pages: range, save: Any = None) -> bytes:
        """Take supplied pages back."""
        self._state.check_pages(pages)
        return self._evict(pages, save)


_IDS_REMEMBERED = 1 << 16
"""Ids of requests that are remembered: more than a client has under way at once."""


class ServedClient:
    """A client process, its connection and its areas.

    Attributes:
        connection: None once it is lost; the client may live on, and is served faults.
        areas: by number.
        sorted: by address, without those that are not open yet.
        last: the area of the last fault.
        read_into: reads from its userfaultfd: how many bytes, or None if there are none.
        resumed: it was another server's before.
    """

    def __init__(self, record: ClientRecord, connection: socket.socket | None) -> None:
        self.record = record
        self.connection = connection
        self.areas: dict[int, ServedArea] = {}
        self.sorted: list[ServedArea] = []
        self._starts: list[int] = []
        self.last: ServedArea | None = None
        # Gives None where os.readv would raise, which takes a microsecond.
        self.read_into = io.FileIO(record.userfaultfd, closefd=False).readinto
        self.opening: list[AreaRecord] = []
        self.gone = False
        self.resumed = False
        self._seen_ids: dict[int, None] = {}

    def is_repeated(self, number: int) -> bool:
        """Whether a request of that id came before: one that a new server found in the socket, and that is asked again.

        Its answer is given once, and so is what it does: a discard that came twice could take what was written in between.
        """
        if not self.resumed:
            return False
        if number in self._seen_ids:
            return True
        self._seen_ids[number] = None
        if len(self._seen_ids) > _IDS_REMEMBERED:
            del self._seen_ids[next(iter(self._seen_ids))]
        return False

    def find(self, address: int) -> ServedArea | None:
        """The area that an address lies in."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        area = self.sorted[index]
        if address >= area.stop:
            return None
        self.last = area
        return area

    def add(self, area: ServedArea) -> None:
        """Faults in it are answered from now on."""
        self.areas[area.number] = area
        insort(self.sorted, area, key=_start)
        insort(self._starts, area.start)

    def remove(self, area: ServedArea) -> None:
        """They are not any more."""
        area.alive = False
        del self.areas[area.number]
        index = bisect_right(self._starts, area.start) - 1
        del self.sorted[index], self._starts[index]
        self.last = None

    def overlaps(self, record: AreaRecord) -> bool:
        """Whether it has an area, or one that is being opened, at some of these addresses."""
        start, stop = record.address, record.address + record.length
        index = bisect_right(self._starts, start)
        if index and self.sorted[index - 1].stop > start:
            return True
        if index < len(self._starts) and self._starts[index] < stop:
            return True
        return any(start < other.address + other.length and other.address < stop for other in self.opening)


class ServerState:
    """What the parts of a server share.

    Attributes:
        lock: held for every change of a page's state and every new entry in a client's page table.
        used: pages that have a frame, or are to get one.
        changes: counts what who waits for pages in the making may wait for.
        notify: wakes the loop, from any thread.
        gone_clients: clients that ended, or that broke their userfaultfd: the loop removes them between two events.
    """

    def __init__(self, device: Device, registry: Registry, notify: Callable[[], None]) -> None:
        self.device = device
        self.registry = registry
        self.name = registry.name
        self.frames: Frames = registry.frames
        self.page_size = registry.page_size
        self.unit = registry.frames.unit
        self.lock = threading.RLock()
        self.areas: dict[int, ServedArea] = {}
        self.clients: dict[int, ServedClient] = {}
        self.used = 0
        if registry.generation:  # else none is there; to look would allocate the states of a device of any size
            self.used = self.frames.pages - self.frames.count(range(self.frames.pages), DevicePageState.MISSING)
        capacity = device.capacity
        self.capacity = None if capacity is None else capacity // self.page_size
        self.changes = 0
        self.notify = notify
        self.gone_clients: list[ServedClient] = []
        # No number comes twice, not even from the server before this one: a client that had no answer asks again for the end
        # of its area, which must not be the end of another.
        self._numbers = itertools.count((registry.generation << _NUMBER_BITS) + 1)

    def check_pages(self, pages: range) -> None:
        """Drivers give us ranges: those are to lie inside the device.

        Raises:
            TypeError, ValueError: it is none, or does not.
        """
        if not isinstance(pages, range):
            raise TypeError(f"pages are a range, not {type(pages).__name__}")
        if pages.step != 1 or pages.start < 0 or pages.stop > self.frames.pages:
            raise ValueError(f"{pages} is not a range of the device's pages, 0 to {self.frames.pages - 1}")

    def areas_over(self, pages: range) -> list[tuple[ServedArea, int, int]]:
        """The areas that map some of the pages, each with start and length of these in the client."""
        first, stop, size = pages.start, pages.stop, self.page_size
        found = []
        for area in self.areas.values():
            if area.first < stop and first < area.last:
                low, high = max(first, area.first), min(stop, area.last)
                found.append((area, area.base + low * size, (high - low) * size))
        return found

    def next_number(self) -> int:
        """Of an area."""
        return next(self._numbers)

    def schedule_removal(self, client: ServedClient) -> None:
        """Have the loop remove a client that is gone, after the event at hand, which may be about its areas."""
        if not client.gone:
            client.gone = True
            self.gone_clients.append(client)

    def open_area(self, area: ServedArea) -> None:
        """Serve it from now on."""
        with self.lock:
            self.areas[area.number] = area
            area.client.add(area)

    def close_area(self, area: ServedArea) -> None:
        """Serve it no more."""
        with self.lock:
            self.areas.pop(area.number, None)
            area.client.remove(area)


def access_of(write: bool) -> Access:
    """What a fault wanted."""
    return "write" if write else "read"
