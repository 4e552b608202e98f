"""The part of the files behind memory that is in the page cache: cachestat(2) where it answers, else mincore(2)."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any

from prefault._kernel.cachestat import PageCache, cachestat
from prefault._system import capabilities
from prefault._system.proc import Mount, read_mounts
from prefault.inspection.mincore import resident, resident_in
from prefault.intervals import Intervals
from prefault.memory.backings import MADE_UP
from prefault.memory.borrowing import Borrowed
from prefault.memory.vma import Backing, Vma, any_descriptor, file_size, shmem_device, vmas
from prefault.ranges import PageRange
from prefault.sizes import PAGE_SIZE

_STACKED = frozenset({"overlay", "fuse", "ecryptfs"})
"""File systems whose files may map the pages of another file: cachestat, which looks at their own, then counts none."""


def counts_own_pages(file_system: str) -> bool:
    """Return whether a zero of cachestat(2) is true for the files of a file system, by the name of its type."""
    return file_system not in _STACKED and file_system != "hugetlbfs"


def page_cache_of(memory: Borrowed, buffer: Any, pages: PageRange) -> PageCache | None:
    """Return the page cache of the file behind a borrowed Mapping; None without a file, or where the kernel refuses."""
    if memory.fd is None or not pages or not capabilities.CACHESTAT.available:
        return None
    try:
        offset = buffer.file_offset + pages.start - memory.address
        length = _within_file(memory.fd, offset, pages.length)
        found = cachestat(memory.fd, offset, length) if length else PageCache(0, 0, 0, 0, 0)
        return found if found.cached or _counts_own_pages(os.fstat(memory.fd).st_dev) else None
    except OSError:  # hugetlbfs has none, and a file that we may not write tells nothing
        return None


def cached_bytes(pages: PageRange) -> int | None:
    """Count the bytes of the files behind ``pages`` in the page cache; None without a file, or where none tells."""
    known = [
        cached_in(vma, pages & PageRange(vma.start, vma.stop))
        for vma in vmas(pages.start, pages.stop)
        if vma.inode and vma.backing in (Backing.FILE, Backing.TMPFS, Backing.MEMFD)
    ]
    told = [count for count in known if count is not None]
    return sum(told) if told else None


def _within_file(fd: int, offset: int, length: int) -> int:
    """Return how many bytes of a range lie before the end of a file's last page.

    A file that shrank may keep pages beyond it, where the kernel could not split their large folio: cachestat counts them.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):  # a block device has no size here
        return length
    return max(0, min(length, status.st_size + -status.st_size % PAGE_SIZE - offset))


class KnownFiles:
    """Facts on the files of one call, each found out once: thousands of mappings may be of one file.

    Finding a descriptor looks at every one of this process, and the mounts are those of the whole machine.
    """

    def __init__(self) -> None:
        self._descriptors: dict[tuple[int, int], int | None] = {}
        self._sizes: dict[tuple[int, int], int | None] = {}
        self._takes_page_cache: dict[int, bool] = {}
        self._counts_own_pages: dict[int, bool] = {}

    def descriptor(self, vma: Vma) -> int | None:
        """Return any descriptor of this process on the file of a mapping, or None. Borrowed: never to be closed."""
        file = vma.device, vma.inode
        if file in self._descriptors:
            fd = self._descriptors[file]
            if fd is None:
                return None
            with contextlib.suppress(OSError):
                status = os.fstat(fd)  # another thread may have closed it, and opened another file by this number
                if (status.st_dev, status.st_ino) == file:
                    return fd
        fd = self._descriptors[file] = any_descriptor(vma)
        return fd

    def size(self, vma: Vma) -> int | None:
        """Return the size in bytes that the file of a mapping had at the first question; None where none tells."""
        file = vma.device, vma.inode
        if file not in self._sizes:
            self._sizes[file] = file_size(vma)
        return self._sizes[file]

    def takes_page_cache(self, vma: Vma) -> bool:
        """Return whether pages of a mapping lie in the page cache of a file, as :func:`takes_page_cache` does."""
        if vma.device not in self._takes_page_cache:
            self._takes_page_cache[vma.device] = takes_page_cache(vma)
        return self._takes_page_cache[vma.device]

    def counts_own_pages(self, device: int) -> bool:
        """Return whether a zero of cachestat(2) is true for the files of a device."""
        if device not in self._counts_own_pages:
            self._counts_own_pages[device] = _counts_own_pages(device)
        return self._counts_own_pages[device]


def cached_in(vma: Vma, pages: PageRange, *, unmapped: bool = False, files: KnownFiles | None = None) -> int | None:
    """Count the bytes of the file behind some pages of a mapping that are in the page cache; None where none tells.

    Args:
        vma: the mapping.
        pages: addresses in it.
        unmapped: none of the pages is in the page tables of this process, so that none is a private copy.
        files: facts on files that are known already; None: they are found out for this mapping alone.
    """
    files = KnownFiles() if files is None else files
    fd = files.descriptor(vma) if capabilities.CACHESTAT.available else None
    if fd is not None:
        with contextlib.suppress(OSError):  # EPERM: the file is another user's; EBADF: closed by another thread
            offset = vma.file_offset + pages.start - vma.start
            length = _within_file(fd, offset, pages.length)
            cached = cachestat(fd, offset, length).cached if length else 0
            if cached or vma.backing is not Backing.FILE or files.counts_own_pages(vma.device):
                return cached * PAGE_SIZE
    # mincore counts private copies as well. Of a file that is another user's it says that all pages are there (since 5.2).
    if (unmapped or vma.shared or not vma.writable) and _is_ours(vma):
        return resident(pages).length
    return None


def cached_pages(vma: Vma, pages: Intervals) -> Intervals | None:
    """Return the pages of a mapping whose part of the file is in the page cache; None where the kernel does not tell.

    Args:
        vma: the mapping.
        pages: addresses in it, of which none is in the page tables of this process.
    """
    return resident_in([PageRange(*span) for span in pages]) if _is_ours(vma) else None


def takes_page_cache(vma: Vma) -> bool:
    """Return whether pages of a mapping lie in the page cache of a file: not those of DAX, nor a device's in sysfs."""
    major, minor = os.major(vma.device), os.minor(vma.device)
    for queue in ("queue", "../queue"):  # of the disk, of which this may be a partition
        with contextlib.suppress(OSError), open(f"/sys/dev/block/{major}:{minor}/{queue}/dax", "rb") as file:
            if file.read(1) == b"1":
                return False
    return not any(mount.filesystem in MADE_UP or _is_dax(mount) for mount in _mounts_of(vma.device))


def _is_dax(mount: Mount) -> bool:
    """Return whether all files of a mount are DAX: ``dax=inode`` leaves it to each file, and ``dax=never`` has none."""
    return not {"dax", "dax=always"}.isdisjoint(mount.options.split(","))


def _counts_own_pages(device: int) -> bool:
    # Stacked file systems have no disk of their own; nor have memfds, for which the mounts need not be read.
    if os.major(device) or device == shmem_device():
        return True
    # mountinfo says "fuse.sshfs", say.
    return all(counts_own_pages(mount.filesystem.partition(".")[0]) for mount in _mounts_of(device))


def _mounts_of(device: int) -> list[Mount]:
    return [mount for mount in read_mounts() if mount.device == device]


def _is_ours(vma: Vma) -> bool:
    """Tell whether the kernel shows this process the page cache of the file (can_do_mincore, mm/mincore.c)."""
    try:
        return os.geteuid() in (0, os.stat(vma.name).st_uid) or os.access(vma.name, os.W_OK, effective_ids=True)
    except OSError:
        return False
