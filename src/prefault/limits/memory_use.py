"""Description of memory that is to be mapped, populated or locked: all that limits depend on."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal, NamedTuple

from prefault.memory.vma import Backing, Vma, mount_directory, vm_flags, vma_at, vmas
from prefault.sizes import PAGE_SIZE


class FilePart(NamedTuple):
    """Addresses that map one file.

    Attributes:
        start, stop: addresses.
        file: device and inode.
        holes_bytes: bytes that the whole file is short of its size; None if it is out of reach.
    """

    start: int
    stop: int
    file: tuple[int, int]
    holes_bytes: int | None


class MemoryUse(NamedTuple):
    """Memory of one kind and the use that is to be made of it.

    Attributes:
        start, stop: addresses; both 0 where only the kind of memory matters.
        backing: supplier of its pages; None for a hole.
        page_size: the kernel's, in bytes; larger than a base page for hugetlb.
        shared: True for a mapping that writes through to its file.
        access: ``"read"`` or ``"write"``: the access that it is populated for.
        allocates: True if the holes of the file are filled by fallocate first.
        locks: True if its pages are locked.
        is_hint: True if nothing is promised: the pages may come later, in part or not at all.
        mapped: False for memory that is yet to be mapped: it meets the limits of mmap as well.
        fd: descriptor of the file behind it; None without one.
        file_base: number to add to an address to get the offset in that file; meaningless without ``fd``.
        file_size: bytes of that file, beyond which nothing is populated; None where it is not known.
        guarded: True if an access guard makes it accessible just before it is populated.
        directory: mount point or path of the file system, where it is known.
        nodes: numbers of the NUMA nodes that its memory must come from; none: any.
    """

    start: int = 0
    stop: int = 0
    backing: Backing | None = Backing.ANONYMOUS
    page_size: int = PAGE_SIZE
    shared: bool = False
    access: Literal["read", "write"] = "write"
    allocates: bool = False
    locks: bool = False
    is_hint: bool = False
    mapped: bool = True
    fd: int | None = None
    file_base: int = 0
    file_size: int | None = None
    guarded: bool = False
    directory: str | None = None
    nodes: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Bytes."""
        return self.stop - self.start

    @property
    def kind(self) -> tuple[object, ...]:
        """Everything but the place."""
        return self[2:]

    @property
    def takes_memory(self) -> bool:
        """True if ordinary memory, or page tables alone, are taken by populating it; hugetlb has pools of its own."""
        return self.backing not in (None, Backing.SPECIAL, Backing.HUGETLB)

    @property
    def copies(self) -> bool:
        """True if each page becomes a private page of the process."""
        return self.takes_memory and not self.shared and self.access == "write"

    @property
    def fills_page_cache(self) -> bool:
        """True if it is populated by pages of a file on a disk, which must stay in the page cache. A copy needs none."""
        return self.backing is Backing.FILE and not self.copies and not self.is_hint

    @property
    def pins_page_cache(self) -> bool:
        """True if pages of a file are locked, so that the kernel cannot evict them, and kills where they are too many."""
        return self.locks and self.fills_page_cache

    @property
    def fills_shmem(self) -> bool:
        """True if holes are filled with memory of the kernel's shmem, through private mappings, too."""
        return self.backing is not None and self.backing.is_shmem

    @property
    def is_reserved(self) -> bool:
        """True if mmap set huge pages aside for it, which other mappings do not get. Slow."""
        return self.mapped and "nr" not in vm_flags(self.start)

    def named(self) -> "MemoryUse":
        """Return it with the mount point of its file system, for people. Slow."""
        vma = None if self.directory is not None or not self.stop else vma_at(self.start)
        return self if vma is None else self._replace(directory=mount_directory(vma))

    def files(self) -> Iterator[FilePart]:
        """Yield the files behind it in order of address: neighbouring mappings of one kind may map several."""
        if self.fd is not None:
            with contextlib.suppress(OSError):  # closed by another thread
                status = os.fstat(self.fd)
                yield FilePart(self.start, self.stop, (status.st_dev, status.st_ino), self._holes(status))
                return
        for vma in vmas(self.start, self.stop):
            holes = None
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/self/map_files/{vma.start:x}-{vma.stop:x}")
                holes = self._holes(status) if status.st_ino == vma.inode else None
            yield FilePart(max(vma.start, self.start), min(vma.stop, self.stop), (vma.device, vma.inode), holes)

    def _holes(self, status: os.stat_result) -> int:
        return max(0, status.st_size + -status.st_size % self.page_size - status.st_blocks * 512)

    def file_system(self) -> object:
        """Return a key that is equal for memory of one file system."""
        if self.fd is not None:
            with contextlib.suppress(OSError):  # closed by another thread
                return os.fstat(self.fd).st_dev
        vma = vma_at(self.start)
        return None if vma is None else vma.device


def use_of_vma(vma: Vma, fd: int | None = None) -> MemoryUse:
    """Describe populating a mapping as its protection permits, holes of its file included."""
    return MemoryUse(
        vma.start, vma.stop, vma.backing, vma.page_size, vma.shared, "write" if vma.writable else "read",
        allocates=vma.shared and vma.writable, fd=fd,
    )  # fmt: skip
