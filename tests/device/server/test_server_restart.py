"""A server that goes on where another was killed; the test is the warden: it keeps the descriptors, and repairs."""

from __future__ import annotations

import mmap
import os
import select
import signal
from collections.abc import Iterator

import pytest

from prefault.device import protocol
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, Supplied
from prefault.device.page_states import DevicePageState
from prefault.device.registry import AreaRecord, ClientRecord
from support import oracle
from support.children import Child
from support.device_server import Handmade, HandmadeArea, Running

PAGE = mmap.PAGESIZE


class Fatal(Device):
    """Page 7 is its end, the first time; and so is saving what is evicted."""

    evicts = True

    def __init__(self, workers: int = 0) -> None:
        self.length = 16 * PAGE
        self.workers = workers
        self.shared = mmap.mmap(-1, PAGE)

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = bytes((page + 1,)) * PAGE
        if page == 7 and not self.shared[0]:
            self.shared[0] = 1
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    def open(self, area: DeviceArea) -> None:
        self.shared[1] += 1

    def save(self, pages: range, content: memoryview) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        area.evict(range(2, 4), self.save)


class Warden:
    """Starts one server after the other."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.running = Running(device, keep=True)
        self.client = Handmade(self.running.connection)

    def record(self, *areas: HandmadeArea, track_dirty: bool = False) -> None:
        kept = self.running.other
        assert kept is not None
        client = self.client
        record = ClientRecord(
            1, os.getpid(), os.getuid(), kept.fileno(), os.pidfd_open(os.getpid()), client.fd, client.lifeline_write,
            client.lifeline_read,
        )  # fmt: skip
        for area in areas:
            record.areas[area.number] = AreaRecord(area.number, area.address, 0, len(area.view), "write", track_dirty)
        self.running.registry.clients[1] = record

    def restart(self) -> Running:
        running = self.running
        assert running.wait() == -signal.SIGKILL
        running.frames.repair()
        running.registry.generation += 1
        self.running = Running(self.device, registry=running.registry, connection=running.connection, other=running.other)
        return self.running

    def close(self) -> None:
        for record in self.running.registry.clients.values():
            os.close(record.pidfd)
        self.client.close()
        self.running.__exit__()


@pytest.fixture(params=[0, 2], ids=["inline", "workers"])
def warden(request: pytest.FixtureRequest) -> Iterator[Warden]:
    made = Warden(Fatal(request.param))
    yield made
    made.close()


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_fault_that_killed_the_server_is_answered_by_the_next(warden: Warden, access: str) -> None:
    area = warden.client.map(16 * PAGE, access=access)
    assert area.view[3 * PAGE] == 4
    area.view[3 * PAGE] = 44
    warden.record(area)

    pid = warden.running.pid
    # The thread that waits has the GIL, so the restart is done by a fork that this process made before.
    with Child(lambda: _restart_when_dead(warden, pid)):
        assert area.view[7 * PAGE] == 8
        assert area.view[3 * PAGE] == 44
        assert isinstance(reply := warden.client.receive(), protocol.Restarted)
        assert reply.generation == 1
        assert area.populate((10, 10), kind=protocol.Refused).kind == "value"
        assert area.log() == [(7, 8)]
        assert warden.device.shared[1] == 2  # type: ignore[attr-defined]
        again = protocol.Map(99, area.address, 0, 16 * PAGE, "write", False)
        assert warden.client.ask(protocol.Mapped, again).area == area.number


def _restart_when_dead(warden: Warden, pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [], 20)
    os.close(pidfd)
    running = warden.running
    running.frames.repair()
    running.registry.generation += 1
    started = Running(warden.device, registry=running.registry, connection=running.connection, other=running.other)
    os.waitpid(started.pid, 0)


def test_pages_that_were_being_evicted_are_writable_again(warden: Warden) -> None:
    area = warden.client.map(16 * PAGE)
    for page in (2, 3):
        area.view[page * PAGE] = 50 + page
    warden.record(area)
    warden.client.send(area.populate_request((0, 1)))
    running = warden.restart()
    reply = warden.client.receive()
    assert isinstance(reply, protocol.Restarted)
    assert [running.frames.states[page] for page in range(4)] == [DevicePageState.MISSING] * 2 + [DevicePageState.READY] * 2
    for page in (2, 3):
        area.view[page * PAGE] += 1
        assert area.view[page * PAGE] == 51 + page
    assert oracle.present(area.address, 4 * PAGE) == [False, False, True, True]


def test_after_a_restart_what_was_supplied_counts_as_dirty(warden: Warden) -> None:
    area = warden.client.map(16 * PAGE, track_dirty=True)
    assert area.view[2 * PAGE] == 3
    area.view[9 * PAGE] = 1
    warden.record(area, track_dirty=True)
    os.kill(warden.running.pid, signal.SIGKILL)
    warden.restart()
    assert isinstance(warden.client.receive(), protocol.Restarted)
    assert area.dirty(clear=True) == [(2, 3), (9, 10)]
    area.view[2 * PAGE] = 1
    assert area.dirty() == [(2, 3)]


def test_a_page_that_is_blamed_fails_once(warden: Warden) -> None:
    area = warden.client.map(16 * PAGE)
    warden.record(area)
    os.kill(warden.running.pid, signal.SIGKILL)
    warden.running.registry.blamed[5] = "page 5 ended the last server"
    warden.restart()
    assert isinstance(warden.client.receive(), protocol.Restarted)
    failed = area.populate((5, 6), kind=protocol.Failed)
    assert (failed.kind, failed.page, failed.message) == ("driver", 5, "page 5 ended the last server")
    assert area.view[5 * PAGE] == 6


def test_the_end_of_an_area_that_is_asked_for_again_is_not_that_of_a_newer_one(warden: Warden) -> None:
    """The last server released the area, notified its warden, and was killed before it could answer."""
    client = warden.client
    area, ended = client.map(4 * PAGE), client.map(4 * PAGE)
    unmap = protocol.Unmap(next(client.numbers), ended.number)
    client.ask(protocol.Done, unmap)
    ended.forget()
    warden.record(area)
    os.kill(warden.running.pid, signal.SIGKILL)
    warden.restart()
    assert isinstance(client.receive(), protocol.Restarted)
    newer = client.map(4 * PAGE)
    client.ask(protocol.Done, unmap)
    newer.populate((0, 1))
    assert oracle.present(newer.address, 4 * PAGE) == [True, False, False, False]
    assert newer.view[PAGE] == area.view[PAGE] == 2
