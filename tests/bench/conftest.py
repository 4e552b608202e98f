"""Records that were not measured: reports and files are tested without a benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefault.bench.grid import Cell
from prefault.bench.machine import BenchMachine
from prefault.bench.results import BenchRun, CellResult, Status

MIB = 1 << 20

MACHINE = BenchMachine(
    kernel="Linux 6.1.0 #1",
    architecture="x86_64",
    cpu="A processor",
    cpus=4,
    usable_cpus=2,
    memory_bytes=8 << 30,
    page_bytes=4096,
    virtual=True,
    thp={"enabled": "madvise", "defrag": None, "shmem_enabled": "never"},
    hugetlb_pages={"2097152": 0},
    python="3.11.0",
    numpy="2.0.0",
    prefault="0.1.0",
)


@pytest.fixture
def make_run() -> Callable[..., BenchRun]:
    def make(*results: CellResult, **fields: object) -> BenchRun:
        values: dict[str, object] = {
            "machine": MACHINE,
            "started": "2026-01-02T03:04:05+00:00",
            "seconds": 1.5,
            "quick": True,
            "repeats": 3,
            "warmed_up_bytes": 256 * MIB,
            "interrupted": False,
            "results": results,
        }
        return BenchRun(**{**values, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture
def measured() -> Callable[..., CellResult]:
    """A measured private "Anon 4 KiB" cell of 4096 MiB, unless said otherwise; times in milliseconds."""

    def make(
        method: str,
        *values_ms: float,
        backing: str = "Anon 4 KiB",
        sharing: str = "private",
        size: int = 4096 * MIB,
        **fields: object,
    ) -> CellResult:
        cell = Cell(size, "private" if sharing == "private" else "shared", backing, method)
        values = tuple(round(value * 1e6) for value in values_ms)
        return CellResult(cell, Status.MEASURED, values, **fields)  # type: ignore[arg-type]

    return make
