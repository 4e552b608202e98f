"""Measure device memory with many areas: fault latency, and leaks."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from device_common import Effort, Holdings, Measure, Trivial, spread
from prefault import device as devices
from prefault.bench.routes.device_processes import helpers
from prefault.bench.routes.shipped_routes import warm
from prefault.sizes import KIB, PAGE_SIZE


def many(effort: Effort) -> Iterator[Measure]:
    """Measure 1 000 areas on one server against one area on another, in turns of 50 faults, on new servers each round.

    Both touch their pages in the same order, ascending or at random. Random touches cost more with any number of areas (page
    tables, caches, frames allocated one by one).
    """
    areas, turn = 1000, 50
    turns = max(2, effort.loads // 10)
    kinds = ("one, in order", "1 000, in order", "one, at random", "1 000, at random")
    times: dict[str, list[int]] = {kind: [] for kind in kinds}
    opening: list[float] = []
    draw = random.Random(4)
    for _ in range(max(2, effort.rounds // 4)):
        with ExitStack() as stack:

            def places(count: int, at_random: bool) -> list[tuple[memoryview, int]]:
                pages = -(-turns * turn // count)
                device = Trivial(count * pages * PAGE_SIZE)
                views = []
                began = time.perf_counter_ns()
                for number in range(count):
                    area = stack.enter_context(devices.map(device, pages * PAGE_SIZE, number * pages * PAGE_SIZE))
                    views.append(stack.enter_context(area.memoryview()))
                if count > 1:
                    opening.append((time.perf_counter_ns() - began) / count)
                found = [(view, page * PAGE_SIZE) for view in views for page in range(pages)]
                if at_random:
                    draw.shuffle(found)
                return found

            warm(4 * turns * turn * PAGE_SIZE)
            to_touch = {kind: places(areas if kind.startswith("1 000") else 1, kind.endswith("random")) for kind in kinds}
            for index in range(turns):
                for kind in kinds if index % 2 else reversed(kinds):
                    times[kind] += each_load(to_touch[kind][index * turn : (index + 1) * turn])
    for one, thousand in (kinds[:2], kinds[2:]):
        ratio = statistics.median(times[thousand]) / statistics.median(times[one])
        yield Measure(
            f"fault latency, any of 1 000 areas on one server, against one area, {one.partition(', ')[2]}", "at most 2x",
            f"{ratio:.2f}x", ratio <= 2,
            f"one: {spread(times[one])}; 1 000: {spread(times[thousand])}; {len(times[one])} of each; mapping took"
            f" {statistics.median(opening) / 1e3:.0f} us an area",
        )  # fmt: skip


def each_load(places: list[tuple[memoryview, int]]) -> list[int]:
    clock = time.perf_counter_ns
    took = []
    for view, at in places:
        began = clock()
        view[at]
        took.append(clock() - began)
    return took


class _Tenant:
    """A client process that maps areas, touches their pages at random, each once, and closes areas, on request."""

    def __init__(self, path: Path, first: int, pages: int = 1) -> None:
        """Start a process that maps areas of so many pages, from page ``first`` of the device on."""
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=_run_tenant, args=(theirs, path, first, pages))
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0

    def ask(self, what: str, count: int) -> list[int]:
        """Return nanoseconds of each of so many calls: "map", "touch" or "close"."""
        self._connection.send((what, count))
        took: list[int] = self._connection.recv()
        return took

    def end(self) -> None:
        self._connection.send(("end", 0))
        self._process.join()


def _run_tenant(connection: multiprocessing.connection.Connection, path: Path, first: int, pages: int) -> None:
    clock = time.perf_counter_ns
    areas: list[devices.Area] = []
    untouched: list[tuple[devices.Area, int]] = []
    draw = random.Random(first)

    def mapped() -> int:
        offset = (first + len(areas) * pages) * PAGE_SIZE
        began = clock()
        area = client.map(pages * PAGE_SIZE, offset)
        took = clock() - began
        areas.append(area)
        untouched.extend((area, page) for page in range(pages))
        return took

    def touched() -> int:
        at = draw.randrange(len(untouched))
        untouched[at], untouched[-1] = untouched[-1], untouched[at]
        area, page = untouched.pop()
        with area.memoryview() as view:
            began = clock()
            view[page * PAGE_SIZE]
            return clock() - began

    def closed() -> int:
        at = draw.randrange(len(areas))
        areas[at], areas[-1] = areas[-1], areas[at]
        area = areas.pop()
        began = clock()
        area.close()
        return clock() - began

    calls = {"map": mapped, "touch": touched, "close": closed}
    client = devices.connect(path)
    while (asked := connection.recv())[0] != "end":
        connection.send([calls[asked[0]]() for _ in range(asked[1])])


def crowd(effort: Effort) -> Iterator[Measure]:
    """Measure very many areas of several client processes on one server against one area, in turns.

    A process has at most ``vm.max_map_count`` mappings. Both sides touch pages at random, each page once.
    """
    count, touches, turn = effort.areas, 2000, 100
    most = min(count, int(Path("/proc/sys/vm/max_map_count").read_text()) - 5000)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        crowded, lonely = Path(directory) / "crowded", Path(directory) / "lonely"
        server = server_of(stack.enter_context(devices.serve(Trivial(count * PAGE_SIZE), crowded)).pid)
        stack.enter_context(devices.serve(Trivial(touches * PAGE_SIZE), lonely))
        alone = _Tenant(lonely, 0, touches)
        stack.callback(alone.end)
        alone.ask("map", 1)
        tenants: list[_Tenant] = []
        before = _rss_kib(server)
        opening: list[int] = []
        for first in range(0, count, most):
            tenants.append(_Tenant(crowded, first))
            stack.callback(tenants[-1].end)
            opening += tenants[-1].ask("map", min(most, count - first))
        in_server = _rss_kib(server) - before
        in_clients = sum(_rss_kib(tenant.pid) - _rss_kib(alone.pid) for tenant in tenants)
        warm(4 * touches * PAGE_SIZE)
        times: dict[str, list[int]] = {"one": [], "many": []}
        for index in range(touches // turn):
            for kind in ("one", "many") if index % 2 else ("many", "one"):
                times[kind] += (alone if kind == "one" else tenants[index % len(tenants)]).ask("touch", turn)
        closing = tenants[0].ask("close", min(1000, most // 2))
    ratio = statistics.median(times["many"]) / statistics.median(times["one"])
    yield Measure(
        f"fault latency, any of {count} areas in {len(tenants)} processes, against one area, at random", "at most 2x",
        f"{ratio:.2f}x", ratio <= 2, f"one: {spread(times['one'])}; {count}: {spread(times['many'])}; {touches} of each",
    )  # fmt: skip
    begin, end = opening[100:1100], opening[-1000:]
    ratio = statistics.median(end) / statistics.median(begin)
    yield Measure(
        f"opening the last 1 000 of {count} areas, against the first", "at most 1.5x", f"{ratio:.2f}x", ratio <= 1.5,
        f"{statistics.median(begin) / 1e3:.0f} and {statistics.median(end) / 1e3:.0f} us an area; closing one of {most} in a"
        f" process: {statistics.median(closing) / 1e3:.0f} us",
    )  # fmt: skip
    yield Measure(
        f"memory for each of {count} areas", "(none)", f"{in_server * 1024 / count:.0f} bytes in the server", None,
        f"{in_clients * 1024 / count:.0f} bytes in the client processes; anonymous memory",
    )  # fmt: skip


def _rss_kib(pid: int) -> int:
    return Holdings.of(pid).rss_kib


def server_of(warden: int) -> int:
    """Return the pid of the server of a warden."""
    return int(Path(f"/proc/{warden}/task/{warden}/children").read_text().split()[0])


def cycles(effort: Effort) -> Iterator[Measure]:
    """Measure leaks: open, touch and close areas one by one, while another area keeps the server alive."""
    length = 64 * KIB
    device = Trivial(16 * length)
    opening: list[int] = []
    closing: list[int] = []

    def cycle(number: int) -> None:
        began = time.perf_counter_ns()
        area = devices.map(device, length, number % 16 * length)
        opening.append(time.perf_counter_ns() - began)
        with area.memoryview() as view:
            assert view[0] == 0x5A
        began = time.perf_counter_ns()
        area.close()
        closing.append(time.perf_counter_ns() - began)

    with devices.map(device):
        pids = {"client": os.getpid(), **helpers()}
        for number in range(effort.cycles // 10):  # afterwards everything that is allocated once exists
            cycle(number)
        opening.clear()
        closing.clear()
        before = {role: Holdings.of(pid) for role, pid in pids.items()}
        for number in range(effort.cycles):
            cycle(number)
        after = {role: Holdings.of(pid) for role, pid in pids.items()}
    yield Measure(
        f"{effort.cycles} areas opened and closed", "(none)",
        f"{statistics.median(opening) / 1e3:.0f} us to open, {statistics.median(closing) / 1e3:.0f} us to close",
        None, f"medians; 99 %: {sorted(opening)[-len(opening) // 100] / 1e3:.0f} and"
        f" {sorted(closing)[-len(closing) // 100] / 1e3:.0f} us",
    )  # fmt: skip
    for role, then in before.items():
        now = after[role]
        more = (now.descriptors - then.descriptors, now.mappings - then.mappings, now.rss_kib - then.rss_kib)
        yield Measure(
            f"what the {role} has more after {effort.cycles} areas", "no leak (below 100 bytes an area)",
            f"{more[0]} descriptors, {more[1]} mappings, {more[2]} KiB",
            more[0] <= 0 and more[1] <= 0 and more[2] * 1024 < 100 * effort.cycles,
            f"{then.descriptors} descriptors, {then.mappings} mappings, {then.rss_kib} KiB anonymous before",
        )  # fmt: skip
    starts = []
    for _ in range(max(3, effort.rounds)):
        began = time.perf_counter_ns()
        devices.map(Trivial(length)).close()
        starts.append((time.perf_counter_ns() - began) / 1e6)
    yield Measure(
        "a device mapped and closed, server and warden too", "(none)", f"{statistics.median(starts):.1f} ms median", None,
        f"{min(starts):.1f} ms best, {max(starts):.1f} worst of {len(starts)}; the server is a fork",
    )  # fmt: skip
