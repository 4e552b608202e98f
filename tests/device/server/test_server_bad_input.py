"""Clients that do not keep to the rules harm only themselves."""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefault._kernel import userfaultfd as uffd
from prefault.device import protocol
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, Supplied
from prefault.device.server import client_connections
from prefault.memory.borrowing import borrow
from support import oracle
from support.device_server import TIMEOUT_S, Handmade, ends_by, listening

PAGE = mmap.PAGESIZE


class Tens(Device):
    writable = False

    def __init__(self, pages: int = 32) -> None:
        self.length = pages * PAGE

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = bytes((page + 10,)) * PAGE
        return None


class Bench:
    """A server with a client that behaves, and others that do not."""

    def __init__(self, server: listening) -> None:
        self.server = server
        self.good = server.connect()
        self.area = self.good.map(32 * PAGE, access="read")
        self._page = 0

    def raw(self) -> socket.socket:
        connection: socket.socket = self.server.raw()
        connection.settimeout(TIMEOUT_S)
        return connection

    def is_well(self) -> None:
        """The client that behaves is served, fault and request."""
        page = self._page = self._page % 30 + 1
        assert self.area.view[page * PAGE] == page + 10
        assert self.good.ask(protocol.Discarded, self._discard(page)).pages == 1

    def _discard(self, page: int) -> protocol.Discard:
        return protocol.Discard(next(self.good.numbers), self.area.number, page, page + 1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    server = listening(Tens(), tmp_path)
    with server:
        made = Bench(server)
        yield made
        made.is_well()
        made.good.close()


def _refusal(connection: socket.socket) -> protocol.Refused | None:
    """Return the refusal that the client receives before the server hangs up."""
    try:
        packet = connection.recv(protocol.MAX_MESSAGE)
    except ConnectionResetError:
        return None
    if not packet:
        return None
    reply = protocol.decode_reply(packet)
    assert isinstance(reply, protocol.Refused)
    assert connection.recv(10) == b""
    return reply


@pytest.mark.parametrize(
    "packet",
    [b"\0", b"garbage" * 1000, b"\x81" * 60000, protocol.encode(protocol.Done(1)), protocol.encode(protocol.Cancel(1)),
     protocol.encode(protocol.Hello(1, 99)), protocol.encode(protocol.Hello(1, 1))[:-1], b"\xdd\xff\xff\xff\xff"],
    ids=range(8),
)  # fmt: skip
def test_what_is_no_hello(bench: Bench, packet: bytes) -> None:
    with bench.raw() as connection:
        connection.send(packet)
        refused = _refusal(connection)
        assert refused is not None
        assert refused.kind == "protocol"


def test_a_hello_without_its_descriptors(bench: Bench) -> None:
    with bench.raw() as connection:
        connection.send(protocol.encode(protocol.Hello(1, protocol.VERSION)))
        refused = _refusal(connection)
        assert refused is not None
        assert "3 descriptors" in refused.message


def _kinds_of_descriptors() -> dict[str, Callable[[], list[int]]]:
    def plain() -> int:
        return os.open("/dev/null", os.O_RDWR)

    def pipe() -> tuple[int, int]:
        return os.pipe()

    def faults(*, ready: bool) -> int:
        fd = uffd.userfaultfd(os.O_CLOEXEC | uffd.UFFD_USER_MODE_ONLY)
        if ready:
            uffd.api(fd)
        return fd

    return {
        "no userfaultfd": lambda: [plain(), *reversed(pipe())],
        "an event descriptor": lambda: [os.eventfd(0), *reversed(pipe())],
        "no handshake": lambda: [faults(ready=False), *reversed(pipe())],
        "no pipe": lambda: [faults(ready=True), plain(), plain()],
        "ends swapped": lambda: [faults(ready=True), *pipe()],
        "too many": lambda: [faults(ready=True), *reversed(pipe()), plain()],
        "many": lambda: [plain() for _ in range(100)],
    }


@pytest.mark.parametrize("name", list(_kinds_of_descriptors()))
def test_a_hello_with_other_descriptors(bench: Bench, name: str) -> None:
    before = len(os.listdir(f"/proc/{bench.server.running.pid}/fd"))
    descriptors = _kinds_of_descriptors()[name]()
    with bench.raw() as connection:
        packet = protocol.encode(protocol.Hello(1, protocol.VERSION))
        socket.send_fds(connection, [packet], descriptors)
        refused = _refusal(connection)
        assert refused is not None
        assert refused.kind == "protocol"
    for fd in descriptors:
        os.close(fd)
    _wait_until(lambda: len(os.listdir(f"/proc/{bench.server.running.pid}/fd")) == before)


def _wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_descriptors_with_another_message(bench: Bench) -> None:
    with bench.server.connect() as client:
        before = len(os.listdir(f"/proc/{bench.server.running.pid}/fd"))
        socket.send_fds(client.connection, [protocol.encode(protocol.Cancel(1))], [0, 1, 2])
        refused = _refusal(client.connection)
        assert refused is not None
        assert "Hello only" in refused.message
        # No areas: nothing of it is left.
        _wait_until(lambda: len(os.listdir(f"/proc/{bench.server.running.pid}/fd")) < before)


def test_a_silent_connection_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connections, "HELLO_S", 0.2)  # in the server, which is a fork
    server = listening(Tens(), tmp_path)
    with server, server.raw() as connection, server.connect() as client:
        connection.settimeout(TIMEOUT_S)
        assert connection.recv(1) == b""
        assert client.map(PAGE, access="read").view[0] == 10  # who said Hello stays


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"length": 0}, "whole pages"),
        ({"length": 100}, "whole pages"),
        ({"offset": 100}, "whole pages"),
        ({"address": 4097}, "whole pages"),
        ({"length": 33 * PAGE}, "not in it"),
        ({"offset": 32 * PAGE, "length": PAGE}, "not in it"),
        ({"offset": (1 << 62) & -PAGE, "length": (1 << 62) & -PAGE}, "not in it"),
        ({"address": ((1 << 63) - 1) & -PAGE}, "no address"),
        ({"access": "write"}, "not writable"),
    ],
)
def test_maps_that_make_no_sense(bench: Bench, values: dict[str, Any], says: str) -> None:
    with bench.server.connect() as client:
        made: dict[str, Any] = {"address": 1 << 30, "offset": 0, "length": PAGE, "access": "read", "track_dirty": False}
        refused = client.ask(protocol.Refused, protocol.Map(next(client.numbers), **(made | values)))
        assert refused.kind == "value"
        assert says in refused.message


