"""``prefault replay``: bring the pages of a recording back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from prefault.cli.json_output import json_option, print_json
from prefault.cli.messages import complain
from prefault.cli.options.recording_options import replay_options, size, some_of, told_as_usage
from prefault.sizes import format_count

if TYPE_CHECKING:
    from prefault.recordings.replaying import ReplayResult

KIND = "prefault-replay"


@click.command(context_settings={"allow_interspersed_args": True})
@click.argument("recording", type=click.Path(exists=True, dir_okay=False))
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@replay_options
@json_option(KIND)
def replay(
    recording: str, roots: tuple[tuple[str, str], ...], budget: int | None, threads: int | None, idle: bool,
    ignore_time: bool, progress: bool | None, as_json: bool, command: tuple[str, ...],
) -> int:  # fmt: skip
    """Bring the pages of RECORDING back into the page cache, in disk order; then run COMMAND, if there is one.

    Device memory of COMMAND, such as a remote file, gets its recorded pages in one go when it is mapped, and the exit status
    is that of COMMAND.

    Files that changed since (inode, size or time) are skipped and counted. The exit status is 0 if all pages are there,
    else 1.

    \b
    Example:
        prefault replay start.rec --budget '2 GiB' --idle
    """
    if command and as_json:
        raise click.UsageError("--json and a COMMAND do not go together: the output is the command's")
    from prefault.recordings.recording_file import load
    from prefault.recordings.replaying import replay as bring_back

    with told_as_usage():
        loaded = load(recording)  # once: it may be a pipe
        result = bring_back(
            loaded, roots=dict(roots), budget=budget, threads=threads, idle=idle, check_time=not ignore_time,
            progress=wanted(progress),
        )  # fmt: skip
    if not command:
        return show(result, as_json, KIND, recording)
    from prefault.recordings.area_replay import replaying_environment
    from prefault.recordings.held_command import HeldCommand

    with replaying_environment(loaded) as environment, HeldCommand(command, environment) as held:
        held.release()
        return held.wait()


def wanted(progress: bool | None) -> bool:
    """Return whether progress is shown: by default on a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def show(result: ReplayResult, as_json: bool, kind: str, recording: str) -> int:
    """Print the result of a replay, and return the exit status."""
    for failure in result.failures:
        complain(str(failure))
    if as_json:
        print_json(
            kind, 1,
            {
                "recording": recording, "complete": result.complete, "bytes": result.bytes,
                "present_bytes": result.present_bytes, "skipped_bytes": result.skipped_bytes, "files": result.files,
                "changed": list(result.changed), "missing": list(result.missing), "over_budget": result.over_budget,
                "failures": [{"path": failure.path, "reason": failure.reason, "remedy": failure.remedy}
                             for failure in result.failures],
                "area_bytes": result.area_bytes, "skipped_areas": list(result.skipped_areas),
                "evicted_bytes": result.evicted_bytes, "seconds": result.seconds,
            },
        )  # fmt: skip
        return 0 if result.complete else 1
    left_out = f", {size(result.skipped_bytes)} left out" if result.skipped_bytes else ""
    lines = [
        f"{size(result.bytes)} brought in, {size(result.present_bytes)} were there{left_out};"
        f" {format_count(result.files, 'file')} whole, in {result.seconds:.2f} s"
    ]
    if result.evicted_bytes:
        lines.append(f"{size(result.evicted_bytes)} evicted")
    if result.area_bytes:
        lines.append(f"{size(result.area_bytes)} of device memory are there")
    if result.skipped_areas:
        lines.append(
            f"device memory that is not mapped here, give it to the program by 'prefault replay FILE -- COMMAND':"
            f" {some_of(result.skipped_areas)}"
        )
    if result.changed:
        lines.append(f"{format_count(len(result.changed), 'file')} changed since and skipped: {some_of(result.changed)}")
    if result.missing:
        count = format_count(len(result.missing), "file")
        lines.append(f"{count} gone, or below a root that was not given: {some_of(result.missing)}")
    if result.over_budget:
        count = format_count(result.over_budget, "file")
        lines.append(f"{count} did not fit into the budget, or into what memory limits leave, whole or in part")
    click.echo("\n".join(lines))
    return 0 if result.complete else 1
