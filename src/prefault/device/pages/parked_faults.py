"""Faults on pages that the driver could not supply yet (``RETRY``), or brings in by itself."""

from __future__ import annotations

import time
from typing import Generic, NamedTuple, TypeVar

Area = TypeVar("Area")


class ParkedFault(NamedTuple, Generic[Area]):
    """A fault that waits.

    Attributes:
        area: whose client touched the page.
        page: of the device.
        write: the touch was a write.
        read_ns: when the fault was read (CLOCK_MONOTONIC, ns).
    """

    area: Area
    page: int
    write: bool
    read_ns: int


class ParkedFaults(Generic[Area]):
    """Faults that wait for ``DevicePool.supply`` or ``DevicePool.retry``; under the server's lock.

    Attributes:
        by_page: the faults, by the page that was touched.
        rounds: incremented by each supply and retry: populates that wait for one compare it.
    """

    def __init__(self) -> None:
        self.by_page: dict[int, list[ParkedFault[Area]]] = {}
        self.rounds = 0

    def park(self, area: Area, page: int, write: bool, read_ns: int) -> None:
        """Keep a fault."""
        self.by_page.setdefault(page, []).append(ParkedFault(area, page, write, read_ns))

    def take(self, pages: range) -> list[ParkedFault[Area]]:
        """Return the faults on these pages, and forget them."""
        if not self.by_page:
            return []
        found = sorted(page for page in self.by_page if page in pages)
        return [fault for page in found for fault in self.by_page.pop(page)]

    def drop(self, area: Area) -> None:
        """Forget the faults in a released area."""
        for page, faults in list(self.by_page.items()):
            kept = [fault for fault in faults if fault.area is not area]
            if kept:
                self.by_page[page] = kept
            else:
                del self.by_page[page]

    def oldest_ns(self) -> int | None:
        """Return when the oldest fault was read; None without one."""
        return min((fault.read_ns for faults in self.by_page.values() for fault in faults), default=None)

    def take_expired(self, timeout_s: float) -> list[ParkedFault[Area]]:
        """Return the faults on pages that somebody has waited for longer than ``timeout_s``, and forget them."""
        before = time.monotonic_ns() - int(timeout_s * 1e9)
        late = [page for page, faults in self.by_page.items() if any(fault.read_ns < before for fault in faults)]
        return [fault for page in late for fault in self.by_page.pop(page)]
