"""statfs(2): the file system that a file lies on."""

from __future__ import annotations

import ctypes

from prefault._kernel._call import INT, POINTER, declare, fail


class Statfs(ctypes.Structure):
    """``struct statfs``."""

    _fields_ = (
        ("f_type", ctypes.c_long),
        ("f_bsize", ctypes.c_long),
        ("f_blocks", ctypes.c_long),
        ("f_bfree", ctypes.c_long),
        ("f_bavail", ctypes.c_long),
        ("f_files", ctypes.c_long),
        ("f_ffree", ctypes.c_long),
        ("f_fsid", ctypes.c_int * 2),
        ("f_namelen", ctypes.c_long),
        ("f_frsize", ctypes.c_long),
        ("f_flags", ctypes.c_long),
        ("f_spare", ctypes.c_long * 4),
    )


_statfs = declare("statfs", ctypes.c_char_p, POINTER)
_fstatfs = declare("fstatfs", INT, POINTER)


def statfs_type(path: bytes) -> int:
    """Return the magic number of the file system of a path (linux/magic.h), links in it followed. statfs(2)."""
    answer = Statfs()
    if _statfs(path, ctypes.addressof(answer)):
        fail("statfs")
    return _magic(answer)


def fstatfs_type(fd: int) -> int:
    """Return the magic number of the file system of an open file (linux/magic.h). fstatfs(2)."""
    answer = Statfs()
    if _fstatfs(fd, ctypes.addressof(answer)):
        fail("fstatfs")
    return _magic(answer)


def _magic(answer: Statfs) -> int:
    magic: int = answer.f_type & 0xFFFF_FFFF  # 32 bits, sign-extended for some file systems
    return magic
