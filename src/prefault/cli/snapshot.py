"""``prefault snapshot``: save which pages of files are in the page cache, and bring them back."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from prefault.cli.json_output import json_option, print_json
from prefault.cli.messages import complain
from prefault.cli.options.option_types import SecondsType
from prefault.cli.options.recording_options import (
    check_writable,
    replay_options,
    root_option,
    size,
    tell_notes,
    told_as_usage,
)
from prefault.cli.replay import show, wanted
from prefault.sizes import format_count

if TYPE_CHECKING:
    from prefault.recordings.snapshots import SavedSnapshot

SAVED = "prefault-snapshot-save"
RESTORED = "prefault-snapshot-restore"

_FILE = click.argument("file", type=click.Path(dir_okay=False))
_PATHS = click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="PATH...")


@click.group()
def snapshot() -> None:
    """Save which pages of files are in the page cache, and bring them back.

    \b
    Example:
        prefault snapshot save cache.snap /srv/database
        prefault snapshot restore cache.snap
    """


@snapshot.command()
@_FILE
@_PATHS
@root_option
@json_option(SAVED)
def save(file: str, paths: tuple[str, ...], roots: tuple[tuple[str, str], ...], as_json: bool) -> int:
    """Save in FILE which pages of PATH... are in the page cache.

    A snapshot without some of the files does not replace a full one; the exit status is 1 then.

    \b
    Example:
        prefault snapshot save cache.snap /srv/database
    """
    from prefault.recordings.snapshots import save_snapshot

    with told_as_usage():
        saved = save_snapshot(file, paths, dict(roots))
    tell_notes(saved.recording.notes)
    _tell_partial(file, saved)
    if as_json:
        print_json(SAVED, 1, _saved(file, saved))
    elif saved.written:
        count = format_count(len(saved.recording.files), "file")
        click.echo(f"{size(saved.recording.file_bytes)} of {count} cached: {file}")
    return 0 if saved.recording.complete else 1


def _saved(file: str, saved: SavedSnapshot) -> dict[str, object]:
    recording = saved.recording
    return {
        "recording": file, "written": saved.written, "complete": recording.complete, "files": len(recording.files),
        "file_bytes": recording.file_bytes, "notes": recording.notes,
    }  # fmt: skip


def _tell_partial(file: str, saved: SavedSnapshot) -> None:
    if not saved.written:
        complain(f"{file}: kept as it is: it is full, and this snapshot lacks files: remove it to have the partial one")


@snapshot.command()
@_FILE
@click.option("--exact", is_flag=True, help="Evict what is cached of these files now and was not then.")
@replay_options
@json_option(RESTORED)
def restore(
    file: str, exact: bool, roots: tuple[tuple[str, str], ...], budget: int | None, threads: int | None, idle: bool,
    ignore_time: bool, progress: bool | None, as_json: bool,
) -> int:  # fmt: skip
    """Bring the pages back that were cached when FILE was saved.

    Files that changed since (inode, size or time) are skipped and counted. The exit status is 0 if all pages are there.

    \b
    Example:
        prefault snapshot restore cache.snap --exact
    """
    from prefault.recordings.replaying import replay

    with told_as_usage():
        result = replay(
            file, roots=dict(roots), budget=budget, threads=threads, idle=idle, check_time=not ignore_time, exact=exact,
            progress=wanted(progress),
        )  # fmt: skip
    return show(result, as_json, RESTORED, file)


@snapshot.command()
@_FILE
@_PATHS
@click.option(
    "--interval", type=SecondsType(0, 366 * 86400), default=300.0, show_default=True, metavar="SECONDS",
    help="Time between two snapshots; 0: at the end only.",
)  # fmt: skip
@click.option("--no-restore", is_flag=True, help="Do not restore FILE first.")
@replay_options
def auto(
    file: str, paths: tuple[str, ...], interval: float, no_restore: bool, roots: tuple[tuple[str, str], ...],
    budget: int | None, threads: int | None, idle: bool, ignore_time: bool, progress: bool | None,
) -> int:  # fmt: skip
    """Restore FILE if there is one, then save PATH... in it every 300 seconds, and at the end, by SIGTERM or Ctrl-C.

    The exit status after SIGTERM or Ctrl-C is 0. A restore that they interrupt is followed by no snapshot, which would lack
    the rest.

    \b
    Example:
        prefault snapshot auto /var/lib/cache.snap /srv/database --idle
    """
    from prefault.recordings.recording_file import RecordingError
    from prefault.recordings.replaying import replay
    from prefault.recordings.snapshots import save_snapshot, save_snapshots

    check_writable(file)
    if not no_restore and os.path.exists(file):
        with told_as_usage():
            try:
                result = replay(
                    file, roots=dict(roots), budget=budget, threads=threads, idle=idle, check_time=not ignore_time,
                    progress=wanted(progress),
                )  # fmt: skip
            except RecordingError as error:
                complain(f"{error}; going on without it")
            else:
                click.echo(f"restored: {size(result.bytes)} brought in, {size(result.present_bytes)} were there", err=True)

    def write() -> None:
        try:
            saved = save_snapshot(file, paths, dict(roots))
        except OSError as error:  # a full disk, which may have room the next time
            complain(f"{file}: {error.strerror}")
            return
        _tell_partial(file, saved)
        if saved.written:
            count = format_count(len(saved.recording.files), "file")
            click.echo(f"saved: {size(saved.recording.file_bytes)} of {count}", err=True)

    with _end_signals() as wait:
        click.echo("watching", err=True)
        save_snapshots(write, wait, interval)
    return 0


@contextmanager
def _end_signals() -> Iterator[Callable[[float | None], bool]]:
    """Keep SIGINT and SIGTERM from cutting a snapshot short.

    Yields:
        A function that waits for some seconds, None: for ever, and returns True at once where one of them has come.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda seconds: bool(select.select([reader], [], [], seconds)[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(reader)
        os.close(writer)
