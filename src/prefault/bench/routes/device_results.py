"""The cells of ``prefault bench device``, and their records."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from prefault.bench.results import Run, Timed
from prefault.bench.routes.shipped_results import ShippedResult
from prefault.sizes import MIB, PAGE_SIZE, format_size

PATTERN: Final = "pattern"
"""The name of the device of one byte value, on which the routes of :class:`Route` are compared."""

Frames: TypeAlias = Literal["ready", "cold"]
"""``ready``: the driver supplied the pages before, for other clients. Else it supplies them during the measurement."""

FRAMES: tuple[Frames, ...] = ("ready", "cold")
PAGE_SIZES = (PAGE_SIZE, 2 * MIB)


class Route(enum.StrEnum):
    """A way to get device memory populated. The value is its name in tables and files."""

    TOUCH = "touch"
    SECOND_CALL = "map, then populate"
    AT_MAP_TIME = "map(populate=)"
    LATER = "populate later"
    KERNEL = "MADV_POPULATE_READ"


MEANINGS: dict[Route, str] = {
    Route.TOUCH: "map, then read a byte of each page: a fault each, answered by the server",
    Route.SECOND_CALL: "map, then ask the device to populate the area: a second call, as with an ioctl of a kernel driver",
    Route.AT_MAP_TIME: "one call that maps and populates",
    Route.LATER: "prefault.populate on an array over an area that was mapped before (its mapping is not timed)",
    Route.KERNEL: "map, then the kernel's own madvise call, which knows nothing of the device: a fault each, in a row",
}


class RouteCell(NamedTuple):
    """One route over one area, to be measured.

    Attributes:
        size_bytes: the length of the area.
        page_size: bytes in a page of the device: 4 KiB or 2 MiB.
        frames: see :data:`Frames`.
        route: the way in which it is populated.
    """

    size_bytes: int
    page_size: int
    frames: Frames
    route: Route

    @property
    def pages(self) -> int:
        """Number of pages of the device in the area."""
        return self.size_bytes // self.page_size

    @property
    def group(self) -> tuple[int, int, Frames]:
        """The key of the cells that are measured on the same memory."""
        return self.size_bytes, self.page_size, self.frames

    def __str__(self) -> str:
        return f"{format_size(self.size_bytes)} in {format_size(self.page_size)} pages, frames {self.frames}, {self.route}"


@dataclass(frozen=True, slots=True)
class Counts:
    """The faults, reads and calls of one repetition; those of the last repetition are kept.

    Attributes:
        client_faults: minor and major faults that getrusage(2) counts for the measuring thread.
        server_faults: messages of page faults that the server answered.
        populated_pages: that the server mapped without a fault.
        supplied_pages: that the driver supplied meanwhile: none where they were ready.
        server_reads: read(2) and the like of the server, from ``/proc/PID/io`` (sockets are not in it); None where the
            kernel does not account them.
        client_sleeps: voluntary context switches of the measuring thread.
        system_calls: calls of client and server together, without those of mapping: see :func:`system_calls`.
    """

    client_faults: int
    server_faults: int
    populated_pages: int
    supplied_pages: int
    server_reads: int | None
    client_sleeps: int
    system_calls: int


@dataclass(frozen=True, slots=True)
class RouteResult(Timed[RouteCell]):
    """The times and counts of one cell. A time is from the first call to the last page.

    Attributes:
        map_ns: the part of each time that :func:`prefault.device.map` took; 0 where it is not timed.
        counts: None without a repetition.
    """

    map_ns: tuple[int, ...] = ()
    counts: Counts | None = None

    @property
    def us_per_page(self) -> float | None:
        """Microseconds per page of the device, in the best repetition."""
        return min(self.values_ns) / 1000 / self.cell.pages if self.statistics else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRun(Run[RouteResult | ShippedResult]):
    """A run of ``prefault bench device``: results on the device of one byte value, then those on devices that ship.

    Attributes:
        colocate: True if areas were mapped with ``colocate=True``.
        user_mode_only: True if the userfaultfd answers no faults of the kernel; None if nothing was mapped.
    """

    colocate: bool
    user_mode_only: bool | None

    @property
    def routes(self) -> tuple[RouteResult, ...]:
        """The results on the device of one byte value."""
        return tuple(result for result in self.results if isinstance(result, RouteResult))

    @property
    def shipped(self) -> tuple[ShippedResult, ...]:
        """The results on devices that ship."""
        return tuple(result for result in self.results if isinstance(result, ShippedResult))


def cells(sizes: Iterable[int], page_sizes: Iterable[int], frames: Iterable[Frames]) -> list[RouteCell]:
    """Return the cells of all routes for each combination."""
    return [
        RouteCell(size, page_size, state, route)
        for page_size in page_sizes
        for size in sizes
        for state in frames
        for route in Route
    ]


def system_calls(route: Route, server_faults: int, server_reads: int | None, pieces: int, chunks: int) -> int:
    """Return the system calls of client and server in one repetition, without those of mapping (about a dozen).

    They are counted by design and not by a tracer, which would change the times. A fault takes a read and one
    UFFDIO_CONTINUE. Reads come from ``/proc/PID/io`` where the kernel accounts them, as one read may return several messages
    and a spinning server reads in vain; the calls that it waits with are not counted. A populate request takes a
    PAGEMAP_SCAN, sendmsg, poll, recvmsg and three getpid in the client; in the server it takes a recvmsg, a UFFDIO_CONTINUE
    and an epoll_wait per piece, and a send. These are 17 for 64 MiB in 4 KiB pages, as strace(1) counts them.

    Args:
        route: the route of the repetition.
        server_faults: see :class:`Counts`.
        server_reads: see :class:`Counts`.
        pieces: in which the server maps the area.
        chunks: in which MADV_POPULATE_READ is issued.
    """
    reads = server_faults if server_reads is None else server_reads
    if route is Route.TOUCH:
        return server_faults + reads
    if route is Route.KERNEL:
        return chunks + server_faults + reads
    return 9 + 2 * pieces


class Ratio(NamedTuple):
    """The best time of a cell relative to others of its group; None where one of them is not measured."""

    to_touch: float | None
    to_map_time: float | None


def ratios(results: Iterable[RouteResult]) -> dict[RouteCell, Ratio]:
    """Compute how many times faster than touching, and slower than map-time populate, each cell was."""
    best = {result.cell: min(result.values_ns) for result in results if result.statistics}
    found = {}
    for cell, value in best.items():
        touch, at_map = best.get(cell._replace(route=Route.TOUCH)), best.get(cell._replace(route=Route.AT_MAP_TIME))
        found[cell] = Ratio(touch / value if touch else None, value / at_map if at_map else None)
    return found
