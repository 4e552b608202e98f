"""What a server did for an area, and in which order it was asked."""

from __future__ import annotations

from collections import deque

BUCKETS = 32
LOG_ENTRIES = 1 << 16


class Counters:
    """Plain numbers, added to in the loop's thread only.

    Attributes:
        missing, minor, write_protect: faults by what was asked for: a page that had to be supplied, one that was there, the
            first write to a page.
        populated_pages: mapped by populate.
        supplied_pages: brought in by the driver, for whatever reason.
        errors: that the driver raised.
        latency: faults that took less than ``2**n`` microseconds, and not less than half of it, by ``n``; from reading the
            message to having answered it.
    """

    __slots__ = (
        "errors", "latency", "log", "minor", "missing", "populated_pages", "supplied_pages", "write_protect",
    )  # fmt: skip

    def __init__(self) -> None:
        self.missing = self.minor = self.write_protect = 0
        self.populated_pages = self.supplied_pages = self.errors = 0
        self.latency = [0] * BUCKETS
        self.log: deque[int | tuple[int, int]] = deque(maxlen=LOG_ENTRIES)

    def record_latency(self, took_ns: int) -> None:
        """A fault took so long."""
        self.latency[min((took_ns // 1000).bit_length(), BUCKETS - 1)] += 1

    def access_runs(self) -> list[tuple[int, int]]:
        """The log: runs of pages, as first and stop, in the order of asking; what follows each other is one run."""
        runs: list[tuple[int, int]] = []
        for entry in list(self.log):
            first, stop = entry if isinstance(entry, tuple) else (entry, entry + 1)
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((first, stop))
        return runs
