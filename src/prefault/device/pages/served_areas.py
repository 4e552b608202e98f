"""The clients of a server, their areas, and the state that the server's modules share."""

from __future__ import annotations

import io
import itertools
import re
import socket
import threading
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from prefault.device.device_pool import Access, ClientProcess, DeviceObject
from prefault.device.driver import Device, DeviceArea
from prefault.device.frames import HUGE_PAGE, zeros
from prefault.device.object_table import TABLE_BYTES, ObjectTable
from prefault.device.page_runs import subtract
from prefault.device.page_states import DevicePageState
from prefault.device.pages.counters import Counters, UnusedCounters, add_totals
from prefault.device.pages.held_pages import HeldPages
from prefault.device.pages.page_pool import PagePool
from prefault.device.pages.parked_faults import ParkedFaults
from prefault.device.pages.protections import PageProtections
from prefault.device.registry import AreaRecord, ClientRecord, Registry
from prefault.interval_index import IntervalIndex

if TYPE_CHECKING:
    from prefault.device.frames import Frames

_DIRTY = re.compile(b"\x01+")
_FILLING = int(DevicePageState.FILLING)
_OBJECTS = "prefault.objects"
"""Name under which the table of objects is kept."""
_NOTHING = bytearray()
_NO_PAGES: set[int] = set()
_NO_WINDOWS: dict[int, tuple[int, int]] = {}
_NUMBER_BITS = 40
"""Bits of the number of an area or a client; above them is the generation of the server that gave it."""


