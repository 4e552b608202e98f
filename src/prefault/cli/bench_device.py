"""``prefault bench device``: measure routes to populated device memory."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from prefault.bench.routes.device_results import FRAMES, PAGE_SIZES, Frames, RouteCell, RouteResult, cells
from prefault.bench.stopping import StopRequest
from prefault.cli.bench_options import check_json_path, exit_if_stopped, json_option, mapping_sizes, sizes
from prefault.sizes import GIB, MIB

_REPEATS = 3
_SIZES = (64 * MIB, GIB)


_page_sizes = sizes(lambda size: size in PAGE_SIZES, ": pages of a device are 4 KiB or 2 MiB")


@click.command()
@click.option("--quick", is_flag=True, help="Measure 64 MiB with ready frames only: some seconds.")
@json_option
@click.option("--size", multiple=True, callback=mapping_sizes, help="Size of the area; repeatable. [64 MiB and 1 GiB]")
@click.option(
    "--page-size", multiple=True, callback=_page_sizes, help="Page size of the device; repeatable. [4 KiB and 2 MiB]"
)
@click.option(
    "--frames", multiple=True, type=click.Choice(get_args(Frames)), help="Supplied before, or during, a run. [both]"
)
@click.option("--repeats", type=click.IntRange(1, 1000), default=_REPEATS, show_default=True, help="Repetitions.")
@click.option("--colocate", is_flag=True, help="Run client and server on one CPU: the lowest fault latency.")
@click.pass_context
def device(
    context: click.Context,
    quick: bool,
    json_path: Path | None,
    size: tuple[int, ...],
    page_size: tuple[int, ...],
    frames: tuple[Frames, ...],
    repeats: int,
    colocate: bool,
) -> None:
    """Compare five routes to populated device memory, on one device.

    The routes are: touch page by page; map, then populate by a second call; map and populate by one call; populate an area
    that was mapped long before; and the kernel's own MADV_POPULATE_READ.
    """
    wanted = cells(
        size or (_SIZES[:1] if quick else _SIZES), page_size or PAGE_SIZES, frames or (FRAMES[:1] if quick else FRAMES)
    )
    check_json_path(json_path)
    finished = 0

    def show(event: RouteCell | RouteResult) -> None:
        nonlocal finished
        if isinstance(event, RouteResult):
            finished += 1
        else:
            click.echo(f"{finished + 1} of {len(wanted)}: {event}", err=True)

    with StopRequest() as stop:
        # Loaded before the measurement: after Ctrl-C only the report is left to do.
        from prefault.bench.grid_report import console_for
        from prefault.bench.routes import device_json, device_runner
        from prefault.bench.routes.device_report import render

        run = device_runner.measure_all(wanted, repeats=repeats, colocate=colocate, stop=stop, show=show)
        # Before the table: the reader of stdout may have gone.
        if json_path is not None:
            device_json.save(run, json_path)
        render(run, console_for())
        exit_if_stopped(context, stop)
