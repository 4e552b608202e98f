"""Stores to pages that clients may not write to: the driver allows or refuses them (page_mkwrite)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING

from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution

if TYPE_CHECKING:
    from prefault.device.pages.fills import FillFailure
    from prefault.device.pages.isolation import Isolation
    from prefault.device.pages.page_tables import PageTables
    from prefault.device.pages.served_areas import ServedArea, ServerState
    from prefault.device.server.workers import Jobs


_log = logging.getLogger("prefault.device")


class WriteRequests:
    """Calls of the driver's ``mkwrite`` under way; used by the loop only."""

    def __init__(self, state: ServerState, page_tables: PageTables, jobs: Jobs, isolation: Isolation) -> None:
        self._state = state
        self._page_tables = page_tables
        self._jobs = jobs
        self._isolation = isolation
        self._waiting: dict[int, list[tuple[ServedArea, int]]] = {}
        """Areas of the threads that wait for each page, and when their faults were read (ns)."""
        self._then: dict[int, list[Callable[[FillFailure | None], None]]] = {}
        """Functions of the populates that wait for each page."""
        self._allowing = state.protections.allowing

    def ask(self, area: ServedArea, page: int, now: int) -> None:
        """Ask the driver for a thread that stored to a page, unless it is being asked already."""
        asked = page in self._waiting
        self._waiting.setdefault(page, []).append((area, now))
        if not asked:
            self._ask(area, page)

    def ask_first(self, area: ServedArea, page: int, then: Callable[[FillFailure | None], None]) -> None:
        """Ask the driver before anybody stores to a page, for a populate; ``then`` gets its failure in the loop."""
        asked = page in self._waiting
        self._waiting.setdefault(page, [])
        self._then.setdefault(page, []).append(then)
        if not asked:
            self._ask(area, page)

    def _ask(self, area: ServedArea, page: int) -> None:
        self._allowing.add(page)
        self._jobs.call(area, "mkwrite", page, then=lambda failure: self._answered(page, failure))

    def _answered(self, page: int, failure: FillFailure | None) -> None:
        waiting = self._waiting.pop(page)
        pages = range(page, page + 1)
        with self._state.lock:
            alive = [(area, now) for area, now in waiting if area.alive]
            protected = page not in self._allowing  # meanwhile: the driver is asked again
            self._allowing.discard(page)
            if failure is None and not protected:
                self._state.protections.set(pages, "write")
                if self._state.frames.states[page] == DevicePageState.READY:
                    self._isolation.unprotect(pages)
            elif failure is not None and alive and self._state.frames.states[page] == DevicePageState.READY:
                self._refuse([area for area, _ in alive], pages)
            for area, now in alive:
                if failure is not None:
                    area.counters.errors += 1
                fault_resolution.wake(area.fd, area.address(page), self._state.page_size)  # to fault again
                area.counters.record_latency(monotonic_ns() - now)
        for then in self._then.pop(page, ()):
            then(failure)

    def _refuse(self, areas: list[ServedArea], pages: range) -> None:
        """Poison a page in the areas of those who wrote to it; under the lock.

        UFFDIO_POISON makes entries where there is none, so the page is shot down for that moment.
        """
        try:
            isolated = self._isolation.isolate(pages)
        except OSError as error:  # a client is changing its mappings: the store faults again, and the driver is asked again
            _log.warning("device %s: a store to page %d could not be refused yet: %s", self._state.name, pages.start, error)
            return
        for run in isolated:
            try:
                self._isolation.move_aside(run)
            except OSError as error:
                self._isolation.lose(run, f"there was no memory to refuse a write to it: {error.strerror}")
                return
            for area in areas:
                # Protection of an absent entry counts as one.
                fault_resolution.unprotect(area.fd, area.address(run.start), self._state.page_size)
                self._page_tables.poison(area, run.start)
            self._isolation.restore(run)
