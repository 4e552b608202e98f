"""A limit of bytes a second, for work beside others that want the disk or the memory's bandwidth as well."""

from __future__ import annotations

import re
import threading
import time

from prefault.sizes import KIB, MIB, PAGE_SIZE, Size, format_size, parse_size

BURST_SECONDS = 0.05
"""Seconds' worth of bytes that may follow each other at once, after a pause too; about the longest single wait."""

SMALLEST_RATE = 64 * KIB
"""Smallest limit in bytes a second, with which a GiB takes 4.5 hours. A smaller number is one whose unit was forgotten."""

_PER_SECOND = r"\s*/\s*s(ec(ond)?)?\s*$"


class RateLimit:
    """Limit of bytes a second that one call or several share, from any number of threads.

    Each :meth:`wait` books its bytes, and returns when those that were booked before it are due. A pause saves up no more
    than a twentieth of a second's bytes.

    Args:
        bytes_per_second: a size, at least 64 KiB, with or without ``"/s"``: ``"2 GiB/s"``, ``500_000_000``; None: no limit.

    Attributes:
        bytes_per_second: the limit; None where there is none.

    Raises:
        TypeError, ValueError: not a size, or below 64 KiB a second.
    """

    def __init__(self, bytes_per_second: Size | None) -> None:
        if isinstance(bytes_per_second, str):
            bytes_per_second = re.sub(_PER_SECOND, "", bytes_per_second, flags=re.IGNORECASE)
        self.bytes_per_second = None if bytes_per_second is None else parse_size(bytes_per_second)
        rate = self.bytes_per_second
        if rate is not None and rate < SMALLEST_RATE:
            raise ValueError(
                f"a rate of {format_size(rate)} a second is below the smallest, {format_size(SMALLEST_RATE)} a second:"
                " give a unit, such as '500 MiB/s', or no rate for no limit"
            )
        self._lock = threading.Lock()
        self._due = 0.0

    @property
    def chunk_bytes(self) -> int:
        """Bytes to do between two waits, at least a page: more in one go would exceed the burst."""
        if self.bytes_per_second is None:
            return 64 * MIB
        return max(PAGE_SIZE, int(self.bytes_per_second * BURST_SECONDS) // PAGE_SIZE * PAGE_SIZE)

    def wait(self, count: int, stopped: threading.Event | None = None) -> None:
        """Wait until ``count`` more bytes may be done. Sleeps; signals are handled meanwhile, and what they raise ends it.

        Args:
            count: bytes about to be done.
            stopped: ends the wait at once when it is set.
        """
        seconds = self.book(count)
        if seconds <= 0:
            return
        if stopped is None:
            time.sleep(seconds)
        else:
            stopped.wait(seconds)

    def book(self, count: int) -> float:
        """Book ``count`` bytes, and return the seconds until they are due: 0 or less for at once."""
        if self.bytes_per_second is None or count <= 0:
            return 0.0
        with self._lock:
            now = time.monotonic()
            begin = max(self._due, now - BURST_SECONDS)
            self._due = begin + count / self.bytes_per_second
        return begin - now


def rate_limit(rate: RateLimit | Size | None) -> RateLimit | None:
    """Return the limit that an argument ``rate`` asks for: as it is, made from a size, or None."""
    return rate if rate is None or isinstance(rate, RateLimit) else RateLimit(rate)
