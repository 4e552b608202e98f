"""Very many areas of several clients on one server: each page is the right one, also after an eviction and a crash."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefault.device
from prefault.device import ClientProcess, DeviceArea, DevicePool, Recipe
from prefault.device.device_pool import Access
from prefault.sizes import PAGE_SIZE
from support import processes

_LIMIT_S = 900.0
_SAMPLE = 300


class _Numbered(prefault.device.Device):
    """A page holds its number. ``control`` evicts a range of pages."""

    evicts = True
    restartable = True

    def __init__(self, pages: int) -> None:
        self.length = pages * PAGE_SIZE

    def recipe(self) -> Recipe:
        return Recipe(f"{__name__}:_Numbered", {"pages": self.length // PAGE_SIZE})

    def start(self, pool: DevicePool) -> None:
        self.pool = pool

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        area.frame(page)[:8] = page.to_bytes(8, "little")

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        first, stop = map(int, request.split())
        return b"%d" % (len(self.pool.evict(range(first, stop))) // PAGE_SIZE)


def _run_client(connection: multiprocessing.connection.Connection, path: Path, first: int, count: int) -> None:
    """Map areas of one page each; then touch, check, and close some of them, on request."""
    draw = random.Random(first)
    client = prefault.device.connect(path)
    areas = {page: client.map(PAGE_SIZE, page * PAGE_SIZE) for page in range(first, first + count)}
    connection.send(len(areas))
    while (what := connection.recv()) != "end":
        some = draw.sample(sorted(areas), min(_SAMPLE, len(areas)))
        if what == "close":
            for page in some:
                areas.pop(page).close()
        else:
            wrong = [page for page in some if _number(areas[page]) != page]
            assert not wrong
        connection.send(len(areas))


def _number(area: prefault.device.Area) -> int:
    with area.memoryview() as view:
        return int.from_bytes(view[:8], "little")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [3000, pytest.param(500_000, marks=pytest.mark.stress)])
def test_many_areas(tmp_path: Path, count: int) -> None:
    fork = multiprocessing.get_context("fork")
    most = min(-(-count // 3), int(Path("/proc/sys/vm/max_map_count").read_text()) - 5000)
    clients: list[tuple[Any, Any]] = []

    def ask(what: str) -> list[int]:
        for connection, _ in clients:
            connection.send(what)
        return received()

    def received() -> list[int]:
        for connection, process in clients:
            assert connection.poll(_LIMIT_S), "a client hangs"
            assert process.is_alive()
        return [connection.recv() for connection, _ in clients]

    with prefault.device.serve(_Numbered(count), tmp_path / "s") as served, ExitStack() as stack:
        for first in range(0, count, most):
            mine, theirs = multiprocessing.Pipe()
            process = fork.Process(target=_run_client, args=(theirs, tmp_path / "s", first, min(most, count - first)))
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            theirs.close()
            clients.append((mine, process))
        assert sum(received()) == count
        ask("touch")
        with prefault.device.connect(tmp_path / "s") as client:
            assert int(client.control(b"0 %d" % count)) == min(count, _SAMPLE * len(clients))
        ask("touch")
        left = ask("close")
        (server,) = (pid for pid in processes.descendants(served.pid) if pid != served.pid)
        os.kill(server, signal.SIGKILL)
        assert ask("touch") == left
        assert sum(left) == count - _SAMPLE * len(clients)
        with prefault.device.connect(tmp_path / "s") as client:
            assert 0 < int(client.control(b"0 %d" % count)) <= 3 * _SAMPLE * len(clients)
        ask("touch")
        for connection, _ in clients:
            connection.send("end")
