"""Timing of a step on an area of a device that ships, and the check of what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import prefault
from prefault.bench.routes.device_processes import cpu_ns, helpers
from prefault.bench.routes.device_routes import CHUNK_BYTES, WrongError
from prefault.bench.routes.shipped_results import Taken
from prefault.bench.stopping import StoppedError
from prefault.device import Area
from prefault.inspection.scan import residency
from prefault.sizes import MIB, PAGE_SIZE, format_size


def never() -> bool:
    """Return False: a measurement that nothing stops."""
    return False


def warm(size_bytes: int = 256 * MIB) -> None:
    """Make the host back free memory: the first touch of a page that the host took back costs several times more."""
    with prefault.Mapping(size_bytes) as memory:
        prefault.populate(memory)


def touch(area: Area, stopping: Callable[[], bool] = never, offsets: Sequence[int] | None = None) -> None:
    """Store 1 to each page of an area, in a loop in C.

    Args:
        area: a writable mapping.
        stopping: asked every 32 MiB.
        offsets: of the bytes to store to, in this order; None: the first of each page.

    Raises:
        StoppedError: ``stopping`` returned True in the middle.
    """
    array = area.ndarray("uint8")
    each = CHUNK_BYTES // PAGE_SIZE
    try:
        if offsets is not None:
            for start in range(0, len(offsets), each):
                _go_on(stopping)
                array[offsets[start : start + each]] = 1
            return
        for start in range(0, len(area), CHUNK_BYTES):
            _go_on(stopping)
            array[start : start + CHUNK_BYTES : PAGE_SIZE] = 1
    finally:
        del array  # else the area could not be closed while an exception holds this frame


def take(area: Area, work: Callable[[], object]) -> Taken:
    """Run and time a step that brings in or moves the whole of an area."""
    server = helpers()["server"]
    faults, cpu = area.stats().faults, cpu_ns(server)
    began = time.perf_counter_ns()
    work()
    ended = time.perf_counter_ns()
    return Taken(ended - began, cpu_ns(server) - cpu, len(area) // PAGE_SIZE, area.stats().faults - faults, notes=area.notes)


def check(area: Area, value: int, length: int | None = None) -> None:
    """Check that pages are present, and that the first byte of each has a value.

    Raises:
        WrongError: they are not, or have another.
    """
    length = length or len(area)
    present = residency(area).present_bytes
    if present < length:
        raise WrongError(f"only {format_size(present)} of {format_size(length)} came in")
    array = area.ndarray("uint8")
    try:
        right = bool((array[:length:PAGE_SIZE] == value).all())
    finally:
        del array
    if not right:
        raise WrongError(f"not all pages begin with {value}, as they should")


def _go_on(stopping: Callable[[], bool]) -> None:
    if stopping():
        raise StoppedError
