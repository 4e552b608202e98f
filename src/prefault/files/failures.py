"""Failures that concern one file: the others go on."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from prefault.errors import errno_name


class FileFailure(NamedTuple):
    """One file that a call could not do, or could not do whole.

    Attributes:
        path: the file, as it was given or found; bytes that are no UTF-8 as surrogates (:func:`os.fsdecode`).
        reason: the cause, in a few words.
        remedy: the step that helps; empty where none is known.
        errno: the kernel's error number; None where the kernel reported no error.
    """

    path: str
    reason: str
    remedy: str = ""
    errno: int | None = None

    @classmethod
    def of(cls, path: str, error: OSError) -> FileFailure:
        """Explain an OSError about ``path``."""
        number = error.errno
        if isinstance(error, FileError):
            return cls(path, error.reason, error.remedy, number)
        if not path:
            return cls(path, "the path is empty", "name a file; a variable in the command may be unset", number)
        return cls(path, errno_name(number), _REMEDIES.get(number or 0, ""), number)

    def __str__(self) -> str:
        text = f"{self.path or repr('')}: {self.reason}"
        return f"{text}: {self.remedy}" if self.remedy else text


class LostPages(FileFailure):
    """Pages of a file that were read, and are not in the page cache any more."""

    __slots__ = ()


class FewLostPages(LostPages):
    """Lost pages that are too few to tell of short memory: the kernel may take cold pages at any time."""

    __slots__ = ()


_REMEDIES = {
    errno.EACCES: "run as its owner or as root, or give read permission (chmod)",
    errno.EPERM: "run as its owner or as root",
    errno.ENOENT: "check the path; the file may have been removed meanwhile",
    errno.ELOOP: "its symbolic links form a loop",
    errno.EIO: "the device or the server could not read it: look at dmesg, or at the server's log",
    errno.ESTALE: "it was replaced on the server: open it again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files (sysctl fs.file-max)",
    errno.ENAMETOOLONG: "the path is longer than the file system allows",
    errno.ENXIO: "no device or no process is behind it",
    errno.ENOTCONN: "its file server is gone: mount it again",
    errno.EAGAIN: "another process holds a lease on it (fcntl(2), F_SETLEASE): try again",
    errno.ETIMEDOUT: "the server did not answer in time",
}


class FileError(OSError):
    """A file that cannot be worked on, with the reason and the remedy.

    Attributes:
        filename: the path.
        reason: the cause, in a few words.
        remedy: the step that helps; empty where none is known.
    """

    def __init__(self, number: int, reason: str, path: str, remedy: str = "") -> None:
        super().__init__(number, reason, path)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return str(FileFailure(os.fsdecode(self.filename), self.reason, self.remedy, self.errno))


class CannotTellError(FileError):
    """The kernel does not say which pages of this file are in the page cache, to this process or of this file system."""