def test_areas_over_each_other(bench: Bench) -> None:
    with bench.server.connect() as client:
        area = client.map(8 * PAGE, access="read")

        def at(address: int, pages: int) -> protocol.Map:
            return protocol.Map(next(client.numbers), address, 0, pages * PAGE, "read", False)

        for address, pages in (
            (area.address + PAGE, 1), (area.address - PAGE, 2), (area.address - PAGE, 20), (area.address + 7 * PAGE, 3),
            (area.address, 7),
        ):  # fmt: skip
            refused = client.ask(protocol.Refused, at(address, pages))
            assert "another area" in refused.message
        again = client.ask(protocol.Mapped, at(area.address, 8))
        assert again.area == area.number  # asked again, as after a restart
        client.ask(protocol.Mapped, at(area.address + 8 * PAGE, 1))


@pytest.mark.parametrize(
    "runs", [((0, 33),), ((5, 5),), ((7, 3),), ((0, (1 << 63) - 1),), ((40, 50),)], ids=repr
)  # fmt: skip
def test_pages_outside_of_the_area(bench: Bench, runs: Any) -> None:
    assert bench.area.populate(*runs, kind=protocol.Refused).kind == "value"
    first, stop = runs[0]
    request = protocol.Discard(next(bench.good.numbers), bench.area.number, first, stop)
    if first != stop:
        assert bench.good.ask(protocol.Refused, request).kind == "value"


