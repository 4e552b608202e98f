"""Snapshots of the page cache of files, saved now and again, as PostgreSQL's autoprewarm does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import CannotTellError
from prefault.files.open_file import OpenFile
from prefault.files.selection import SelectedFile, select
from prefault.recordings.recording_file import (
    RecordedFile,
    Recording,
    RecordingError,
    can_be_replaced,
    clip,
    load,
    plain,
)
from prefault.recordings.roots import Roots

INTERVAL_S = 300.0
"""Seconds between two snapshots: the default of autoprewarm."""
_LOCK_S = 10.0
"""Seconds to wait for a process that saves a snapshot in the same directory."""
_LOCK_PAUSE_S = 0.02


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
                notes.append(plain(str(found)))
            continue
        if stat.S_ISBLK(found.stat.st_mode):
            notes.append(plain(f"{found.path}: is a block device, which snapshots do not have: name files"))
            continue
        root, below = known.split(found.path)
        try:
            with OpenFile(found.path) as file:
                edges = clip(cached_ranges(file), file.size)
                files[root, below] = RecordedFile(below, root, *file.identity, file.size, file.modified_ns, edges)
        except FileNotFoundError:  # removed since it was listed, as temporary files are: nothing of it can be lost
            continue
        except (CannotTellError, OSError) as error:
            notes.append(plain(f"{found.path}: {error.strerror}"))
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
    given = list(paths)
    taken = take_snapshot(given, roots)
    with _locked(target):
        before = _full_one(target)
        if before is not None:
            taken.notes.extend(_lost_file_systems(before, taken, given, Roots(roots)))
            taken = msgspec.structs.replace(taken, complete=not taken.notes)
            if not taken.complete:
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


def _full_one(path: str | os.PathLike[str]) -> Recording | None:
    """Return the snapshot that a file has, if it is full."""
    try:
        if not can_be_replaced(os.fsdecode(path)):
            return None
        found = load(path)
    except (OSError, RecordingError):
        return None
    return found if found.complete else None


def _lost_file_systems(
    before: Recording, taken: Recording, paths: Iterable[str | os.PathLike[str]], roots: Roots
) -> Iterator[str]:
    """Yield a sentence for each file system that a snapshot had files of below the paths, and that is not there any more.

    An empty directory where a file system is not mounted yet looks like one whose files were removed. Its device number
    tells them apart, and so does a file that still has its name: numbers of network file systems differ from mount to mount.
    """
    here = {(file.root, file.path) for file in taken.files}
    devices = {file.device for file in taken.files}
    tops = [os.fsencode(os.path.realpath(os.fsdecode(path))).rstrip(b"/") for path in paths]
    by_device: dict[int, list[RecordedFile]] = {}
    for file in before.files:
        by_device.setdefault(file.device, []).append(file)
    for device, files in by_device.items():
        if device in devices:
            continue
        places = [place for file in files if (place := roots.place_of(file)) is not None]
        below = [place for place in places if any(place == top or place.startswith(top + b"/") for top in tops)]
        if not below or any((file.root, file.path) in here for file in files):
            continue
        if device not in {_device_of(directory) for directory in {os.path.dirname(place) for place in below}}:
            yield plain(
                f"all {len(below)} files of a file system are gone, such as {os.fsdecode(below[0])}: is it not mounted?"
            )


def _device_of(directory: bytes) -> int | None:
    """Return the device number of a directory, or of the nearest one above that is there; None: it cannot be looked at."""
    while True:
        try:
            return os.stat(directory).st_dev
        except (FileNotFoundError, NotADirectoryError):
            if directory == os.path.dirname(directory):
                return None
            directory = os.path.dirname(directory)
        except OSError:
            return None


@contextlib.contextmanager
def _locked(target: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes that save snapshots in this directory out, where flock(2) works."""
    directory = os.path.dirname(os.path.realpath(os.fsdecode(target)))
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # to be told by the save
        yield
        return
    try:
        until = time.monotonic() + _LOCK_S
        while not _flocked(fd) and time.monotonic() < until:
            time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(fd)


def _flocked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # NFS has it for files that are open for writing only
        return True
    return True
