"""Results: plain records and their statistics."""

from __future__ import annotations

import enum
import statistics
from dataclasses import dataclass

from prefault.bench.grid import Cell
from prefault.bench.machine import BenchMachine

DOUBTFUL_SPREAD = 0.10
"""A standard deviation of more than this part of the mean makes a figure doubtful (as for pyperf)."""

DOUBTFUL_MEDIAN = 1.2
"""A median of more than this times the best makes a figure doubtful."""


class Status(enum.StrEnum):
    """The outcome of a cell."""

    MEASURED = "measured"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"
    STOPPED = "stopped"


class Timed:
    """Base of results: the statistics of their times."""

    __slots__ = ()
    values_ns: tuple[int, ...]
    status: Status

    @property
    def statistics(self) -> CellStatistics | None:
        """The statistics of the times; None without a time, and for a failed cell: its times are incomplete."""
        if not self.values_ns or self.status is Status.FAILED:
            return None
        return CellStatistics.of(self.values_ns)


@dataclass(frozen=True, slots=True)
class CellResult(Timed):
    """The times of one cell.

    Attributes:
        cell: which.
        status: ``STOPPED`` is before the last repetition, or before the first.
        values_ns: the time of each repetition, in the order in which they ran. A failed or stopped cell may have some.
        reason: why it is not measured, a sentence's worth; None where it is.
        note: what else is worth knowing, such as what :func:`prefault.populate` chose.
    """

    cell: Cell
    status: Status
    values_ns: tuple[int, ...] = ()
    reason: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class CellStatistics:
    """The statistics of the repetitions of one cell.

    Attributes:
        repetitions: the number of repetitions.
        best_ns: the shortest, which is what was published.
        median_ns, mean_ns, worst_ns: over all.
        stdev_ns: the sample standard deviation; None of a single value.
    """

    repetitions: int
    best_ns: int
    median_ns: float
    mean_ns: float
    worst_ns: int
    stdev_ns: float | None

    @classmethod
    def of(cls, values_ns: tuple[int, ...]) -> CellStatistics:
        """Compute the statistics of at least one value."""
        return cls(
            repetitions=len(values_ns),
            best_ns=min(values_ns),
            median_ns=statistics.median(values_ns),
            mean_ns=statistics.fmean(values_ns),
            worst_ns=max(values_ns),
            stdev_ns=statistics.stdev(values_ns) if len(values_ns) > 1 else None,
        )

    @property
    def spread(self) -> float | None:
        """The standard deviation as a part of the mean; None of a single value."""
        return None if self.stdev_ns is None else self.stdev_ns / self.mean_ns

    @property
    def milliseconds(self) -> dict[str, float | None]:
        """The figures in milliseconds, by their names in files."""
        return {
            "best_ms": self.best_ns / 1e6,
            "median_ms": self.median_ns / 1e6,
            "mean_ms": self.mean_ns / 1e6,
            "worst_ms": self.worst_ns / 1e6,
            "stdev_ms": None if self.stdev_ns is None else self.stdev_ns / 1e6,
        }

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the figure is doubtful; empty where it is not."""
        doubts = []
        if self.spread is None:
            doubts.append("a single repetition has no spread")
        elif self.spread > DOUBTFUL_SPREAD:
            doubts.append(f"the standard deviation is {self.spread:.0%} of the mean")
        if self.median_ns > DOUBTFUL_MEDIAN * self.best_ns:
            doubts.append(f"the median is {self.median_ns / self.best_ns:.1f} times the best")
        return tuple(doubts)


@dataclass(frozen=True, slots=True)
class BenchRun:
    """A run of the benchmark: figures with the machine that gave them.

    Attributes:
        machine: where.
        started: when, ISO 8601 with the offset from UTC.
        seconds: how long it took.
        quick: whether the quick grid was asked for.
        repeats: that were asked for in each cell.
        warmed_up_bytes: of memory that were populated and freed before the first cell; 0 if it came to no measurement.
        interrupted: whether it was stopped before its end.
        results: one per cell, in the order of the grid.
    """

    machine: BenchMachine
    started: str
    seconds: float
    quick: bool
    repeats: int
    warmed_up_bytes: int
    interrupted: bool
    results: tuple[CellResult, ...]