def test_an_area_of_another_client(bench: Bench) -> None:
    with bench.server.connect() as client:
        number = bench.area.number
        for request in (
            protocol.Populate(7, number, ((0, 1),), "read", False, False, True),
            protocol.Discard(7, number, 0, 1),
            protocol.AskLog(7, number),
            protocol.AskStatistics(7, number),
            protocol.DirtyPages(7, number, True),
        ):
            assert "no area" in client.ask(protocol.Refused, request).message
        client.ask(protocol.Done, protocol.Unmap(7, number))  # of nothing
    assert bench.area.view[31 * PAGE] == 41


def test_overlapping_runs_are_populated_once(bench: Bench) -> None:
    assert bench.area.populate((3, 9), (5, 12), (3, 4), (20, 21)).mapped == 10
    assert oracle.present(bench.area.address, 32 * PAGE) == [3 <= page < 12 or page == 20 for page in range(32)]


def test_an_area_that_is_not_mapped_or_not_registered(bench: Bench) -> None:
    with bench.server.connect() as client:
        number = client.ask(protocol.Mapped, protocol.Map(1, 1 << 30, 0, 4 * PAGE, "read", False)).area
        failed = client.ask(protocol.Failed, protocol.Populate(2, number, ((0, 4),), "read", False, False, True))
        assert failed.kind == "gone"
        assert "not mapped there" in failed.message


def test_memory_that_is_unmapped_under_a_populate_fails_it(bench: Bench) -> None:
    with bench.server.connect() as client:
        area = client.map(32 * PAGE, access="read")
        area.forget()
        failed = area.populate((0, 32), kind=protocol.Failed)
        assert failed.kind == "gone"


def test_an_area_of_several_mappings_is_populated_whole(bench: Bench) -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    with bench.server.connect() as client:
        area = client.map(32 * PAGE, access="read")
        for page in (3, 4, 17):
            assert libc.mprotect(ctypes.c_void_p(area.address + page * PAGE), ctypes.c_size_t(PAGE), mmap.PROT_READ) == 0
        assert area.populate((0, 32)).mapped == 32
        assert oracle.present_bytes(area.address, 32 * PAGE) == 32 * PAGE


def test_frames_that_a_client_punched_are_supplied_again(bench: Bench) -> None:
    assert bench.area.view[3 * PAGE] == 13
    from prefault._kernel.fallocate import fallocate

    fallocate(bench.good.frames_fd, 3, 3 * PAGE, PAGE)
    assert bench.area.view[3 * PAGE] == 13
    fallocate(bench.good.frames_fd, 3, 0, 8 * PAGE)
    assert bench.area.populate((0, 8)).mapped == 8
    assert bytes(bench.area.view[: 8 * PAGE : PAGE]) == bytes(range(10, 18))


class _Foreign:
    """Shared memory of the client's own, announced as frames."""

    def __init__(self, client: Handmade, pages: int) -> None:
        self.map = mmap.mmap(-1, pages * PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.map)
        with borrow(self.view) as memory:
            self.address = memory.address
        uffd.register(client.fd, self.address, pages * PAGE, 5)
        request = protocol.Map(next(client.numbers), self.address, 0, pages * PAGE, "read", False)
        self.number = client.ask(protocol.Mapped, request).area


def test_memory_that_is_not_the_frames_costs_no_client_a_page(bench: Bench) -> None:
    assert bench.area.view[3 * PAGE] == 13
    with bench.server.connect() as client:
        foreign = _Foreign(client, 8)
        failed = client.ask(protocol.Failed, protocol.Populate(99, foreign.number, ((0, 8),), "read", False, False, True))
        assert failed.kind == "gone"
        assert oracle.present(bench.area.address, 8 * PAGE) == [page == 3 for page in range(8)]
        foreign.view.release()
        foreign.map.close()

    def touch(say: Callable[[str], None]) -> None:
        with bench.server.connect() as client:
            say(f"{_Foreign(client, 8).view[3 * PAGE]}")

    assert ends_by(touch) == ("", -signal.SIGBUS)


