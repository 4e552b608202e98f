"""``prefault report``: residency as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefault.cli.messages import printable
from prefault.cli.options.option_types import pid_option
from prefault.sizes import format_count

if TYPE_CHECKING:
    from prefault.pictures.heat_rows import HeatRow
    from prefault.pictures.watch_recording import RecordedFrame


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True), metavar="[PATH]...")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), required=True, metavar="FILE.html", help="The file to write."
)
@pid_option("Show the mappings of a process.")
@click.option("--watch", "recording", type=click.Path(exists=True, dir_okay=False), metavar="RECORDING",
              help="Show a recording of `prefault watch --record`, with a slider.")  # fmt: skip
@click.option("--bench", type=click.Path(exists=True, dir_okay=False), metavar="RESULTS.json",
              help="Show the grid of `prefault bench --json`.")  # fmt: skip
@click.option("--title", help="Heading of the page.")
def report(
    paths: tuple[str, ...], output: str, pid: int | None, recording: str | None, bench: str | None, title: str | None
) -> None:
    """Write one HTML file that shows which parts of files, or of a process, are in memory.

    The page has all its data, needs no network, and asks for none. Model files (.safetensors, .gguf, .npy) are shown
    by tensor too.

    \b
    Example:
      prefault report -o residency.html models/
      prefault report -o process.html --pid 4711
      prefault report -o frames.html --watch frames.jsonl
      prefault report -o bench.html --bench results.json
    """
    from prefault.pictures.html_report import report_page, write_report

    sources = [bool(paths), pid is not None, recording is not None]
    if sum(sources) > 1:
        raise click.UsageError("give PATHs, --pid or --watch, and one of them only")
    if not any(sources) and bench is None:
        raise click.UsageError("give PATHs, --pid, --watch or --bench")
    rows: list[HeatRow] = []
    frames: list[RecordedFrame] = []
    if recording is not None:
        frames = _frames(recording)
    elif any(sources):
        from prefault.pictures.sampling import rows_of_models, rows_of_pid

        rows = rows_of_models(paths) if pid is None else rows_of_pid(pid)
        if not rows:
            raise click.ClickException("nothing to show: no file is there")
    page = report_page(
        title or _title(paths, rows, recording), rows=rows, recording=frames, bench=None if bench is None else _bench(bench)
    )
    write_report(output, page)
    shown = format_count(len(rows), "row") if rows else format_count(len(frames), "frame") if frames else "1 benchmark"
    click.echo(f"{printable(output)}: {shown}")


def _title(paths: tuple[str, ...], rows: list[HeatRow], recording: str | None) -> str:
    if recording is not None:
        return f"Residency over time: {recording}"
    if paths:
        return f"Residency of {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return f"Memory of process {rows[0].group}" if rows else "prefault bench"


def _frames(path: str) -> list[RecordedFrame]:
    from prefault.pictures.watch_recording import DamagedFramesError, read_recording

    try:
        found = list(read_recording(path))
    except DamagedFramesError as error:
        raise click.ClickException(str(error)) from error
    if not any(frame.rows for frame in found):
        raise click.ClickException(f"{path} has no rows to show")
    return found


def _bench(path: str) -> dict[str, Any]:
    from prefault.bench.jsonfile import SchemaError, load, to_json

    try:
        return to_json(load(Path(path)))
    except SchemaError as error:
        raise click.ClickException(str(error)) from error
