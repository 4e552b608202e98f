"""Signals that the caller of the tests ignores, handled for the tests.

A shell starts ``command &`` with SIGINT ignored, nohup(1) starts its command with SIGHUP ignored, and many CI runners do
both. Processes inherit that. Python then installs no handler that raises KeyboardInterrupt, and a test that sends the signal
waits for an effect that never comes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _survive(number: int, frame: FrameType | None) -> None:
    """Do nothing, as the caller of the tests asked."""


# A signal with a handler is at its default again after exec: the programs that tests start have neither of these.
_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: _survive}


@contextmanager
def not_ignored() -> Iterator[None]:
    """Handle SIGINT (by KeyboardInterrupt) and SIGHUP (by nothing) where they are ignored; ignore them again at the end."""
    ignored = [number for number in _HANDLERS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, _HANDLERS[number])
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
