"""Polling for the next fault while faults come in quick succession, and the CPU on which the server runs."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeAlias

_SPIN_NS = 100_000
"""Nanoseconds to poll after a fault."""
_SOON_NS = 250_000
"""Faults closer together than this count as a sequence: waking a sleeping process takes 50 to 200 us."""
_EVENTS = 64

Events: TypeAlias = list[tuple[int, int]]
"""Results of an epoll: descriptors and event masks."""


class FaultPolling:
    """Decides when to poll for the next fault instead of sleeping, so that an idle server uses no CPU.

    On the CPU of the faulting thread polling would keep that thread from running: a colocated server sleeps at once.
    """

    def __init__(self) -> None:
        self._last = 0
        self._home = os.sched_getaffinity(0)
        self._alone = len(self._home) < 2
        self._places: dict[int, int] = {}

    def wanted(self, arrived_ns: int) -> bool:
        """Return whether to poll for the next fault, after the answer to those that arrived at this time (monotonic, ns)."""
        soon = arrived_ns - self._last < _SOON_NS
        self._last = time.monotonic_ns()
        return soon and not self._alone and not self._places

    def wait(
        self, poll: Callable[[float, int], Events], expected: Events, answer: Callable[[], None], calm: Callable[[], bool]
    ) -> Events:
        """Poll for a moment, and return the next events, if they come.

        Args:
            poll: of the epoll.
            expected: the most likely events.
            answer: answers these right here.
            calm: whether to go on polling after that.
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
        """Run on that CPU for an area, if this process may; the last area that asks wins."""
        if cpu in self._home:
            self._places.pop(area, None)
            self._places[area] = cpu
            _run_on({cpu})

    def separate(self, area: int) -> None:
        """Run on the CPU of another area, or on all, after an area ended."""
        if self._places.pop(area, None) is not None:
            _run_on({list(self._places.values())[-1]} if self._places else self._home)


def _run_on(cpus: set[int]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a cpuset took all of these CPUs away
            raise
