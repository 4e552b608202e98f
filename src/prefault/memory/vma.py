"""Virtual memory areas (VMAs) of this process, asked of the kernel one by one and cheaply."""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Iterator
from ctypes import addressof, create_string_buffer, sizeof
from typing import TypeAlias

from prefault._kernel import mman, procmap
from prefault._system import capabilities, proc
from prefault._system.kept_files import KeptFile
from prefault.sizes import PAGE_SIZE


class Backing(enum.Enum):
    """Supply of the pages of a mapping. SPECIAL memory is a device's, or cannot be populated by madvise(2)."""

    ANONYMOUS = "private anonymous memory"
    SHARED_ANONYMOUS = "shared anonymous memory"
    MEMFD = "a memfd"
    TMPFS = "a file on tmpfs"
    FILE = "a file"
    HUGETLB = "huge pages of hugetlb"
    SPECIAL = "special memory"

    @property
    def is_shmem(self) -> bool:
        """True for memory of the kernel's shmem: it has no place on a disk, and holes are allocated on first touch."""
        return self in (Backing.SHARED_ANONYMOUS, Backing.MEMFD, Backing.TMPFS)


class Vma:
    """One virtual memory area, as it was when the kernel was asked.

    ``start`` and ``stop`` are addresses, ``page_size`` is the kernel's page size for it (2 MiB or 1 GiB for hugetlb),
    ``file_offset`` is the offset in the file that ``start`` maps, ``device`` and ``inode`` name that file (0 without one).
    """

    __slots__ = (
        "_backing", "_name", "device", "executable", "file_offset", "inode", "page_size", "readable", "shared",
        "start", "stop", "writable",
    )  # fmt: skip

    def __init__(
        self, start: int, stop: int, flags: int, page_size: int, file_offset: int, device: int, inode: int,
        name: str | None = None,
    ) -> None:  # fmt: skip
        self.start = start
        self.stop = stop
        self.readable = bool(flags & procmap.PROCMAP_QUERY_VMA_READABLE)
        self.writable = bool(flags & procmap.PROCMAP_QUERY_VMA_WRITABLE)
        self.executable = bool(flags & procmap.PROCMAP_QUERY_VMA_EXECUTABLE)
        self.shared = bool(flags & procmap.PROCMAP_QUERY_VMA_SHARED)
        self.page_size = page_size
        self.file_offset = file_offset
        self.device = device
        self.inode = inode
        self._name = name
        self._backing: Backing | None = None

    @property
    def name(self) -> str:
        """The path or the ``[name]`` that ``/proc/self/maps`` shows. Looked up on first use."""
        if self._name is None:
            self._name = _name_at(self.start)
        return self._name

    @property
    def backing(self) -> Backing:
        """The supply of the pages."""
        if self._backing is None:
            self._backing = self._classify()
        return self._backing

    def _classify(self) -> Backing:
        if self.page_size > PAGE_SIZE:
            return Backing.HUGETLB
        if not self.inode:
            if self.shared and self.name.startswith("/SYSV"):  # its inode is the segment's id, of which 0 is the first
                return Backing.SHARED_ANONYMOUS
            # [vvar], [vdso], [vsyscall]. Only looked at where a name can matter: anonymous memory is nearly always nameless.
            return Backing.SPECIAL if self.name.startswith("[v") else Backing.ANONYMOUS
        if self.device == shmem_device():
            return Backing.MEMFD if self.name.startswith("/memfd:") else Backing.SHARED_ANONYMOUS
        filesystem = _filesystem(self.device)
        if filesystem is None:
            # A mount of the kernel's own, or one that this process does not see: that is taken for a disk, since discard
            # never changes files on disks.
            own = self.name.startswith(("/secretmem", "/dmabuf:", "anon_inode:", "socket:"))
            return Backing.SPECIAL if own else Backing.FILE
        if _is_device(self):
            # Private mappings of /dev/zero are anonymous memory (zero(4)).
            return Backing.ANONYMOUS if self.name == "/dev/zero" and not self.shared else Backing.SPECIAL
        return Backing.TMPFS if filesystem in ("tmpfs", "ramfs", "devtmpfs", "rootfs") else Backing.FILE

    def unprotected(self) -> Vma:
        """Return a copy that permits reading and writing: the mapping as an access guard is going to leave it."""
        import copy

        again = copy.copy(self)
        again.readable = again.writable = True
        return again

    def describe(self) -> str:
        """Return a few words for messages: ``"rw-s a file (/data/x)"``."""
        letters = "".join(
            letter if there else "-"
            for letter, there in (("r", self.readable), ("w", self.writable), ("x", self.executable))
        )
        name = f" ({self.name})" if self.name else ""
        return f"{letters}{'s' if self.shared else 'p'} {self.backing.value}{name}"

    def __repr__(self) -> str:
        return f"Vma([{self.start:#x}, {self.stop:#x}) {self.describe()})"


