"""Ctrl-C as a descriptor to wait for.

A signal handler can raise between any two steps, also between those that put the machine back as it was. The benchmark waits
for its worker nearly all the time, so it waits for the signal at the same place.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(Exception):
    """The user asked for a stop in the middle of a measurement."""


class StopRequest:
    """Remember SIGINT, SIGTERM and SIGHUP instead of acting upon them, while entered in the main thread.

    A signal that is ignored already stays ignored, as nohup(1) and a shell's ``command &`` ask for.

    Attributes:
        signal: the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
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
        """True once a signal came."""
        return self.signal is not None

    def fileno(self) -> int:
        """Return a descriptor that is readable as soon as a signal came."""
        return self._read_fd

    def request(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ask for a stop as if signal ``number`` had come."""
        if self.signal is None:
            self.signal = number
            os.write(self._write_fd, b"\0")

    def ignore_more(self) -> None:
        """Ignore these signals from now on, also after the ``with``: the process keeps its results and is about to end."""
        for number in self._before:
            self._before[number] = signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.request(signal.Signals(number))
