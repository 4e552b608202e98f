"""Detection of a server that makes no progress: by its heartbeat, and by its state as a process."""

from __future__ import annotations

import time

from prefault.device import handover
from prefault.device.registry import Registry

_LATE = 0.25
"""Share of ``timeout_s``. A check later than that means that no process ran, and the driver's time begins anew."""


class HangDetector:
    """Checks, once in ``timeout_s`` at least, whether a call of the driver exceeds its time, or the server stays stopped.

    Attributes:
        next_check: time of the next check (CLOCK_MONOTONIC, seconds).
    """

    def __init__(self, registry: Registry) -> None:
        self._timeout_s = registry.facts.timeout_s
        self._heartbeat = registry.frames.heartbeat
        self._stopped_until: float | None = None
        """Time at which a server that was found stopped counts as hung, unless it is continued."""
        self.next_check = 0.0

    def restart(self) -> None:
        """Give the server its full time from now on."""
        self._stopped_until = None
        self.next_check = time.monotonic() + self._timeout_s

    def check(self, pidfd: int) -> str:
        """Return the reason why the server counts as hung, if a check is due and finds one; else an empty string."""
        now = time.monotonic()
        if now < self.next_check:
            return ""
        # This process was stopped, and so was the server: Ctrl-Z, or a frozen container.
        if now > self.next_check + _LATE * self._timeout_s:
            self.restart()
            return ""
        # A call that begins after this check has its time until the next one at least.
        limit_ns = int(self._timeout_s * 1e9)
        oldest = min((began for began in self._heartbeat if began), default=0)
        left_ns = oldest + limit_ns - time.monotonic_ns() if oldest else limit_ns
        self.next_check = now + (left_ns if left_ns > 0 else limit_ns) / 1e9
        if left_ns <= 0:
            return "did not come back from a call within"
        if not handover.is_stopped(pidfd):
            self._stopped_until = None
        elif self._stopped_until is None:
            # Stopped by a thread of the driver, for example. Where no call is under way nothing else shows it.
            self._stopped_until = self.next_check
        elif now >= self._stopped_until:
            return "was stopped by a signal for"
        return ""