_maps = KeptFile("/proc/self/maps")
_NAME_BYTES = 4096 + 64  # PATH_MAX and " (deleted)"
_QUERY_BYTES = sizeof(procmap.ProcmapQuery)


def vma_at(address: int) -> Vma | None:
    """Return the VMA that holds ``address``, or else the next one above it; None above the last.

    One ioctl where the kernel has PROCMAP_QUERY (Linux 6.11), else a read of all of ``/proc/self/maps``.
    """
    if capabilities.PROCMAP_QUERY.available:
        row = row_at(address)
        return None if row is None else _vma_of(row)
    return next((vma for vma in _read_all() if vma.stop > address), None)


def row_at(address: int) -> VmaRow | None:
    """Return what :func:`vma_at` returns, as numbers only: one ioctl, for which the kernel needs PROCMAP_QUERY."""
    return _query(procmap.ProcmapQuery(_QUERY_BYTES, procmap.PROCMAP_QUERY_COVERING_OR_NEXT_VMA), address)


def vmas(start: int, stop: int) -> Iterator[Vma]:
    """Yield the VMAs that share a byte with ``[start, stop)``, in order. Between two that do not touch is a hole."""
    if capabilities.PROCMAP_QUERY.available:
        for row in _query_all(start, stop):
            yield _vma_of(row)
    else:
        yield from (vma for vma in _read_all() if vma.stop > start and vma.start < stop)


def vmas_by_kind(start: int, stop: int) -> Iterator[tuple[int, int, Vma]]:
    """Yield start, stop and kind of each VMA that shares a byte with ``[start, stop)``, in order.

    The kind is the first such VMA with the same permissions, page size and file, and in a file with the same distance
    between address and offset. What is found out about it, its backing above all, holds for all of its kind: finding out
    takes several system calls, and an object for each of thousands of VMAs takes longer than to populate it.
    """
    if not capabilities.PROCMAP_QUERY.available:
        yield from ((vma.start, vma.stop, vma) for vma in vmas(start, stop))
        return
    known: dict[tuple[int, ...], Vma] = {}
    for row in _query_all(start, stop):
        first, last, flags, page_size, offset, inode, major, minor = row
        kind = flags, page_size, inode, major, minor, offset - first if inode else 0
        vma = known.get(kind)
        if vma is None:
            vma = _vma_of(row)
            # Without a file the name matters: [vdso] and its neighbours are special memory.
            if inode or not (vma.shared or _may_be_special(first, last)):
                known[kind] = vma
        elif not inode and _may_be_special(first, last):
            vma = _vma_of(row)
        yield first, last, vma


_ROW = struct.Struct("QQQQQQII")
"""Answer of PROCMAP_QUERY: start, stop, flags, page size, offset in the file, inode, major and minor device number."""
_ROW_OFFSET = procmap.ProcmapQuery.vma_start.offset
VmaRow: TypeAlias = tuple[int, int, int, int, int, int, int, int]


def _query_all(start: int, stop: int) -> Iterator[VmaRow]:
    """Ask for one VMA after the other by one structure: with thousands of VMAs its making would take most of the time."""
    query = procmap.ProcmapQuery(_QUERY_BYTES, procmap.PROCMAP_QUERY_COVERING_OR_NEXT_VMA)
    at = start
    while at < stop:
        row = _query(query, at)
        if row is None or row[0] >= stop:
            return
        yield row
        at = row[1]


def _query(query: procmap.ProcmapQuery, address: int) -> VmaRow | None:
    query.query_addr = address
    try:
        _maps.ioctl(procmap.PROCMAP_QUERY, query, quick=True)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return _ROW.unpack_from(query, _ROW_OFFSET)


def _vma_of(row: VmaRow) -> Vma:
    start, stop, flags, page_size, offset, inode, major, minor = row
    return Vma(start, stop, flags, page_size, offset, os.makedev(major, minor) if inode else 0, inode)


def _may_be_special(start: int, stop: int) -> bool:
    """Return whether [vdso] or a neighbour of it lay at these addresses when this process first looked."""
    first, last = _special_span()
    return start < last and first < stop


@functools.cache
def _special_span() -> tuple[int, int]:
    found = [line for line in proc.read_maps() if line.name.startswith("[v") and line.end >> 63 == 0]
    return (found[0].start, found[-1].end) if found else (0, 0)


