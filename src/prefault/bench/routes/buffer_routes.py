"""One repetition of one route of a buffer object, on a new server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prefault import device as devices
from prefault._kernel import mman
from prefault.bench.routes.buffer_driver import PageByPage
from prefault.bench.routes.device_processes import anonymous_bytes, helpers
from prefault.bench.routes.device_routes import WrongError
from prefault.bench.routes.shipped_results import BufferRoute, Taken
from prefault.bench.routes.shipped_routes import check, never, take, touch
from prefault.drivers.buffers import BufferObjects, Buffers
from prefault.sizes import MIB

_NAME = "object"
_MOVES = {
    BufferRoute.OUT: ("vram", "system"),
    BufferRoute.OUT_MAPPED: ("vram", "system"),
    BufferRoute.IN: ("system", "vram"),
    BufferRoute.IN_MAPPED: ("system", "vram"),
}
_IN_VRAM = (BufferRoute.HUGE_FAULTS, BufferRoute.HUGE_POPULATE)


def repetition(route: BufferRoute, size_bytes: int, stopping: Callable[[], bool] = never) -> Taken:
    """Measure a route once, on a new server with a new object.

    Args:
        route: how pages come in or move.
        size_bytes: of the object; VRAM and SYSTEM have as much each.
        stopping: asked every 32 MiB of faults.

    Raises:
        StoppedError: ``stopping`` returned True in the middle.
        WrongError: not all pages came in, or not with the right bytes; or the object did not move.
        OSError: the route failed.
    """
    kind = PageByPage if route is BufferRoute.FAULTS else BufferObjects
    with devices.open(kind(vram=size_bytes, system=size_bytes, space=4 * size_bytes)) as client:
        buffers = Buffers(client)
        if route in _MOVES:
            return _move(buffers, route, size_bytes)
        if route is BufferRoute.BOOKKEEPING:
            return _bookkeeping(buffers, size_bytes, stopping)
        buffers.create(_NAME, size_bytes, placements=["vram" if route in _IN_VRAM else "system"])
        with buffers.map(_NAME) as area:
            if route in (BufferRoute.POPULATE, BufferRoute.HUGE_POPULATE):
                taken = take(area, lambda: area.populate("write"))
                check(area, 0)
            else:
                taken = take(area, lambda: touch(area, stopping))
                check(area, 1)
            return taken


def _move(buffers: Buffers, route: BufferRoute, size_bytes: int) -> Taken:
    here, there = _MOVES[route]
    buffers.create(_NAME, size_bytes, placements=[here, there])
    with buffers.map(_NAME) as area:
        area.populate("write")
        touch(area)
        if route in (BufferRoute.OUT, BufferRoute.IN):
            # The frames stay; the page-table entries of this process go.
            mman.madvise(area.address, len(area), mman.MADV_DONTNEED)
        taken = take(area, lambda: buffers.move(_NAME, there))
        found = buffers.describe(_NAME).placement
        if found != there:
            raise WrongError(f"the object is in {found}, and not in {there}")
        area.populate("read")
        check(area, 1)
        return taken


def _bookkeeping(buffers: Buffers, size_bytes: int, stopping: Callable[[], bool]) -> Taken:
    buffers.create("small", MIB)
    with buffers.map("small") as small:
        touch(small)  # what the first fault of a server takes is not the object's
        before = _server_bytes()
        buffers.create(_NAME, size_bytes, placements=["system"])
        with buffers.map(_NAME) as area:
            taken = take(area, lambda: touch(area, stopping))
            check(area, 1)
            return taken._replace(bookkeeping_bytes=_server_bytes() - before)


def _server_bytes() -> int:
    """Return the anonymous bytes of warden and server, and the bytes of page states."""
    pids = helpers()
    total = sum(map(anonymous_bytes, pids.values()))
    for fd in Path(f"/proc/{pids['server']}/fd").iterdir():
        if "prefault-states" in os.readlink(fd):
            return total + os.stat(fd).st_blocks * 512
    return total
