"""Roots: directories with a name, so that a recording fits where the same files have other paths."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping

from prefault.files.failures import FileError
from prefault.files.file_systems import MADE_BY_KERNEL
from prefault.files.open_file import OpenFile
from prefault.recordings.recording_file import RecordedFile


class Roots:
    """Names of directories, and the way from absolute paths to paths below them and back.

    Args:
        directories: path of the directory by name.

    Raises:
        ValueError: an empty name, or one that is not UTF-8.
    """

    def __init__(self, directories: Mapping[str, str | os.PathLike[str]] | None = None) -> None:
        self._directories = {
            name: os.fsencode(os.path.realpath(os.fsdecode(path))) for name, path in (directories or {}).items()
        }
        if "" in self._directories:
            raise ValueError("a root has a name: root=DIR")
        for name in self._directories:
            if name.encode(errors="replace") != name.encode(errors="surrogatepass"):
                raise ValueError(f"the name of a root is UTF-8, and {name!r} is not")

    def split(self, path: str) -> tuple[str, bytes]:
        """Return the name of the innermost root that a path is below, and the rest; ``("", path)`` without one."""
        whole = os.fsencode(path)
        fitting = [
            (len(directory), name)
            for name, directory in self._directories.items()
            if whole.startswith(directory.rstrip(b"/") + b"/")
        ]
        if not fitting:
            return "", whole
        length, name = max(fitting)
        return name, whole[length:].lstrip(b"/")

    def place_of(self, file: RecordedFile) -> bytes | None:
        """Return the path of a recorded file here; None where its root is not among these."""
        if not file.root:
            return file.path
        directory = self._directories.get(file.root)
        return None if directory is None else os.path.join(directory, file.path)

    def open(self, file: RecordedFile) -> OpenFile | None:
        """Open a recorded file here; return None where its root is not among these.

        A recording may come from somebody else: only regular files are opened, and below a root only files that lie there.

        Raises:
            FileError: another kind of file, a file that the kernel makes, or a link that leads out of the root.
            OSError: open(2) failed.
        """
        place = self.place_of(file)
        if place is None or not file.root:
            return None if place is None else _open_regular(os.fsdecode(place))
        directory, path = self._directories[file.root], os.fsdecode(os.path.realpath(place))
        _check_below(directory, path)
        opened = _open_regular(path)
        try:
            # Again: a directory on the way may have been replaced by a link meanwhile.
            _check_below(directory, os.readlink(f"/proc/self/fd/{opened.fd}"))
        except BaseException:
            opened.close()
            raise
        return opened


def _check_below(directory: bytes, path: str) -> None:
    if not os.fsencode(path).startswith(directory.rstrip(b"/") + b"/"):
        raise FileError(errno.EXDEV, "leads out of its root, by a link", path, "give the directory that it leads to as root")


def _open_regular(path: str) -> OpenFile:
    if stat.S_ISBLK(os.stat(path).st_mode):
        raise FileError(errno.EINVAL, "is a block device, which recordings do not have", path)
    file = OpenFile(path)
    if file.is_block_device or file.file_system in MADE_BY_KERNEL:
        file.close()
        raise FileError(errno.EINVAL, f"is on {file.file_system}, which has no page cache", path)
    return file
