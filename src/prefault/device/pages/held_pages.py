"""Ranges of pages that are held: a touch of a missing page there waits, and the driver is not asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from prefault.device.page_runs import split_at


@dataclass(slots=True, eq=False)
class Hold:
    """A held range.

    Attributes:
        pages: of the device.
        thread: identifier of the thread that holds them.
        waiting: functions that wake the threads which touched its pages: they fault again.
    """

    pages: range
    thread: int
    waiting: list[Callable[[], None]] = field(default_factory=list)


class HeldPages:
    """All held ranges of a device, in the order in which they were held; under the server's lock.

    Attributes:
        active: the held ranges.
    """

    def __init__(self) -> None:
        self.active: list[Hold] = []

    def hold(self, pages: range) -> Hold:
        """Hold pages for the calling thread from now on."""
        held = Hold(pages, threading.get_ident())
        self.active.append(held)
        return held

    def release(self, held: Hold) -> None:
        """End a hold, and wake the threads that wait."""
        self.active.remove(held)
        for wake in held.waiting:
            wake()

    def before(self, held: Hold) -> list[Hold]:
        """Return the holds of overlapping pages that are older than this one."""
        older = self.active[: self.active.index(held)]
        return [other for other in older if other.pages.start < held.pages.stop and held.pages.start < other.pages.stop]

    def holders(self, pages: range) -> set[int]:
        """Return the identifiers of the threads that hold some of these pages."""
        return {held.thread for held in self.active if held.pages.start < pages.stop and pages.start < held.pages.stop}

    def overlaps(self, pages: range) -> bool:
        """Return whether some of these pages are held."""
        return bool(self.holders(pages))

    def defer(self, page: int, wake: Callable[[], None]) -> bool:
        """Return whether a page is held; ``wake`` is called at the end of the hold then."""
        for held in self.active:
            if page in held.pages:
                held.waiting.append(wake)
                return True
        return False

    def split_at(self, page: int, pages: range) -> tuple[bool, range]:
        """Return whether ``page`` is held, and the run of ``pages`` around it that shares the answer."""
        return split_at(page, pages, (held.pages for held in self.active))
