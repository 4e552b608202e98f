"""Memory at an address that no Python object owns: holes, forbidden pages, special mappings."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefault._kernel import mman
from prefault._system.proc import read_maps, read_mounts
from prefault.sizes import PAGE_SIZE

PAGE = PAGE_SIZE
READ, WRITE, EXEC = mman.PROT_READ, mman.PROT_WRITE, mman.PROT_EXEC


class Span:
    """A range of addresses that prefault and numpy accept as a buffer of bytes."""

    def __init__(self, address: int, length: int, *, readonly: bool = False) -> None:
        self.address = address
        self.length = length
        self.__array_interface__: dict[str, Any] = {
            "data": (address, readonly), "shape": (length,), "typestr": "|u1", "version": 3,
        }  # fmt: skip

    def page(self, index: int) -> int:
        """Return the address of a page."""
        return self.address + index * PAGE

    def part(self, first: int, pages: int) -> Span:
        """Return the span of some of the pages."""
        return Span(self.page(first), pages * PAGE)


class Region(Span):
    """Memory by raw mmap(2), without transparent huge pages unless asked for, so that each page is one fault."""

    def __init__(
        self,
        pages: int,
        prot: int = READ | WRITE,
        *,
        fd: int = -1,
        shared: bool = False,
        flags: int = 0,
        page_size: int = PAGE,
        offset: int = 0,
    ) -> None:
        flags |= mman.MAP_SHARED if shared else mman.MAP_PRIVATE
        if fd < 0:
            flags |= mman.MAP_ANONYMOUS
        length = pages * page_size
        super().__init__(mman.mmap(0, length, prot, flags, fd, offset), length)
        if page_size == PAGE:
            mman.madvise(self.address, length, mman.MADV_NOHUGEPAGE)

    def protect(self, first: int, pages: int, prot: int) -> None:
        """mprotect some of the pages."""
        mman.mprotect(self.page(first), pages * PAGE, prot)

    def punch(self, first: int, pages: int) -> None:
        """Unmap some of the pages: a hole."""
        mman.munmap(self.page(first), pages * PAGE)

    def fill(self, first: int, content: bytes) -> None:
        """Write bytes from the start of a page on."""
        view = self.view()
        view[first * PAGE : first * PAGE + len(content)] = content

    def read(self, first: int, pages: int) -> bytes:
        """The bytes of some of the pages."""
        return bytes(self.view()[first * PAGE : (first + pages) * PAGE])

    def view(self) -> memoryview:
        """The bytes; to be dropped before the region is unmapped."""
        import numpy

        return numpy.asarray(self).data

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        mman.munmap(self.address, self.length)  # over holes as well


def special(name: str) -> Span | None:
    """The mapping that /proc/self/maps calls ``[vvar]``, ``[vdso]``, ...; None where there is none."""
    for line in read_maps():
        if line.name == name:
            return Span(line.start, line.end - line.start)
    return None


@contextmanager
def file_of(directory: Path | str, size: int) -> Iterator[tuple[int, Path]]:
    """An empty file of ``size`` bytes, all of it a hole: descriptor and path."""
    fd, name = tempfile.mkstemp(prefix="prefault-test-", dir=directory)
    path = Path(name)
    try:
        os.ftruncate(fd, size)
        yield fd, path
    finally:
        os.close(fd)
        path.unlink()


def data_pages(fd: int) -> list[int]:
    """Numbers of the pages of a file that are no hole (SEEK_DATA)."""
    found = []
    for start in range(0, os.fstat(fd).st_size, PAGE):
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data up to the end
                raise
            break
        if data < start + PAGE:
            found.append(start // PAGE)
    return found


def filesystem_of(directory: Path) -> str:
    """The type of the file system that holds a directory, such as ``ext4``."""
    device = directory.stat().st_dev
    return next((mount.filesystem for mount in read_mounts() if mount.device == device), "")
