"""A run as a table for a terminal or a file: rendered from plain records."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefault.bench import published
from prefault.bench.findings import findings
from prefault.bench.grid import Cell, Group
from prefault.bench.machine import BenchMachine
from prefault.bench.ratios import Ratios, ratios
from prefault.bench.results import AnyResult, BenchRun, CellResult, CellStatistics, Run, Status, Timed
from prefault.sizes import MIB, format_size

PIPED_WIDTH = 100
"""Columns of output that goes to no terminal."""

# The seven columns of figures and names, with their gaps; the bar gets what is left.
_COLUMNS_WITHOUT_BAR = 24 + 8 + 8 + 6 + 6 + 6 + 6 + 7
_BAR_COLUMNS = range(6, 31)


def console_for(stream: TextIO | None = None) -> Console:
    """Make a console on ``stream`` (stdout), with colours on a terminal only and a fixed width without one."""
    console = Console(file=stream or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def render(run: BenchRun, console: Console) -> None:
    """Print the machine, a table for each group, the meaning of the columns, and the findings."""
    warm = f"{format_size(run.warmed_up_bytes)} warmed up first" if run.warmed_up_bytes else "nothing warmed up"
    print_heading(run, f", an empty mapping each time, {warm}", console)
    beside = ratios(run.results)
    size = None
    for group, results in grouped(run):
        if group.size_bytes != size:
            size = group.size_bytes
            console.print()
            console.rule(Text(format_size(size)), align="left", characters="─" if _unicode(console) else "-")
        console.print()
        console.print(_table(group, results, beside, console))
        print_remarks({result.cell.method: result for result in results}, console)
    print_legend(_legend(run), console)
    sentences = findings(run)
    if sentences:
        console.print()
        console.print(Text(" ".join(sentences)))


def print_heading(run: Run[Any], circumstances: str, console: Console) -> None:
    """Print the machine, the time and the circumstances, and how many cells an interrupted run measured."""
    for line in _machine_lines(run.machine):
        console.print(Text(line))
    repeats = "one run" if run.repeats == 1 else f"best of {run.repeats}"
    console.print(Text(f"{run.started}, {run.seconds:.0f} s; {repeats}{circumstances}"))
    if run.interrupted:
        done = sum(result.status is Status.MEASURED for result in run.results)
        console.print(Text(f"Interrupted: {done} of {len(run.results)} cells are complete.", style="bold yellow"))


def grouped(run: Run[AnyResult]) -> Iterable[tuple[Any, list[AnyResult]]]:
    """Return the results group by group, with the key of each group."""
    groups: dict[Any, list[AnyResult]] = {}
    for result in run.results:
        groups.setdefault(result.cell.group, []).append(result)
    return groups.items()


def new_table() -> Table:
    """Make a table without columns and lines."""
    return Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", collapse_padding=True)


def print_remarks(results: Mapping[str, Timed[Any]], console: Console) -> None:
    """Print the reasons of cells without figures and the notes of others, by name; equal remarks share a line."""
    remarks: dict[str, list[str]] = {}
    for name, result in results.items():
        if result.reason is not None:
            remarks.setdefault(f"{result.status.value}: {result.reason}", []).append(name)
        if result.note is not None:
            remarks.setdefault(result.note, []).append(name)
    for remark, names in remarks.items():
        whose = "all" if len(names) == len(results) > 1 else ", ".join(names)
        console.print(Text(f"  {whose}: {remark}", style="yellow"))


def print_legend(lines: Iterable[str], console: Console) -> None:
    """Print the meaning of the columns."""
    console.print()
    for line in lines:
        console.print(Text(line, style="dim"))


def _machine_lines(machine: BenchMachine) -> list[str]:
    """Describe the machine in four lines."""
    thp = ", ".join(f"{name}={value or 'absent'}" for name, value in machine.thp.items())
    pools = ", ".join(f"{pages} x {format_size(int(size))}" for size, pages in machine.hugetlb_pages.items()) or "none"
    cpus = f"{machine.cpus} CPU{'s' if machine.cpus > 1 else ''}"
    if machine.usable_cpus != machine.cpus:
        cpus += f" ({machine.usable_cpus} usable)"
    return [
        f"{machine.cpu}, {cpus}, {format_size(machine.memory_bytes)}{', virtual machine' if machine.virtual else ''}",
        f"{machine.kernel}, {machine.architecture}",
        f"Transparent huge pages: {thp}",
        f"hugetlb pages: {pools}; prefault {machine.prefault}, Python {machine.python}, numpy {machine.numpy}",
    ]


def _table(group: Group, results: list[CellResult], beside: Mapping[Cell, Ratios], console: Console) -> Table:
    table = new_table()
    room = console.width - _COLUMNS_WITHOUT_BAR
    bar_columns = max(_BAR_COLUMNS.start, min(_BAR_COLUMNS.stop - 1, room))
    table.add_column(f"{group.sharing} {group.backing}", width=24, no_wrap=True)
    table.add_column("", width=bar_columns, no_wrap=True)
    for title, columns in (("best ms", 8), ("median", 8), ("spread", 6), ("/write", 6), ("publ.", 6), ("/publ.", 6)):
        table.add_column(title, width=columns, justify="right", no_wrap=True)
    timed = [result.statistics for result in results]
    slowest = max((figures.best_ns for figures in timed if figures is not None), default=0)
    for result, figures in zip(results, timed, strict=True):
        ratio = beside[result.cell]
        if figures is None:
            table.add_row(result.cell.method, "", "-", "", "", "", _times(ratio.published), "")  # a remark says why
            continue
        table.add_row(
            result.cell.method,
            Text(_bar(figures.best_ns / slowest if slowest else 0, bar_columns, console), style="cyan"),
            _milliseconds(figures.best_ns),
            _milliseconds(figures.median_ns),
            Text(_spread(figures), style="yellow" if figures.doubts else ""),
            _times(ratio.ours),
            _times(ratio.published),
            _times(ratio.against_published),
        )
    return table


def _legend(run: BenchRun) -> Iterator[str]:
    yield "Bars: the time, relative to the slowest of the group. spread: standard deviation as a part of the mean."
    sizes = {published.reference_size(result.cell.size_bytes) for result in run.results}
    of_sizes = " and ".join(f"{size // MIB} MiB" for size in sorted(sizes))
    yield (
        f"/write: the best time over that of writing each page by hand. publ.: the same ratio in the figures published in"
        f" 2021 for {of_sizes} (commit 4ca9b3859dac); empty: not published. /publ.: the first over the second."
    )
    doubtful = sum(bool(result.statistics and result.statistics.doubts) for result in run.results)
    if doubtful:
        yield f"?: doubtful, the repetitions differ too much or there is only one ({doubtful} of {len(run.results)} rows)."
    if any(_copies_a_file(result.cell) and published.reference_ms(result.cell) for result in run.results):
        yield (
            "Private mappings of files in 4 KiB pages: the published figures fit a file whose pages are in the page cache"
            ' already (as in "Memfd filled"); here the file is empty each time, so that reading allocates too.'
        )


def _copies_a_file(cell: Cell) -> bool:
    return cell.sharing == "private" and cell.backing in ("Memfd 4 KiB", "tmpfs", "file")


def _bar(part: float, columns: int, console: Console) -> str:
    if not _unicode(console):
        return "#" * max(1, round(part * columns))
    eighths = max(1, round(part * columns * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _milliseconds(nanoseconds: float) -> str:
    value = nanoseconds / 1e6
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _spread(figures: CellStatistics) -> str:
    text = "" if figures.spread is None else f"{figures.spread:.0%}"
    return f"{text}?" if figures.doubts else text


def _times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"
