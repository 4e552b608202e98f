"""Progress functions that hold a call, so that tests can look at it under way."""

from __future__ import annotations

import threading

LIMIT_S = 60


class Gate:
    """A progress function that holds the call at its first report, until it is opened."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

    def __call__(self, done: int, total: int) -> None:
        self.reached.set()
        assert self._open.wait(LIMIT_S)

    def open(self) -> None:
        self._open.set()
