"""Waiting for the next fault: awake for a moment where it will come soon, asleep else; and on which CPU."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeAlias

_SPIN_NS = 100_000
"""How long to stay awake after a fault."""
_SOON_NS = 250_000
"""Faults that are no further apart than this come in a row: a sleeping process takes 50 to 200 us to be woken."""
_EVENTS = 64

Events: TypeAlias = list[tuple[int, int]]
"""Of an epoll: descriptors, and what can be done with them."""


class FaultPolling:
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

    def wait(
        self, poll: Callable[[float, int], Events], expected: Events, answer: Callable[[], None], calm: Callable[[], bool]
    ) -> Events:
        """The next events, if they come soon.

        Args:
            poll: of the epoll.
            expected: the most likely events.
            answer: deals with these right here.
            calm: whether to go on waiting after that.
        """
        until = self._last + _SPIN_NS
        while True:
            events = poll(0, _EVENTS)
            if events == expected:
                answer()
                self._last = time.monotonic_ns()
                if not calm():
                    return []
                until = self._last + _SPIN_NS
            elif events or time.monotonic_ns() > until:
                return events

    def colocate(self, area: int, cpu: int) -> None:
        """For an area run on that CPU, if we may; the last one that asks wins."""
        if cpu in self._home:
            self._places.pop(area, None)
            self._places[area] = cpu
            _run_on({cpu})

    def separate(self, area: int) -> None:
        """The area is no more."""
        if self._places.pop(area, None) is not None:
            _run_on({list(self._places.values())[-1]} if self._places else self._home)


def _run_on(cpus: set[int]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a cpuset took all of these CPUs away
            raise
