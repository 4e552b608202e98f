"""``prefault run``: run a command that leaves the page cache as it was."""

from __future__ import annotations

import click

from prefault.cli.json_output import json_option, print_json
from prefault.cli.recording_options import size, told_as_usage

KIND = "prefault-run"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--keep-cache", is_flag=True, required=True,
    help="Put the page cache of the files that COMMAND touches back as it was: evict what came, read what went.",
)  # fmt: skip
@json_option(KIND)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def run(keep_cache: bool, as_json: bool, command: tuple[str, ...]) -> int:  # noqa: ARG001  required: there is one mode
    """Run COMMAND without pushing other files out of the page cache for longer than it runs.

    The exit status is that of COMMAND (128 and the number of the signal that ended it). SIGTERM and Ctrl-C go to COMMAND.

    \b
    Example:
        prefault run --keep-cache -- tar -cf /backup/srv.tar /srv
    """
    from prefault.recordings.cache_keeping import run_keeping_cache

    with told_as_usage():
        kept = run_keeping_cache(command)
    if as_json:
        print_json(
            KIND, 1,
            {
                "exit_status": kept.status, "way": kept.way, "files": kept.files, "evicted_bytes": kept.evicted_bytes,
                "stayed_bytes": kept.stayed_bytes, "restored_bytes": kept.restored_bytes,
            },
        )  # fmt: skip
    else:
        stayed = f", {size(kept.stayed_bytes)} in use by others" if kept.stayed_bytes else ""
        click.echo(
            f"prefault: {size(kept.evicted_bytes)} evicted{stayed}, {size(kept.restored_bytes)} brought back, of"
            f" {kept.files} files (by {kept.way})", err=True,
        )  # fmt: skip
    return kept.status
