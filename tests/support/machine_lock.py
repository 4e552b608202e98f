"""A lock between test processes: a test that changes a setting of the whole machine runs while no other test does."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MachineLock:
    """A lock that all test processes of this user share, held by many ordinary tests or by one that is alone."""

    def __init__(self, directory: Path) -> None:
        stem = f"{directory}/prefault-tests-{os.geteuid()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._turnstile = os.open(f"{stem}-turnstile.lock", flags, 0o600)
        self._running = os.open(f"{stem}-running.lock", flags, 0o600)

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        """Hold the lock inside the block, ``alone`` or together with others."""
        # Each test passes the turnstile: while one waits there to be alone, no further test starts.
        fcntl.flock(self._turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._running, fcntl.LOCK_UN)  # also for forks of the test that still run

    def close(self) -> None:
        """Close the files of the lock."""
        os.close(self._turnstile)
        os.close(self._running)
