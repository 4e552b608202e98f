"""``prefault record``: run a command and note which pages of which files it touches."""

from __future__ import annotations

import os
from typing import Any

import click

from prefault.cli.json_output import json_option, print_json
from prefault.cli.recording_options import root_option, size, tell_notes, told_as_usage

KIND = "prefault-record"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="File that gets the recording.")
@click.option(
    "--way", type=click.Choice(["auto", "trace", "residency"]), default="auto", show_default=True,
    help="trace: the kernel's tracepoints (root). residency: the page cache before and after. auto: the first that works.",
)  # fmt: skip
@click.option(
    "--files", multiple=True, type=click.Path(exists=True), metavar="PATH",
    help="Files and trees for --evict; by residency, they are looked at whoever opens them; repeatable.",
)  # fmt: skip
@click.option("--evict", is_flag=True, help="Evict --files first: pages that are cached already are told apart less well.")
@root_option
@json_option(KIND)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def record(
    output: str, way: Any, files: tuple[str, ...], evict: bool, roots: tuple[tuple[str, str], ...], as_json: bool,
    command: tuple[str, ...],
) -> int:  # fmt: skip
    """Note which pages of which files a command touches, to be brought back by prefault replay.

    The exit status is that of COMMAND (128 and the number of the signal that ended it). SIGTERM and Ctrl-C go to COMMAND,
    and the recording is written afterwards.

    \b
    Example:
        prefault record -o start.rec -- python serve.py --check
        prefault replay start.rec
    """
    from prefault.recordings.area_replay import CommandLogs
    from prefault.recordings.recorder import record_command

    # A recording that cannot be written is told before the command runs, which may take hours.
    directory = os.path.dirname(os.path.abspath(output))
    if not os.access(directory, os.W_OK | os.X_OK):
        raise click.UsageError(f"{output}: no file can be made in {directory}: give another directory")
    if evict and not files:
        raise click.UsageError("--evict evicts the files of --files PATH: name some")
    with told_as_usage(), CommandLogs() as logs:
        done = record_command(
            command, way=way, files=files, evict=evict, roots=dict(roots), environment=logs.environment, areas=logs.areas
        )
    recording = done.recording
    recording.save(output)
    tell_notes(recording.notes)
    if as_json:
        print_json(
            KIND, 1,
            {
                "recording": output, "way": recording.way, "exit_status": done.status, "complete": recording.complete,
                "files": len(recording.files), "file_bytes": recording.file_bytes,
                "areas": len(recording.areas), "area_bytes": recording.area_bytes, "notes": recording.notes,
            },
        )  # fmt: skip
    else:
        areas = f", and {size(recording.area_bytes)} of device memory" if recording.areas else ""
        click.echo(
            f"prefault: {size(recording.file_bytes)} of {len(recording.files)} files{areas} recorded by {recording.way}"
            f" in {output}", err=True,
        )  # fmt: skip
    return done.status
