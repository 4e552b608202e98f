"""Counters of an area's faults and populates, and the log of the pages that were asked for."""

from __future__ import annotations

import operator
from array import array

BUCKETS = 32
LOG_ENTRIES = 1 << 16
LOG_MOST = 2 * LOG_ENTRIES
_PAGE_BITS = 40  # more than addresses have
_PAGES = (1 << _PAGE_BITS) - 1
_RUN_MOST = 1 << 64 - _PAGE_BITS


class Counters:
    """Statistics of an area, written in the loop's thread only.

    Attributes:
        missing: faults on pages that the driver had to supply.
        minor: faults on pages that were supplied already.
        write_protect: faults by the first write to a page.
        populated_pages: pages that populate requests mapped.
        supplied_pages: pages that the driver supplied, by fault or populate.
        errors: calls in which the driver raised.
        latency: histogram of fault latencies: entry ``n`` counts faults that took less than ``2**n`` microseconds, and at
            least half of it, from reading the message to answering it.
        log: pages and runs that were asked for, in order: the first page of each, and above it the number of the others. At
            least the latest :data:`LOG_ENTRIES` are kept.
    """

    __slots__ = (
        "errors", "latency", "log", "minor", "missing", "populated_pages", "supplied_pages", "write_protect",
    )  # fmt: skip

    latency: list[int]
    log: array[int]

    def __init__(self) -> None:
        self.missing = self.minor = self.write_protect = 0
        self.populated_pages = self.supplied_pages = self.errors = 0

    def log_run(self, first: int, stop: int) -> None:
        """Add a run of pages to the log. A single page may be appended as it is; see :meth:`trim_log` for who does."""
        while first < stop:
            count = min(stop - first, _RUN_MOST)
            self.log.append(first | (count - 1) << _PAGE_BITS)
            first += count
        if len(self.log) > LOG_MOST:
            self.trim_log()

    def trim_log(self) -> None:
        """Drop the oldest entries of the log; to be called when it has more than :data:`LOG_MOST`."""
        del self.log[:-LOG_ENTRIES]

    def record_latency(self, took_ns: int) -> None:
        """Add a fault that took so many nanoseconds to the histogram."""
        self.latency[(took_ns // 1000).bit_length()] += 1

    def latency_histogram(self) -> tuple[int, ...]:
        """Return the first :data:`BUCKETS` entries of the histogram, of which the last also counts all longer latencies."""
        return (*self.latency[: BUCKETS - 1], sum(self.latency[BUCKETS - 1 :]))

    def totals(self) -> tuple[int, ...]:
        """Return the counters in one tuple: those of a Statistics message, with the histogram at the end."""
        return (
            self.missing, self.minor, self.write_protect, self.populated_pages, self.supplied_pages, self.errors,
            *self.latency_histogram(),
        )  # fmt: skip

    def access_runs(self) -> list[tuple[int, int]]:
        """Return the log as runs of pages, first and stop, in the order of asking; adjacent entries are merged."""
        runs: list[tuple[int, int]] = []
        for entry in self.log[-LOG_ENTRIES:]:
            first = entry & _PAGES
            stop = first + (entry >> _PAGE_BITS) + 1
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((first, stop))
        return runs


class UnusedCounters(Counters):
    """Counters of an area that was not touched yet: log and histogram, a kilobyte, are made when they are first used.

    A class of its own, which the object leaves then: ``__getattr__`` makes every access to an attribute slower.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> object:
        if name not in ("latency", "log"):
            raise AttributeError(f"counters have no {name}")
        self.latency = [0] * 64  # any number of nanoseconds has its entry: no bound to be checked for each fault
        self.log = array("Q")
        self.__class__ = Counters  # type: ignore[assignment]
        return getattr(self, name)


def add_totals(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sums of two results of :meth:`Counters.totals`."""
    return tuple(map(operator.add, one, other))
