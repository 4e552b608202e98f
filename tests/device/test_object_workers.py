"""Workers: a driver that hangs for one object goes on with the others, and threads are started when they are needed."""

from __future__ import annotations

import ast
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import ClientProcess, DeviceArea, DeviceClient, DevicePool, FaultAround
from prefault.device.device_pool import Access
from prefault.sizes import GIB, PAGE_SIZE
from support import processes
from support.children import Child

_PAGES = 64


class Hanging(prefault.device.Device):
    """Supplies no page of an object whose name begins with ``hung`` before it is told to."""

    length = GIB
    batch = 4 * PAGE_SIZE

    def __init__(self, workers: int, object_workers: int | None, *, fault_around: FaultAround | None = None) -> None:
        self.workers = workers
        self.object_workers = object_workers
        self.fault_around = fault_around

    def start(self, pool: DevicePool) -> None:
        for name in ("hung", "hung too", "free", "free too"):
            pool.create_object(name, _PAGES * PAGE_SIZE)
        self.released = threading.Event()
        self.inside: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.lock = threading.Lock()

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        self.populate(area, range(page, page + 1), access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        name = "" if area.object is None else area.object.name
        with self.lock:
            self.inside[name] = self.inside.get(name, 0) + 1
            self.most[name] = max(self.most.get(name, 0), self.inside[name])
        if name.startswith("hung"):
            self.released.wait()
        area.frames(pages)[:] = b"%c" % (pages.start % 255 + 1) * (len(pages) * PAGE_SIZE)
        with self.lock:
            self.inside[name] -= 1

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        if request == b"release":
            self.released.set()
        return repr(self.inside if request == b"inside" else self.most).encode()


@contextmanager
def _populating(area: prefault.device.Area, count: int) -> Iterator[list[threading.Thread]]:
    """Populate a part of an area in each of so many threads; wait for them at the end."""
    part = _PAGES // count * PAGE_SIZE
    threads = [
        threading.Thread(target=area.populate, kwargs={"offset": number * part, "length": part, "headroom": "ignore"})
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        area.control(b"release")
        for thread in threads:
            thread.join()


def _asked(client: DeviceClient, what: bytes) -> Any:
    """Return the driver's counts, which are a literal of Python."""
    return ast.literal_eval(client.control(what).decode())


def _server() -> int:
    (pid,) = (pid for pid in processes.descendants(os.getpid()) if processes.name(pid) == "prefault-server")
    return pid


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_a_hung_object_leaves_workers_for_the_others() -> None:
    with prefault.device.open(Hanging(4, 2)) as client, client.map(object="hung") as hung:
        with _populating(hung, 8) as waiting, client.map(object="free") as free:
            assert processes.eventually(lambda: _asked(client, b"inside").get("hung") == 2)
            for _ in range(3):
                assert free.populate().bytes in (_PAGES * PAGE_SIZE, 0)
                assert free.read(5 * PAGE_SIZE, 4) != bytes(4)
            assert _asked(client, b"inside")["hung"] == 2
            assert all(thread.is_alive() for thread in waiting)
        assert hung.residency().present_bytes == _PAGES * PAGE_SIZE
        assert _asked(client, b"most")["hung"] == 2
        assert _asked(client, b"most")["free"] <= 2


def test_two_hung_objects_leave_workers_for_others() -> None:
    with prefault.device.open(Hanging(3, 1)) as client:
        with client.map(object="hung") as one, client.map(object="hung too") as two, client.map(object="free") as free:
            with _populating(one, 4), _populating(two, 4):
                assert processes.eventually(lambda: _asked(client, b"inside") == {"hung": 1, "hung too": 1})
                assert free.populate().bytes == _PAGES * PAGE_SIZE
            assert two.residency().present_bytes == one.residency().present_bytes == _PAGES * PAGE_SIZE
        assert _asked(client, b"most") == {"hung": 1, "hung too": 1, "free": 1}


def test_faults_of_a_hung_object_wait_their_turn() -> None:
    def touch(first: int) -> int:
        with prefault.device.connect(path) as client, client.map(object="hung") as area, area.memoryview() as view:
            return sum(view[page * PAGE_SIZE] for page in (*range(first, _PAGES), *range(first)))

    device = Hanging(3, 1, fault_around=FaultAround(4 * PAGE_SIZE, 4 * PAGE_SIZE))
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/s"
        with prefault.device.serve(device, path), prefault.device.connect(path) as client, client.map(object="free") as free:
            with Child(lambda: touch(0)) as one, Child(lambda: touch(_PAGES // 2)) as two:
                assert processes.eventually(lambda: _asked(client, b"inside").get("hung") == 1)
                time.sleep(0.2)  # for the second one to touch its page
                with free.memoryview() as view:
                    assert sum(view[page * PAGE_SIZE] for page in range(_PAGES))
                client.control(b"release")
                assert one.result() == two.result() > 0
            assert _asked(client, b"most")["hung"] == 1


def test_ctrl_c_in_a_populate_that_waits_for_its_object() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        prefault.device.open(Hanging(2, 1)) as client,
        client.map(object="hung") as other,  # before: the driver's open() would wait as well
        client.map(object="hung") as hung,
        _populating(hung, 1),
    ):
        assert processes.eventually(lambda: _asked(client, b"inside").get("hung") == 1)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                other.populate()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert _asked(client, b"inside")["hung"] == 1


def test_the_end_does_not_wait_for_what_did_not_begin() -> None:
    with prefault.device.open(Hanging(4, 1)) as client:
        area = client.map(object="hung")
        with _populating(area, 8):
            assert processes.eventually(lambda: _asked(client, b"inside").get("hung") == 1)
        area.close()
        client.control(b"release")


@pytest.mark.parametrize("most", [0, -1, 1.5, "2", True])
def test_numbers_that_cannot_be(most: Any) -> None:
    with pytest.raises(ValueError, match=r"Hanging\.object_workers is None or at least 1"):
        prefault.device.open(Hanging(2, most))


# --- threads


def test_threads_are_started_when_there_is_work() -> None:
    with prefault.device.open(Hanging(64, 16)) as client:
        server = _server()
        few = _threads(server)
        assert few <= 2
        with client.map(object="free") as area:
            area.populate(length=4 * PAGE_SIZE)
            assert _threads(server) <= few + 2  # one call after the other
        with client.map(object="hung") as area, _populating(area, 16):
            assert processes.eventually(lambda: _asked(client, b"inside").get("hung") == 16)
            assert 17 <= _threads(server) <= 20


class _FewThreads(Hanging):
    """Starts no more than two threads, as if a limit on processes were reached."""

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        start, started = threading.Thread.start, [1]

        def limited(thread: threading.Thread) -> None:
            started[0] += 1
            if started[0] > 2:
                raise RuntimeError("can't start new thread")
            start(thread)

        threading.Thread.start = limited  # type: ignore[assignment]


def test_fewer_threads_than_asked_for_are_enough() -> None:
    with (
        prefault.device.open(_FewThreads(8, 1)) as client,
        client.map(object="hung") as hung,
        client.map(object="free") as free,
    ):
        with _populating(hung, 4):
            assert processes.eventually(lambda: _asked(client, b"inside").get("hung") == 1)
            threads = [threading.Thread(target=free.populate) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert free.residency().present_bytes == _PAGES * PAGE_SIZE
            assert _threads(_server()) == 3
        assert hung.residency().present_bytes == _PAGES * PAGE_SIZE
