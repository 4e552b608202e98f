"""Calling back when the high-water mark is reached, in a thread that holds no lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from prefault.pool.pool_statistics import PoolStatistics

OnHighWater: TypeAlias = Callable[[PoolStatistics], object]
"""Called with the pool's statistics, in a thread of its own, one call at a time."""


class Notifier:
    """Runs the callback, one event after the other, in a thread that lives as long as there are events.

    Not in the thread that populates: that one is inside the gate of its memory, where a callback that discards or populates
    would wait for itself. What the callback raises goes to ``threading.excepthook``, like anything that a thread raises, and
    the next event is delivered all the same.
    """

    def __init__(self, callback: OnHighWater) -> None:
        self._callback = callback
        # Reentrant: a signal handler may populate in this very thread.
        self._lock = threading.RLock()
        self._events: deque[PoolStatistics] = deque(maxlen=16)
        self._running = False

    def notify(self, statistics: PoolStatistics) -> None:
        """Have the callback called soon."""
        with self._lock:
            self._events.append(statistics)
            if self._running:
                return
            self._running = True
        try:
            threading.Thread(target=self._run, name="prefault-high-water", daemon=True).start()
        except RuntimeError:  # a limit of threads, or the interpreter is going down: the next crossing tries again
            self._running = False

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._events:
                    self._running = False
                    return
                event = self._events.popleft()
            try:
                self._callback(event)
            except BaseException as error:  # noqa: BLE001  it is the user's, and goes where a thread's errors go
                report(error)


def report(error: BaseException) -> None:
    """Hand an error of a thread that goes on to ``threading.excepthook``."""
    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread())))
