"""``prefault record``: run a command and note which pages of which files it touches."""

from __future__ import annotations

from typing import Any

import click

from prefault.cli.options.recording_options import check_writable, root_option, size, tell_notes, told_as_usage
from prefault.sizes import format_count


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="File that gets the recording.")
@click.option(
    "--way", type=click.Choice(["auto", "trace", "residency"]), default="auto", show_default=True,
    help="trace: the kernel's tracepoints (root). residency: the page cache before and after. auto: the first that works.",
)  # fmt: skip
@click.option(
    "--files", multiple=True, type=click.Path(exists=True), metavar="PATH",
    help="Files and trees for --evict; by residency, their cached pages are compared before and after; repeatable.",
)  # fmt: skip
@click.option("--evict", is_flag=True, help="Evict --files first: pages that are cached already are told apart less well.")
@root_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def record(
    output: str, way: Any, files: tuple[str, ...], evict: bool, roots: tuple[tuple[str, str], ...],
    command: tuple[str, ...],
) -> int:  # fmt: skip
    """Run COMMAND and note which pages of which files it touches, to be brought back by prefault replay.

    The exit status is that of COMMAND (128 and the number of the signal that ended it). SIGTERM and Ctrl-C go to COMMAND,
    and the recording is written afterwards.

    \b
    Example:
        prefault record -o start.rec -- python serve.py --check
    """
    from prefault.recordings.area_replay import CommandLogs
    from prefault.recordings.recorder import record_command

    check_writable(output)  # before the command, which may run for hours
    if evict and not files:
        raise click.UsageError("--evict evicts the files of --files PATH: name some")
    with told_as_usage(), CommandLogs() as logs:
        done = record_command(
            command, way=way, files=files, evict=evict, roots=dict(roots), environment=logs.environment, areas=logs.areas
        )
    recording = done.recording
    recording.save(output)
    tell_notes(recording.notes)
    areas = f", and {size(recording.area_bytes)} of device memory" if recording.areas else ""
    click.echo(
        f"prefault: {size(recording.file_bytes)} of {format_count(len(recording.files), 'file')}{areas} recorded by"
        f" {recording.way} in {output}", err=True,
    )  # fmt: skip
    return done.status
