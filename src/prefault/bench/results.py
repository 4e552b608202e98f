"""Results: plain records and their statistics."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from prefault.bench.grid import Cell
from prefault.bench.machine import BenchMachine

AnyCell = TypeVar("AnyCell", bound=Hashable)
AnyResult = TypeVar("AnyResult", bound="Timed")  # type: ignore[type-arg]

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


@dataclass(frozen=True, slots=True)
class Timed(Generic[AnyCell]):
    """Base of results: the times of one cell.

    Attributes:
        cell: the cell that was measured.
        status: ``STOPPED`` is before the last repetition, or before the first.
        values_ns: the time of each repetition, in the order in which they ran. A failed or stopped cell may have some.
        reason: the reason why it is not measured, a sentence's worth; None where it is.
        note: a remark for the reader, such as the method that :func:`prefault.populate` chose.
    """

    cell: AnyCell
    status: Status
    values_ns: tuple[int, ...] = ()
    reason: str | None = None
    note: str | None = None

    @property
    def statistics(self) -> CellStatistics | None:
        """The statistics of the times; None without a time, and for a failed cell: its times are incomplete."""
        if not self.values_ns or self.status is Status.FAILED:
            return None
        return CellStatistics.of(self.values_ns)


class CellResult(Timed[Cell]):
    """The times of one cell of the grid."""

    __slots__ = ()


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
        """Reasons to doubt the figure; empty where there are none."""
        doubts = []
        if self.spread is None:
            doubts.append("a single repetition has no spread")
        elif self.spread > DOUBTFUL_SPREAD:
            doubts.append(f"the standard deviation is {self.spread:.0%} of the mean")
        if self.median_ns > DOUBTFUL_MEDIAN * self.best_ns:
            doubts.append(f"the median is {self.median_ns / self.best_ns:.1f} times the best")
        return tuple(doubts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Generic[AnyResult]):
    """Base of runs: figures with the machine that gave them.

    Attributes:
        machine: the machine that was measured.
        started: the time of the start, ISO 8601 with the offset from UTC.
        seconds: the duration.
        repeats: repetitions that were asked for in each cell.
        interrupted: True if the run was stopped before its end.
        results: one per cell, in the order of the cells.
    """

    machine: BenchMachine
    started: str
    seconds: float
    repeats: int
    interrupted: bool
    results: tuple[AnyResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun(Run[CellResult]):
    """A run of ``prefault bench``.

    Attributes:
        quick: True if the quick grid was asked for.
        warmed_up_bytes: bytes of memory that were populated and freed before the first cell; 0 if no cell was possible.
    """

    quick: bool
    warmed_up_bytes: int