def test_a_client_that_reads_no_answers(bench: Bench) -> None:
    with bench.server.connect() as client:
        area = client.map(32 * PAGE, access="read")
        client.connection.setblocking(False)
        try:
            for _ in range(100_000):
                client.send(protocol.AskStatistics(next(client.numbers), area.number))
        except BlockingIOError:
            pass
        bench.is_well()
        assert area.view[5 * PAGE] == 15  # its faults are answered all the same
        client.connection.settimeout(TIMEOUT_S)
        for _ in range(50):
            assert isinstance(client.receive(), protocol.Statistics)


def test_more_populates_than_a_client_may_have_under_way(bench: Bench) -> None:
    with bench.server.connect() as client:
        area = client.map(32 * PAGE, access="read")
        requests = [area.populate_request((0, 32)) for _ in range(300)]
        seen: dict[int, protocol.Reply] = {}
        for request in requests:
            client.send(request)
        while len(seen) < len(requests):
            reply = client.receive()
            seen[reply.id] = reply
        assert {type(reply) for reply in seen.values()} <= {protocol.Populated, protocol.Refused}


def test_a_client_that_is_killed_leaves_nothing(bench: Bench) -> None:
    descriptors = len(os.listdir(f"/proc/{bench.server.running.pid}/fd"))
    for _ in range(3):
        pid = os.fork()
        if not pid:
            try:
                client = bench.server.connect()
                view = client.map(32 * PAGE, access="read").view
                view[3 * PAGE]
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        bench.is_well()
    _wait_until(lambda: len(os.listdir(f"/proc/{bench.server.running.pid}/fd")) == descriptors)


def test_a_connection_that_is_lost_is_not_the_end_of_its_faults(bench: Bench) -> None:
    client = bench.server.connect()
    area = client.map(32 * PAGE, access="read")
    client.send(protocol.Hello(1, 1))
    assert _refusal(client.connection) is not None
    assert area.view[9 * PAGE] == 19
    client.connection.close()
    assert area.view[10 * PAGE] == 20
    client.close()


def test_more_connections_than_there_are_descriptors(tmp_path: Path) -> None:
    server = listening(Tens(), tmp_path, descriptors=64)
    with server:
        made = Bench(server)
        many, told = [], 0
        for _ in range(60):
            connection = made.raw()
            many.append(connection)
        for connection in many[-10:]:
            refused = _refusal(connection)
            assert refused is not None
            told += "does not take you" in refused.message
        assert told == 10
        made.is_well()
        for connection in many:
            connection.close()
        _wait_until(lambda: len(os.listdir(f"/proc/{server.running.pid}/fd")) < 40)
        made.is_well()
        made.good.close()


@pytest.mark.parametrize("seed", range(3))
def test_noise(bench: Bench, seed: int) -> None:
    """Messages with bytes changed, cut, repeated: the other client is served all the same."""
    generator = random.Random(seed)
    for _ in range(15):
        client: Handmade = bench.server.connect()
        area = client.map(8 * PAGE, access="read")
        made: list[protocol.Request] = [
            area.populate_request((0, 8)), protocol.Discard(9, area.number, 0, 3), protocol.AskLog(9, area.number),
            protocol.Map(3, area.address + 8 * PAGE, 0, PAGE, "read", True, 0), protocol.Unmap(4, area.number),
        ]  # fmt: skip
        client.connection.setblocking(False)
        try:
            for _ in range(30):
                packet = bytearray(protocol.encode(generator.choice(made)))
                for _ in range(generator.randrange(4)):
                    packet[generator.randrange(len(packet))] = generator.randrange(256)
                client.connection.send(packet[: generator.randrange(1, len(packet) + 1)])
        except OSError:
            pass  # it was hung up on
        client.connection.settimeout(TIMEOUT_S)
        client.close()
        bench.is_well()


def test_a_userfaultfd_that_is_made_blocking(bench: Bench) -> None:
    client = bench.server.connect()
    os.set_blocking(client.fd, True)
    bench.is_well()
    client.close()
