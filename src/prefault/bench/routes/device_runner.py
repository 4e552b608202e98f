"""Run all routes, one device after the other; every cell ends in exactly one result, whatever happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import TypeAlias

from prefault.bench.kinds import HUGE_PAGE_BYTES
from prefault.bench.obstacles import memory_obstacle
from prefault.bench.places import hugetlb_pool
from prefault.bench.results import Status
from prefault.bench.routes import shipped_runner
from prefault.bench.routes.device_results import DeviceRun, RouteCell, RouteResult
from prefault.bench.routes.device_routes import (
    Bed,
    RouteRefusedError,
    RouteRepetition,
    WrongError,
    repetition,
)
from prefault.bench.routes.shipped_results import ShippedCell, ShippedResult
from prefault.bench.runner import NOT_REACHED, follow
from prefault.bench.stopping import StoppedError, StopRequest
from prefault.device.client.fault_descriptor import USER_MODE_ONLY_NOTE

Event: TypeAlias = RouteCell | RouteResult | ShippedCell | ShippedResult
"""A cell that begins, or the result of one that ended."""


def run(
    cells: Sequence[RouteCell], *, repeats: int, colocate: bool, stopping: Callable[[], bool]
) -> Generator[RouteCell | RouteResult, None, None]:
    """Measure the cells and yield an event at the beginning and the end of each.

    Cells in 2 MiB pages come last: the hugetlb pool is grown for them where that is allowed, and gets its old size back
    afterwards. Close the generator, or exhaust it.
    """
    session = _RouteSession(repeats, colocate, stopping)
    huge = [cell for cell in cells if cell.page_size == HUGE_PAGE_BYTES]
    yield from session.run([cell for cell in cells if cell.page_size != HUGE_PAGE_BYTES], None)
    if not huge:
        return
    with ExitStack() as stack:
        refusal = None
        if not stopping():
            pages = max(cell.pages for cell in huge)
            pool = stack.enter_context(hugetlb_pool(pages))
            if pool.available_pages < pages:
                refusal = pool.refusal
        yield from session.run(huge, refusal)


def measure_all(
    cells: Sequence[RouteCell | ShippedCell], *, repeats: int, colocate: bool, stop: StopRequest,
    show: Callable[[Event], None],
) -> DeviceRun:  # fmt: skip
    """Measure the cells and return the run with their results, in the order of ``cells``. ``show`` takes each event."""

    def stopping() -> bool:
        return stop.requested

    def events() -> Generator[Event, None, None]:
        routes = [cell for cell in cells if isinstance(cell, RouteCell)]
        yield from run(routes, repeats=repeats, colocate=colocate, stopping=stopping)
        shipped = [cell for cell in cells if isinstance(cell, ShippedCell)]
        yield from shipped_runner.run(shipped, repeats=repeats, stopping=stopping)

    fields = follow(cells, events(), stop, show)
    notes = [result.note or "" for result in fields["results"] if result.values_ns]
    user_mode_only = any(USER_MODE_ONLY_NOTE in note for note in notes) if notes else None
    return DeviceRun(**fields, repeats=repeats, colocate=colocate, user_mode_only=user_mode_only)


class _RouteSession:
    def __init__(self, repeats: int, colocate: bool, stopping: Callable[[], bool]) -> None:
        self._repeats = repeats
        self._colocate = colocate
        self._stopping = stopping

    def run(self, cells: Sequence[RouteCell], no_pool: str | None) -> Iterator[RouteCell | RouteResult]:
        """Measure the cells. ``no_pool`` says why the hugetlb pool is too small for 2 MiB pages; None if it is not."""
        for (size, page_size), group in itertools.groupby(cells, key=lambda cell: (cell.size_bytes, cell.page_size)):
            yield from self._group(size, page_size, list(group), no_pool)

    def _group(
        self, size: int, page_size: int, cells: list[RouteCell], no_pool: str | None
    ) -> Iterator[RouteCell | RouteResult]:
        if self._stopping():
            yield from (RouteResult(cell, Status.STOPPED, reason=NOT_REACHED) for cell in cells)
            return
        reason = None if page_size == HUGE_PAGE_BYTES and no_pool is None else memory_obstacle(size)
        if reason is not None:
            yield from (RouteResult(cell, Status.UNAVAILABLE, reason=reason) for cell in cells)
            return
        try:
            bed = Bed(size, page_size, colocate=self._colocate)
        except OSError as error:
            yield from (RouteResult(cell, Status.UNAVAILABLE, reason=_text(error)) for cell in cells)
            return
        with bed:
            note = _note(bed, page_size, no_pool)
            for cell in cells:
                yield cell
                yield self._cell(bed, cell, note)

    def _cell(self, bed: Bed, cell: RouteCell, note: str | None) -> RouteResult:
        done: list[RouteRepetition] = []
        status, reason = Status.MEASURED, None
        try:
            for _ in range(self._repeats):
                if self._stopping():
                    raise StoppedError
                done.append(repetition(bed, cell, self._stopping))
        except StoppedError:
            status, reason = Status.STOPPED, f"stopped after {len(done)} of {self._repeats} repetitions"
        except RouteRefusedError as error:
            status, reason = Status.UNAVAILABLE, str(error)
        except WrongError as error:
            status, reason = Status.FAILED, str(error)
        except OSError as error:
            status, reason = Status.FAILED, _text(error)
        return RouteResult(
            cell,
            status,
            tuple(one.total_ns for one in done),
            reason,
            note,
            tuple(one.map_ns for one in done),
            done[-1].counts if done else None,
        )


def _note(bed: Bed, page_size: int, no_pool: str | None) -> str | None:
    notes = list(bed.notes)
    if page_size == HUGE_PAGE_BYTES:
        notes.append("in hugetlb pages" if no_pool is None else f"not in hugetlb pages ({no_pool})")
    return "; ".join(notes) or None


def _text(error: OSError) -> str:
    return error.strerror or str(error)
