"""Measures of buffer objects: kinds of faults, populate, moves, and bookkeeping."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device_common import Effort, Measure
from prefault._system import thp
from prefault.bench.routes.buffer_routes import repetition
from prefault.bench.routes.shipped_results import BASELINES, BufferRoute, Taken
from prefault.sizes import KIB, format_size

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@contextmanager
def huge_pages_advised() -> Iterator[None]:
    """Allow huge pages of shmem where they are advised, if this process may, and restore the setting."""
    before = thp.read_setting("shmem_enabled")
    changed = before == "never" and os.access(_SETTING, os.W_OK)
    if changed:
        _SETTING.write_text("advise")
    try:
        yield
    finally:
        if changed and before is not None:
            _SETTING.write_text(before)


def buffers(effort: Effort) -> Iterator[Measure]:
    """Measure an object by each route, alternating; new servers each round."""
    rounds = max(2, effort.rounds // 4)
    with huge_pages_advised():
        taken: dict[BufferRoute, list[Taken]] = {route: [] for route in BufferRoute}
        for _ in range(rounds + 1):
            for route, each in taken.items():
                if route is not BufferRoute.BOOKKEEPING:
                    each.append(repetition(route, effort.length))
        seconds = {
            # Round 0 warms the memory.
            route: [one.total_ns / 1e9 for one in each[1:]]
            for route, each in taken.items()
            if each
        }
        yield from faults(effort, seconds, {route: each[-1].faults for route, each in taken.items() if each})
        yield from moves(effort, rounds, seconds)
        yield bookkeeping(effort)


def faults(
    effort: Effort, seconds: dict[BufferRoute, list[float]], answered: dict[BufferRoute, int]
) -> Iterator[Measure]:  # fmt: skip
    """Compare the ways in which an object comes in."""
    small = statistics.median(seconds[BufferRoute.FAULTS])
    for route, baseline in BASELINES.items():
        if baseline is BufferRoute.FAULTS:
            assert isinstance(route, BufferRoute)
            each = seconds[route]
            ratio = small / statistics.median(each)
            share = answered[BufferRoute.FAULTS] / max(1, answered[route])
            huge = route is BufferRoute.HUGE_FAULTS
            yield Measure(
                f"buffer object of {format_size(effort.length)}: {route}", "30x, 1/400 of the faults" if huge else "",
                f"{ratio:.1f}x", (ratio >= 30 and share >= 400) if huge else None,
                f"{statistics.median(each) * 1000:.0f} ms (best {min(each) * 1000:.0f}), {answered[route]} faults; by single"
                f" faults {small * 1000:.0f} ms; shmem_enabled {thp.read_setting('shmem_enabled')}",
            )  # fmt: skip


def moves(effort: Effort, rounds: int, seconds: dict[BufferRoute, list[float]]) -> Iterator[Measure]:
    """Compare moves of an object that is supplied, with and without entries in a client, with memcpy."""
    import numpy

    length = effort.length
    source = numpy.ones(length // 4, numpy.uint8)
    target = numpy.zeros_like(source)
    copies = []
    for _ in range(rounds):
        began = time.perf_counter()
        target[:] = source
        copies.append(4 * (time.perf_counter() - began))
    copy = length / statistics.median(copies) / 1e9
    for route in (BufferRoute.OUT, BufferRoute.OUT_MAPPED, BufferRoute.IN, BufferRoute.IN_MAPPED):
        speed = length / statistics.median(seconds[route]) / 1e9
        yield Measure(
            f"{route}, {format_size(length)}", "1.5 GB/s", f"{speed:.2f} GB/s", speed >= 1.5,
            f"{speed / copy:.2f} of the speed of one memcpy in the same run ({copy:.1f} GB/s)",
        )  # fmt: skip


def bookkeeping(effort: Effort) -> Measure:
    """Compare the memory that warden and server take for an object, beyond its frames, with the limit."""
    taken = repetition(BufferRoute.BOOKKEEPING, effort.length)
    assert taken.bookkeeping_bytes is not None
    each = taken.bookkeeping_bytes / (effort.length / KIB)
    return Measure(
        f"bookkeeping of {format_size(effort.length)} in pages of 4 KiB", "1 byte per KiB", f"{each:.2f} bytes per KiB",
        each <= 1, "anonymous memory of warden and server, and the memfd of page states",
    )  # fmt: skip
