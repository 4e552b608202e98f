"""Ratios, by which machines can be compared without comparing milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from prefault.bench import published
from prefault.bench.grid import Cell
from prefault.bench.results import BenchRun, CellResult


@dataclass(frozen=True, slots=True)
class Ratios:
    """The best time of a method over that of writing each page by hand, in the same group.

    Attributes:
        ours: on the machine of the run; None where either was not measured.
        published: in 2021, at the published size that is nearest; None for rows that were not published.
    """

    ours: float | None
    published: float | None

    @property
    def against_published(self) -> float | None:
        """The ratio here over the published one. Below 1, the method gains more here than it gained there."""
        return None if self.ours is None or self.published is None else self.ours / self.published


def ratios(results: Iterable[CellResult]) -> Mapping[Cell, Ratios]:
    """Compute the ratios of every cell."""
    best = {result.cell: result.statistics.best_ns for result in results if result.statistics is not None}
    found = {}
    for result in results:
        cell = result.cell
        mine, write = best.get(cell), best.get(replace(cell, method=published.REFERENCE_METHOD))
        ours = None if mine is None or write is None else mine / write
        found[cell] = Ratios(ours, published.ratio_to_write(cell))
    return found


class DifferentMachinesError(ValueError):
    """Times of different machines cannot be compared; ratios can."""


def compare(before: BenchRun, after: BenchRun, *, across_machines: bool = False) -> Mapping[Cell, float]:
    """Return the best time of ``after`` over that of ``before``, for each cell that both measured.

    Args:
        before: the earlier run.
        after: the later one.
        across_machines: compare although the machines differ.

    Raises:
        DifferentMachinesError: the runs come from machines, kernels or settings that differ.
    """
    differences = before.machine.differences(after.machine)
    if differences and not across_machines:
        raise DifferentMachinesError(f"the runs come from machines that differ: {'; '.join(differences)}")
    earlier = {result.cell: result.statistics for result in before.results}
    found = {}
    for result in after.results:
        old, new = earlier.get(result.cell), result.statistics
        if old is not None and new is not None:
            found[result.cell] = new.best_ns / old.best_ns
    return found
