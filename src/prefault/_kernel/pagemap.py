"""The entries of /proc/pid/pagemap, and the PAGEMAP_SCAN ioctl (Linux 6.7)."""

from __future__ import annotations

import ctypes
import enum
import fcntl
import os

PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1


class PageCategory(enum.IntFlag):
    """``PAGE_IS_*``: the categories of pages that PAGEMAP_SCAN reports."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8  # Linux 6.15


PM_SOFT_DIRTY = 1 << 55
PM_MMAP_EXCLUSIVE = 1 << 56
PM_UFFD_WP = 1 << 57
PM_GUARD_REGION = 1 << 58  # Linux 6.15
PM_FILE = 1 << 61
PM_SWAP = 1 << 62
PM_PRESENT = 1 << 63
PM_PFRAME_MASK = (1 << 55) - 1

ENTRY_BYTES = 8


class PageRegion(ctypes.Structure):
    """``struct page_region``: a run of pages of the same categories."""

    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("categories", ctypes.c_uint64))


class PmScanArg(ctypes.Structure):
    """``struct pm_scan_arg``."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


def pagemap_scan(fd: int, argument: PmScanArg) -> int:
    """Scan a range by ioctl(PAGEMAP_SCAN) on an open pagemap; return the number of regions filled in.

    ``argument.walk_end`` is where the scan ended. See Documentation/admin-guide/mm/pagemap.rst.
    """
    return int(fcntl.ioctl(fd, PAGEMAP_SCAN, argument, True))


def read_pagemap(fd: int, first_page: int, pages: int) -> bytes:
    """Read the 64-bit entries of ``pages`` pages from page number ``first_page`` on, as native-endian bytes."""
    wanted = pages * ENTRY_BYTES
    entries = bytearray()
    while len(entries) < wanted:  # a read returns no more than fits the kernel's buffer
        part = os.pread(fd, wanted - len(entries), first_page * ENTRY_BYTES + len(entries))
        if not part:
            break
        entries += part
    return bytes(entries)
