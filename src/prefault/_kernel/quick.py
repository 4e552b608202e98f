"""ioctl(2), pread(2) and statx(2) on files whose content the kernel makes, without giving up the GIL.

os.pread, os.fstat and fcntl.ioctl give it up. Beside busy Python threads each call then takes milliseconds instead of a
microsecond.
"""

from __future__ import annotations

import ctypes
import struct

from prefault._kernel._call import INT, LONG, OFFSET, POINTER, SIZE, UINT, declare_quick, fail

AT_EMPTY_PATH = 0x1000
STATX_INO = 0x100
STATX = struct.Struct("32xQ96xII112x")
"""The fields ``stx_ino``, ``stx_dev_major`` and ``stx_dev_minor`` of ``struct statx``."""

_pread = declare_quick("pread", INT, POINTER, SIZE, OFFSET, result=LONG)
# No types: ctypes would call a converter for each argument, a third of the time of the whole call.
_ioctl = declare_quick("ioctl")
_statx = declare_quick("statx", INT, ctypes.c_char_p, INT, UINT, POINTER)


def ioctl(fd: int, request: int, argument: ctypes.Structure) -> int:
    """Call ioctl(2) with a structure that the kernel may change; return its result."""
    result = _ioctl(fd, request, ctypes.byref(argument))
    if result < 0:
        fail("ioctl")
    return result


def pread(fd: int, length: int) -> bytes:
    """Read up to ``length`` bytes from the start of a file. pread(2)."""
    buffer = ctypes.create_string_buffer(length)
    count = _pread(fd, buffer, length, 0)
    if count < 0:
        fail("pread")
    return buffer[:count]  # type: ignore[return-value]


def identity(fd: int) -> tuple[int, int, int]:
    """Return the inode and the device (major, minor) of an open file. statx(2), Linux 4.11."""
    buffer = ctypes.create_string_buffer(STATX.size)
    if _statx(fd, b"", AT_EMPTY_PATH, STATX_INO, buffer):
        fail("statx")
    return STATX.unpack(buffer)
