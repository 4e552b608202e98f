"""Entries in the page tables of clients: made for READY pages only, and under the lock."""

from __future__ import annotations

import re
import time
from fcntl import ioctl
from typing import TYPE_CHECKING

from prefault._kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_RUN_ARGUMENT
from prefault.device.page_runs import subtract, with_gaps
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution

if TYPE_CHECKING:
    from prefault.device.pages.fills import Fill
    from prefault.device.pages.huge_pages import HugePages
    from prefault.device.pages.served_areas import ServedArea, ServerState


_RUN = re.compile(b"\\x00+|\\x01+")
_pack_into = UFFDIO_RUN_ARGUMENT.pack_into


class PageTables:
    """Maps and poisons pages in areas.

    Attributes:
        huge: maker of huge entries.
    """

    def __init__(self, state: ServerState, huge: HugePages) -> None:
        self._state = state
        self.huge = huge
        self._frames = state.frames
        self._size = state.page_size
        self._evicts = state.device.evicts
        self._argument = bytearray(UFFDIO_RUN_ARGUMENT.size)

    def map(self, area: ServedArea, pages: range, *, write: bool = False) -> fault_resolution.Result:
        """Map READY pages and wake the threads that wait for them; under the lock.

        Pages whose writes are tracked get write-protected entries, unless ``write`` says that the pages are written at once.
        Pages that clients may not write to get such entries in any case: the thread faults again.
        """
        huge = self.huge.map(area, pages)
        if huge:
            result = fault_resolution.Result()
            result.mapped += [(area.address(run.start), area.address(run.stop)) for run in huge]
            for piece in subtract(pages, huge):
                result.add(self._map_small(area, piece, write=write))
            return result
        return self._map_small(area, pages, write=write)

    def _map_small(self, area: ServedArea, pages: range, *, write: bool) -> fault_resolution.Result:
        protections = self._state.protections
        if self._evicts and protections.in_use and area.protectable:
            if write:
                for run in protections.not_read_only_runs(pages):
                    protections.mark_written(run)
            writable = protections.writable_runs(pages)
            result = fault_resolution.Result()
            for piece, allowed in with_gaps(writable, pages):
                tracked = area.tracks and not write
                result.add(self._map(area, piece, protect=tracked or not allowed, write=write and allowed))
            return result
        if write or not area.had_entry:
            return self._map(area, pages, protect=area.tracks and not write, write=write)
        # A page that had an entry, and lost it, may have been written: protected, it would pass for a clean one.
        result = fault_resolution.Result()
        for match in _RUN.finditer(area.had_entry, pages.start - area.first, pages.stop - area.first):
            piece = range(match.start() + area.first, match.end() + area.first)
            result.add(self._map(area, piece, protect=not area.had_entry[match.start()], write=False))
        return result

    def _map(self, area: ServedArea, pages: range, *, protect: bool, write: bool) -> fault_resolution.Result:
        size = self._frames.page_size
        if write:
            area.mark_dirty(pages)
        if protect:
            self.huge.arm(area, area.address(pages.start), len(pages) * size)
        result = fault_resolution.map_run(area.fd, area.address(pages.start), len(pages) * size, self._frames.unit, protect)
        if result.present and area.tracks and write:
            fault_resolution.unprotect(area.fd, area.address(pages.start), len(pages) * size)
        if result.holes and self._resolve_holes(area, result.holes):
            result.unreachable = True
        if result.failed:  # no memory for page tables, or the frame's own memory is broken: retrying would not end
            fault_resolution.poison_run(area.fd, area.address(pages.start), len(pages) * size, self._frames.unit)
        if result.gone:
            self._state.schedule_removal(area.client)
        if area.tracks:
            for mapped in [self.pages_of(area, span) for span in result.mapped]:
                area.mark_entries(mapped)
                if not protect:
                    area.mark_dirty(mapped)
        if area.poisoned and result.mapped:
            area.poisoned.difference_update(page for span in result.mapped for page in self.pages_of(area, span))
        return result

    def map_one(self, area: ServedArea, page: int, write: bool) -> None:
        """Map one READY page, for which a thread waits, in as few steps as possible; under the lock."""
        if not area.tracks and not area.poisoned and not (self._evicts and self._state.protections.in_use):
            try:
                _pack_into(self._argument, 0, area.base + page * self._size, self._size, 0, 0)
                ioctl(area.fd, UFFDIO_CONTINUE, self._argument, True)
            except OSError:
                pass  # map() handles the error
            else:
                return
        self.map(area, range(page, page + 1), write=write)

    def pages_of(self, area: ServedArea, span: tuple[int, int]) -> range:
        """Return the pages of an area at these addresses."""
        size = self._frames.page_size
        return range((span[0] - area.base) // size, -(-(span[1] - area.base) // size))

    def _resolve_holes(self, area: ServedArea, holes: list[int]) -> bool:
        """Answer for addresses at which the kernel finds no frame.

        Frames that were punched, by any process that has the memfd, become MISSING and are asked for again. Foreign memory
        that the client mapped there is poisoned.

        Returns:
            Whether some of the memory is foreign.
        """
        size, foreign = self._frames.page_size, False
        by_page = {(address - area.base) // size: address for address in holes}
        for page, hole in by_page.items():
            if self._frames.has(hole - area.base):
                fault_resolution.poison_run(area.fd, area.address(page), size, self._frames.unit)
                foreign = True
                continue
            if self._frames.states[page] == DevicePageState.READY:
                self._state.pool.punch(range(page, page + 1))
            fault_resolution.wake(area.fd, area.address(page), size)
        return foreign

    def wake(self, area: ServedArea, page: int) -> None:
        """Wake the threads that wait for a page: they fault again."""
        if not area.alive:
            return
        fault_resolution.wake(area.fd, area.address(page), self._frames.page_size)

    def poison(self, area: ServedArea, page: int) -> None:
        """Poison a page in one area, so that touching it is SIGBUS, and wake the threads that wait; under the lock."""
        result = fault_resolution.poison_run(area.fd, area.address(page), self._frames.page_size, self._frames.unit)
        area.mark_poisoned(page)
        if result.gone:
            self._state.schedule_removal(area.client)

    def answer_parked(self, pages: range) -> None:
        """Map READY pages for the threads that wait for them since the driver could not supply them; under the lock."""
        for area, page, write, read_ns in self._state.parked.take(pages):
            if area.alive:
                self.map_one(area, page, write)
                area.counters.record_latency(time.monotonic_ns() - read_ns)

    def answer_waiting(self, fill: Fill, mapped: bool) -> tuple[ServedArea, int, bool, int] | None:
        """Answer the faults that waited for a fill: map its pages, or poison the one page that was asked for alone.

        Args:
            fill: a fill whose pages' states are set.
            mapped: the area that asked has its entries already.

        Returns:
            The first fault that could not be answered, if any; later ones were woken, to fault again.
        """
        if self._state.parked.by_page:
            self.answer_parked(range(fill.pages.start, fill.done))
        left = None
        for waiting in fill.waiting:
            area, page, write, read_ns = waiting
            if not area.alive:
                continue
            if page < fill.done:
                if not (mapped and area is fill.area):
                    self.map_one(area, page, write)
                elif write and area.protectable:
                    # Its entry may be write-protected: the write is a fault of its own.
                    self.wake(area, page)
            elif fill.single:
                self.poison(area, page)
            elif left is None:
                left = waiting
                continue
            else:
                fault_resolution.wake(area.fd, area.address(page), self._frames.page_size)
                continue
            area.counters.record_latency(time.monotonic_ns() - read_ns)
        return left
