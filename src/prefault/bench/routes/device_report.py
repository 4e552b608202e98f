"""A run of ``prefault bench device`` as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefault.bench.grid_report import grouped, new_table, print_heading, print_legend, print_remarks
from prefault.bench.routes.device_results import MEANINGS, DeviceRun, Ratio, Route, RouteResult, ratios
from prefault.bench.routes.shipped_results import MEANINGS as SHIPPED_MEANINGS
from prefault.bench.routes.shipped_results import ROUTES, TITLES, ShippedCell, ShippedResult, times_faster
from prefault.sizes import KIB, MIB, format_size

# With the routes' names these are 80 columns.
_WIDTHS = (
    ("best ms", 7), ("median", 7), ("map", 6), ("us/page", 7), ("faults", 7), ("served", 7), ("calls", 7), ("faster", 6),
)  # fmt: skip


_SHIPPED_WIDTHS = (("best ms", 7), ("median", 7), ("us/page", 7), ("MiB/s", 7), ("faults", 7), ("faster", 7))


def render(run: DeviceRun, console: Console) -> None:
    """Print the machine, a table for each memory, and what the columns mean."""
    print_heading(run, ", client and server on one CPU" if run.colocate else "", console)
    if run.user_mode_only:
        console.print(Text("userfaultfd for user mode only: faults that the kernel raises are not answered", style="yellow"))
    compared, faster = ratios(run.routes), times_faster(run.shipped)
    for _, group in grouped(run):
        shipped = [result for result in group if isinstance(result, ShippedResult)]
        if shipped:
            _print_shipped(shipped, faster, console)
            continue
        results = [result for result in group if isinstance(result, RouteResult)]
        cell = results[0].cell
        title = f"{format_size(cell.size_bytes)} in {format_size(cell.page_size)} pages, frames {cell.frames}"
        console.print()
        console.print(Text(title, style="bold"))
        console.print(_table(results, [compared.get(result.cell, Ratio(None, None)) for result in results]))
        print_remarks({result.cell.route.value: result for result in results}, console)
    print_legend(_legend(run), console)


def _table(results: list[RouteResult], compared: list[Ratio]) -> Table:
    table = new_table()
    table.add_column("", width=max(len(route) for route in Route), no_wrap=True)
    for name, columns in _WIDTHS:
        table.add_column(name, width=columns, justify="right", no_wrap=True)
    for result, ratio in zip(results, compared, strict=True):
        figures, counts = result.statistics, result.counts
        if figures is None or counts is None:
            table.add_row(result.cell.route.value, "-")  # a remark says why
            continue
        table.add_row(
            result.cell.route.value,
            _number(figures.best_ns / 1e6),
            Text(_number(figures.median_ns / 1e6), style="yellow" if figures.doubts else ""),
            _number(min(result.map_ns) / 1e6) if any(result.map_ns) else "",
            _number(result.us_per_page or 0),
            str(counts.client_faults),
            str(counts.server_faults),
            str(counts.system_calls),
            "" if ratio.to_touch is None else f"{_number(ratio.to_touch)}x",
        )
    return table


def _print_shipped(results: list[ShippedResult], faster: Mapping[ShippedCell, float], console: Console) -> None:
    cell = results[0].cell
    console.print()
    console.print(Text(TITLES[cell.device].format(format_size(cell.size_bytes)), style="bold"))
    table = new_table()
    table.add_column("", width=max(len(route) for routes in ROUTES.values() for route in routes), no_wrap=True)
    for name, columns in _SHIPPED_WIDTHS:
        table.add_column(name, width=columns, justify="right", no_wrap=True)
    for result in results:
        figures, each, speed = result.statistics, result.us_per_page, result.mb_per_second
        if figures is None or each is None or speed is None:
            table.add_row(result.cell.route.value, "-")  # a remark says why
            continue
        table.add_row(
            result.cell.route.value,
            _number(figures.best_ns / 1e6),
            Text(_number(figures.median_ns / 1e6), style="yellow" if figures.doubts else ""),
            _number(each),
            _number(speed * 1e6 / MIB),
            str(result.faults),
            f"{_number(faster[result.cell])}x" if result.cell in faster else "",
        )
    console.print(table)
    print_remarks({result.cell.route.value: result for result in results}, console)
    for result in results:
        if result.bookkeeping_bytes is not None:
            per_kib = result.bookkeeping_bytes / (cell.size_bytes / KIB)
            console.print(Text(f"  {result.cell.route}: {per_kib:.3g} bytes of bookkeeping for each KiB of the object"))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _legend(run: DeviceRun) -> Iterable[str]:
    for route in dict.fromkeys(result.cell.route for result in run.routes):
        yield f"{route.value}: {MEANINGS[route]}."
    for each in dict.fromkeys(result.cell.route for result in run.shipped):
        yield f"{each.value}: {SHIPPED_MEANINGS[each]}."
    if run.shipped:
        yield (
            "Of devices that ship: us/page is of the best, per page of 4 KiB that came in or moved; MiB/s likewise;"
            " faults: those that the server answered; faster: page for page, than the same by single faults."
        )
    if not run.routes:
        return
    yield (
        "ready: the driver has supplied the pages before, as for a second client; cold: it does so while the time is taken."
        " Times are from the first call to the last page; map: the part of mapping; us/page: of the best, per page of the"
        " device."
    )
    yield (
        "faults: those of the measuring thread (getrusage). served: faults that the server answered. calls: system calls of"
        " both, by design and not traced: a read (from /proc/PID/io) and an ioctl a fault; without the dozen of mapping."
        " faster: than touching."
    )
