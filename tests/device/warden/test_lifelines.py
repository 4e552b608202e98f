"""Clients that lost or left their server end by SIGBUS or go on, and harm neither others nor themselves."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import prefault.device
from prefault._kernel import mman
from prefault.device.driver import DeviceArea
from prefault.sizes import PAGE_SIZE
from support import processes
from support.children import Child
from support.device_server import ends_by, listening
from support.devices import Pattern, expected

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES = 16


def _lose_connection(area: prefault.device.Area) -> None:
    assert area._memory is not None
    area._memory.connection.connection.shutdown(socket.SHUT_RDWR)


def _take(address: int, length: int) -> None:
    """Map something just there, and unmap it."""
    flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED_NOREPLACE
    mman.munmap(mman.mmap(address, length, mman.PROT_NONE, flags), length)


# --- a lost connection


def test_memory_mapped_after_a_lost_connection_is_out_of_its_servers_reach(tmp_path: Path) -> None:
    device = Pattern(PAGES, salt=2)

    def client(say: Callable[[str], None]) -> None:
        with prefault.device.serve(Pattern(PAGES), tmp_path / "s") as server:
            with prefault.device.connect(server.path) as lost, lost.map() as area:
                _lose_connection(area)
            with prefault.device.map(device) as other:  # where the first was, if that is free
                server.close()  # which poisons what it did not supply
                view = other.memoryview()
                say(str(bytes(view[:PAGE_SIZE]) == expected(device, 0)))
                view.release()

    assert ends_by(client) == ("True", 0)


def test_the_address_of_an_area_stays_taken_while_its_server_may_act_upon_it(tmp_path: Path) -> None:
    with prefault.device.serve(Pattern(PAGES), tmp_path / "s") as server, prefault.device.connect(server.path) as client:
        area = client.map()
        address, length = area.address, len(area)
        _lose_connection(area)
        area.close()
        with pytest.raises(FileExistsError):
            _take(address, length)
    mman.munmap(address, length)


def test_the_address_of_an_area_is_free_when_its_server_has_ended(tmp_path: Path) -> None:
    with prefault.device.serve(Pattern(PAGES), tmp_path / "s") as server:
        client = prefault.device.connect(server.path)
        area = client.map()
        address, length = area.address, len(area)
        _lose_connection(area)
    area.close()
    client.close()
    _take(address, length)


# --- a client that the server lets go


class OpensAtTheGate(Pattern):
    """``open`` of the first area waits for the test."""

    def __init__(self) -> None:
        super().__init__(PAGES, writable=True, workers=2)
        self._said = mmap.mmap(-1, PAGE_SIZE)

    def opening(self) -> bool:
        return self._said[0] == 1

    def let_open(self) -> None:
        self._said[1] = 1

    def closed(self) -> bool:
        """Return whether an area was closed."""
        return self._said[2] == 1

    def open(self, area: DeviceArea) -> None:
        if not self.opening():
            self._said[0] = 1
            processes.eventually(lambda: self._said[1] == 1)

    def close(self, area: DeviceArea) -> None:
        self._said[2] = 1


def test_a_client_that_ends_while_its_area_is_opened_disarms_no_other_lifeline(tmp_path: Path) -> None:
    device = OpensAtTheGate()
    server = listening(device, tmp_path)
    with server as connect, connect():
        pid = server.running.pid
        before = processes.descriptors(pid)
        with Child(lambda: connect().map(PAGE_SIZE)):
            assert processes.eventually(device.opening)
            assert processes.descriptors(pid) != before
        assert processes.eventually(lambda: processes.descriptors(pid) == before)
        with connect() as other:  # whose descriptors have the same numbers, in the server
            fcntl.fcntl(other.lifeline_read, fcntl.F_SETFL, os.O_ASYNC)
            device.let_open()
            assert processes.eventually(device.closed)
            assert fcntl.fcntl(other.lifeline_read, fcntl.F_GETFL) & os.O_ASYNC


def test_a_client_that_made_its_userfaultfd_blocking_ends_by_sigbus() -> None:
    def client(say: Callable[[str], None]) -> None:
        with prefault.device.map(Pattern(PAGES)) as area:
            assert area._memory is not None
            os.set_blocking(area._memory.connection.userfaultfd.fd, True)
            say("touches ")
            say(str(area.memoryview()[0]))

    assert ends_by(client) == ("touches ", -signal.SIGBUS)
