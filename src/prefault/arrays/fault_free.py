"""ready: populate and lock memory for a loop, and count the page faults that its thread had nevertheless."""

from __future__ import annotations

import resource
import threading
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from prefault.engine.locking import lock_pages, pages_of
from prefault.engine.methods import Access
from prefault.engine.populating import HeadroomChoice, PopulateResult, populate
from prefault.errors import PageFaultsError
from prefault.intervals import Intervals
from prefault.memory.borrowing import Borrowed, borrow
from prefault.memory.page_locks import page_locks
from prefault.sizes import Size, format_size


class ReadyMemory:
    """Memory made ready by :func:`prefault.ready`; a context manager.

    Attributes:
        populated: what had to be brought in; None before the block.
        locked_bytes: bytes that this block was the first to lock; memory that was locked before is not among them. They are
            unlocked at its end, or at that of the last block that needs them.
    """

    def __init__(
        self, buffer: Any, access: Access | None, offset: Size, length: Size | None, lock: bool, check: bool,
        headroom: HeadroomChoice,
    ) -> None:  # fmt: skip
        self._buffer = buffer
        self._access: Access | None = access
        self._offset, self._length = offset, length
        self._lock, self._check = lock, check
        self._headroom: HeadroomChoice = headroom
        self._memory: Borrowed | None = None
        self._pages = Intervals()
        self._thread = 0
        self._before = self._after = (0, 0)
        self._running = False
        self.populated: PopulateResult | None = None
        self.locked_bytes = 0

    @property
    def minor_faults(self) -> int:
        """Page faults of the thread in the block that needed no input; so far, or in all once the block has ended."""
        return self._count()[0]

    @property
    def major_faults(self) -> int:
        """Page faults of the thread in the block that waited for a disk or swap."""
        return self._count()[1]

    @property
    def faults(self) -> int:
        """All page faults of the thread in the block."""
        return sum(self._count())

    def __enter__(self) -> Self:
        if self._memory is not None:
            raise RuntimeError("this memory is in a block already: call prefault.ready once for each")
        memory = self._memory = borrow(self._buffer)  # so that its owner cannot unmap it in the block
        try:
            self._pages = pages_of(memory, self._offset, self._length)
            populating = partial(
                populate,
                self._buffer,
                access=self._access,
                offset=self._offset,
                length=self._length,
                headroom=self._headroom,
            )
            if self._lock and self._pages:
                fresh = page_locks.begin(self, self._pages)  # before: Ctrl-C may come right after the lock
                began = perf_counter()
                locked = lock_pages(self._pages, memory.address, populating, self._headroom, began, lasting=False)
                self.populated = locked.populated
                self.locked_bytes = fresh.length
            else:
                self.populated = populating()
        except BaseException:
            self._end()
            raise
        self._thread = threading.get_ident()
        self._running = True
        self._before = _faults()  # last: what comes before does not count
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None) -> None:
        self._after = _faults()  # first
        self._running = False
        self._end()
        if threading.get_ident() != self._thread:
            self._after = self._before
            if kind is None:
                raise RuntimeError("the block ended in another thread than it began in: its faults cannot be counted")
        elif self._check and kind is None and self.faults:
            raise PageFaultsError(self.minor_faults, self.major_faults, self._sentence())

    def __repr__(self) -> str:
        size = format_size(self._pages.length)
        if self._running and threading.get_ident() != self._thread:
            return f"<ReadyMemory of {size}, in a block of another thread>"
        return f"<ReadyMemory of {size}, {self.minor_faults} minor and {self.major_faults} major page faults>"

    def _count(self) -> tuple[int, int]:
        after = self._after
        if self._running:
            if threading.get_ident() != self._thread:
                raise RuntimeError("the page faults are counted for the thread that entered the block, and read by it")
            after = _faults()
        return after[0] - self._before[0], after[1] - self._before[1]

    def _end(self) -> None:
        page_locks.end(self)
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.release()

    def _sentence(self) -> str:
        minor, major = self._count()
        return (
            f"{minor} minor and {major} major page faults in this thread, though all {format_size(self._pages.length)} were"
            " ready: the loop touched other memory (new objects and buffers of its own: preallocate them, and run it once"
            " before), or the kernel moved or protected pages (a fork, compaction, NUMA balancing)"
        )


def ready(
    buffer: Any,
    *,
    access: Access | None = None,
    offset: Size = 0,
    length: Size | None = None,
    lock: bool = True,
    check: bool = False,
    headroom: HeadroomChoice = "check",
) -> ReadyMemory:
    """Populate and lock ``buffer`` for the length of a block, and count the page faults that the thread had inside.

    ::

        with prefault.ready(buffer) as memory:
            for packet in packets:
                handle(packet, buffer)
        print(memory.faults)  # zero is checked, not hoped for

    The faults are all of the thread's, not only those on the buffer: Python's own allocations in the loop count too. Threads
    that the loop starts count for themselves.

    Args:
        buffer: any buffer, as for :func:`prefault.populate`; rounded outward to whole pages. It cannot be closed or resized
            inside of the block.
        access: ``"read"``, ``"write"`` or None: how it is populated.
        offset: where to start, in bytes from the start of the buffer.
        length: how far; None: to its end.
        lock: keep the pages from swap and reclaim. At the end is unlocked what was not locked before, nor is needed by
            another such block, in any thread, nor was locked by :func:`prefault.lock` meanwhile.
        check: raise at the end of the block if there was a fault.
        headroom: ``"check"`` checks RLIMIT_MEMLOCK and the limits of populating first; ``"ignore"`` does not.

    Returns:
        A context manager, whose ``minor_faults`` and ``major_faults`` can be read inside of the block and afterwards.

    Raises:
        PageFaultsError: at the end of the block, with ``check``: there was a page fault.
        HeadroomError: RLIMIT_MEMLOCK or another limit leaves less than is needed; nothing was populated.
        PopulateError, PopulateInterrupted, TypeError, ValueError: as :func:`prefault.lock`, when the block is entered.

    Source: getrusage(2), RUSAGE_THREAD (Linux 2.6.26); mlock2(2).
    """
    return ReadyMemory(buffer, access, offset, length, lock, check, headroom)


def _faults() -> tuple[int, int]:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt, usage.ru_majflt
