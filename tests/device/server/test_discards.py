"""Discarded content does not come back, even if its pages are filled or saved at the time."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device import protocol
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, FaultAround, Recipe, Supplied
from prefault.device.page_states import DevicePageState
from prefault.sizes import PAGE_SIZE
from support import processes
from support.children import Child
from support.device_server import Handmade, HandmadeArea, Running, listening, served
from support.devices import Saved

PAGES = 16
PAGE = 3
"""Content that is discarded."""
_WAIT_S = 0.3
"""Seconds to wait for an event that must not come."""


class Gates:
    """Points at which the driver waits, in memory that the test shares with the server. All are open in the beginning."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, PAGE_SIZE)

    def _index(self, name: str) -> int:
        return 2 * ["save", "fill", "discard", "close", "decide"].index(name)

    def shut(self, name: str) -> None:
        self._bytes[self._index(name)] = 1

    def open(self, name: str) -> None:
        self._bytes[self._index(name)] = 0

    def reached(self, name: str) -> bool:
        return self._bytes[self._index(name) + 1] == 1

    def pass_through(self, name: str) -> None:
        """Wait at a point, in the driver."""
        self._bytes[self._index(name) + 1] = 1
        assert processes.eventually(lambda: not self._bytes[self._index(name)])


class Stored(Device):
    """Reads first and then waits, saves and discards after it waited; the page is evicted by a thread of its own."""

    length = PAGES * PAGE_SIZE
    evicts = True

    def __init__(self, *, workers: int = 2, fault_around: FaultAround | None = None, save_fails: bool = False) -> None:
        self.workers = workers
        self.fault_around = fault_around
        self.gates = Gates()
        self._store = mmap.mmap(-1, self.length)
        self._told = mmap.mmap(-1, PAGE_SIZE)
        self._save_fails = save_fails

    def hold(self, value: int) -> None:
        """Set the store's content of the page, in the test."""
        self._store[PAGE * PAGE_SIZE] = value

    def evict(self) -> None:
        """Have the driver evict, in the test."""
        self._told[0] = 1

    def open(self, area: DeviceArea) -> None:
        threading.Thread(target=self._evict, args=(area,), daemon=True).start()

    def _evict(self, area: DeviceArea) -> None:
        while not self._told[0]:
            time.sleep(0.001)
        area.evict(range(PAGE, PAGE + 1), self._save)

    def _save(self, run: range, content: memoryview) -> None:
        self.gates.pass_through("save")
        if self._save_fails:
            raise OSError("the disk is full")
        self._store[run.start * PAGE_SIZE : run.stop * PAGE_SIZE] = content

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        content = self._store[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        if page == PAGE:
            self.gates.pass_through("fill")
        area.frame(page)[:] = content
        return None

    def discard(self, area: DeviceArea, pages: range) -> None:
        self.gates.pass_through("discard")
        self._store[pages.start * PAGE_SIZE : pages.stop * PAGE_SIZE] = bytes(len(pages) * PAGE_SIZE)

    def close(self, area: DeviceArea) -> None:
        self.gates.pass_through("close")


def _discard(client: Handmade, area: HandmadeArea) -> None:
    client.send(protocol.Discard(next(client.numbers), area.number, PAGE, PAGE + 1))


def _evicting(device: Stored, running: Running, area: HandmadeArea) -> None:
    area.view[PAGE * PAGE_SIZE] = 77
    device.gates.shut("save")
    device.evict()
    assert processes.eventually(lambda: device.gates.reached("save"))
    assert running.frames.states[PAGE] == DevicePageState.EVICTING


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("save_fails", [False, True])
def test_a_discard_waits_for_the_eviction_of_its_pages_and_faults_do_not(workers: int, save_fails: bool) -> None:
    device = Stored(workers=workers, save_fails=save_fails)
    with served(device) as (running, client):
        area = client.map(device.length)
        _evicting(device, running, area)
        _discard(client, area)
        area.view[(PAGE + 1) * PAGE_SIZE] = 1
        assert area.statistics().missing == 2  # it is answered, and the discard is not yet
        device.gates.open("save")
        assert isinstance(client.receive(), protocol.Discarded)
        assert area.view[PAGE * PAGE_SIZE] == 0


def test_a_discard_waits_for_pages_that_are_being_filled() -> None:
    device = Stored()
    device.hold(77)
    device.gates.shut("fill")
    with served(device) as (_, client):
        area = client.map(device.length)
        client.send(area.populate_request((PAGE, PAGE + 1)))
        assert processes.eventually(lambda: device.gates.reached("fill"))
        _discard(client, area)
        area.statistics()
        device.gates.open("fill")
        assert {type(client.receive()) for _ in range(2)} == {protocol.Populated, protocol.Discarded}
        assert area.view[PAGE * PAGE_SIZE] == 0


def test_a_populate_supplies_no_page_before_the_driver_has_discarded_it() -> None:
    device = Stored()
    device.hold(77)
    device.gates.shut("discard")
    with served(device) as (running, client):
        area = client.map(device.length)
        _discard(client, area)
        assert processes.eventually(lambda: device.gates.reached("discard"))
        client.send(area.populate_request((0, PAGES)))
        others = [page for page in range(PAGES) if page != PAGE]
        assert processes.eventually(lambda: all(running.frames.states[page] == DevicePageState.READY for page in others))
        device.gates.open("discard")
        assert {type(client.receive()) for _ in range(2)} == {protocol.Populated, protocol.Discarded}
        assert area.view[PAGE * PAGE_SIZE] == 0


@pytest.mark.parametrize("around", [None, FaultAround(PAGES * PAGE_SIZE, PAGES * PAGE_SIZE)], ids=["alone", "around"])
def test_a_fault_waits_until_the_driver_has_discarded_its_page(tmp_path: Path, around: FaultAround | None) -> None:
    device = Stored(fault_around=around)
    device.hold(77)
    device.gates.shut("discard")
    with listening(device, tmp_path) as connect, connect() as client:
        area = client.map(device.length)
        _discard(client, area)
        assert processes.eventually(lambda: device.gates.reached("discard"))

        def other() -> tuple[int, int]:
            with connect() as elsewhere:
                view = elsewhere.map(device.length).view
                return view[(PAGE - 1) * PAGE_SIZE], view[PAGE * PAGE_SIZE]

        with Child(other) as child:
            time.sleep(_WAIT_S)
            device.gates.open("discard")
            assert child.result() == (0, 0)
        assert isinstance(client.receive(), protocol.Discarded)
        assert area.view[PAGE * PAGE_SIZE] == 0


def test_a_discard_that_waits_ends_with_its_area_which_is_closed_at_the_driver() -> None:
    device = Stored()
    with served(device) as (running, client):
        area, other = client.map(device.length), client.map(device.length)
        _evicting(device, running, other)
        _discard(client, area)
        client.send(protocol.Unmap(next(client.numbers), area.number))
        refused = client.receive()
        assert isinstance(refused, protocol.Refused)
        assert "was unmapped" in refused.message
        assert isinstance(client.receive(), protocol.Done)
        assert processes.eventually(lambda: device.gates.reached("close"))
        device.gates.open("save")
        assert other.view[PAGE * PAGE_SIZE] == 77  # it was evicted, and not discarded
        assert not device.gates.reached("discard")


class Refusing(Stored):
    """Decides about a discard after it waited: refuses, kills its process, or goes on, as the test has set."""

    restartable = True
    GO_ON, REFUSE, DIE = range(3)

    def decide(self, answer: int) -> None:
        """Set the answers to discards, in the test."""
        self._told[1] = answer

    def discards(self) -> int:
        """Return how often the driver was asked to discard."""
        return self._told[2]

    def recipe(self) -> Recipe | None:
        return None

    def discard(self, area: DeviceArea, pages: range) -> None:
        self._told[2] += 1
        self.gates.pass_through("decide")
        match self._told[1]:
            case self.REFUSE:
                raise PermissionError(f"{pages} are pinned")
            case self.DIE:
                self._told[1] = self.GO_ON
                os.kill(os.getpid(), signal.SIGKILL)
        super().discard(area, pages)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_refused_discard_changes_nothing(workers: int) -> None:
    device = Refusing(workers=workers)
    device.decide(Refusing.REFUSE)
    with served(device) as (running, client):
        area = client.map(device.length)
        area.view[PAGE * PAGE_SIZE] = 77
        before = os.fstat(running.frames.fd).st_blocks
        refused = client.ask(protocol.Refused, protocol.Discard(next(client.numbers), area.number, 0, PAGES))
        assert refused.kind == "device"
        assert f"driver raised in discard(): PermissionError: range(0, {PAGES}) are pinned" in refused.message
        assert running.frames.states[PAGE] == DevicePageState.READY
        assert os.fstat(running.frames.fd).st_blocks == before
        assert area.view[PAGE * PAGE_SIZE] == 77
        device.decide(Refusing.GO_ON)
        assert area.discard(0, PAGES) == 1
        assert area.view[PAGE * PAGE_SIZE] == 0


def test_the_frames_stay_while_the_driver_decides_and_nothing_fills_saves_or_maps_them(tmp_path: Path) -> None:
    device = Refusing()
    device.gates.shut("decide")
    device.decide(Refusing.REFUSE)
    with listening(device, tmp_path) as connect, connect() as client:
        area = client.map(device.length)
        area.view[PAGE * PAGE_SIZE] = 77
        _discard(client, area)
        assert processes.eventually(lambda: device.gates.reached("decide"))
        device.evict()  # in a thread of the driver
        area.view[PAGE * PAGE_SIZE + 1] = 78  # mapped: it goes on

        def other() -> bytes:
            with connect() as elsewhere:
                view = elsewhere.map(device.length).view
                return bytes(view[PAGE * PAGE_SIZE : PAGE * PAGE_SIZE + 2])

        with Child(other) as child:
            time.sleep(_WAIT_S)
            assert not child.ended()
            assert not device.gates.reached("save")
            device.gates.open("decide")
            assert child.result() == b"MN"  # 77, 78
        assert isinstance(client.receive(), protocol.Refused)
        assert area.view[PAGE * PAGE_SIZE] == 77


def test_two_clients_discard_the_same_pages(tmp_path: Path) -> None:
    device = Refusing()
    device.gates.shut("decide")
    device.decide(Refusing.REFUSE)
    with listening(device, tmp_path) as connect, connect() as client, connect() as second:
        area, again = client.map(device.length), second.map(device.length)
        area.view[PAGE * PAGE_SIZE] = 77
        _discard(client, area)
        assert processes.eventually(lambda: device.gates.reached("decide"))
        second.send(protocol.Discard(next(second.numbers), again.number, 0, PAGES))
        again.statistics()
        assert device.discards() == 1  # the second one waits for the first
        device.gates.open("decide")
        for asked in (client, second):
            assert isinstance(asked.receive(), protocol.Refused)
        assert device.discards() == 2
        assert again.view[PAGE * PAGE_SIZE] == 77
        device.decide(Refusing.GO_ON)
        assert again.discard(0, PAGES) == 1
        assert area.view[PAGE * PAGE_SIZE] == 0


def test_a_fill_beyond_the_capacity_waits_for_a_discard_that_makes_room(tmp_path: Path) -> None:
    device = Refusing()
    device.capacity = 2 * PAGE_SIZE
    device.gates.shut("decide")
    with listening(device, tmp_path) as connect, connect() as client:
        area = client.map(device.length)
        area.view[0] = area.view[PAGE * PAGE_SIZE] = 77
        client.send(protocol.Discard(next(client.numbers), area.number, 0, PAGE + 1))
        assert processes.eventually(lambda: device.gates.reached("decide"))

        def other() -> int:
            with connect() as elsewhere:
                return elsewhere.map(device.length).view[(PAGE + 1) * PAGE_SIZE]

        with Child(other) as child:
            time.sleep(_WAIT_S)
            device.gates.open("decide")
            assert child.result() == 0
        assert isinstance(client.receive(), protocol.Discarded)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_driver_killed_in_discard_is_asked_again_by_the_next_server(workers: int) -> None:
    device = Refusing(workers=workers)
    with prefault.device.map(device) as area, area.memoryview() as view:
        view[PAGE * PAGE_SIZE] = view[0] = 77
        device.decide(Refusing.DIE)
        assert area.discard(offset=PAGE * PAGE_SIZE, length=PAGE_SIZE).freed_bytes == PAGE_SIZE
        assert device.discards() == 2
        assert (view[PAGE * PAGE_SIZE], view[0]) == (0, 77)


def test_a_driver_killed_in_discard_for_good_leaves_the_pages(tmp_path: Path) -> None:
    device = Refusing()
    device.restartable = False
    with prefault.device.map(device) as area, area.memoryview() as view:
        view[PAGE * PAGE_SIZE] = 77
        device.decide(Refusing.DIE)
        with pytest.raises(prefault.DeviceGoneError):
            area.discard(offset=PAGE * PAGE_SIZE, length=PAGE_SIZE)
        assert view[PAGE * PAGE_SIZE] == 77


def test_a_refusal_reaches_the_caller_of_discard() -> None:
    device = Refusing()
    device.decide(Refusing.REFUSE)
    with prefault.device.map(device) as area:
        with pytest.raises(prefault.DiscardError, match=r"driver raised in discard\(\): PermissionError: range\(0, 16\)"):
            prefault.discard(area)
        with pytest.raises(prefault.DiscardError, match="are pinned"):
            area.discard()


def _writes_discards_reads(connect: Callable[[], Handmade], pages: range, seed: int, duration_s: float) -> tuple[int, int]:
    """Return the number of rounds, and of those in which the old bytes came back."""
    generator = random.Random(seed)
    count = wrong = 0
    with connect() as client:
        area = client.map(pages.stop * PAGE_SIZE)
        until = time.monotonic() + duration_s
        while time.monotonic() < until:
            page = generator.choice(pages)
            area.view[page * PAGE_SIZE] = 1
            area.discard(page, page + 1)
            wrong += area.view[page * PAGE_SIZE] != 0
            count += 1
    return count, wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_pool_that_is_too_small_no_old_bytes_come_back(tmp_path: Path, workers: int) -> None:
    device = Saved(str(tmp_path / "store"), 48, capacity_pages=8, workers=workers)
    with (
        listening(device, tmp_path) as connect,
        Child(lambda: _writes_discards_reads(connect, range(16), 1, 1.0)) as one,
        Child(lambda: _writes_discards_reads(connect, range(16, 32), 2, 1.0)) as two,
        Child(lambda: _writes_discards_reads(connect, range(32, 48), 3, 1.0)) as three,
    ):
        found = [child.result() for child in (one, two, three)]
    assert all(count > 10 for count, _ in found)
    assert [wrong for _, wrong in found] == [0, 0, 0]
