"""PROCMAP_QUERY (Linux 6.11): one mapping of a process, without reading all of /proc/pid/maps."""

from __future__ import annotations

import ctypes
import fcntl

PROCMAP_QUERY = 0xC0686611
PROCMAP_QUERY_VMA_READABLE = 0x01
PROCMAP_QUERY_VMA_WRITABLE = 0x02
PROCMAP_QUERY_VMA_EXECUTABLE = 0x04
PROCMAP_QUERY_VMA_SHARED = 0x08
PROCMAP_QUERY_COVERING_OR_NEXT_VMA = 0x10


class ProcmapQuery(ctypes.Structure):
    """``struct procmap_query``."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("query_flags", ctypes.c_uint64),
        ("query_addr", ctypes.c_uint64),
        ("vma_start", ctypes.c_uint64),
        ("vma_end", ctypes.c_uint64),
        ("vma_flags", ctypes.c_uint64),
        ("vma_page_size", ctypes.c_uint64),
        ("vma_offset", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("vma_name_size", ctypes.c_uint32),
        ("build_id_size", ctypes.c_uint32),
        ("vma_name_addr", ctypes.c_uint64),
        ("build_id_addr", ctypes.c_uint64),
    )


def procmap_query(fd: int, query: ProcmapQuery) -> None:
    """Look up one VMA by address, by ioctl(PROCMAP_QUERY) on an open ``/proc/pid/maps``.

    Raises:
        OSError: ENOENT where no VMA matches, ENOTTY before Linux 6.11.
    """
    fcntl.ioctl(fd, PROCMAP_QUERY, query, True)