def _name_at(address: int) -> str:
    if not capabilities.PROCMAP_QUERY.available:
        return next((vma.name for vma in _read_all() if vma.start <= address < vma.stop), "")
    name = create_string_buffer(_NAME_BYTES)
    query = procmap.ProcmapQuery(
        _QUERY_BYTES, query_addr=address, vma_name_size=_NAME_BYTES, vma_name_addr=addressof(name)
    )  # fmt: skip
    try:
        _maps.ioctl(procmap.PROCMAP_QUERY, query, quick=True)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):  # unmapped meanwhile; a path deeper than PATH_MAX
            return ""
        raise
    return os.fsdecode(name.value)


def _read_all() -> Iterator[Vma]:
    mounts = {mount.device: mount.filesystem for mount in proc.read_mounts()}
    page_sizes: dict[int, int] | None = None
    for line in proc.read_maps():
        flags = sum(bit for letter, bit in zip(line.permissions, (1, 2, 4), strict=False) if letter != "-") | (
            procmap.PROCMAP_QUERY_VMA_SHARED if line.permissions[3] == "s" else 0
        )
        device = line.device if line.inode else 0
        page_size = PAGE_SIZE
        if line.device and mounts.get(line.device, "hugetlbfs") == "hugetlbfs":
            # maps does not tell, and the walk that smaps does is slow: only where it may be hugetlb (the kernel's own mount
            # of it is not among those of this process).
            if page_sizes is None:
                page_sizes = {found.start: found.fields.get("KernelPageSize", PAGE_SIZE) for found in proc.read_smaps()}
            page_size = page_sizes.get(line.start, PAGE_SIZE)
        yield Vma(line.start, line.end, flags, page_size, line.offset, device, line.inode, line.name)


def vm_flags(address: int) -> frozenset[str]:
    """Return the VmFlags of the VMA at ``address`` (two letters each, proc_pid_smaps(5)). Slow: for explaining a failure."""
    return next((line.vm_flags for line in proc.read_smaps() if line.start <= address < line.end), frozenset())


def _filesystem(device: int) -> str | None:
    """Return the type of the file system with this device number; None for mounts that this process does not see."""
    # Not cached: the number of an unmounted tmpfs goes to the next file system without a disk of its own, perhaps a network
    # file system, and discarding takes the bytes of tmpfs files.
    return next((mount.filesystem for mount in proc.read_mounts() if mount.device == device), None)


@functools.cache
def shmem_device() -> int:
    """Return the device number of the kernel's own tmpfs, where memfds, shared anonymous memory and SysV segments live."""
    address = mman.mmap(0, PAGE_SIZE, mman.PROT_READ, mman.MAP_SHARED | mman.MAP_ANONYMOUS)
    try:
        vma = vma_at(address)
        assert vma is not None
        return vma.device
    finally:
        mman.munmap(address, PAGE_SIZE)


def mount_directory(vma: Vma) -> str | None:
    """Return the mount point of the file system behind ``vma``; None where this process does not see it."""
    return next((mount.directory for mount in proc.read_mounts() if mount.device == vma.device), None)


def _is_device(vma: Vma) -> bool:
    try:
        mode = os.stat(vma.name).st_mode
    except OSError:
        return False  # deleted or out of sight, so nothing that udev made
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def file_descriptor(vma: Vma) -> int | None:
    """Return a descriptor of this process that is open for reading and writing on the file of ``vma``, or None.

    Borrowed: never to be closed or kept. No new descriptor is opened, because closing *any* descriptor of a file drops the
    POSIX locks that this process holds on it (fcntl(2)), a database's for example.
    """
    for fd in proc.own_descriptors():
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (vma.device, vma.inode) and _is_read_write(fd):
                return fd
        except OSError as error:
            if error.errno != errno.EBADF:  # closed by another thread since we listed it
                raise
    return None


def any_descriptor(vma: Vma) -> int | None:
    """Return any descriptor of this process on the file of ``vma``, or None. Borrowed: never to be closed."""
    for fd in proc.own_descriptors():
        with contextlib.suppress(OSError):  # closed by another thread since they were listed
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (vma.device, vma.inode):
                return fd
    return None


def file_size(vma: Vma) -> int | None:
    """Return the size of the file behind ``vma`` in bytes; None where it cannot be found out."""
    fd = any_descriptor(vma)
    if fd is not None:
        with contextlib.suppress(OSError):
            return os.fstat(fd).st_size
    for path in (vma.name, f"/proc/self/map_files/{vma.start:x}-{vma.stop:x}"):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) == (vma.device, vma.inode):
                return status.st_size
    return None


def _is_read_write(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
