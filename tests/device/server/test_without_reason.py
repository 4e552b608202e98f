"""No process is killed, blamed or refused for what it did not do."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device import handover, protocol
from prefault.device.device_pool import Access
from prefault.device.driver import DeviceArea, Supplied
from prefault.device.page_states import DevicePageState
from prefault.device.process import launching
from prefault.device.process.launching import LaunchedWarden
from prefault.device.process.startup import create_registry
from prefault.device.registry import CLIENT_DESCRIPTORS, AreaRecord
from prefault.device.server.warden_link import WardenLink
from prefault.device.warden.supervisor import Warden
from prefault.errors import DriverError
from prefault.sizes import PAGE_SIZE
from support import processes
from support.children import in_child
from support.device_server import served
from support.devices import Enclave, Pattern, content
from support.raw_clients import page_of
from support.wardens import Forks, Gated, roles

pytestmark = pytest.mark.usefixtures("no_leaks")


# --- for the time that others take


class Unhurried(Enclave):
    """Driver each of whose calls keeps to its time, though two of them together do not."""

    timeout_s = 1.5
    batch = PAGE_SIZE

    def __init__(self, *, capacity_pages: int, workers: int, slow_page: int = -1) -> None:
        super().__init__(16, capacity_pages=capacity_pages, workers=workers)
        self._slow_page = slow_page

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == self._slow_page:
            time.sleep(0.9)
        return super().fault(area, page, access)

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        time.sleep(0.9)
        super().reclaim(area, pages)


def test_the_time_of_reclaim_is_not_that_of_the_fault_it_makes_room_for() -> None:
    with prefault.device.map(Unhurried(capacity_pages=1, workers=0, slow_page=1)) as area:
        prefault.populate(area, length=PAGE_SIZE)
        prefault.populate(area, offset=PAGE_SIZE, length=PAGE_SIZE)


def test_waiting_for_the_reclaim_of_others_is_no_call() -> None:
    with prefault.device.map(Unhurried(capacity_pages=3, workers=3)) as area:
        prefault.populate(area, length=3 * PAGE_SIZE)
        prefault.populate(area, offset=3 * PAGE_SIZE, length=3 * PAGE_SIZE)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    assert processes.eventually(lambda: _state(pid) == "T")


def test_a_driver_does_not_pay_for_the_time_that_it_was_stopped(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    device = Gated(str(gate), timeout_s=1.0)
    with prefault.device.map(device) as area, ThreadPoolExecutor(1) as pool:
        found = roles()
        populating = pool.submit(prefault.populate, area, offset=4 * PAGE_SIZE, length=PAGE_SIZE)
        assert processes.eventually((tmp_path / "asked").exists)
        try:
            _stop(found["warden"])
            _stop(found["server"])
            time.sleep(1.5 * device.timeout_s)  # time that passes is what this is about
            gate.touch()
            os.kill(found["warden"], signal.SIGCONT)
            assert processes.eventually(lambda: _state(found["warden"]) == "S")  # it has looked at the clock
        finally:
            for pid in filter(processes.alive, found.values()):
                os.kill(pid, signal.SIGCONT)
        populating.result(20)
        assert page_of(area, 4) == content(4)


# --- for a crash


class CrashesOnce(Pattern):
    """The first batch that is populated is the end of its process."""

    def __init__(self) -> None:
        super().__init__(restartable=True)
        self._shared = mmap.mmap(-1, PAGE_SIZE)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        if not self._shared[0]:
            self._shared[0] = 1
            os._exit(3)
        super().populate(area, pages, access)


def test_a_crash_in_a_batch_fails_one_populate_and_not_one_for_each_page() -> None:
    with prefault.device.map(CrashesOnce()) as area:
        with pytest.raises(DriverError, match="ended by itself, with exit status 3"):
            prefault.populate(area)
        prefault.populate(area)
        assert page_of(area, 63) == content(63)


class CrashesInClose(Pattern):
    """Closing the area at offset 0 is the end of its process, in each server."""

    def __init__(self) -> None:
        super().__init__(restartable=True)

    def close(self, area: DeviceArea) -> None:
        if area.offset == 0:
            os._exit(3)


def test_a_crash_in_close_ends_one_server_and_not_each_after_it() -> None:
    device = CrashesInClose()
    with prefault.device.map(device, 8 * PAGE_SIZE, 16 * PAGE_SIZE) as other:
        prefault.device.map(device, 8 * PAGE_SIZE).close()
        prefault.populate(other)
        assert page_of(other, 3) == content(19)


def test_hello_that_the_dead_server_did_not_read_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = launching.launch, threading.Event()
    launched: list[LaunchedWarden] = []

    def start_stopped(device: prefault.device.Device) -> LaunchedWarden:
        launched.append(start(device))
        _stop(launched[0].server_pid)
        started.set()
        return launched[0]

    monkeypatch.setattr(launching, "launch", start_stopped)
    with ThreadPoolExecutor(1) as pool:
        mapping = pool.submit(prefault.device.map, Pattern(8, restartable=True))
        assert started.wait(20)
        nothing = struct.pack("i", 0)
        assert processes.eventually(lambda: fcntl.ioctl(launched[0].connection, termios.TIOCOUTQ, nothing) != nothing)
        os.kill(launched[0].server_pid, signal.SIGKILL)
        with mapping.result(20) as area:
            prefault.populate(area)
            assert page_of(area, 1) == content(1)


def test_hello_that_the_dead_server_read_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    notify = WardenLink.notify

    def notify_and_die(self: WardenLink, message: handover.Message, descriptors: list[int] | None = None) -> None:
        notify(self, message, descriptors)
        if isinstance(message, handover.Admitted):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(WardenLink, "notify", notify_and_die)  # as seen by a fork
    with prefault.device.map(Pattern(8, restartable=True)) as area:
        prefault.populate(area)
        assert page_of(area, 1) == content(1)


_BECOMES_CAT = """
import os, sys, prefault, prefault.device
area = prefault.device.connect(sys.argv[1]).map()
prefault.populate(area, length="4 KiB")
print("mapped", flush=True)
sys.stdin.readline()
try:
    prefault.populate(area)
