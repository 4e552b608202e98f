"""The server, against a client that only knows the protocol. The oracle is the memory itself, and pagemap."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from prefault.device import protocol
from prefault.device.device_pool import Access
from prefault.device.driver import ZERO, Device, DeviceArea, FaultAround, Supplied
from support import oracle
from support.children import Child
from support.device_server import Handmade, Running, ends_by, listening, served

PAGE = mmap.PAGESIZE


class Numbered(Device):
    """Page ``n`` is filled with ``n % 251 + 1``; what is asked for is written to a log in shared memory of its own."""

    def __init__(self, pages: int = 64, **options: Any) -> None:
        self.length = pages * PAGE
        for name, value in options.items():
            setattr(self, name, value)
        self.log = mmap.mmap(-1, 1 << 16)
        self.bad: set[int] = set()
        self.raises: Callable[[], BaseException] = lambda: ValueError("no such page")

    def note(self, text: str) -> None:
        self.log.write(f"{text}\n".encode())

    def notes(self) -> list[str]:
        """In another process than the one that wrote them."""
        return bytes(self.log[:]).rstrip(b"\0").decode().splitlines()

    def open(self, area: DeviceArea) -> None:
        self.note(f"open {area.pages.start}-{area.pages.stop} {area.access} {area.pid}")

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        self.note(f"fault {page} {access}")
        if page in self.bad:
            raise self.raises()
        area.frame(page)[:] = bytes((page % 251 + 1,)) * self.page_size
        return None

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        self.note(f"populate {pages.start}-{pages.stop} {access}")
        for page in pages:
            if page in self.bad:
                raise self.raises()
            area.frame(page)[:] = bytes((page % 251 + 1,)) * self.page_size

    def discard(self, area: DeviceArea, pages: range) -> None:
        self.note(f"discard {pages.start}-{pages.stop}")

    def close(self, area: DeviceArea) -> None:
        self.note(f"close {area.pages.start}-{area.pages.stop}")


class OnlyFault(Device):
    """No populate of its own; odd pages are zeros."""

    def __init__(self, pages: int = 32) -> None:
        self.length = pages * PAGE

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page % 2:
            return ZERO
        area.frame(page)[:] = bytes((page + 1,)) * PAGE
        return None


@pytest.fixture(params=[0, 3], ids=["inline", "workers"])
def workers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# --- faults


@pytest.mark.usefixtures("no_leaks")
def test_a_touched_page_is_supplied_once_and_mapped_by_itself(workers: int) -> None:
    device = Numbered(workers=workers)
    with served(device) as (running, client):
        area = client.map(64 * PAGE)
        assert area.view[5 * PAGE : 6 * PAGE] == bytes((6,)) * PAGE
        area.view[9 * PAGE] = 77
        assert area.view[9 * PAGE : 9 * PAGE + 2] == bytes((77, 10))
        assert oracle.present(area.address, 64 * PAGE) == [page in (5, 9) for page in range(64)]
        other = client.map(8 * PAGE, 4 * PAGE)  # frames are the device's: supplied for one, they are there for all
        assert other.view[5 * PAGE] == 77
        assert (area.statistics().missing, area.statistics().minor) == (2, 0)
        assert (other.statistics().missing, other.statistics().minor) == (0, 1)
        assert sum(other.statistics().latency) == 1
        assert area.log() == [(5, 6), (9, 10)]
        area.unmap()
        other.unmap()
        client.close()
        assert running.wait() == 0
    said = [note.rsplit(" ", 1)[0] if note.startswith("open") else note for note in device.notes()]
    assert said == ["open 0-64 write", "fault 5 read", "fault 9 write", "open 4-12 write", "close 0-64", "close 4-12"]
    assert f"open 0-64 write {os.getpid()}" in device.notes()


def test_processes_that_touch_the_same_page_are_answered_by_one_call(workers: int, tmp_path: Any) -> None:
    class Slow(Numbered):
        def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
            time.sleep(0.2)
            return super().fault(area, page, access)

    device = Slow(workers=workers)
    with listening(device, tmp_path) as connect:

        def touch() -> int:
            with connect() as client:
                return client.map(64 * PAGE).view[3 * PAGE]

        with Child(touch) as one, Child(touch) as two, Child(touch) as three:
            assert [child.result() for child in (one, two, three)] == [4] * 3
    assert device.notes().count("fault 3 read") == 1


@pytest.mark.parametrize(
    "raises",
    [lambda: ValueError("no such page"), lambda: SystemExit(3), KeyboardInterrupt, lambda: MemoryError(), BaseException],
    ids=["ValueError", "SystemExit", "KeyboardInterrupt", "MemoryError", "BaseException"],
)
def test_an_exception_of_the_driver_is_a_sigbus_for_that_page_and_no_other(
    workers: int, raises: Callable[[], BaseException]
) -> None:
    device = Numbered(workers=workers)
    device.bad, device.raises = {7}, raises

    def client_process(say: Callable[[str], None]) -> None:
        with served(device) as (_, client):
            area = client.map(64 * PAGE)
            say(f"{area.view[6 * PAGE]} {area.view[8 * PAGE]} ")
            threading.Timer(0.3, lambda: say("hung")).start()
            say(f"not reached: {area.view[7 * PAGE]}")

    said, status = ends_by(client_process)
    assert (said, status) == ("7 9 ", -signal.SIGBUS)


@pytest.mark.parametrize("answer", [0, b"", True, "zero", object()], ids=["0", "b''", "True", "zero", "object"])
def test_a_driver_that_returns_something_else_is_an_error(answer: object) -> None:
    class Wronger(OnlyFault):
        def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
            return answer  # type: ignore[return-value]

    with served(Wronger()) as (_, client):
        failed = client.map(32 * PAGE).populate((3, 5), kind=protocol.Failed)
        assert (failed.kind, failed.page) == ("driver", 3)
        assert "returns None" in failed.message


def test_frames_are_writable_only_while_the_driver_is_asked_for_them() -> None:
    class Greedy(Numbered):
        def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
            super().fault(area, page, access)
            for wrong in (range(page + 1, page + 2), range(page, page + 2), range(page - 1, page)):
                try:
                    area.frames(wrong)
                    area.frame(wrong.start)
                except ValueError as error:
                    self.note(str(error))
            return None

    device = Greedy()
    with served(device) as (_, client):
        assert client.map(64 * PAGE).view[3 * PAGE] == 4
    assert len([note for note in device.notes() if "asked for just now" in note]) == 3


def test_a_last_page_is_zeros_behind_the_end_of_the_device(workers: int) -> None:
    device = Numbered(4, workers=workers)
    device.length = 4 * PAGE - 1000
    with served(device) as (_, client):
        assert client.welcome.length == 4 * PAGE - 1000
        area = client.map(4 * PAGE)
        assert area.view[3 * PAGE :] == bytes((4,)) * (PAGE - 1000) + bytes(1000)
    with served(device) as (_, client):
        area = client.map(4 * PAGE)
        area.populate((0, 4))
        assert area.view[3 * PAGE :] == bytes((4,)) * (PAGE - 1000) + bytes(1000)


# --- fault-around


def test_windows_are_aligned_and_double_while_faults_go_forward() -> None:
    device = Numbered(256, fault_around=FaultAround(4 * PAGE, 32 * PAGE))
    with served(device) as (_, client):
        area = client.map(256 * PAGE)
        assert area.view[101 * PAGE] == 102
        assert oracle.present(area.address, 256 * PAGE) == [100 <= page < 104 for page in range(256)]
        for page in range(104, 200):
            assert area.view[page * PAGE] == page + 1
        assert area.view[3 * PAGE] == 4
        assert area.statistics().missing == 7
    assert [note for note in device.notes() if note.startswith("populate")] == [
        "populate 100-104 read", "populate 104-112 read", "populate 112-128 read", "populate 128-160 read",
        "populate 160-192 read", "populate 192-224 read", "populate 0-4 read",
    ]  # fmt: skip


def test_a_window_that_fails_falls_back_to_the_page(workers: int) -> None:
    device = Numbered(64, fault_around=FaultAround(8 * PAGE, 8 * PAGE), workers=workers)
    device.bad = {3}

    def client_process(say: Callable[[str], None]) -> None:
        with served(device) as (_, client):
            area = client.map(64 * PAGE)
            say(f"{area.view[1 * PAGE]} {area.view[4 * PAGE]} ")
            say(f"{area.view[3 * PAGE]}")

    assert ends_by(client_process) == ("2 5 ", -signal.SIGBUS)


# --- populate


@pytest.mark.usefixtures("no_leaks")
def test_populate_is_one_call_and_no_fault_follows(workers: int) -> None:
    device = Numbered(1000, workers=workers)
    with served(device) as (_, client):
        area = client.map(1000 * PAGE)
        assert area.view[20 * PAGE] == 21
        reply: protocol.Populated = area.populate((0, 20), (21, 1000))
        assert (reply.mapped, reply.poisoned) == (999, ())
        assert oracle.present_bytes(area.address, 1000 * PAGE) == 1000 * PAGE
        assert [area.view[page * PAGE] for page in range(1000)] == [page % 251 + 1 for page in range(1000)]
        assert (area.statistics().missing, area.statistics().minor) == (1, 0)
        assert area.populate((0, 1000)).mapped == 0  # all had entries
        assert area.statistics().populated_pages == 999
        assert area.statistics().supplied_pages == 1000
    # Of two workers either may be first.
    found = sorted(note for note in device.notes() if note.startswith("populate"))
    assert found == ["populate 0-20 read", "populate 21-1000 read"]


def test_batches_are_of_the_size_that_the_driver_wants(workers: int) -> None:
    device = Numbered(100, batch=30 * PAGE, workers=workers)
    with served(device) as (_, client):
        area = client.map(100 * PAGE)
        assert area.populate((0, 100), access="write").mapped == 100
        assert bytes(area.view[::PAGE]) == bytes(page % 251 + 1 for page in range(100))
    found = sorted(note for note in device.notes() if note.startswith("populate"))
    assert found == ["populate 0-30 write", "populate 30-60 write", "populate 60-90 write", "populate 90-100 write"]


def test_populate_of_a_driver_without_one() -> None:
    with served(OnlyFault()) as (_, client):
        area = client.map(32 * PAGE)
        assert area.populate((0, 32)).mapped == 32
        assert bytes(area.view[::PAGE]) == bytes(0 if page % 2 else page + 1 for page in range(32))


def test_a_driver_that_declares_population_as_meaningless() -> None:
    with served(Numbered(populates=False)) as (_, client):
        assert not client.welcome.populates
        failed = client.map(64 * PAGE).populate((0, 1), kind=protocol.Failed)
        assert (failed.kind, failed.number) == ("no populate", errno.EOPNOTSUPP)


@pytest.mark.parametrize("rollback", [False, True])
def test_a_populate_that_fails_reports_the_pages_that_stay(workers: int, rollback: bool) -> None:
    device = Numbered(100, batch=10 * PAGE, workers=workers, writable=False)
    device.bad = {35}
    with served(device) as (running, client):
        area = client.map(100 * PAGE, access="read")
        assert area.view[2 * PAGE] == 3
        failed = area.populate((0, 2), (3, 100), rollback=rollback, kind=protocol.Failed)
        assert (failed.kind, failed.number) == ("driver", errno.EIO)
        assert "no such page" in failed.message
        assert failed.page == 33
        assert "pages 33 to 42" in failed.message
        mapped = {page for run in failed.mapped for page in range(*run)}
        present = {page for page, there in enumerate(oracle.present(area.address, 100 * PAGE)) if there}
        assert present == mapped | {2}
        assert mapped == set() if rollback else mapped >= {0, 1, *range(3, 10)} - ({0, 1} if workers else set())
        if rollback:
            assert os.fstat(running.frames.fd).st_blocks * 512 == PAGE
        assert area.view[34 * PAGE] == 35


def test_rollback_leaves_what_another_client_may_have_written(tmp_path: Any) -> None:
    device = Numbered(40, batch=10 * PAGE, writable=True)
    device.bad = {35}
    with listening(device, tmp_path) as connect, connect() as one, connect() as two:
        area, other = one.map(40 * PAGE), two.map(10 * PAGE, 10 * PAGE)
        area.populate((0, 40), rollback=True, kind=protocol.Failed)
        present = oracle.present(area.address, 40 * PAGE)
        assert present == [10 <= page < 20 for page in range(40)]
        assert other.view[0] == 11
        assert other.statistics().minor == 1


def test_clients_come_and_go(tmp_path: Any) -> None:
    device = Numbered(64)
    server = listening(device, tmp_path)
    with server as connect:
        with connect() as one, connect() as two:
            one.map(64 * PAGE).view[5 * PAGE] = 99
            assert two.map(64 * PAGE).view[5 * PAGE] == 99
        with connect() as three:
            assert three.map(64 * PAGE).view[5 * PAGE] == 99
        os.kill(server.running.pid, signal.SIGTERM)
        assert server.running.wait() == 0


def test_a_populate_larger_than_the_capacity_is_refused_before_the_start(workers: int) -> None:
    device = Numbered(64, capacity=16 * PAGE, workers=workers, writable=False)
    with served(device) as (running, client):
        area = client.map(64 * PAGE, access="read")
        failed = area.populate((0, 17), kind=protocol.Failed)
        assert (failed.kind, failed.number) == ("full", errno.ENOSPC)
        assert "capacity is 16" in failed.message
        assert os.fstat(running.frames.fd).st_blocks == 0


def test_a_read_only_device_drops_what_was_supplied_first(workers: int) -> None:
    device = Numbered(200, capacity=16 * PAGE, workers=workers, writable=False, batch=4 * PAGE)
    with served(device) as (running, client):
        area = client.map(200 * PAGE, access="read")
        for page in range(200):
            assert area.view[page * PAGE] == page % 251 + 1
            assert os.fstat(running.frames.fd).st_blocks * 512 <= 16 * PAGE
        assert oracle.present(area.address, 200 * PAGE) == [page >= 184 for page in range(200)]
        assert area.populate((0, 8), (184, 192)).mapped == 8
        assert oracle.present(area.address, 200 * PAGE) == [page < 8 or 184 <= page < 192 for page in range(200)]


def test_a_device_that_is_full_and_makes_no_room(workers: int) -> None:
    device = Numbered(64, capacity=4 * PAGE, workers=workers)
    with served(device) as (_, client):
        area = client.map(64 * PAGE)
        for page in range(4):
            assert area.view[page * PAGE] == page + 1
        failed = area.populate((10, 11), kind=protocol.Failed)
        assert (failed.kind, failed.number) == ("full", errno.ENOSPC)
        assert "no room" in failed.message
        assert area.discard(1, 3) == 2
        assert area.populate((10, 11)).mapped == 1


def test_cancel_ends_a_populate_between_batches(workers: int) -> None:
    class Slow(Numbered):
        def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
            time.sleep(0.02)
            super().populate(area, pages, access)

    device = Slow(1000, batch=PAGE, workers=workers)
    with served(device) as (_, client):
        area = client.map(1000 * PAGE)
        request = area.populate_request((0, 1000), progress=True)
        client.send(request)
        assert isinstance(client.receive(), protocol.Progress)
        client.send(protocol.Cancel(request.id))
        while isinstance(reply := client.receive(), protocol.Progress):
            pass
        assert isinstance(reply, protocol.Failed)
        assert (reply.kind, reply.number, reply.id) == ("cancelled", errno.ECANCELED, request.id)
        assert sum(stop - first for first, stop in reply.mapped) < 900
        assert area.view[999 * PAGE] == 999 % 251 + 1


def test_faults_are_answered_while_a_populate_is_under_way() -> None:
    class Slow(Numbered):
        def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
            time.sleep(0.01)
            super().populate(area, pages, access)

    device = Slow(200, batch=PAGE)
    with served(device) as (_, client):
        area = client.map(200 * PAGE)
        client.send(area.populate_request((0, 100)))
        assert area.view[199 * PAGE] == 200
        assert isinstance(client.receive(), protocol.Populated)
    notes = device.notes()
    assert notes.index("fault 199 read") < notes.index("populate 90-91 read")


# --- discard, unmap, the end


def test_discard_gives_frames_back_and_the_driver_supplies_again(workers: int) -> None:
    device = Numbered(64, workers=workers)
    with served(device) as (running, client):
        area = client.map(64 * PAGE)
        area.populate((0, 64))
        area.view[3 * PAGE] = 200
        assert area.discard(2, 10) == 8
        assert area.discard(2, 10) == 0
        assert os.fstat(running.frames.fd).st_blocks * 512 == 56 * PAGE
        assert oracle.present(area.address, 64 * PAGE) == [not 2 <= page < 10 for page in range(64)]
        assert area.view[3 * PAGE] == 4
    assert "discard 2-10" in device.notes()


def test_only_writers_discard_the_writes_of_others() -> None:
    with served(Numbered(8)) as (_, client):
        area = client.map(8 * PAGE, access="read")
        client.ask(protocol.Refused, protocol.Discard(next(client.numbers), area.number, 0, 1))


def test_a_touch_after_unmap_is_a_sigbus_and_no_hang() -> None:
    def client_process(say: Callable[[str], None]) -> None:
        with served(Numbered(8)) as (_, client):
            area = client.map(8 * PAGE)
            client.ask(protocol.Done, protocol.Unmap(next(client.numbers), area.number))
            say("unmapped ")
            say(str(area.view[0]))

    assert ends_by(client_process) == ("unmapped ", -signal.SIGBUS)


def test_a_driver_that_refuses_an_area(workers: int) -> None:
    class Closed(Numbered):
        def open(self, area: DeviceArea) -> None:
            raise PermissionError("not for you")

    device = Closed(8, workers=workers)
    with served(device) as (_, client):
        request = protocol.Map(next(client.numbers), 1 << 30, 0, PAGE, "read", False)
        refused = client.ask(protocol.Refused, request)
        assert refused.kind == "device"
        assert "not for you" in refused.message
        assert "close 0-1" not in device.notes()


def test_sigterm_maps_what_is_there_and_poisons_the_rest() -> None:
    def client_process(say: Callable[[str], None]) -> None:
        with served(Numbered(8)) as (running, client):
            area, other = client.map(8 * PAGE), client.map(8 * PAGE)
            area.populate((0, 4))
            os.kill(running.pid, signal.SIGTERM)
            gone = client.receive()
            say(f"{type(gone).__name__} {running.wait()} {other.view[3 * PAGE]} ")
            say(str(other.view[5 * PAGE]))

    assert ends_by(client_process) == ("Gone 0 4 ", -signal.SIGBUS)


def test_the_end_of_the_client_is_the_end_of_its_private_server() -> None:
    device = Numbered(8)

    def client_process(say: Callable[[str], None]) -> None:
        running = Running(device)
        client = Handmade(running.connection)
        client.map(8 * PAGE)
        say(str(running.pid))
        os._exit(0)

    said, status = ends_by(client_process)
    assert status == 0
    give_up = time.monotonic() + 10
    while os.path.exists(f"/proc/{said}") and time.monotonic() < give_up:
        with open(f"/proc/{said}/stat") as file:
            if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                break
        time.sleep(0.01)
    else:
        assert not os.path.exists(f"/proc/{said}")
    assert device.notes()[-1] == "close 0-8"
