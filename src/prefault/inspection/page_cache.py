"""The part of the files behind memory that is in the page cache: cachestat(2) where it answers, else mincore(2)."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from prefault._kernel.cachestat import PageCache, cachestat
from prefault._system import capabilities
from prefault.inspection.mincore import resident
from prefault.memory.borrowing import Borrowed
from prefault.memory.vma import Backing, Vma, any_descriptor, vmas
from prefault.ranges import PageRange
from prefault.sizes import PAGE_SIZE


def page_cache_of(memory: Borrowed, buffer: Any, pages: PageRange) -> PageCache | None:
    """Return the page cache of the file behind a borrowed Mapping; None without a file, or where the kernel refuses."""
    if memory.fd is None or not pages or not capabilities.CACHESTAT.available:
        return None
    try:
        return cachestat(memory.fd, buffer.file_offset + pages.start - memory.address, pages.length)
    except OSError:  # hugetlbfs has none, and a file that we may not write tells nothing
        return None


def cached_bytes(pages: PageRange) -> int | None:
    """Count the bytes of the files behind ``pages`` in the page cache; None without a file, or where none tells."""
    known = [
        _cached_in(vma, pages & PageRange(vma.start, vma.stop))
        for vma in vmas(pages.start, pages.stop)
        if vma.inode and vma.backing in (Backing.FILE, Backing.TMPFS, Backing.MEMFD)
    ]
    told = [count for count in known if count is not None]
    return sum(told) if told else None


def _cached_in(vma: Vma, pages: PageRange) -> int | None:
    fd = any_descriptor(vma) if capabilities.CACHESTAT.available else None
    if fd is not None:
        with contextlib.suppress(OSError):  # EPERM: the file is another user's; EBADF: closed by another thread
            return cachestat(fd, vma.file_offset + pages.start - vma.start, pages.length).cached * PAGE_SIZE
    # mincore counts private copies as well. Of a file that is another user's it says that all pages are there (since 5.2).
    if (vma.shared or not vma.writable) and _is_ours(vma):
        return resident(pages).length
    return None


def _is_ours(vma: Vma) -> bool:
    """Tell whether the kernel shows this process the page cache of the file (can_do_mincore, mm/mincore.c)."""
    try:
        return os.geteuid() in (0, os.stat(vma.name).st_uid) or os.access(vma.name, os.W_OK, effective_ids=True)
    except OSError:
        return False
