"""The table and the sentences, from records that nobody measured."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from prefault.bench.findings import findings
from prefault.bench.grid import Cell
from prefault.bench.grid_report import console_for, render
from prefault.bench.results import BenchRun, CellResult, Status

Make = Callable[..., BenchRun]
Measured = Callable[..., CellResult]
MIB = 1 << 20


def _text(run: BenchRun, width: int | None = None, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console = console_for(stream)
    if width is not None:
        console.width = width
    render(run, console)
    stream.flush()
    return raw.getvalue().decode(encoding)


def _row(text: str, method: str) -> str:
    """The first row of a method that has figures."""
    return next(line for line in text.splitlines() if line.startswith(f"{method} ") and "█" in line)


@pytest.fixture
def example(make_run: Make, measured: Measured) -> BenchRun:
    return make_run(
        measured("read", 500, 501, 502),
        measured("write", 1000, 1001, 1002),
        measured("populate_write", 600, 800, 900),
        measured("prefault", 300, 301, 302, note="populate_write, 2 threads"),
        *(
            CellResult(Cell(4096 * MIB, "shared", "hugetlbfs", method), Status.UNAVAILABLE, reason="the pool is empty")
            for method in ("read", "write")
        ),
        CellResult(Cell(4096 * MIB, "shared", "tmpfs", "write"), Status.FAILED, (3,), "killed by SIGBUS"),
        measured("fallocate+populate_write", 700, 701, 702, backing="tmpfs", sharing="shared"),
    )


def test_piped_it_is_plain_and_as_wide_as_promised(example: BenchRun) -> None:
    text = _text(example)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("width", [80, 90, 100])
def test_no_figure_is_cut_off(example: BenchRun, width: int) -> None:
    text = _text(example, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert _row(text, "populate_write").split()[-6:] == ["600.0", "800.0", "20%?", "0.60x", "0.81x", "0.74x"]
    assert _row(text, "fallocate+populate_write").split()[-4:] == ["700.0", "701.0", "0%", "0.84x"]


def test_an_unpublished_row_has_no_published_figure(example: BenchRun) -> None:
    assert _row(_text(example), "prefault").split()[-4:] == ["300.0", "301.0", "0%", "0.30x"]


def test_bars_are_relative_to_the_slowest_of_the_group(example: BenchRun) -> None:
    text = _text(example)
    assert _row(text, "write").count("█") == pytest.approx(2 * _row(text, "read").count("█"), abs=1)


def test_the_machine_and_its_settings_come_first(example: BenchRun) -> None:
    head = "\n".join(_text(example).splitlines()[:6])
    for part in (
        "A processor",
        "virtual machine",
        "2 usable",
        "Linux 6.1.0",
        "enabled=madvise",
        "2026-01-02",
        "256.0 MiB warmed",
    ):
        assert part in head


def test_cells_without_figures_say_why(example: BenchRun) -> None:
    text = _text(example)
    assert "all: unavailable: the pool is empty" in text
    assert "write: failed: killed by SIGBUS" in text
    assert "prefault: populate_write, 2 threads" in text


def test_an_interrupted_run_says_so(make_run: Make, measured: Measured) -> None:
    stopped = CellResult(
        Cell(2 * MIB, "private", "tmpfs", "read"), Status.STOPPED, (7, 8), "stopped after 2 of 3 repetitions"
    )
    text = _text(make_run(measured("write", 1, 1, 1), stopped, interrupted=True))
    assert "Interrupted: 1 of 2 cells are complete" in text
    assert "stopped after 2 of 3" in text


def test_ascii_terminals_get_ascii_bars(example: BenchRun) -> None:
    assert "####" in _text(example, encoding="ascii")


def test_nothing_measured_is_a_report_too(make_run: Make) -> None:
    cell = CellResult(Cell(2 * MIB, "private", "tmpfs", "read"), Status.UNAVAILABLE, reason="no")
    assert "unavailable: no" in _text(make_run(cell))
    assert findings(make_run(cell)) == []


def test_findings_are_computed(make_run: Make, measured: Measured) -> None:
    run = make_run(
        measured("write", 1000, size=256 * MIB),
        measured("populate_write", 620, size=256 * MIB),
        measured("populate_write", 800, backing="tmpfs", sharing="shared", size=256 * MIB),
        measured("fallocate+populate_write", 1000, backing="tmpfs", sharing="shared", size=256 * MIB),
        measured("populate_write", 400, backing="file", sharing="shared", size=256 * MIB),
        measured("fallocate+populate_read", 100, backing="file", sharing="shared", size=256 * MIB),
        measured("populate_write", 62, backing="Anon THP", size=256 * MIB),
        measured("prefault", 31, backing="Anon THP", size=256 * MIB, note="2 threads"),
    )
    populate, allocate, file, huge = findings(run)
    assert "0.62x" in populate
    assert "published for 4096 MiB: 0.81x" in populate
    assert "cost time, 1.25x" in allocate
    assert "0.25x" in file
    assert "0.10x" in huge
    assert "0.05x (2 threads)" in huge


def test_figures_of_a_stopped_cell_are_no_finding(make_run: Make, measured: Measured) -> None:
    cell = Cell(4096 * MIB, "private", "Anon 4 KiB", "populate_write")
    assert findings(make_run(measured("write", 1000), CellResult(cell, Status.STOPPED, (1,), "stopped"))) == []


def test_a_filtered_run_has_a_finding_still(make_run: Make, measured: Measured) -> None:
    run = make_run(measured("read", 10, backing="hugetlbfs"), measured("write", 20, backing="hugetlbfs"))
    assert findings(run) == ["4096 MiB private hugetlbfs: read was the fastest and write took 2.0 times as long."]
