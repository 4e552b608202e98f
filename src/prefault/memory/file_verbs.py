"""Files in place of memory: the interface to what knows their page cache, for verbs that are given a path.

A higher layer implements it. It is loaded when the first path comes, and only an object without memory is asked whether it
is one, so that calls on memory pay nothing for it.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from prefault.sizes import Size


class FileNames:
    """Base of objects that stand for files, beside paths: the selections of :func:`prefault.select`."""


class HeldFiles(abc.ABC):
    """Lock of files, which lasts until it is closed; a context manager. :class:`prefault.FileLock` explains the numbers."""

    files: int
    bytes: int
    failures: Sequence[Any]
    seconds: float

    @abc.abstractmethod
    def close(self) -> None:
        """End the locks; idempotent. The pages stay cached until the kernel wants the memory."""

    @property
    @abc.abstractmethod
    def closed(self) -> bool:
        """True once the locks have ended, and where there were none."""

    def __enter__(self) -> HeldFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class FileVerbs(abc.ABC):
    """Verbs on files. Each has the arguments of the one on memory of its name, and refuses those that files do not have."""

    @abc.abstractmethod
    def populate(self, files: Any, *, offset: Size, length: Size | None, **options: Any) -> Any:
        """Bring all of it into the page cache; return the engine's result."""

    @abc.abstractmethod
    def plan(self, files: Any, *, offset: Size, length: Size | None, **options: Any) -> Any:
        """Return the engine's plan, whose notes tell what is missing, and how it would be brought in."""

    @abc.abstractmethod
    def residency(self, files: Any, *, offset: Size, length: Size | None, nodes: bool) -> Any:
        """Return the residency of one file in the page cache, by byte offsets."""

    @abc.abstractmethod
    def lock(self, files: Any, *, offset: Size, length: Size | None, **options: Any) -> HeldFiles:
        """Bring all of it into the page cache, and lock it there."""


_loaders: list[Callable[[], FileVerbs]] = []


def provide_file_verbs(load: Callable[[], FileVerbs]) -> None:
    """Have ``load`` called for the verbs when the first path comes."""
    _loaders[:] = [load]


def verbs_on(target: Any) -> FileVerbs | None:
    """Return the verbs on files if an object is a path, a list of paths, or stands for files; None for anything else."""
    if not _loaders:
        return None
    if isinstance(target, list | tuple):
        are_files = bool(target) and all(isinstance(item, str | os.PathLike) for item in target)
    else:
        are_files = isinstance(target, str | os.PathLike | FileNames)
    return _loaders[0]() if are_files else None
