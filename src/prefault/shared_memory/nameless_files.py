"""Files in /dev/shm that have no name while they are filled, so that nothing is left of them if that fails."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager

from prefault._kernel._call import explain
from prefault._system.descriptors import opened
from prefault._system.proc import read_mounts
from prefault.engine.populating import HeadroomChoice, populate
from prefault.errors import MappingError
from prefault.mapping.mapping import Mapping
from prefault.memory.backings import Descriptor

DIRECTORY = "/dev/shm"
"""The place where shm_open(3) looks for names, in glibc and musl."""

_MODE = 0o600
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


def file_name(name: str) -> str:
    """Return the name of the file in /dev/shm for a name of shm_open(3).

    Raises:
        OSError: it is empty, has a slash inside, or is too long (EINVAL), as shm_open says.
        UnicodeEncodeError: it is no UTF-8, so that the standard class and the resource tracker could not remove it.
    """
    stripped = name.lstrip("/")
    if not stripped or "/" in stripped or len(stripped.encode()) > 255:
        raise OSError(errno.EINVAL, "a name of shared memory has 1 to 255 bytes and no slash inside", name)
    return stripped


def create_nameless() -> int | None:
    """Create a file without a name and return its descriptor; None where the file system has no O_TMPFILE.

    Source: open(2), O_TMPFILE (tmpfs has it since Linux 3.11).
    """
    try:
        with _directory() as at:
            return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE, dir_fd=at)
    except OSError as error:
        if error.errno in _NO_TMPFILE:
            return None
        raise _refusal(error) from error


def create_named(name: str) -> int:
    """Create an empty file with a name, as shm_open(3) does, and return its descriptor.

    Raises:
        FileExistsError: there is one of this name.
        MappingError: no file can be made.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with _directory() as at:
            return os.open(file_name(name), flags, _MODE, dir_fd=at)
    except FileExistsError:
        raise
    except OSError as error:
        raise _refusal(error) from error


def give_name(fd: int, name: str) -> None:
    """Give a name to a file that has none.

    Raises:
        FileExistsError: there is another file of this name.
        MappingError: the file system refuses it.

    Source: open(2), on linkat(2) and O_TMPFILE.
    """
    try:
        with _directory() as at:
            os.link(f"/proc/self/fd/{fd}", file_name(name), dst_dir_fd=at)
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from error
    except OSError as error:
        raise _refusal(error) from error


def open_existing(name: str) -> int:
    """Open shared memory by its name, as shm_open(3) does, and return the descriptor."""
    try:
        with _directory() as at:
            return os.open(file_name(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), name) from error


def remove(name: str) -> None:
    """Remove a name, as shm_unlink(3) does."""
    os.unlink(f"{DIRECTORY}/{file_name(name)}")


def allocate(fd: int, headroom: HeadroomChoice = "check") -> None:
    """Fill the holes of a file by fallocate(2), with the limits checked; no page table is made.

    Raises:
        HeadroomError: a limit leaves less than is needed.
        BackingFullError: the kernel found no space.
    """
    with Mapping(backing=Descriptor(fd)) as mapping:
        populate(mapping, method="fallocate", headroom=headroom)


def huge_option(fd: int) -> str:
    """Return the mount option ``huge=`` of the tmpfs that holds a file; ``"never"`` where it is not set."""
    device = os.fstat(fd).st_dev
    options = next((mount.options for mount in read_mounts() if mount.device == device), "")
    return next((word.removeprefix("huge=") for word in options.split(",") if word.startswith("huge=")), "never")


def _directory() -> AbstractContextManager[int]:
    return opened(os.open, DIRECTORY, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _refusal(error: OSError) -> MappingError:
    number = error.errno or 0
    reason = f"no inodes are left ({DIRECTORY} can be remounted with a larger nr_inodes=)" if number == errno.ENOSPC else ""
    if number == errno.ENOENT:
        reason = "it does not exist; mount a tmpfs there"
    return MappingError(number, f"no shared memory can be made in {DIRECTORY}: {reason or explain(number)}")
