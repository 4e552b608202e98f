"""Discards that clients ask for: no page is supplied or saved while its driver forgets it, or refuses to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefault.device.page_runs import split_at
from prefault.device.page_states import UNSETTLED
from prefault.device.pages import fault_resolution

if TYPE_CHECKING:
    from prefault.device.pages.fills import FillFailure
    from prefault.device.pages.page_tables import PageTables
    from prefault.device.pages.served_areas import ServedArea, ServerState
    from prefault.device.server.workers import Jobs


@dataclass(slots=True, eq=False)
class _Discard:
    """A discard under way.

    Attributes:
        then: called in the loop at the end, with the driver's failure and the number of pages that were given back.
        seen: ``ServerState.changes`` at the last check for pages that are still filled, evicted or shot down.
        called: the driver's ``discard`` has been called.
        runs: the pages that were supplied; EVICTING during the call, and punched after it unless it raised.
        waiting: faults on its pages, as area and page; they are raised again when they are woken.
    """

    area: ServedArea
    pages: range
    then: Callable[[FillFailure | None, int], None]
    seen: int = -1
    called: bool = False
    runs: list[range] = field(default_factory=list)
    waiting: list[tuple[ServedArea, int]] = field(default_factory=list)


class Discards:
    """All discards under way; used by the loop only, which waits for none of them.

    A call of the driver that fills or saves a page cannot be called off. One that began before the discard may have read
    the old content, or still write it, so that the driver is asked to discard after it. No new one begins until the driver
    has forgotten the pages: faults on them wait, and populates defer them. The frames go afterwards: a driver that raises
    has refused, and the pages are as they were, writes made meanwhile included.

    Attributes:
        active: the discards under way.
    """

    def __init__(self, state: ServerState, page_tables: PageTables, jobs: Jobs) -> None:
        self._state = state
        self._page_tables = page_tables
        self._jobs = jobs
        self.active: list[_Discard] = []

    def start(self, area: ServedArea, pages: range, then: Callable[[FillFailure | None, int], None]) -> None:
        """Discard pages on behalf of an area, and call ``then`` in the loop at the end."""
        discard = _Discard(area, pages, then)
        self.active.append(discard)
        self._advance(discard)

    def step(self) -> None:
        """Advance the discards whose pages may have come to rest by now."""
        for discard in [waits for waits in self.active if not waits.called and waits.seen != self._state.changes]:
            self._advance(discard)

    def drop(self, area: ServedArea, failure: FillFailure) -> None:
        """End the discards of a released area with a failure, unless the driver is called already."""
        for discard in [waits for waits in self.active if not waits.called and waits.area is area]:
            self._finish(discard, failure)

    def defer_fault(self, area: ServedArea, page: int) -> bool:
        """Queue a fault whose page is being discarded, and return True: it is raised again at the end of the discard."""
        for discard in self.active:
            if page in discard.pages:
                discard.waiting.append((area, page))
                return True
        return False

    def split_at(self, page: int, pages: range) -> tuple[bool, range]:
        """Return whether ``page`` is being discarded, and the run of ``pages`` around it that shares the answer."""
        return split_at(page, pages, (discard.pages for discard in self.active))

    def _advance(self, discard: _Discard) -> None:
        state = self._state
        with state.lock:
            discard.seen = state.changes
            if state.held.overlaps(discard.pages) or state.frames.runs(discard.pages, *UNSETTLED):
                return
            discard.runs = state.pool.begin_eviction(discard.pages)
            state.pool.evicting += 1  # room is made soon: a fill that finds none waits
        discard.called = True
        self._jobs.call(discard.area, "discard", discard.pages, then=lambda failure: self._finish(discard, failure))

    def _finish(self, discard: _Discard, failure: FillFailure | None) -> None:
        self.active.remove(discard)
        state = self._state
        with state.lock:
            state.pool.evicting -= discard.called
            if failure is None:
                state.protections.cure(discard.pages)
            for run in discard.runs:
                if failure is None:
                    state.pool.punch(run)
                else:
                    state.pool.make_ready(run)
            for area, start, length in state.areas_over(discard.pages) if discard.runs else ():
                fault_resolution.wake(area.fd, start, length)  # touched these pages meanwhile
            state.changes += 1
        for area, page in discard.waiting:
            if area.alive:
                self._page_tables.wake(area, page)
        discard.then(failure, 0 if failure is not None else sum(map(len, discard.runs)))
