"""The published figures of 2021."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources

from prefault.bench.grid import PUBLISHED_SIZES, Cell
from prefault.sizes import MIB

SOURCE = (
    "David Hildenbrand, 'mm/madvise: introduce MADV_POPULATE_(READ|WRITE) to prefault page tables', 2021 (linux-mm),"
    " commit 4ca9b3859dac, section V: Single-threaded performance comparison"
)

REFERENCE_METHOD = "write"
"""The method that every ratio refers to: storing a byte in each page by hand, in the same group."""

# Where the cost of a call no longer shows: on the published machine 2 MiB took some 100 microseconds, 4096 MiB a second.
_SMALL_BYTES = 64 * MIB


@functools.cache
def figures() -> Mapping[Cell, float]:
    """Return the 190 published figures in milliseconds: the shortest of ten runs on an empty mapping, one thread.

    Source: David Hildenbrand, "mm/madvise: introduce MADV_POPULATE_(READ|WRITE) to prefault page tables", patch series of
    2021 on linux-mm; the figures stand in the message of commit 4ca9b3859dac (Linux 5.14), section V, "Single-threaded
    performance comparison".
    """
    text = resources.files("prefault.bench").joinpath("hildenbrand_2021.csv").read_text()
    return {
        Cell(
            int(row["size_mib"]) * MIB,
            "private" if row["sharing"] == "private" else "shared",
            row["backing"],
            row["method"],
        ): float(row["best_of_10_ms"])
        for row in csv.DictReader(text.splitlines())
    }


def reference_size(size_bytes: int) -> int:
    """Return the published size that a mapping of ``size_bytes`` is compared with."""
    small, large = PUBLISHED_SIZES
    return small if size_bytes < _SMALL_BYTES else large


def figure_ms(cell: Cell) -> float | None:
    """Return the figure that was published for exactly this cell."""
    return figures().get(cell)


def reference_ms(cell: Cell) -> float | None:
    """Return the published figure of this cell at the reference size; None for a row that was not published."""
    return figures().get(replace(cell, size_bytes=reference_size(cell.size_bytes)))


def ratio_to_write(cell: Cell) -> float | None:
    """Return the published time over that of :data:`REFERENCE_METHOD` in the same group, at the reference size."""
    mine = reference_ms(cell)
    write = reference_ms(replace(cell, method=REFERENCE_METHOD))
    return None if mine is None or write is None else mine / write


def expected_ms(cell: Cell) -> float:
    """Estimate the time of one repetition with its teardown. Only proportions matter: they give the time left."""
    known = reference_ms(cell) or reference_ms(Cell(cell.size_bytes, "private", "Anon 4 KiB", "write")) or 1.0
    return 0.5 + 1.3 * known * cell.size_bytes / reference_size(cell.size_bytes)
