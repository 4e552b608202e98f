"""Roots: directories with a name, so that a recording fits where the same files have other paths."""

from __future__ import annotations

import os
from collections.abc import Mapping

from prefault.recordings.recording_file import RecordedFile


class Roots:
    """Names of directories, and the way from absolute paths to paths below them and back.

    Args:
        directories: path of the directory by name.

    Raises:
        ValueError: an empty name.
    """

    def __init__(self, directories: Mapping[str, str | os.PathLike[str]] | None = None) -> None:
        self._directories = {
            name: os.fsencode(os.path.realpath(os.fsdecode(path))) for name, path in (directories or {}).items()
        }
        if "" in self._directories:
            raise ValueError("a root has a name: root=DIR")

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

    def path_of(self, file: RecordedFile) -> str | None:
        """Return the path of a recorded file here; None where its root is not among these."""
        if not file.root:
            return os.fsdecode(file.path)
        directory = self._directories.get(file.root)
        return None if directory is None else os.fsdecode(os.path.join(directory, file.path))
