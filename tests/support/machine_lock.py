"""A lock between test processes: a test that changes a setting of the whole machine runs while no other test does."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

_FIXTURES = {"thp_setting", "hugetlb_pool"}


def runs_alone(item: pytest.Item) -> bool:
    """Return whether a test changes settings of the whole machine: by a fixture of conftest.py, or marked ``alone``."""
    return item.get_closest_marker("alone") is not None or not _FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def put_first(items: list[pytest.Item]) -> None:
    """Put the tests that run alone first: one after the other, under one lock, and not each after a wait for all others."""
    items.sort(key=lambda item: not runs_alone(item))


class MachineLock:
    """A lock that all test processes of this user share, held by many ordinary tests or by one that is alone."""

    def __init__(self, directory: Path) -> None:
        stem = f"{directory}/prefault-tests-{os.geteuid()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._turnstile = os.open(f"{stem}-turnstile.lock", flags, 0o600)
        self._running = os.open(f"{stem}-running.lock", flags, 0o600)
        self._alone = False

    def share(self) -> None:
        """Wait until no test is alone, and hold the lock together with others."""
        self._hold(fcntl.LOCK_SH)

    def be_alone(self) -> None:
        """Wait until no other test holds the lock, and hold it alone. What this process held of it is released first.

        A process that holds it alone goes on.
        """
        if not self._alone:
            self._hold(fcntl.LOCK_EX)
            self._alone = True

    def _hold(self, how: int) -> None:
        self.release()  # two tests that both waited to be alone, and held their share meanwhile, would wait for ever
        # Each test passes the turnstile: while one waits there to be alone, no further test starts.
        fcntl.flock(self._turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._running, how)
        finally:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)

    def release(self) -> None:
        """Release the lock, also in forks of this process."""
        self._alone = False
        fcntl.flock(self._running, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the files of the lock."""
        os.close(self._turnstile)
        os.close(self._running)
