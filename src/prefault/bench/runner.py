"""Run the grid: every cell ends in exactly one result, whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeAlias, TypeVar

from prefault.bench.grid import Cell
from prefault.bench.kinds import Places
from prefault.bench.machine import available_memory_bytes, this_machine
from prefault.bench.obstacles import memory_bytes, obstacle, pool_pages
from prefault.bench.places import MARGIN_BYTES, Hugetlbfs, TemporaryHugetlbPool, hugetlb_pool, hugetlbfs
from prefault.bench.results import AnyCell, BenchRun, CellResult, Status, Timed
from prefault.bench.stopping import StoppedError, StopRequest
from prefault.bench.worker_process import CellFailedError, Worker, WorkerError
from prefault.sizes import GIB

# The time for an answer of a worker: a repetition takes a second per GiB, and ten where the host has to find memory.
_LIMIT_SECONDS = 60.0
_LIMIT_SECONDS_PER_GIB = 60.0

NOT_REACHED = "stopped before its turn"


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """Memory was populated and freed before measuring."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Repeated:
    """One repetition of the cell ended."""

    cell: Cell
    value_ns: int


Event: TypeAlias = WarmedUp | Cell | Repeated | CellResult
"""A step of a run. A cell that begins is an event, and so is the result of each cell of the grid."""

AnyEvent = TypeVar("AnyEvent")


def run(
    cells: Sequence[Cell], *, repeats: int, places: Places, stop: StopRequest | None = None
) -> Generator[Event, None, None]:
    """Measure the cells in worker processes and yield events.

    Cells in huge pages come last, so that the others can use the memory of the pool. Close the generator, or exhaust it: it
    grows the hugetlb pool and restores it. After ``stop`` was requested the remaining cells finish at once, as stopped.
    """
    ordinary = [cell for cell in cells if not pool_pages(cell)]
    huge = [cell for cell in cells if pool_pages(cell)]
    if ordinary:
        session = _GridSession(repeats, places, TemporaryHugetlbPool(0), Hugetlbfs(None), stop)
        yield from session.run(ordinary)
    if huge:
        with ExitStack() as stack:
            pool, mounted = TemporaryHugetlbPool(0), Hugetlbfs(None)
            if stop is None or not stop.requested:
                pool = stack.enter_context(hugetlb_pool(max(map(pool_pages, huge))))
                if any(cell.backing == "hugetlbfs" for cell in huge):
                    mounted = stack.enter_context(hugetlbfs())
            session = _GridSession(repeats, replace(places, hugetlbfs=mounted.directory), pool, mounted, stop)
            yield from session.run(huge)


def measure_all(
    cells: Sequence[Cell], *, quick: bool, repeats: int, places: Places, stop: StopRequest, show: Callable[[Event], None]
) -> BenchRun:
    """Measure the cells and return the run with their results, in the order of ``cells``. ``show`` takes each event."""
    warmed_up_bytes = 0

    def count(event: Event) -> None:
        nonlocal warmed_up_bytes
        if isinstance(event, WarmedUp):
            warmed_up_bytes += event.size_bytes
        show(event)

    events = run(cells, repeats=repeats, places=places, stop=stop)
    return BenchRun(**follow(cells, events, stop, count), quick=quick, repeats=repeats, warmed_up_bytes=warmed_up_bytes)


def follow(
    cells: Sequence[AnyCell], events: Generator[AnyEvent, None, None], stop: StopRequest, show: Callable[[AnyEvent], None]
) -> dict[str, Any]:
    """Exhaust the events of a run and show each; return the fields of the run, all but its options."""
    machine = this_machine()
    started, began = datetime.now().astimezone().isoformat(timespec="seconds"), time.monotonic()
    results = {}
    with closing(events):
        for event in events:
            show(event)
            if isinstance(event, Timed):
                results[event.cell] = event
    return {
        "machine": machine,
        "started": started,
        "seconds": time.monotonic() - began,
        "interrupted": stop.requested,
        "results": tuple(results[cell] for cell in cells),
    }


class _GridSession:
    """Cells that share a pool and a hugetlbfs, run by one worker after another."""

    def __init__(
        self, repeats: int, places: Places, pool: TemporaryHugetlbPool, mounted: Hugetlbfs, stop: StopRequest | None
    ) -> None:
        self._repeats = repeats
        self._places = places
        self._pool = pool
        self._mounted = mounted
        self._stop = stop
        self._worker: Worker | None = None

    def run(self, cells: Sequence[Cell]) -> Iterator[Event]:
        try:
            yield from self._warm_up(cells)
            for cell in cells:
                yield from self._cell(cell)
            if self._worker is not None:
                self._worker.close()
                self._worker = None
        finally:
            if self._worker is not None:  # an exception, or the generator was closed
                self._worker.kill()

    @property
    def _stopping(self) -> bool:
        return self._stop is not None and self._stop.requested

    def _warm_up(self, cells: Sequence[Cell]) -> Iterator[Event]:
        possible = [cell for cell in cells if self._obstacle(cell) is None]
        if not possible or self._stopping:
            return
        hugetlb = bool(pool_pages(possible[0]))
        if hugetlb:
            size_bytes = max(cell.size_bytes for cell in possible)
        else:
            size_bytes = min(max(map(memory_bytes, possible)), available_memory_bytes() - MARGIN_BYTES)
        worker = self._ready_worker()
        try:
            worker.warm_up(size_bytes, _limit_seconds(size_bytes), hugetlb=hugetlb)
        except (WorkerError, StoppedError):
            self._worker = None
        except CellFailedError:
            return  # the cells fail as well, and their results say why
        else:
            yield WarmedUp(size_bytes)

    def _cell(self, cell: Cell) -> Iterator[Event]:
        if self._stopping:
            yield CellResult(cell, Status.STOPPED, reason=NOT_REACHED)
            return
        reason = self._obstacle(cell)
        if reason is not None:
            yield CellResult(cell, Status.UNAVAILABLE, reason=reason)
            return
        yield cell
        values: list[int] = []
        note: str | None = None
        status, reason = Status.MEASURED, None
        try:
            worker = self._ready_worker()
            worker.measure(cell, self._repeats, self._places)
            while (repetition := worker.repetition(_limit_seconds(cell.size_bytes))) is not None:
                values.append(repetition[0])
                note = repetition[1] or note
                yield Repeated(cell, repetition[0])
        except CellFailedError as error:
            status, reason = Status.FAILED, str(error)
        except WorkerError as error:
            self._worker = None
            status, reason = Status.FAILED, str(error)
        except StoppedError:
            self._worker = None
            status, reason = Status.STOPPED, f"stopped after {len(values)} of {self._repeats} repetitions"
        yield CellResult(cell, status, tuple(values), reason, note)

    def _obstacle(self, cell: Cell) -> str | None:
        return obstacle(cell, self._places, self._pool, self._mounted)

    def _ready_worker(self) -> Worker:
        if self._worker is not None and not self._worker.alive:  # killed while it was idle
            self._worker.kill()
            self._worker = None
        if self._worker is None:
            self._worker = Worker(self._stop, self._mounted.fds)
        return self._worker


def _limit_seconds(size_bytes: int) -> float:
    return _LIMIT_SECONDS + _LIMIT_SECONDS_PER_GIB * size_bytes / GIB
