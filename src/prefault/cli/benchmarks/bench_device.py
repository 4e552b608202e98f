"""``prefault bench device``: measure routes to populated device memory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import click

from prefault.bench.routes.device_results import FRAMES, PAGE_SIZES, PATTERN, Frames, RouteCell, RouteResult, cells
from prefault.bench.routes.shipped_results import Shipped, ShippedCell, ShippedResult, shipped_cells
from prefault.bench.stopping import StopRequest
from prefault.cli.benchmarks.bench_options import check_json_path, exit_if_stopped, json_option, mapping_sizes, sizes
from prefault.cli.options.option_types import CountType
from prefault.sizes import GIB, MIB

_REPEATS = 3
_SIZES = (64 * MIB, GIB)


_page_sizes = sizes(lambda size: size in PAGE_SIZES, ": pages of a device are 4 KiB or 2 MiB")


_DEVICES = (PATTERN, *get_args(Shipped))


@click.command()
@click.option(
    "--device", "names", multiple=True, type=click.Choice(_DEVICES),
    help="Device: of one byte value, an enclave page cache, or buffer objects; repeatable. [pattern]",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Measure 64 MiB with ready frames only: some seconds.")
@json_option("prefault-bench-device")
@click.option("--size", multiple=True, callback=mapping_sizes, help="Size; repeatable. [64 MiB and 1 GiB; enclave: 64 MiB]")
@click.option(
    "--page-size", multiple=True, callback=_page_sizes, help="Page size of the device; repeatable. [4 KiB and 2 MiB]"
)
@click.option(
    "--frames", multiple=True, type=click.Choice(get_args(Frames)), help="Supplied before, or during, a run. [both]"
)
@click.option("--repeats", type=CountType(1, 1000), default=_REPEATS, show_default=True, help="Repetitions.")
@click.option("--colocate", is_flag=True, help="Run client and server on one CPU: the lowest fault latency.")
@click.pass_context
def device(
    context: click.Context,
    names: tuple[Literal["pattern"] | Shipped, ...],
    quick: bool,
    json_path: Path | None,
    size: tuple[int, ...],
    page_size: tuple[int, ...],
    frames: tuple[Frames, ...],
    repeats: int,
    colocate: bool,
) -> None:
    """Compare five routes to populated device memory, on one device; or those of devices that ship.

    The routes are: touch page by page; map, then populate by a second call; map and populate by one call; populate an area
    that was mapped long before; and the kernel's own MADV_POPULATE_READ.

    "enclave" compares pages that are added one by one with populate, with and without reclaim; "buffers" compares kinds of
    faults with populate, and measures moves and bookkeeping. An enclave needs memory of three times its size, a buffer
    object of twice its size.

    \b
    Examples:
      prefault bench device --quick
      prefault bench device --device buffers --size "64 MiB" --json run.json
    """
    wanted: list[RouteCell | ShippedCell] = []
    names = tuple(dict.fromkeys(names)) or (PATTERN,)
    if PATTERN in names:
        wanted += cells(
            size or (_SIZES[:1] if quick else _SIZES), page_size or PAGE_SIZES, frames or (FRAMES[:1] if quick else FRAMES)
        )
    elif page_size or frames or colocate:
        raise click.UsageError(f"--page-size, --frames and --colocate are for --device {PATTERN}, which is not asked for")
    for name in names:
        if name != PATTERN:
            wanted += shipped_cells(name, size or (_SIZES[:1] if quick or name == "enclave" else _SIZES))
    if "enclave" in names:
        from prefault.drivers.enclave.sealing import load_cipher

        load_cipher()  # where it is missing, this says so before anything is measured
    check_json_path(json_path)
    finished = 0

    def show(event: RouteCell | RouteResult | ShippedCell | ShippedResult) -> None:
        nonlocal finished
        if isinstance(event, RouteResult | ShippedResult):
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
