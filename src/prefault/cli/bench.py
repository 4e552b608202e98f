"""``prefault bench``: measure how fast this machine populates memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from prefault.bench import grid, jsonfile, places, runner
from prefault.bench.grid import Cell
from prefault.bench.kinds import KINDS, Places
from prefault.bench.stopping import StopRequest
from prefault.cli.benchmarks.bench_device import device
from prefault.cli.benchmarks.bench_options import check_json_path, exit_if_stopped, json_option, mapping_sizes
from prefault.cli.options.option_types import CountType

_QUICK_REPEATS = 3
_FULL_REPEATS = 10


def _one_of(valid: Iterable[str]) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[str, ...]]:
    """Return a callback that checks the values of a filter, without regard to case."""
    names = {name.lower(): name for name in valid}

    def check(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if value.lower() not in names:
                listed = ", ".join(f'"{name}"' if " " in name else name for name in names.values())
                raise click.UsageError(f"--{parameter.name} has no value {value!r}; it has: {listed}")
        return tuple(names[value.lower()] for value in values)

    return check


@click.group(invoke_without_command=True)
@click.option("--quick", is_flag=True, help="Measure the main rows only, with 256 MiB and three repetitions: some seconds.")
@json_option(jsonfile.KIND)
@click.option(
    "--size", multiple=True, callback=mapping_sizes, help="Mapping size; repeatable. [2 MiB and 4 GiB, quick: 256 MiB]"
)
@click.option("--repeats", type=CountType(1, 1000), help="Repetitions of each cell. [10, quick: 3]")
@click.option("--method", multiple=True, callback=_one_of(grid.METHODS), help="Measure only this method; repeatable.")
@click.option("--backing", multiple=True, callback=_one_of(KINDS), help="Measure only this backing; repeatable.")
@click.option("--sharing", multiple=True, callback=_one_of(("private", "shared")), help="Measure only these mappings.")
@click.option(
    "--file-directory", type=click.Path(), metavar="DIR", help='Directory for files of the "file" rows; must be on a disk.'
)
@click.option("--list", "list_cells", is_flag=True, help="List the cells and measure nothing.")
@click.pass_context
def bench(
    context: click.Context,
    quick: bool,
    json_path: Path | None,
    size: tuple[int, ...],
    repeats: int | None,
    method: tuple[str, ...],
    backing: tuple[str, ...],
    sharing: tuple[str, ...],
    file_directory: str | None,
    list_cells: bool,
) -> None:
    """Measure how fast this machine populates memory, beside the figures published in 2021.

    Rows in 2 MiB pages need a hugetlb pool. As root, the pool is enlarged for them (vm.nr_hugepages), and a hugetlbfs
    is mounted where there is none; both are put back at the end, also after Ctrl-C. --backing leaves these rows out.

    \b
    Examples:
      prefault bench --quick
      prefault bench --size "2 MiB" --backing tmpfs --json run.json
    """
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"options of {context.invoked_subcommand!r} come after its name")
        return
    cells = grid.select(_grid(quick, size), methods=method, backings=backing, sharings=sharing)
    if not cells:
        raise click.UsageError("the filters leave no cell: prefault bench --list shows all cells")
    if list_cells:
        for cell in cells:
            click.echo(str(cell))
        return
    check_json_path(json_path)
    if file_directory is not None and not Path(file_directory).is_dir():
        raise click.UsageError(f"--file-directory {file_directory} is not a directory")
    places_used = Places(file=file_directory or places.default_file_directory())
    with StopRequest() as stop:
        # Loaded before the measurement: after Ctrl-C only the report is left to do.
        from prefault.bench.grid_report import console_for, render
        from prefault.bench.live_display import progress

        repeats = repeats or (_QUICK_REPEATS if quick else _FULL_REPEATS)
        with progress(cells, repeats) as show:
            run = runner.measure_all(cells, quick=quick, repeats=repeats, places=places_used, stop=stop, show=show)
        # Before the table: the reader of stdout may have gone.
        if json_path is not None:
            jsonfile.save(run, json_path)
        render(run, console_for())
        exit_if_stopped(context, stop)


def _grid(quick: bool, sizes: Sequence[int]) -> list[Cell]:
    if quick:
        return [cell for size in sizes or (grid.QUICK_SIZE,) for cell in grid.quick_grid(size)]
    return grid.full_grid(sizes or grid.PUBLISHED_SIZES)


bench.add_command(device)
