"""Waiting for the next fault: awake for a moment where it will come soon, asleep else; and on which CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_SPIN_NS = 100_000
"""How long to stay awake after a fault."""
_SOON_NS = 250_000
"""Faults that are no further apart than this come in a row: a sleeping process takes 50 to 200 us to be woken."""
_EVENTS = 64


class Spin:
    """Stays awake only while faults come one soon after the other, so that an idle server uses no CPU.

    On the CPU that the faulting thread runs on it would keep that from running: then it sleeps at once, which wakes it.
    """

    def __init__(self) -> None:
        self._last = 0
        self._home = os.sched_getaffinity(0)
        self._alone = len(self._home) < 2
        self._places: dict[int, int] = {}

    def wanted(self, arrived_ns: int) -> bool:
        """After faults that arrived then were answered: whether to wait awake for the next."""
        soon = arrived_ns - self._last < _SOON_NS
        self._last = time.monotonic_ns()
        return soon and not self._alone and not self._places

    def wait(self, poll: Callable[[float, int], list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """The next events, if they come soon."""
        until = self._last + _SPIN_NS
        while not (events := poll(0, _EVENTS)):
            if time.monotonic_ns() > until:
                break
        return events

    def colocate(self, area: int, cpu: int) -> None:
        """For an area run on that CPU, if we may; the last one that asks wins."""
        if cpu in self._home:
            self._places.pop(area, None)
            self._places[area] = cpu
            os.sched_setaffinity(0, {cpu})

    def separate(self, area: int) -> None:
        """The area is no more."""
        if self._places.pop(area, None) is not None:
            os.sched_setaffinity(0, {list(self._places.values())[-1]} if self._places else self._home)
