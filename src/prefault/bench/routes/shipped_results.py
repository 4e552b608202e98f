"""The cells of ``prefault bench device`` on devices that ship, and their records."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from prefault.bench.results import Timed
from prefault.sizes import MIB, PAGE_SIZE, format_size

Shipped: TypeAlias = Literal["enclave", "buffers"]
"""A device that ships: an enclave page cache, or buffer objects."""


# 512 pages of 4 KiB: enough to be timed, and few enough that two requests for each do not take minutes.
INSTRUCTION_BYTES = 2 * MIB
"""Length of the part of an enclave that is added by instructions, in bytes."""


class EnclaveRoute(enum.StrEnum):
    """A way in which pages of an enclave come in. The value is its name in tables and files."""

    FAULTS = "EAUG by faults"
    POPULATE = "populate"
    INSTRUCTIONS = "EAUG, EACCEPT, touch"
    FAULTS_RECLAIM = "EAUG by faults, reclaim"
    POPULATE_RECLAIM = "populate, reclaim"
    SCATTERED_RECLAIM = "populate, scattered"
    LOAD = "populate, load"


class BufferRoute(enum.StrEnum):
    """A way in which pages of a buffer object come in or move. The value is its name in tables and files."""

    FAULTS = "4 KiB faults"
    FAULT_AROUND = "fault-around 64 KiB"
    HUGE_FAULTS = "2 MiB faults"
    POPULATE = "populate, 4 KiB"
    HUGE_POPULATE = "populate, 2 MiB"
    OUT = "move to system"
    OUT_MAPPED = "move to system, mapped"
    IN = "move to vram"
    IN_MAPPED = "move to vram, mapped"
    BOOKKEEPING = "bookkeeping by page"


ShippedRoute: TypeAlias = EnclaveRoute | BufferRoute

ROUTES: dict[Shipped, type[EnclaveRoute] | type[BufferRoute]] = {"enclave": EnclaveRoute, "buffers": BufferRoute}

TITLES: dict[Shipped, str] = {
    "enclave": "enclave page cache of {}, an enclave of the same size",
    "buffers": "buffer object of {}",
}

MEANINGS: dict[ShippedRoute, str] = {
    EnclaveRoute.FAULTS: "store to each page: a fault each, which adds and accepts it; the page cache has room",
    EnclaveRoute.POPULATE: "one call; the page cache has room",
    EnclaveRoute.INSTRUCTIONS: "the two instructions as requests and a store, for each of 512 pages",
    EnclaveRoute.FAULTS_RECLAIM: "as above; another enclave fills the page cache, and is evicted, encrypted, meanwhile",
    EnclaveRoute.POPULATE_RECLAIM: "one call; likewise",
    EnclaveRoute.SCATTERED_RECLAIM: "one call; the other enclave's pages are every second one, and came in in no order",
    EnclaveRoute.LOAD: "one call that loads and decrypts what was evicted, while as much is evicted",
    BufferRoute.FAULTS: "store to each page in SYSTEM, without fault-around",
    BufferRoute.FAULT_AROUND: "store to each page in SYSTEM; a fault brings in 16 pages",
    BufferRoute.HUGE_FAULTS: "store to each page in VRAM; a fault brings in 2 MiB",
    BufferRoute.POPULATE: "one call, in SYSTEM",
    BufferRoute.HUGE_POPULATE: "one call, in VRAM",
    BufferRoute.OUT: "the object leaves VRAM, while this process maps it and has no page-table entries for it",
    BufferRoute.OUT_MAPPED: "the same with page-table entries",
    BufferRoute.IN: "the object enters VRAM, without page-table entries",
    BufferRoute.IN_MAPPED: "the same with page-table entries",
    BufferRoute.BOOKKEEPING: "fault-around; for the memory of warden and server beyond the object's own",
}

BASELINES: dict[ShippedRoute, ShippedRoute] = {
    EnclaveRoute.POPULATE: EnclaveRoute.FAULTS,
    EnclaveRoute.INSTRUCTIONS: EnclaveRoute.FAULTS,
    EnclaveRoute.POPULATE_RECLAIM: EnclaveRoute.FAULTS_RECLAIM,
    EnclaveRoute.SCATTERED_RECLAIM: EnclaveRoute.FAULTS_RECLAIM,
    EnclaveRoute.LOAD: EnclaveRoute.FAULTS_RECLAIM,
    BufferRoute.FAULT_AROUND: BufferRoute.FAULTS,
    BufferRoute.HUGE_FAULTS: BufferRoute.FAULTS,
    BufferRoute.POPULATE: BufferRoute.FAULTS,
    BufferRoute.HUGE_POPULATE: BufferRoute.FAULTS,
}
"""The route by single faults that each is compared with. Others are compared with none."""


class Taken(NamedTuple):
    """One repetition of a route.

    Attributes:
        total_ns: wall-clock time.
        server_cpu_ns: CPU time of the server's threads meanwhile.
        pages: pages of 4 KiB that came in or moved.
        faults: messages of page faults that the server answered meanwhile.
        evicted_bytes: bytes that left the enclave page cache meanwhile; 0 elsewhere.
        bookkeeping_bytes: memory of warden and server that the object takes beside its own; None where not measured.
        notes: sentences on what is weaker on this machine than asked for.
    """

    total_ns: int
    server_cpu_ns: int
    pages: int
    faults: int
    evicted_bytes: int = 0
    bookkeeping_bytes: int | None = None
    notes: tuple[str, ...] = ()


class ShippedCell(NamedTuple):
    """One route of one device, to be measured.

    Attributes:
        device: see :data:`Shipped`.
        size_bytes: of the enclave and its page cache, or of the buffer object.
        route: the way in which pages come in or move.
    """

    device: Shipped
    size_bytes: int
    route: ShippedRoute

    @property
    def group(self) -> tuple[Shipped, int]:
        """The key of the cells that stand in one table."""
        return self.device, self.size_bytes

    def __str__(self) -> str:
        return f"{TITLES[self.device].format(format_size(self.size_bytes))}: {self.route}"


@dataclass(frozen=True, slots=True)
class ShippedResult(Timed[ShippedCell]):
    """The times and figures of one cell.

    Attributes:
        server_cpu_ns: CPU time of the server in each repetition.
        pages, faults, evicted_bytes, bookkeeping_bytes: of the last repetition, see :class:`Taken`.
    """

    server_cpu_ns: tuple[int, ...] = ()
    pages: int = 0
    faults: int = 0
    evicted_bytes: int = 0
    bookkeeping_bytes: int | None = None

    @property
    def us_per_page(self) -> float | None:
        """Microseconds per page of 4 KiB, in the best repetition."""
        return min(self.values_ns) / 1000 / self.pages if self.statistics else None

    @property
    def mb_per_second(self) -> float | None:
        """Megabytes (10^6) that came in or moved in a second, in the best repetition."""
        return self.pages * PAGE_SIZE * 1000 / min(self.values_ns) if self.statistics else None


def shipped_cells(device: Shipped, sizes: Iterable[int]) -> list[ShippedCell]:
    """Return the cells of all routes of a device for each size in bytes."""
    return [ShippedCell(device, size, route) for size in sizes for route in ROUTES[device]]


def times_faster(results: Iterable[ShippedResult]) -> dict[ShippedCell, float]:
    """Compute how many times faster, page for page, each cell was than its route by single faults, if that is measured."""
    found = {result.cell: result.us_per_page for result in results}
    ratios = {}
    for cell, value in found.items():
        baseline = BASELINES.get(cell.route)
        single = None if baseline is None else found.get(cell._replace(route=baseline))
        if value and single:
            ratios[cell] = single / value
    return ratios
