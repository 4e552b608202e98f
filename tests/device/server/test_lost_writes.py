"""Written content stays, and is known as dirty: after restarts, lost connections, rollbacks, parts of pages."""

from __future__ import annotations

import mmap
import os
import signal
import socket
from pathlib import Path

import pytest

import prefault.device
from prefault._kernel import mman
from prefault.device import protocol
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, Supplied
from prefault.device.page_states import DevicePageState
from prefault.ipc import socket_path
from prefault.sizes import PAGE_SIZE
from support import processes
from support.device_server import Handmade, listening, served
from support.devices import Pattern
from support.wardens import roles

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES = 8
_WAIT_S = 0.3
"""Seconds that a driver waits for a write that cannot come, since the write waits for the driver."""


class Evicting(Device):
    """Keeps what is evicted in memory that the test shares; ``save`` waits for a write behind its back.

    It evicts all pages when it is asked to populate, and in ``open`` once it is told to.
    """

    length = PAGES * PAGE_SIZE
    evicts = True
    restartable = True
    workers = 1

    def __init__(self) -> None:
        self._store = mmap.mmap(-1, self.length)
        self._said = mmap.mmap(-1, PAGE_SIZE)

    def evict_in_open(self) -> None:
        self._said[0] = 1

    def saves(self) -> bool:
        """Return whether the driver has the content of pages that are not punched yet."""
        return self._said[1] == 1

    def written(self) -> None:
        """Announce, in the test, that the pages have other content by now."""
        self._said[2] = 1

    def open(self, area: DeviceArea) -> None:
        if self._said[0]:
            area.evict(range(PAGES), self._save)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        area.evict(range(PAGES), self._save)
        super().populate(area, pages, access)

    def _save(self, pages: range, content: memoryview) -> None:
        taken = bytes(content)
        self._said[1] = 1
        processes.eventually(lambda: self._said[2] == 1, _WAIT_S)
        self._store[pages.start * PAGE_SIZE : pages.stop * PAGE_SIZE] = taken

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = self._store[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        return None


def test_a_driver_that_evicts_in_open_after_a_restart_finds_all_areas_write_protected() -> None:
    device = Evicting()
    with prefault.device.map(device) as first, prefault.device.map(device) as second, second.memoryview() as view:
        view[0] = 1
        device.evict_in_open()
        os.kill(roles()["server"], signal.SIGKILL)
        assert processes.eventually(device.saves)
        view[0] = 2
        device.written()
        first.stats()  # answered after all areas are opened
        assert view[0] == 2


def test_a_connection_that_ends_during_an_eviction_takes_no_write_protection_away() -> None:
    device = Evicting()
    with served(device) as (running, client):
        area = client.map(device.length)
        area.view[0] = 1
        client.send(area.populate_request((1, 2)))
        assert processes.eventually(device.saves)
        client.connection.shutdown(socket.SHUT_RDWR)
        area.view[0] = 2
        device.written()
        assert processes.eventually(lambda: running.frames.states[0] in (DevicePageState.MISSING, DevicePageState.READY))
        assert area.view[0] == 2


class FailsAtLast(Pattern):
    """One page a call; the last one fails, when the test says so."""

    def __init__(self) -> None:
        super().__init__(PAGES, writable=True, workers=2, batch_pages=1)
        self._said = mmap.mmap(-1, PAGE_SIZE)

    def asked(self) -> bool:
        """Return whether the driver was asked for the last page."""
        return self._said[0] == 1

    def fail(self) -> None:
        self._said[1] = 1

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        if PAGES - 1 in pages:
            self._said[0] = 1
            processes.eventually(lambda: self._said[1] == 1)
            raise OSError("the last page is worn out")
        super().populate(area, pages, access)


def test_a_rollback_leaves_what_another_client_wrote_in_an_area_that_it_closed(tmp_path: Path) -> None:
    device = FailsAtLast()
    server = listening(device, tmp_path)
    with server as connect, connect() as one, connect() as other:
        area = one.map(device.length)
        one.send(area.populate_request((0, PAGES), rollback=True))
        states = server.running.frames.states
        assert processes.eventually(lambda: device.asked() and states[0] == states[3] == DevicePageState.READY)
        closed = other.map(PAGE_SIZE)
        closed.view[10] = 99
        closed.unmap()
        device.fail()
        assert isinstance(one.receive(), protocol.Failed)
        assert states[3] == DevicePageState.MISSING  # it was rolled back
        assert area.view[10] == 99


class CountsDiscards(Pattern):
    """Device that counts calls of discard, over all of its servers."""

    def __init__(self) -> None:
        super().__init__(PAGES, writable=True, restartable=True)
        self._said = mmap.mmap(-1, PAGE_SIZE)

    @property
    def discards(self) -> int:
        return self._said[0]

    def discard(self, area: DeviceArea, pages: range) -> None:
        self._said[0] += 1


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    assert processes.eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def test_a_discard_that_killed_servers_did_not_read_is_done_when_it_is_asked_for_again(tmp_path: Path) -> None:
    """Carried out sooner, a discard would be repeated by the next server, which finds the copy, after new writes."""
    device = CountsDiscards()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with prefault.device.serve(device, tmp_path / "s") as server:
        socket_path.connect_to(connection, server.path, 10)
        with Handmade(connection) as client:
            area = client.map(device.length)
            area.view[0] = 5
            discard = protocol.Discard(next(client.numbers), area.number, 0, 1)
            for _ in range(2):
                former = roles()["server"]
                _stop(former)
                client.send(discard)
                os.kill(former, signal.SIGKILL)
                assert isinstance(client.receive(), protocol.Restarted)
                area.statistics()  # nothing else is answered
            assert device.discards == 0
            assert area.view[0] == 5
            assert client.ask(protocol.Discarded, discard).pages == 1
            assert device.discards == 1


def test_discarding_an_area_that_ends_inside_of_a_page_leaves_the_rest_of_that_page() -> None:
    device = Pattern(4, writable=True)
    part = prefault.device.map(device, PAGE_SIZE + 100)
    with part, prefault.device.map(device) as whole, whole.memoryview() as view:
        view[PAGE_SIZE + 200] = 77
        discarded = part.discard()
        assert view[PAGE_SIZE + 200] == 77
        assert discarded.bytes == PAGE_SIZE


@pytest.mark.parametrize("how", ["touch", "populate"])
def test_a_page_that_was_written_and_left_the_page_table_stays_dirty_when_it_comes_back(how: str) -> None:
    with prefault.device.map(Pattern(4, writable=True), track_dirty=True) as area, area.memoryview() as view:
        view[PAGE_SIZE] = 200
        mman.madvise(area.address, len(area), mman.MADV_DONTNEED)
        if how == "populate":
            area.populate("read")
        assert view[PAGE_SIZE] == 200
        assert PAGE_SIZE in area.dirty_pages()


def test_the_next_server_knows_as_well_which_pages_may_have_been_written() -> None:
    device = Pattern(4, writable=True, restartable=True)
    with prefault.device.map(device, track_dirty=True) as area, area.memoryview() as view:
        assert view[PAGE_SIZE] != 200
        os.kill(roles()["server"], signal.SIGKILL)
        area.dirty_pages(clear=True)
        view[PAGE_SIZE] = 200
        mman.madvise(area.address, len(area), mman.MADV_DONTNEED)
        assert view[PAGE_SIZE] == 200
        assert PAGE_SIZE in area.dirty_pages()
