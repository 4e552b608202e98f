"""Eviction loses no write; and dirty tracking."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefault._kernel import userfaultfd as uffd
from prefault.device import protocol
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, Supplied
from prefault.device.page_states import DevicePageState
from support import oracle
from support.children import Child
from support.device_server import ends_by, listening, served

PAGE = mmap.PAGESIZE


class Stored(Device):
    """Device whose evicted pages are kept in memory that the test shares, and supplied again from there.

    A page that is discarded is evicted instead: so the test says when. ``churn`` evicts at random all the time.
    """

    writable = True
    evicts = True

    def __init__(
        self, pages: int = 16, *, churn: bool = False, seed: int = 1, workers: int = 0, page_size: int = PAGE
    ) -> None:
        self.page_size = page_size
        self.length = pages * page_size
        self.workers = workers
        self.store = mmap.mmap(-1, self.length)
        self.counts = memoryview(mmap.mmap(-1, PAGE)).cast("Q")
        self.churn = churn
        self.seed = seed
        self.fails = memoryview(mmap.mmap(-1, PAGE))

    def open(self, area: DeviceArea) -> None:
        if self.churn and not self.counts[1]:
            self.counts[1] = 1
            threading.Thread(target=self._churn, args=(area,), daemon=True).start()

    def _churn(self, area: DeviceArea) -> None:
        generator = random.Random(self.seed)
        pages = self.length // self.page_size
        while not self.counts[2]:
            first = generator.randrange(pages)
            self.evict(area, range(first, min(pages, first + generator.randrange(1, 5))))
            self.counts[0] += 1
        self.counts[3] = 1

    def evict(self, area: DeviceArea, pages: range) -> None:
        area.evict(pages, self.save)

    def save(self, pages: range, content: memoryview) -> None:
        if self.fails[0]:
            raise OSError("the disk is full")
        self.store[pages.start * self.page_size : pages.stop * self.page_size] = content

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = self.store[page * self.page_size : (page + 1) * self.page_size]
        return None


class ByMessage(Stored):
    """``populate`` of an odd number of pages evicts the pages behind them. What a test of one thread needs."""

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        if pages.start == 0:
            found = area.evict(range(4, 8), None if self.fails[1] else self.save)
            if self.fails[1]:
                self.store[: len(found)] = found
        super().populate(area, pages, access)


class SlowToSave(ByMessage):
    """Device that waits after it saved the content."""

    def save(self, pages: range, content: memoryview) -> None:
        super().save(pages, content)
        time.sleep(0.2)


@pytest.mark.parametrize("touch", ["written", "not mapped", "read"])
def test_a_touch_of_a_page_that_is_being_evicted_waits_and_loses_nothing(touch: str) -> None:
    with served(SlowToSave(workers=2)) as (running, client):
        area, other = client.map(16 * PAGE), client.map(16 * PAGE, access="read")
        area.view[5 * PAGE] = 50
        client.send(area.populate_request((0, 1)))
        while running.frames.states[5] != DevicePageState.EVICTING:
            time.sleep(0.001)
        if touch == "written":
            area.view[5 * PAGE + 1] = 51
        elif touch == "not mapped":
            assert other.view[5 * PAGE] == 50
        else:
            assert area.view[5 * PAGE] == 50  # still there
            assert running.frames.states[5] == DevicePageState.EVICTING
        assert isinstance(client.receive(), protocol.Populated)
        assert area.view[5 * PAGE : 5 * PAGE + 2] == bytes((50, 51 if touch == "written" else 0))
        assert running.frames.states[5] == DevicePageState.READY


def test_a_page_that_the_client_replaced_leaves_no_write_behind_it_unprotected() -> None:
    with served(SlowToSave(workers=2)) as (running, client):
        area = client.map(16 * PAGE)
        for page in range(4, 8):
            area.view[page * PAGE] = 10 * page
        uffd.unregister(client.fd, area.address + 5 * PAGE, PAGE)  # the kernel stops there
        client.send(area.populate_request((0, 1)))
        while running.frames.states[7] != DevicePageState.EVICTING:
            time.sleep(0.001)
        area.view[7 * PAGE + 1] = 71
        assert isinstance(client.receive(), protocol.Populated)
        assert area.view[7 * PAGE : 7 * PAGE + 2] == bytes((70, 71))


@pytest.mark.usefixtures("no_leaks")
def test_writes_are_saved_and_come_back() -> None:
    device = ByMessage()
    with served(device) as (running, client):
        area, other = client.map(16 * PAGE), client.map(8 * PAGE, 2 * PAGE, access="read")
        for page in range(3, 9):
            area.view[page * PAGE : page * PAGE + 2] = bytes((page, 1))
        assert other.view[3 * PAGE] == 5
        assert area.populate((0, 1)).mapped == 1
        assert [device.store[page * PAGE] for page in range(16)] == [0, 0, 0, 0, 4, 5, 6, 7, *[0] * 8]
        assert [running.frames.has(page * PAGE) for page in range(9)] == [page in (0, 3, 8) for page in range(9)]
        assert oracle.present(area.address, 16 * PAGE) == [page in (0, 3, 8) for page in range(16)]
        assert not any(oracle.present(other.address, 8 * PAGE))
        area.view[5 * PAGE + 1] += 1
        assert area.view[5 * PAGE : 5 * PAGE + 3] == bytes((5, 2, 0))
        assert other.view[3 * PAGE + 1] == 2
        area.view[4 * PAGE] = 44


def test_without_save_the_content_is_returned() -> None:
    device = ByMessage()
    device.fails[1] = 1
    with served(device) as (_, client):
        area = client.map(16 * PAGE)
        area.view[6 * PAGE], area.view[7 * PAGE] = 60, 70
        area.populate((0, 1))
        # Pages 6 and 7 only: those that were not supplied are left out.
        assert (device.store[0], device.store[PAGE]) == (60, 70)


def test_pages_that_could_not_be_saved_stay_as_they_are() -> None:
    device = ByMessage()
    with served(device) as (_, client):
        area = client.map(16 * PAGE)
        for page in range(4, 8):
            area.view[page * PAGE] = page
        device.fails[0] = 1
        failed = area.populate((0, 1), kind=protocol.Failed)
        assert "the disk is full" in failed.message
        assert [area.view[page * PAGE] for page in range(4, 8)] == [4, 5, 6, 7]
        area.view[5 * PAGE] = 55  # not write-protected any more
        device.fails[0] = 0
        area.populate((0, 1))
        assert device.store[5 * PAGE] == 55


class Small(Device):
    """Device that is not writable, with a small capacity: reclaim by age."""

    writable = False
    length = 1 << 40
    capacity = 4 * PAGE

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[0] = page % 256
        return None


def test_pages_that_come_and_go_leave_no_trace_and_are_as_old_as_when_they_came_last() -> None:
    with served(Small()) as (running, client):
        area = client.map(16 * PAGE, access="read")
        area.populate((0, 4))
        for _ in range(3000):
            assert area.discard(0, 1) == 1
            assert area.view[0] == 0
        assert area.view[4 * PAGE] == 4  # in the place of page 1, the oldest by now
        assert [int(state) for state in running.frames.states[:5]] == [
            DevicePageState.READY,
            DevicePageState.MISSING,
            DevicePageState.READY,
            DevicePageState.READY,
            DevicePageState.READY,
        ]


def test_a_device_that_is_writable_says_that_it_evicts() -> None:
    class Silent(ByMessage):
        evicts = False

    with served(Silent()) as (_, client):
        failed = client.map(16 * PAGE).populate((0, 1), kind=protocol.Failed)
        assert "evicts = True" in failed.message


@pytest.mark.parametrize("wrong", [range(17), range(-1, 2), range(0, 4, 2), 3], ids=repr)
def test_pages_outside_of_the_device_are_the_drivers_fault(wrong: Any) -> None:
    class Wrong(Stored):
        def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
            area.evict(wrong)

    with served(Wrong()) as (_, client):
        failed = client.map(16 * PAGE).populate((0, 1), kind=protocol.Failed)
        assert failed.kind == "driver"
        assert "Error" in failed.message


def test_reclaim_makes_room_for_a_writable_device() -> None:
    class Reclaiming(Stored):
        capacity = 4 * PAGE

        def reclaim(self, area: DeviceArea, pages: int) -> None:
            self.evict(area, range(area.pages.start, area.ready(area.pages)[0].start + pages))

    for workers in (0, 2):
        device = Reclaiming(workers=workers)
        with served(device) as (running, client):
            area = client.map(16 * PAGE)
            for round_ in range(3):
                for page in range(16):
                    area.view[page * PAGE] += page
                    assert os.fstat(running.frames.fd).st_blocks * 512 <= 4 * PAGE
                    assert area.view[page * PAGE] == page * (round_ + 1)


_COUNTERS = PAGE // 8


def _writer(connect: Callable[[], Any], number: int, seed: int, pages: int, duration_s: float) -> list[int]:
    """Add one to its own word of random pages, as fast as possible; return the number of times, by page."""
    generator = random.Random(seed)
    counts = [0] * pages
    with connect() as client:
        words = client.map(pages * PAGE).view.cast("Q")
        until = time.monotonic() + duration_s
        while time.monotonic() < until:
            for _ in range(50):
                page = generator.randrange(pages)
                words[page * _COUNTERS + number] += 1
                counts[page] += 1
        words.release()
    return counts


def _no_write_is_lost(directory: Path, seed: int, duration_s: float, workers: int = 0) -> tuple[int, int]:
    pages, writers = 8, 3
    device = Stored(pages, churn=True, seed=seed, workers=workers)
    with listening(device, directory) as connect, connect() as client:
        area = client.map(pages * PAGE)

        def write(number: int) -> list[int]:
            return _writer(connect, number, seed + number, pages, duration_s)

        with Child(lambda: write(0)) as one, Child(lambda: write(1)) as two, Child(lambda: write(2)) as three:
            counts = [child.result(duration_s + 30) for child in (one, two, three)]
        device.counts[2] = 1
        give_up = time.monotonic() + 10
        while not device.counts[3]:
            assert time.monotonic() < give_up, "the thread that evicts is stuck"
            time.sleep(0.001)
        words = area.view.cast("Q")
        found = [[words[page * _COUNTERS + number] for page in range(pages)] for number in range(writers)]
        words.release()
        assert found == counts
    return sum(map(sum, counts)), device.counts[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_write_is_lost_by_writers_at_full_speed(tmp_path: Path, workers: int) -> None:
    writes, evictions = _no_write_is_lost(tmp_path, 4711 + workers, 0.4, workers)
    assert writes > 100
    assert evictions > 20


@pytest.mark.stress
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
def test_no_write_is_lost_for_a_long_time(tmp_path: Path, seed: int) -> None:
    writes, evictions = _no_write_is_lost(tmp_path, seed, 60)
    print(f"seed {seed}: {writes} writes, {evictions} evictions")


# --- dirty tracking


def test_dirty_pages_are_those_that_were_written() -> None:
    with served(Stored()) as (_, client):
        area = client.map(16 * PAGE, track_dirty=True)
        assert area.view[3 * PAGE] == 0
        area.populate((5, 12), access="write")
        assert area.dirty() == []
        area.view[7 * PAGE] = 1  # populated: trapped
        area.view[8 * PAGE] = 1
        area.view[3 * PAGE] = 1  # read before
        area.view[14 * PAGE] = 1  # written at the first touch
        assert area.dirty() == [(3, 4), (7, 9), (14, 15)]
        assert area.dirty(clear=True) == [(3, 4), (7, 9), (14, 15)]
        assert area.dirty() == []
        assert area.view[7 * PAGE] == 1
        area.view[7 * PAGE] = 2
        area.view[7 * PAGE] = 3
        assert area.dirty() == [(7, 8)]
        assert area.statistics().write_protect >= 4


def test_dirty_pages_of_an_area_are_its_own() -> None:
    with served(Stored()) as (_, client):
        area, other = client.map(16 * PAGE, track_dirty=True), client.map(8 * PAGE, 4 * PAGE, track_dirty=True)
        other.view[PAGE] = 1
        assert (area.dirty(), other.dirty()) == ([], [(5, 6)])
        untracked = client.map(16 * PAGE)
        refused = client.ask(protocol.Refused, protocol.DirtyPages(next(client.numbers), untracked.number, False))
        assert "track_dirty" in refused.message


def test_dirty_pages_survive_being_evicted_or_not() -> None:
    device = ByMessage()
    with served(device) as (_, client):
        area = client.map(16 * PAGE, track_dirty=True)
        area.populate((4, 8))
        area.view[5 * PAGE] = 1
        area.populate((0, 1))  # evicts 4 to 7
        assert area.dirty() == [(5, 6)]
        assert area.view[5 * PAGE] == 1
        assert area.dirty(clear=True) == [(5, 6)]
        area.populate((4, 8))
        device.fails[0] = 1
        area.view[6 * PAGE] = 1
        area.populate((0, 1), kind=protocol.Populated)  # page 0 is there: nothing is evicted
        assert area.discard(0, 1) == 1
        area.populate((0, 1), kind=protocol.Failed)
        assert area.dirty() == [(6, 7)]
        area.view[7 * PAGE] = 1  # still protected
        assert area.dirty() == [(6, 8)]


def test_a_page_that_fails_after_it_was_evicted_is_a_sigbus() -> None:
    class Forgetful(ByMessage):
        def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
            if self.store[page * PAGE]:
                raise OSError("I forgot")
            return super().fault(area, page, access)

    def client_process(say: Callable[[str], None]) -> None:
        with served(Forgetful()) as (_, client):
            area = client.map(16 * PAGE, track_dirty=True)
            area.view[5 * PAGE] = 1
            area.populate((0, 1))
            say(f"{area.view[6 * PAGE]} ")
            say(f"{area.view[5 * PAGE]}")

    assert ends_by(client_process) == ("0 ", -signal.SIGBUS)


@pytest.mark.parametrize("workers", [0, 2])
def test_at_the_orderly_end_what_is_written_is_saved_by_close_and_writes_go_on(workers: int) -> None:
    class Closing(Stored):
        def close(self, area: DeviceArea) -> None:
            time.sleep(0.05)
            area.evict(range(4, 6), self.save)

    device = Closing(workers=workers)

    def client_process(say: Callable[[str], None]) -> None:
        with served(device) as (running, client):
            area = client.map(16 * PAGE, track_dirty=True)
            for page in (3, 4, 9):
                area.view[page * PAGE] = page
            assert area.dirty(clear=True) == [(3, 5), (9, 10)]
            os.kill(running.pid, signal.SIGTERM)
            assert running.wait() == 0
            area.view[9 * PAGE] += 1  # was write-protected
            say(f"{area.view[9 * PAGE]} {device.store[4 * PAGE]} ")
            area.view[4 * PAGE] = 1  # evicted

    assert ends_by(client_process) == ("10 4 ", -signal.SIGBUS)
