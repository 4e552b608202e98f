"""Sparse memory of every kind that this machine has, and what the kernel says of it."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prefault.memory.backings import File
from prefault.sparse import SparseMemory
from support import oracle

HUGE = 2 << 20
PAGE = oracle.PAGE


class SparseKind(NamedTuple):
    """A backing, by the options that make it."""

    name: str
    backing: str
    shared: bool
    page_size: int = PAGE

    @property
    def is_disk(self) -> bool:
        return self.backing == "disk"

    @property
    def is_memory_file(self) -> bool:
        """What is discarded is taken from a file that is nothing but memory."""
        return self.shared and not self.is_disk

    def make(self, size: int, directory: Path, **options: Any) -> SparseMemory:
        """A memory of this kind. A file on a disk holds a pattern; see :meth:`unwritten`."""
        backing: Any = self.backing
        if self.is_disk:
            path = directory / f"sparse-{os.urandom(4).hex()}"
            path.write_bytes(b"".join(self.unwritten(at, PAGE) for at in range(0, size, PAGE)))
            backing = File(path)
        return SparseMemory(size, backing=backing, shared=self.shared, **options)

    def unwritten(self, offset: int, length: int) -> bytes:
        """What a page holds that was never written."""
        if not self.is_disk:
            return bytes(length)
        return b"".join(bytes([at // PAGE % 251 + 1]) * PAGE for at in range(offset, offset + length, PAGE))


KINDS = (
    SparseKind("private-anonymous", "anonymous", False),
    SparseKind("shared-anonymous", "anonymous", True),
    SparseKind("private-memfd", "memfd", False),
    SparseKind("shared-memfd", "memfd", True),
    SparseKind("shared-tmpfs", "tmpfs", True),
    SparseKind("private-disk", "disk", False),
    SparseKind("shared-disk", "disk", True),
)
HUGE_KINDS = (
    SparseKind("private-hugetlb", "hugetlb", False, HUGE),
    SparseKind("shared-hugetlb", "hugetlb", True, HUGE),
    SparseKind("hugetlb-memfd", "memfd-hugetlb", True, HUGE),
)


def signal_of(touch: Callable[[], object]) -> int:
    """The signal that a forked child dies of when it does this; 0 where it survives."""
    pid = os.fork()
    if not pid:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            touch()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def faults(memory: SparseMemory, offset: int, *, write: bool = False) -> bool:
    """Whether touching the byte is a SIGSEGV."""
    address = memory.range.start + offset
    touch: Callable[[], object] = (
        (lambda: ctypes.memset(address, 1, 1)) if write else (lambda: ctypes.string_at(address, 1))
    )  # fmt: skip
    number = signal_of(touch)
    assert number in (0, signal.SIGSEGV)
    return number == signal.SIGSEGV


def present(memory: SparseMemory) -> list[bool]:
    """Page by page, what pagemap says of the memory."""
    return oracle.present(memory.range.start, len(memory))


def present_blocks(memory: SparseMemory) -> list[int]:
    """Numbers of the blocks of which every page is present; of every other block no page may be."""
    pages = present(memory)
    each = memory.block // PAGE
    blocks = [pages[at : at + each] for at in range(0, len(pages), each)]
    assert all(all(block) or not any(block) for block in blocks), "a block is populated in part"
    return [number for number, block in enumerate(blocks) if all(block)]


def mappings(memory: SparseMemory) -> int:
    """How many mappings the reservation is made of."""
    start, stop = memory.range.start, memory.range.start + memory.reservation
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(text, 16) for text in line.split()[0].split("-"))
        count += low < stop and high > start
    return count


def status_kib(key: str) -> int:
    """A line of /proc/self/status."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
