"""The FS_IOC_FIEMAP ioctl: where a file has blocks (Documentation/filesystems/fiemap.rst), Linux 2.6.28."""

from __future__ import annotations

import ctypes
import errno
import fcntl
from collections.abc import Iterator

FS_IOC_FIEMAP = 0xC020660B
FIEMAP_EXTENT_LAST = 1


class Fiemap(ctypes.Structure):
    """``struct fiemap``, without the extents that follow it."""

    _fields_ = (
        ("fm_start", ctypes.c_uint64),
        ("fm_length", ctypes.c_uint64),
        ("fm_flags", ctypes.c_uint32),
        ("fm_mapped_extents", ctypes.c_uint32),
        ("fm_extent_count", ctypes.c_uint32),
        ("fm_reserved", ctypes.c_uint32),
    )


class FiemapExtent(ctypes.Structure):
    """``struct fiemap_extent``: a range with blocks, written to or only reserved."""

    _fields_ = (
        ("fe_logical", ctypes.c_uint64),
        ("fe_physical", ctypes.c_uint64),
        ("fe_length", ctypes.c_uint64),
        ("fe_reserved64", ctypes.c_uint64 * 2),
        ("fe_flags", ctypes.c_uint32),
        ("fe_reserved", ctypes.c_uint32 * 3),
    )


def fiemap(fd: int, offset: int, length: int, extents: int) -> list[FiemapExtent]:
    """Return up to ``extents`` extents that touch ``length`` bytes of the file from ``offset`` on. The file position stays.

    Raises:
        OSError: EOPNOTSUPP where the file system cannot tell (tmpfs, NFS).
    """

    class FiemapRequest(ctypes.Structure):
        _fields_ = (("head", Fiemap), ("extents", FiemapExtent * extents))

    request = FiemapRequest(Fiemap(offset, length, 0, 0, extents))
    fcntl.ioctl(fd, FS_IOC_FIEMAP, request, True)
    return list(request.extents[: request.head.fm_mapped_extents])


def holes(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges in ``[start, stop)`` of a file that have no blocks; none where the file system cannot tell.

    Unlike lseek(SEEK_HOLE), FIEMAP moves no file position, which other descriptors may share, and reports no hole where
    blocks were allocated and never written.
    """
    at = start
    while at < stop:
        try:
            extents = fiemap(fd, at, stop - at, _EXTENTS)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise
            return
        for extent in extents:
            if extent.fe_logical > at:
                yield at, min(extent.fe_logical, stop)
            at = max(at, extent.fe_logical + extent.fe_length)
        if len(extents) < _EXTENTS or extents[-1].fe_flags & FIEMAP_EXTENT_LAST:
            break
    if at < stop:
        yield at, stop


_EXTENTS = 256
