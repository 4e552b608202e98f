"""Snapshots of the page cache of files, saved now and again, as PostgreSQL's autoprewarm does."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import CannotTellError
from prefault.files.open_file import OpenFile
from prefault.files.selection import SelectedFile, select
from prefault.recordings.recording_file import RecordedFile, Recording, RecordingError, clip, load
from prefault.recordings.roots import Roots

INTERVAL_S = 300.0
"""Seconds between two snapshots: the default of autoprewarm."""


class SavedSnapshot(NamedTuple):
    """A snapshot, and whether it was written.

    Attributes:
        recording: the pages that were cached.
        written: False where it is partial, and the file has a full one.
    """

    recording: Recording
    written: bool


def take_snapshot(
    paths: Iterable[str | os.PathLike[str]], roots: Mapping[str, str | os.PathLike[str]] | None = None
) -> Recording:
    """Return which pages of files are in the page cache.

    The snapshot is complete if every file below the paths could be looked at. Files without a cached page are in it as well.

    Args:
        paths: files and directories.
        roots: directories by name, see :func:`prefault.replay`.
    """
    known, notes, files = Roots(roots), [], dict[tuple[str, bytes], RecordedFile]()
    named = [os.path.realpath(os.fsdecode(path)) for path in paths]
    for found in select(named):
        if not isinstance(found, SelectedFile):
            if found.errno != errno.ENOENT or found.path in named:  # others were removed since they were listed
                notes.append(_plain(str(found)))
            continue
        root, below = known.split(found.path)
        try:
            with OpenFile(found.path) as file:
                edges = clip(cached_ranges(file), file.size)
                files[root, below] = RecordedFile(below, root, *file.identity, file.size, file.modified_ns, edges)
        except FileNotFoundError:  # removed since it was listed, as temporary files are: nothing of it can be lost
            continue
        except (CannotTellError, OSError) as error:
            notes.append(_plain(f"{found.path}: {error.strerror}"))
    ordered = [files[key] for key in sorted(files)]
    return Recording("snapshot", time.time_ns(), [], not notes, notes, ordered, [])


def save_snapshot(
    target: str | os.PathLike[str], paths: Iterable[str | os.PathLike[str]],
    roots: Mapping[str, str | os.PathLike[str]] | None = None,
) -> SavedSnapshot:  # fmt: skip
    """Save which pages of files are in the page cache; a partial snapshot does not replace a full one.

    Args:
        target: file that gets the snapshot.
        paths: files and directories.
        roots: directories by name, see :func:`prefault.replay`.

    Raises:
        OSError: the file cannot be written; the one that was there stays.
    """
    taken = take_snapshot(paths, roots)
    if not taken.complete and _is_full(target):
        return SavedSnapshot(taken, written=False)
    taken.save(target)
    return SavedSnapshot(taken, written=True)


def save_snapshots(save: Callable[[], None], wait: Callable[[float | None], bool], interval_s: float = INTERVAL_S) -> None:
    """Save a snapshot again and again, and at the end. Ctrl-C while one is saved is the end as well.

    Args:
        save: saves one.
        wait: waits for a number of seconds, None: for ever; returns True when it is time to end.
        interval_s: seconds between two snapshots; 0: at the end only.
    """
    with contextlib.suppress(KeyboardInterrupt):
        while not wait(interval_s or None):
            save()
    save()


def _is_full(path: str | os.PathLike[str]) -> bool:
    try:
        return load(path).complete
    except (OSError, RecordingError):
        return False


def _plain(text: str) -> str:
    """Return a text without surrogates, which MessagePack cannot have."""
    return os.fsencode(text).decode(errors="backslashreplace")