class ServedArea(DeviceArea):
    """An area in the server, as its driver sees it.

    Attributes:
        start, stop: addresses in the client.
        base: address at which page 0 of the device would be.
        fd: the client's userfaultfd.
        tracks: first writes are noticed: pages are mapped write-protected.
        protectable: registered for write protection.
        dirty: a byte per page, 1 after a write to it; empty unless the area tracks writes.
        had_entry: a byte per page, 1 once it was mapped; empty unless the kernel alone tracks writes: see
            :meth:`PageTables.map`.
        armed: a byte per aligned 2 MiB of addresses, 1 where they are registered for write protection; for devices with huge
            faults, see :class:`HugePages`.
        collapse_fails: the server may not make huge entries in this client.
        poisoned: pages whose entries are poison.
        object: the object that the client mapped by its name, if any.
        counters: statistics and log.
        calls: driver calls that have the area now; a released area is closed at the driver when there are none.
        alive: False once it is released, or its client gone.
    """

    # A server may have half a million areas. A driver may set other attributes: its DeviceArea has a dict, made when needed.
    __slots__ = (
        "_evict", "_state", "access", "alive", "armed", "base", "calls", "client", "collapse_fails", "counters", "dirty",
        "fd", "first", "had_entry", "last", "length", "number", "object", "offset", "opened", "pid", "poisoned",
        "protectable", "record", "start", "stop", "tracks", "uid", "windows",
    )  # fmt: skip

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
        self.dirty = zeros(self.last - self.first) if self.tracks else _NOTHING
        # Where the kernel tracks alone, only the server knows that a page had an entry before.
        self.had_entry = zeros(self.last - self.first) if self.tracks and not state.device.evicts else _NOTHING
        chunks = -(-self.stop // HUGE_PAGE) - self.start // HUGE_PAGE if state.device.huge_faults else 0
        self.armed = bytearray(b"\x01" if self.tracks else b"\x00") * chunks if chunks else _NOTHING
        self.collapse_fails = False
        self.poisoned = _NO_PAGES
        self.object = state.objects.at(self.first) if record.of_object else None
        self.counters: Counters = UnusedCounters()
        self.windows = _NO_WINDOWS
        self.calls = 0
        self.alive = True
        self.opened = False
        self._state = state
        self._evict = evict

    def address(self, page: int) -> int:
        """Return the address of a page of the device, in the client."""
        return self.base + page * self._state.page_size

    def checked(self, first: int, stop: int) -> range:
        """Return a run of pages that the client names; raise ValueError if the area does not map all of them."""
        if not self.first <= first <= stop <= self.last:
            raise ValueError(f"pages {first} to {stop} are not pages of the area, {self.first} to {self.last}")
        return range(first, stop)

    def describe(self, pages: range) -> str:
        """Return words for pages, as they are numbered in the object, if the area is of one."""
        start, where = 0, ""
        if self.object is not None:
            start, where = self.object.pages(self._state.page_size).start, f" of {self.object.name!r}"
        first, last = pages[0] - start, pages[-1] - start
        return f"page {first}{where}" if first == last else f"pages {first} to {last}{where}"

    def overlap(self, pages: range) -> range:
        """Return the pages that this area maps, out of these."""
        first, last = max(self.first, pages.start), min(self.last, pages.stop)
        return range(first, max(first, last))

    def mark_poisoned(self, page: int) -> None:
        """Record that the entry of a page is poison."""
        if not self.poisoned:
            self.poisoned = set()
        self.poisoned.add(page)

    # --- dirty tracking, under the lock

    def mark_dirty(self, pages: range) -> None:
        """Record writes to pages, if the area tracks them."""
        if self.tracks:
            self.dirty[pages.start - self.first : pages.stop - self.first] = b"\x01" * len(pages)

    def mark_entries(self, pages: range) -> None:
        """Record that pages have entries, if only the server knows that."""
        if self.had_entry:
            self.had_entry[pages.start - self.first : pages.stop - self.first] = b"\x01" * len(pages)

    def dirty_runs(self, pages: range) -> list[range]:
        """Return the runs of these pages of the area that were written to."""
        matches = _DIRTY.finditer(self.dirty, pages.start - self.first, pages.stop - self.first)
        return [range(match.start() + self.first, match.end() + self.first) for match in matches]

    # --- DeviceArea, for the driver

    @property
    def pages(self) -> range:
        """Pages of the device that this area maps."""
        return range(self.first, self.last)

    def frame(self, page: int) -> memoryview:
        """Return the memory of a page that the driver is to supply."""
        frames = self._state.frames
        if not 0 <= page < frames.pages or frames.states[page] != _FILLING:
            raise ValueError(f"page {page} is not one that the driver was asked for just now: it is not to be written")
        return frames.view_one(page)

    def frames(self, pages: range) -> memoryview:
        """Return the memory of pages that the driver is to supply."""
        self._state.check_pages(pages)
        if len(pages) and self._state.frames.run_at(pages.start, pages.stop) != (DevicePageState.FILLING, pages.stop):
            raise ValueError(f"{pages} are not all pages that the driver was asked for just now: they are not to be written")
        return self._state.frames.view(pages)

    def ready(self, pages: range) -> list[range]:
        """Return the runs of these pages that are supplied now."""
        self._state.check_pages(pages)
        return self._state.reclaimable(pages)

    def evict(self, pages: range, save: Any = None) -> bytes:
        """Evict supplied pages: see :meth:`DeviceArea.evict`."""
        self._state.check_pages(pages)
        return self._evict(pages, save)


_IDS_REMEMBERED = 1 << 16
"""Request ids to remember: more than a client has under way at once."""


class ServedClient:
    """A client process, its connection and its areas.

    Attributes:
        connection: None once it is lost; the client may live on, and its faults are answered.
        areas: by number.
        by_address: areas by address, without those that are not open yet.
        last: the area of the last fault.
        read_into: reads from its userfaultfd into a buffer; the number of bytes, or None if there are none.
        opening: areas that the driver is opening.
        process: the client as its driver sees it.
        references: areas that the driver has open or is opening, and control requests that it has: the driver is told of
            the client's end after all of these.
        controls: control requests that the driver has.
        gone: it ended, and is about to be removed.
        removed: it is not served any more.
        resumed: the last server served it before.
    """

    def __init__(self, record: ClientRecord, connection: socket.socket | None) -> None:
        self.record = record
        self.connection = connection
        self.areas: dict[int, ServedArea] = {}
        self.by_address: IntervalIndex[ServedArea] = IntervalIndex()
        self.last: ServedArea | None = None
        # Returns None where os.readv would raise, which takes a microsecond.
        self.read_into = io.FileIO(record.userfaultfd, closefd=False).readinto
        self.opening: list[AreaRecord] = []
        self.process = ClientProcess(record.number, record.pid, record.uid)
        self.references = self.controls = 0
        self.gone = self.removed = False
        self.resumed = False
        self._seen_ids: dict[int, None] = {}

    def is_repeated(self, number: int) -> bool:
        """Return whether a request of that id came before: a new server found it in the socket, and the client repeated it.

        Each is carried out and answered once: a second discard could drop writes that were made after the first.
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
        """Return the area that an address lies in."""
        area = self.by_address.at(address)
        if area is not None:
            self.last = area
        return area

    def add(self, area: ServedArea) -> None:
        """Serve an area: faults in it are answered from now on."""
        self.areas[area.number] = area
        self.by_address.add(area.start, area.stop, area)

    def remove(self, area: ServedArea) -> None:
        """Stop serving an area."""
        area.alive = False
        del self.areas[area.number]
        self.by_address.remove(area.start, area.stop, area)
        self.last = None

    def overlaps(self, record: AreaRecord) -> bool:
        """Return whether an area of the client, open or being opened, has some of the addresses of this one."""
        start, stop = record.address, record.address + record.length
        if self.by_address.overlapping(start, stop):
            return True
        return any(start < other.address + other.length and other.address < stop for other in self.opening)


class ServerState:
    """State that the modules of a server share.

    Attributes:
        lock: held for every change of a page's state and every new entry in a client's page table.
        pool: the pages' states, and the count of their frames.
        protections: the pages' flags.
        held: pages that are neither supplied nor mapped for the time being.
        parked: faults on pages that the driver could not supply yet.
        changes: incremented whenever a page leaves FILLING, EVICTING or ASIDE, or a hold ends; waiters compare it before
            they look again.
        reclaiming_for: pages of the populate request that the driver makes room for, during its ``reclaim``.
        notify: wakes the loop, from any thread.
        gone_clients: clients that ended, or that broke their userfaultfd: the loop removes them between two events.
    """

    def __init__(self, device: Device, registry: Registry, notify: Callable[[], None]) -> None:
        self.device = device
        self.registry = registry
        self.name = registry.facts.name
        self.frames: Frames = registry.frames
        self.page_size = registry.facts.page_size
        self.unit = registry.frames.unit
        self.lock = threading.RLock()
        self.areas: dict[int, ServedArea] = {}
        self._by_page: IntervalIndex[ServedArea] = IntervalIndex()
        self.clients: dict[int, ServedClient] = {}
        self.protections = PageProtections(device, self.frames, restarted=registry.generation > 0)
        self.pool = PagePool(
            self.frames, None if device.capacity is None else device.capacity // self.page_size, self.protections,
            reclaims=not device.writable, restarted=registry.generation > 0,
        )  # fmt: skip
        self.held = HeldPages()
        self.parked: ParkedFaults[ServedArea] = ParkedFaults()
        self.changes = 0
        self.reclaiming_for: list[range] = []
        self.notify = notify
        self.gone_clients: list[ServedClient] = []
        self._closed_totals: dict[str, tuple[int, ...]] = {}
        """Totals of the counters of areas that were closed, by the name of their object."""
        # No number is given twice, not even by the server before this one: a client without an answer repeats the unmap of
        # its area, which must not unmap another; and drivers keep what belongs to a client by the client's number.
        first = (registry.generation << _NUMBER_BITS) + 1
        self._numbers, self._client_numbers = itertools.count(first), itertools.count(first)

    @cached_property
    def objects(self) -> ObjectTable:
        """Objects of the device."""
        kept = self.frames.kept
        keep = partial(kept.keep, _OBJECTS, TABLE_BYTES)
        return ObjectTable(keep, _OBJECTS in kept, self.registry.facts.length, self.page_size)

    def check_pages(self, pages: range) -> None:
        """Check that the pages which a driver names are a range inside the device.

        Raises:
            TypeError, ValueError: they are not.
        """
        if not isinstance(pages, range):
            raise TypeError(f"pages are a range, not {type(pages).__name__}")
        if pages.step != 1 or pages.start < 0 or pages.stop > self.frames.pages:
            raise ValueError(f"{pages} is not a range of the device's pages, 0 to {self.frames.pages - 1}")

    def areas_over(self, pages: range) -> list[tuple[ServedArea, int, int]]:
        """Return the areas that map some of the pages, each with the start and the length of these in the client."""
        first, stop, size = pages.start, pages.stop, self.page_size
        found = []
        for low, high, area in self._by_page.overlapping(first, stop):
            low, high = max(first, low), min(stop, high)
            found.append((area, area.base + low * size, (high - low) * size))
        return found

    def reclaimable(self, pages: range) -> list[range]:
        """Return the READY ones of these pages, but for those that room is being made for, in runs."""
        runs = self.frames.runs(pages, DevicePageState.READY)
        spared = self.reclaiming_for
        return [piece for run in runs for piece in subtract(run, spared)] if spared else runs

    def next_number(self) -> int:
        """Return the number of a new area."""
        return next(self._numbers)

    def next_client_number(self) -> int:
        """Return the number of a new client."""
        return next(self._client_numbers)

    def schedule_removal(self, client: ServedClient) -> None:
        """Have the loop remove a client that is gone, after the event at hand, which may be about its areas."""
        if not client.gone:
            client.gone = True
            self.gone_clients.append(client)

    def open_area(self, area: ServedArea) -> None:
        """Serve an area from now on, and enter it into the registry, where the next server finds it."""
        client = area.client
        with self.lock:
            self.areas[area.number] = area
            self._by_page.add(area.first, area.last, area)
            client.add(area)
        client.record.areas[area.number] = area.record
        self.registry.area_table.publish(client.record.number, area.record)

    def close_area(self, area: ServedArea) -> None:
        """Stop serving an area."""
        with self.lock:
            self.areas.pop(area.number, None)
            self._by_page.remove(area.first, area.last, area)
            area.client.remove(area)

    # --- objects

    def release_object(self, area: ServedArea) -> None:
        """Drop the reference of an area to its object, and keep what it counted."""
        used = area.object
        if used is not None:
            before = self._closed_totals.get(used.name)
            counted = area.counters.totals()
            with self.lock:
                self._closed_totals[used.name] = counted if before is None else add_totals(before, counted)
                self.objects.release(used)

    def remove_object(self, found: DeviceObject) -> None:
        """Remove an object, and what its areas counted; OSError EBUSY while areas map it."""
        self.objects.remove(found)
        self._closed_totals.pop(found.name, None)

    def object_totals(self, name: str) -> tuple[int, ...]:
        """Return the totals of the counters of all areas of an object; FileNotFoundError if there is none of that name."""
        with self.lock:
            found = self.objects.find(name)
            totals = self._closed_totals.get(name, UnusedCounters().totals())
            for area, _, _ in self.areas_over(found.pages(self.page_size)):
                if area.object == found:
                    totals = add_totals(totals, area.counters.totals())
            return totals


def access_of(write: bool) -> Access:
    """Return the access that a fault asks for."""
    return "write" if write else "read"
