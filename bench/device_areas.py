"""Measure device memory with many areas: fault latency, and leaks."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack

from device_common import Effort, Holdings, Measure, Trivial, helpers, spread, warm
from prefault import device as devices
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
