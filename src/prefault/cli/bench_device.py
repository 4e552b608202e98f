"""``prefault bench device``."""

from __future__ import annotations

import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import get_args

import click

from prefault.bench import jsonfile
from prefault.bench.device_results import FRAMES, PAGE_SIZES, DeviceRun, Frames, RouteCell, RouteResult, cells
from prefault.bench.kinds import HUGE_PAGE_BYTES
from prefault.bench.machine import this_machine
from prefault.bench.stopping import StopRequest
from prefault.sizes import GIB, MIB, parse_size

_REPEATS = 3
_SIZES = (64 * MIB, GIB)


def _bytes(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    sizes = []
    for value in values:
        try:
            size = parse_size(value)
        except ValueError as error:
            raise click.UsageError(f"{parameter.opts[0]}: {error}") from error
        if parameter.name == "page_size" and size not in PAGE_SIZES:
            raise click.UsageError(f"--page-size {value}: pages of a device are 4 KiB or 2 MiB")
        if parameter.name == "size" and (size == 0 or size % HUGE_PAGE_BYTES):
            raise click.UsageError(f"--size {value} is not a multiple of 2 MiB")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


@click.command()
@click.option("--quick", is_flag=True, help="64 MiB only, frames ready: some seconds.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Keep the run in FILE.")
@click.option("--size", multiple=True, callback=_bytes, help="Of the area; repeatable. [64 MiB and 1 GiB]")
@click.option("--page-size", multiple=True, callback=_bytes, help="Of the device; repeatable. [4 KiB and 2 MiB]")
@click.option("--frames", multiple=True, type=click.Choice(get_args(Frames)), help="Supplied before, or on the way. [both]")
@click.option("--repeats", type=click.IntRange(1, 1000), default=_REPEATS, show_default=True, help="Repetitions.")
@click.option("--colocate", is_flag=True, help="Client and server share a CPU: the shortest way to answer a fault.")
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

    Touching page by page; mapping and then a second call; one call that does both; populating later; and the kernel's own
    MADV_POPULATE_READ.
    """
    wanted = cells(
        size or (_SIZES[:1] if quick else _SIZES), page_size or PAGE_SIZES, frames or (FRAMES[:1] if quick else FRAMES)
    )
    if json_path is not None:
        try:
            jsonfile.check_writable(json_path)
        except OSError as error:
            raise click.ClickException(f"--json {json_path} cannot be written: {error.strerror or error}") from error
    with StopRequest() as stop:
        run = _measure(wanted, repeats, colocate, stop)
        # Before the table: whoever reads stdout may have gone.
        if json_path is not None:
            from prefault.bench import device_json

            device_json.save(run, json_path)
        from prefault.bench.device_report import render
        from prefault.bench.report import console_for

        render(run, console_for())
    if stop.signal is not None:
        context.exit(128 + stop.signal)


def _measure(wanted: list[RouteCell], repeats: int, colocate: bool, stop: StopRequest) -> DeviceRun:
    from prefault.bench import device_report, device_runner  # noqa: F401  now: after Ctrl-C nothing has to be loaded
    from prefault.device.uffd import USER_MODE_ONLY_NOTE

    machine = this_machine()
    started, began = datetime.now().astimezone().isoformat(timespec="seconds"), time.monotonic()
    results: dict[RouteCell, RouteResult] = {}
    events = device_runner.run(wanted, repeats=repeats, colocate=colocate, stopping=lambda: stop.requested)
    with closing(events):
        for event in events:
            if isinstance(event, RouteResult):
                results[event.cell] = event
            else:
                click.echo(f"{len(results) + 1} of {len(wanted)}: {event}", err=True)
    notes = [result.note or "" for result in results.values() if result.counts is not None]
    return DeviceRun(
        machine=machine,
        started=started,
        seconds=time.monotonic() - began,
        repeats=repeats,
        colocate=colocate,
        user_mode_only=any(USER_MODE_ONLY_NOTE in note for note in notes) if notes else None,
        interrupted=stop.requested,
        results=tuple(results[cell] for cell in wanted),
    )
