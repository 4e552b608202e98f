"""The callback at the high-water mark, in a thread that holds no lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from prefault.pool.pool_statistics import PoolStatistics

OnHighWater: TypeAlias = Callable[[PoolStatistics], object]
"""Called with the pool's statistics, in a thread of its own, one call at a time."""


class HighWaterNotifier:
    """Runs the callback, one event after the other, in a thread that lives as long as there are events.

    The thread that populates is inside the access guard of its memory, where a callback that discards or populates would
    deadlock. Exceptions of the callback go to ``threading.excepthook``; the next event is delivered nevertheless.
    """

    def __init__(self, callback: OnHighWater) -> None:
        self._callback = callback
        # Reentrant: a signal handler may populate in this very thread.
        self._lock = threading.RLock()
        self._events: deque[PoolStatistics] = deque(maxlen=16)
        self._running = False

    def notify(self, statistics: PoolStatistics) -> None:
        """Queue an event, and return; of a burst the last 16 are delivered."""
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
            except BaseException as error:  # noqa: BLE001  of the caller's code, reported as a thread's errors are
                report_error(error)


def report_error(error: BaseException) -> None:
    """Report an error to ``threading.excepthook`` in a thread that goes on."""
    threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread())))
