"""One repetition of one route, on a device that another area keeps mapped."""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import prefault
from prefault import device as devices
from prefault._kernel import mman
from prefault._system import capabilities
from prefault.bench.routes.device_driver import CONTENT, BenchDevice
from prefault.bench.routes.device_processes import helpers
from prefault.bench.routes.device_results import Counts, Route, RouteCell, system_calls
from prefault.bench.stopping import StoppedError
from prefault.device.client.area import Area
from prefault.device.server.populate_requests import PIECE
from prefault.inspection.scan import residency
from prefault.sizes import MIB, format_size

CHUNK_BYTES = 32 * MIB
"""Bytes after which a long route checks whether it is to stop."""


class RouteRefusedError(Exception):
    """A route is not available on this machine."""


class WrongError(Exception):
    """A route did not populate the memory, or not with the right bytes."""


class RouteRepetition(NamedTuple):
    """Times and counts of one repetition."""

    total_ns: int
    map_ns: int
    counts: Counts


class Bed:
    """A device whose server runs, and an area of it that keeps it running."""

    def __init__(self, size_bytes: int, page_size: int, *, colocate: bool) -> None:
        self.device = BenchDevice(size_bytes, page_size)
        self._colocate = colocate
        self.keeper = devices.map(self.device)
        self.server_pid = helpers().get("server")

    @property
    def user_mode_only(self) -> bool:
        """True if faults that the kernel raises are not answered."""
        return self.keeper.user_mode_only

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what is weaker on this machine than asked for."""
        return self.keeper.notes

    def prepare(self, cell: RouteCell) -> None:
        """Supply or discard all frames, as the cell asks for."""
        if cell.frames == "ready":
            self.keeper.populate()
        else:
            self.keeper.discard()

    def map(self, *, populate: bool = False) -> Area:
        """Map another area of the whole device."""
        return devices.map(self.device, populate=populate, colocate=self._colocate)

    def close(self) -> None:
        """End the server."""
        self.keeper.close()

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def repetition(bed: Bed, cell: RouteCell, stopping: Callable[[], bool]) -> RouteRepetition:
    """Measure a route once.

    Raises:
        StoppedError: ``stopping`` returned True in the middle.
        RouteRefusedError: the machine does not have the route.
        WrongError: the memory was not populated, or does not hold the bytes of the device.
        OSError: the route failed.
    """
    bed.prepare(cell)
    earlier = bed.map() if cell.route is Route.LATER else None
    reads, usage = _server_reads(bed.server_pid), resource.getrusage(resource.RUSAGE_THREAD)
    began = time.perf_counter_ns()
    area = earlier or bed.map(populate=cell.route is Route.AT_MAP_TIME)
    mapped = time.perf_counter_ns()
    try:
        try:
            error = _populate(cell, area, stopping)
        except OSError as refusal:
            error = refusal.with_traceback(None)
        ended = time.perf_counter_ns()
        after = resource.getrusage(resource.RUSAGE_THREAD)
        now = _server_reads(bed.server_pid)
        server_reads = None if reads is None or now is None else now - reads
        counts = _counts(bed, cell, area, usage, after, server_reads)
        error = error or _wrong(area)
        if error is not None:
            raise error
    finally:
        area.close()
    return RouteRepetition(ended - began, 0 if earlier else mapped - began, counts)


# What goes wrong is returned and not raised: a traceback would keep views alive, and the area could not be closed.


def _populate(cell: RouteCell, area: Area, stopping: Callable[[], bool]) -> Exception | None:
    if cell.route is Route.TOUCH:
        return _touch(area, cell.page_size, stopping)
    if cell.route is Route.SECOND_CALL:
        area.populate()
    elif cell.route is Route.LATER:
        prefault.populate(area.ndarray())
    elif cell.route is Route.KERNEL:
        return _madvise(area, stopping)
    return None


def _touch(area: Area, page_size: int, stopping: Callable[[], bool]) -> Exception | None:
    bytes_ = area.ndarray()
    for start in range(0, len(area), CHUNK_BYTES):
        if stopping():
            return StoppedError()
        if bytes_[start : start + CHUNK_BYTES : page_size].min() != CONTENT:
            return WrongError("a page that was touched does not hold what the device does")
    return None


def _madvise(area: Area, stopping: Callable[[], bool]) -> Exception | None:
    for start in range(0, len(area), CHUNK_BYTES):
        if stopping():
            return StoppedError()
        try:
            mman.madvise(area.address + start, min(CHUNK_BYTES, len(area) - start), mman.MADV_POPULATE_READ)
        except OSError as error:
            if error.errno == errno.EFAULT and area.user_mode_only:
                return RouteRefusedError(
                    "userfaultfd answers faults of user mode only here, and not those of the kernel: EFAULT"
                )
            if error.errno == errno.EINVAL and not capabilities.MADV_POPULATE.available:
                return RouteRefusedError(f"this kernel has no MADV_POPULATE_READ: {capabilities.MADV_POPULATE.refusal}")
            return error
    return None


def _counts(
    bed: Bed, cell: RouteCell, area: Area, before: resource.struct_rusage, after: resource.struct_rusage,
    server_reads: int | None,
) -> Counts:  # fmt: skip
    statistics = area.stats()
    piece = PIECE * cell.page_size if cell.frames == "ready" else max(bed.device.batch, cell.page_size)
    pieces, chunks = -(-cell.size_bytes // piece), -(-cell.size_bytes // CHUNK_BYTES)
    return Counts(
        client_faults=after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt,
        server_faults=statistics.faults,
        populated_pages=statistics.populated_pages,
        supplied_pages=statistics.supplied_pages,
        server_reads=server_reads,
        client_sleeps=after.ru_nvcsw - before.ru_nvcsw,
        system_calls=system_calls(cell.route, statistics.faults, server_reads, pieces, chunks),
    )


def _wrong(area: Area) -> Exception | None:
    """Check that the whole area is populated, with the right bytes; return the error if not."""
    present = residency(area).present_bytes
    if present < len(area):
        return WrongError(f"only {format_size(present)} of {format_size(len(area))} were populated")
    if area.ndarray()[:: 64 * 1024].min() != CONTENT:
        return WrongError("the memory does not hold what the device does")
    return None


def _server_reads(pid: int | None) -> int | None:
    """Count the server's read calls so far; None where the kernel does not (CONFIG_TASK_IO_ACCOUNTING)."""
    if pid is None:
        return None
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("syscr:")), None)
