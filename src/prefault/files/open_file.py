"""One file, open for reading, with the facts that decide how its page cache is looked at and filled."""

from __future__ import annotations

import errno
import os
import stat
from types import TracebackType
from typing import NamedTuple

from prefault._kernel.statfs import fstatfs_type
from prefault.files.failures import FileError
from prefault.files.file_systems import name_of
from prefault.ranges import PageRange
from prefault.sizes import MAX_SIZE, PAGE_SIZE

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
)


class FileIdentity(NamedTuple):
    """Device and inode of a file: equal for hard links of one file."""

    device: int
    inode: int


class OpenFile:
    """A regular file or a block device, open for reading; a context manager that closes it.

    The file is opened without moving its access time where this process may ask for that (O_NOATIME, open(2)), and never
    waits for the other side of a FIFO: only regular files and block devices are opened at all.

    Attributes:
        path: the path that it was opened by; bytes that are no UTF-8 as surrogates.
        fd: the read-only descriptor, which this object owns; -1 after :meth:`close`.
        size: bytes when the file was opened, or at the last :meth:`current_size`.
        identity: device and inode.
        modified_ns: time of the last modification when it was opened, in nanoseconds since 1970.
        allocated_bytes: bytes of blocks that it had when it was opened; less than ``size`` for a sparse file.
        file_system: name of the file system's type, such as ``"ext4"`` (also ext2 and ext3) or ``"fuse"``; the magic number
            of a type without a known name, ``"0x1234"``; ``"block device"`` for a block device.
        page_size: bytes of a page of the page cache: the huge page size on hugetlbfs, else the base page size.

    Raises:
        FileError: neither a regular file nor a block device.
        OSError: open(2) failed, as for a missing file or a missing permission.
    """

    __slots__ = (
        "allocated_bytes",
        "fd",
        "file_system",
        "identity",
        "is_block_device",
        "modified_ns",
        "owner",
        "page_size",
        "path",
        "size",
    )

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> None:
        self.fd = -1
        self.path = os.fsdecode(path)
        # Looked at before it is opened: to open a FIFO wakes its writer, and to open a device may do anything.
        _check_kind(os.stat(self.path), self.path)
        self.fd = _open(self.path)
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        status = os.fstat(self.fd)
        _check_kind(status, self.path)
        self.identity = FileIdentity(status.st_dev, status.st_ino)
        self.modified_ns = status.st_mtime_ns
        self.allocated_bytes = status.st_blocks * 512
        self.owner = status.st_uid
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        self.page_size = PAGE_SIZE
        if self.is_block_device:
            self.file_system = "block device"
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
        else:
            self.file_system = name_of(fstatfs_type(self.fd))
            self.size = status.st_size
            if self.file_system == "hugetlbfs":
                self.page_size = status.st_blksize

    def current_size(self) -> int:
        """Ask for the size in bytes as it is now, and keep it in ``size``."""
        self.size = os.lseek(self.fd, 0, os.SEEK_END) if self.is_block_device else os.fstat(self.fd).st_size
        return self.size

    def pages(self, start: int = 0, stop: int | None = None) -> PageRange:
        """Return the whole pages that hold the bytes ``[start, stop)`` of the file, cut at the end of the file.

        Args:
            start: byte offset.
            stop: byte offset; None: the end of the file.

        Raises:
            ValueError: negative, or backwards.
        """
        end = self.size if stop is None else stop
        if start < 0 or end < 0 or (stop is not None and start > stop) or max(start, end) > MAX_SIZE:
            raise ValueError(f"not a range of a file: [{start}, {stop})")
        end = min(end, self.size)
        return PageRange.outward(min(start, end), end, self.page_size)

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"OpenFile({self.path!r}, size={self.size}, file_system={self.file_system!r})"


def _check_kind(status: os.stat_result, path: str) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    if stat.S_ISDIR(mode):
        raise FileError(errno.EISDIR, "is a directory", path, "name the files in it, or give the directory to warm()")
    kind = next((name for test, name in _KINDS if test(mode)), "of an unknown kind")
    raise FileError(errno.EINVAL, f"is {kind}", path, "only regular files and block devices have a page cache")


OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Flags by which files are opened. O_NONBLOCK: between stat and open somebody may have put a FIFO there."""


def _open(path: str) -> int:
    try:
        fd = os.open(path, OPEN_FLAGS | os.O_NOATIME)
    except PermissionError:  # EPERM: only the owner may leave the access time alone; else the second attempt tells
        fd = os.open(path, OPEN_FLAGS)
    os.set_blocking(fd, True)  # FUSE passes the flag to its server, which may answer EAGAIN
    return fd
