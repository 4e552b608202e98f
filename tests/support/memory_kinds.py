"""Small samples of every kind of memory that can be populated, partly filled."""

from __future__ import annotations

import enum
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prefault._kernel import mman
from support.regions import PAGE, Region, file_of

HUGE = 2 << 20


class MemoryKind(enum.Enum):
    """Backing and sharing of a mapping."""

    PRIVATE_ANONYMOUS = "private-anonymous"
    SHARED_ANONYMOUS = "shared-anonymous"
    PRIVATE_MEMFD = "private-memfd"
    SHARED_MEMFD = "shared-memfd"
    SHARED_TMPFS = "shared-tmpfs"
    PRIVATE_DISK = "private-disk"
    SHARED_DISK = "shared-disk"
    PRIVATE_HUGETLB = "private-hugetlb"
    SHARED_HUGETLB = "shared-hugetlb"

    @property
    def shared(self) -> bool:
        """Whether the mapping is MAP_SHARED."""
        return self.value.startswith("shared")

    @property
    def page_size(self) -> int:
        """Bytes in a page of this kind."""
        return HUGE if self.value.endswith("hugetlb") else PAGE


class Sample:
    """A region of memory, some pages of which had content before they were mapped or populated.

    Attributes:
        region: the memory.
        content: expected bytes, page by page.
        fd: of the file behind the memory; None without one.
        filled: numbers of the pages with content, in the file or in the memory.
    """

    def __init__(self, region: Region, pages: int, page_size: int, fd: int | None, seed: int) -> None:
        self.region = region
        self.fd = fd
        self.pages = pages
        self.page_size = page_size
        rng = random.Random(seed)
        self.filled = sorted(rng.sample(range(pages), pages // 2))
        self.content = [bytes(page_size)] * pages
        for index in self.filled:
            self.content[index] = rng.randbytes(page_size)

    def write_to_file(self) -> None:
        """Fill the pages of the file."""
        assert self.fd is not None
        for index in self.filled:
            os.pwrite(self.fd, self.content[index], index * self.page_size)

    def write_to_memory(self) -> None:
        """Fill the pages through the mapping; they are present then."""
        for index in self.filled:
            self.region.fill(index * self.page_size // PAGE, self.content[index])

    def assert_intact(self) -> None:
        """No byte has changed. Read by the kernel: a page that cannot be had is an error here, and no SIGBUS."""
        size = self.page_size
        memory = os.open("/proc/self/mem", os.O_RDONLY)
        try:
            pages = [os.pread(memory, size, self.region.address + index * size) for index in range(self.pages)]
        finally:
            os.close(memory)
        assert [index for index in range(self.pages) if pages[index] != self.content[index]] == []


@contextmanager
def sample(kind: MemoryKind, disk: Path, *, pages: int = 8, seed: int = 1) -> Iterator[Sample]:
    """Memory of a kind, unmapped and removed afterwards. A hugetlb pool must have as many pages."""
    with ExitStack() as stack:
        fd: int | None = None
        flags = mman.MAP_HUGETLB if kind.page_size == HUGE else 0
        if kind in (MemoryKind.PRIVATE_MEMFD, MemoryKind.SHARED_MEMFD):
            fd = os.memfd_create("prefault-test")
            stack.callback(os.close, fd)
            os.ftruncate(fd, pages * PAGE)
        elif kind in (MemoryKind.PRIVATE_DISK, MemoryKind.SHARED_DISK, MemoryKind.SHARED_TMPFS):
            directory = Path("/dev/shm") if kind is MemoryKind.SHARED_TMPFS else disk
            fd, _ = stack.enter_context(file_of(directory, pages * PAGE))
        region = stack.enter_context(
            Region(pages, fd=-1 if fd is None else fd, shared=kind.shared, flags=flags, page_size=kind.page_size)
        )
        yield Sample(region, pages, kind.page_size, fd, seed)
