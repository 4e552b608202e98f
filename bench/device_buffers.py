"""Measures of buffer objects: kinds of faults, populate, moves, and bookkeeping."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device_common import Effort, Measure, helpers
from prefault import device as devices
from prefault._system import thp
from prefault.device import Area, FaultAround, Recipe
from prefault.drivers.buffers import BufferObjects, Buffers
from prefault.sizes import KIB, MIB, PAGE_SIZE, format_size

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class PageByPage(BufferObjects):
    """Buffer objects without fault-around."""

    fault_around = FaultAround(PAGE_SIZE, PAGE_SIZE)

    def recipe(self) -> Recipe:
        return Recipe("device_buffers:PageByPage", super().recipe().arguments)


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


def touch(area: Area) -> None:
    """Store to each page, in a loop in C."""
    array = area.ndarray("uint8")
    array[::PAGE_SIZE] = 1
    del array


def one_round(effort: Effort, kind: type[BufferObjects], place: str, bring: Callable[[Area], object]) -> tuple[float, int]:
    """Return seconds and page faults of bringing a new object in."""
    length = effort.length
    with devices.open(kind(vram=length, system=length, space=4 * length)) as client:
        buffers = Buffers(client)
        buffers.create("object", length, placements=[place])
        with buffers.map("object") as area:
            began = time.perf_counter()
            bring(area)
            return time.perf_counter() - began, area.stats().faults


def buffers(effort: Effort) -> Iterator[Measure]:
    """Measure an object by each route, alternating; new servers each round."""
    routes: dict[str, tuple[type[BufferObjects], str, Callable[[Area], object]]] = {
        "4 KiB faults": (PageByPage, "system", touch),
        "fault-around 64 KiB": (BufferObjects, "system", touch),
        "2 MiB faults": (BufferObjects, "vram", touch),
        "populate, 4 KiB": (BufferObjects, "system", lambda area: area.populate("write")),
        "populate, 2 MiB": (BufferObjects, "vram", lambda area: area.populate("write")),
    }
    rounds = max(2, effort.rounds // 4)
    with huge_pages_advised():
        times: dict[str, list[float]] = {name: [] for name in routes}
        faults: dict[str, int] = {}
        for round_ in range(rounds + 1):
            for name, (kind, place, bring) in routes.items():
                took, faults[name] = one_round(effort, kind, place, bring)
                if round_:  # round 0 warms the memory
                    times[name].append(took)
        small = statistics.median(times["4 KiB faults"])
        size = format_size(effort.length)
        for name, each in times.items():
            ratio = small / statistics.median(each)
            share = faults["4 KiB faults"] / max(1, faults[name])
            huge = name == "2 MiB faults"
            yield Measure(
                f"buffer object of {size}: {name}", "30x, 1/400 of the faults" if huge else "", f"{ratio:.1f}x",
                (ratio >= 30 and share >= 400) if huge else None,
                f"{statistics.median(each) * 1000:.0f} ms (best {min(each) * 1000:.0f}), {faults[name]} faults;"
                f" shmem_enabled {thp.read_setting('shmem_enabled')}",
            )  # fmt: skip
        yield from moves(effort, rounds)
        yield bookkeeping(effort)


def moves(effort: Effort, rounds: int) -> Iterator[Measure]:
    """Measure moves of an object that is supplied, with and without entries in a client, against memcpy."""
    import numpy

    length = effort.length
    source = numpy.ones(length // 4, numpy.uint8)
    target = numpy.zeros_like(source)
    times: dict[str, list[float]] = {"without live mappings": [], "with live mappings": [], "memcpy": []}
    with devices.open(BufferObjects(vram=length, system=length, space=4 * length)) as client:
        buffers = Buffers(client)
        buffers.create("object", length)
        with buffers.map("object") as area:
            area.populate("write")
            for _ in range(rounds + 1):
                for name in ("without live mappings", "with live mappings"):
                    for place in ("system", "vram"):
                        if name == "with live mappings":
                            touch(area)
                        began = time.perf_counter()
                        buffers.move("object", place)
                        times[name].append(time.perf_counter() - began)
                began = time.perf_counter()
                target[:] = source
                times["memcpy"].append(4 * (time.perf_counter() - began))
    copy = length / statistics.median(times["memcpy"][1:]) / 1e9
    for name in ("without live mappings", "with live mappings"):
        for first, way in ((2, "vram to system"), (3, "system to vram")):
            speed = length / statistics.median(times[name][first::2]) / 1e9
            yield Measure(
                f"move of {format_size(length)}, {way}, {name}", "1.5 GB/s", f"{speed:.2f} GB/s", speed >= 1.5,
                f"{speed / copy:.2f} of the speed of one memcpy in the same run ({copy:.1f} GB/s)",
            )  # fmt: skip


def bookkeeping(effort: Effort) -> Measure:
    """Measure the memory that warden and server take for an object, beyond its frames."""
    length = effort.length
    with devices.open(BufferObjects(vram=length, system=length, space=4 * length)) as client:
        buffers = Buffers(client)
        buffers.create("small", MIB)
        with buffers.map("small") as area:
            touch(area)
            before = _taken()
            buffers.create("object", length, placements=["system"])
            with buffers.map("object") as area:
                touch(area)
                taken = _taken() - before
    each = taken / (length / KIB)
    return Measure(
        f"bookkeeping of {format_size(length)} in pages of 4 KiB", "1 byte per KiB", f"{each:.2f} bytes per KiB", each <= 1,
        "anonymous memory of warden and server, and the memfd of page states",
    )  # fmt: skip


def _taken() -> int:
    """Return the anonymous bytes of warden and server, and the bytes of page states."""
    total, pids = 0, helpers()
    for pid in pids.values():
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * KIB
    for fd in Path(f"/proc/{pids['server']}/fd").iterdir():
        if "prefault-states" in os.readlink(fd):
            total += os.stat(fd).st_blocks * 512
            break
    return total
