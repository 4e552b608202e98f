"""``prefault run``: run a command that leaves the page cache as it was."""

from __future__ import annotations

import click

from prefault.cli.messages import complain
from prefault.cli.options.recording_options import size, told_as_usage
from prefault.sizes import format_count


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--keep-cache", is_flag=True, required=True,
    help="Put the page cache of the files that COMMAND touches back as it was: evict what came, read what went.",
)  # fmt: skip
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def run(keep_cache: bool, command: tuple[str, ...]) -> int:  # noqa: ARG001  required: there is one mode
    """Run COMMAND, a backup say, without pushing other files out of the page cache for longer than it runs.

    The exit status is that of COMMAND (128 and the number of the signal that ended it). SIGTERM and Ctrl-C go to COMMAND.

    \b
    Example:
        prefault run --keep-cache -- tar -cf /backup/srv.tar /srv
    """
    from prefault.recordings.cache_keeping import run_keeping_cache

    with told_as_usage():
        kept = run_keeping_cache(command)
    stayed = f", {size(kept.stayed_bytes)} in use by others" if kept.stayed_bytes else ""
    click.echo(
        f"prefault: {size(kept.evicted_bytes)} evicted{stayed}, {size(kept.restored_bytes)} brought back, of"
        f" {format_count(kept.files, 'file')} (by {kept.way})", err=True,
    )  # fmt: skip
    if kept.lost_events:
        complain(f"the kernel dropped {kept.lost_events} events that came too fast: some pages are as the command left them")
    return kept.status