except prefault.errors.DeviceGoneError:  # said by the warden, which is alone by now
    os.execv("/bin/cat", ["cat"])
"""


def test_a_program_that_a_client_becomes_outlives_a_warden_that_has_no_server(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with prefault.device.serve(Pattern(8), path) as server:
        command = [sys.executable, "-c", _BECOMES_CAT, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            try:
                assert client.stdout.readline() == "mapped\n"
                os.kill(roles()["server"], signal.SIGKILL)
                client.stdin.write("go on\n")
                client.stdin.flush()
                assert processes.eventually(lambda: processes.name(client.pid) == "cat")
                assert processes.eventually(lambda: not processes.alive(server.pid))  # nobody is left who needs it
                assert client.communicate("I am well", 20)[0] == "I am well"
                assert client.returncode == 0
            finally:
                client.kill()


# --- for a child of the driver's that lives longer


def _child_of_the_driver(path: str) -> int:
    with prefault.device.connect(path) as client, client.map() as area:
        assert page_of(area, 0) == content(0)
        (child,) = processes.children(roles()["server"])
    return child


def test_the_end_of_a_served_device_does_not_wait_for_a_child_of_its_driver(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = prefault.device.serve(Forks(8, timeout_s=0.5), path)
    child = _child_of_the_driver(path)
    try:
        server.close()
        assert processes.alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_path_is_free_though_a_child_of_the_driver_of_a_dead_device_lives(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with prefault.device.serve(Forks(8), path) as server:
        child = _child_of_the_driver(path)
        try:
            dead = roles()
            for pid in (server.pid, dead["server"]):
                os.kill(pid, signal.SIGKILL)
            assert processes.eventually(lambda: not any(map(processes.alive, dead.values())))
            prefault.device.serve(Pattern(8), path).close()
            assert processes.alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


# --- for what there is much of, or was before


class Waiting(Pattern):
    """Device that supplies nothing until the test allows it."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages, workers=1)
        self.may = mmap.mmap(-1, PAGE_SIZE)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        while not self.may[0]:
            time.sleep(0.001)
        super().populate(area, pages, access)


def test_a_client_may_have_as_many_populates_under_way_as_it_has_threads() -> None:
    device = Waiting(100)
    with served(device) as (_, client):
        area = client.map(100 * PAGE_SIZE, access="read")
        for page in range(100):
            client.send(area.populate_request((page, page + 1)))
        assert area.statistics().supplied_pages == 0  # answered behind all of them: none was refused, and none is done
        device.may[0] = 1
        assert {type(client.receive()) for _ in range(100)} == {protocol.Populated}


class SavesInVain(Pattern):
    """Read-only, and its first three pages are evicted when it is told so; which fails when it is told so."""

    def __init__(self) -> None:
        super().__init__(16, capacity_pages=4)
        self.told = mmap.mmap(-1, PAGE_SIZE)

    def open(self, area: DeviceArea) -> None:
        threading.Thread(target=self._evict, args=(area,), daemon=True).start()

    def _evict(self, area: DeviceArea) -> None:
        self._await(0)
        with pytest.raises(OSError, match="the disk is full"):
            area.evict(range(3), self._save)

    def _await(self, which: int) -> None:
        while not self.told[which]:
            time.sleep(0.001)

    def _save(self, pages: range, view: memoryview) -> None:
        self._await(1)
        raise OSError("the disk is full")


def test_pages_whose_eviction_failed_may_be_dropped_as_before() -> None:
    device = SavesInVain()
    with served(device) as (running, client):
        area = client.map(16 * PAGE_SIZE, access="read")
        area.populate((0, 4))
        device.told[0] = 1
        assert processes.eventually(lambda: set(running.frames.states[:3]) == {DevicePageState.EVICTING})
        for _ in range(1100):  # so often that the order in which pages came is tidied up
            assert area.discard(3, 4) == 1
            area.populate((3, 4))
        device.told[1] = 1
        assert processes.eventually(lambda: set(running.frames.states[:3]) == {DevicePageState.READY})
        assert area.populate((4, 8)).mapped == 4  # in the place of all of them


def _areas_of_the_next_client() -> list[int]:
    device = Pattern(64)
    registry = create_registry(device)
    ours, theirs = handover.pair()
    names = CLIENT_DESCRIPTORS
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in names]
    handover.send(theirs, handover.Admitted(1, 10, 0, names), descriptors[:2])  # the others were cut off (RLIMIT_NOFILE)
    handover.send(theirs, handover.HandoverDone())
    registry.area_table.publish(1, AreaRecord(1, 1 << 30, 0, PAGE_SIZE, "write", False, row=registry.area_table.reserve()))
    Warden(registry, device).reattach(os.pidfd_open(os.getpid()), ours)
    registry.area_table.load(registry.clients)  # its server died
    registry.clients[1] = handover.client_record(handover.Admitted(1, 11, 0, names), descriptors)
    registry.area_table.load(registry.clients)  # so did the next one, which had a client of that number
    return list(registry.clients[1].areas)


def test_a_client_does_not_inherit_the_areas_of_one_that_the_warden_could_not_admit() -> None:
    assert in_child(_areas_of_the_next_client) == []
