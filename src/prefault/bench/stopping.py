"""Ctrl-C as a descriptor to wait for.

An exception out of a signal handler can come between any two steps, also those that put the machine back as it was. The
benchmark waits for its worker nearly all the time, so it waits for the signal at the same place.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """While entered (in the main thread), SIGINT, SIGTERM and SIGHUP are remembered instead of acted upon.

    Attributes:
        signal: the first that came; None so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish is kept
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read_fd)
        os.close(self._write_fd)

    @property
    def requested(self) -> bool:
        """Whether one came."""
        return self.signal is not None

    def fileno(self) -> int:
        """Readable from the moment on that one came."""
        return self._read_fd

    def request(self, number: signal.Signals = signal.SIGINT) -> None:
        """As if the signal had come."""
        if self.signal is None:
            self.signal = number
            os.write(self._write_fd, b"\0")

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.request(signal.Signals(number))
