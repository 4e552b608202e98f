"""lock: populate, and keep it from being swapped out or written back and dropped."""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any, Literal, NamedTuple, TypeAlias, overload

from prefault.engine.methods import Access
from prefault.engine.parts import PopulateOptions
from prefault.engine.populating import HeadroomChoice, PopulateResult, Progress, populate
from prefault.engine.rate import RateLimit, rate_limit
from prefault.errors import HoleError, OutOfMemoryError
from prefault.intervals import Intervals
from prefault.limits.demand import Demand
from prefault.limits.memory_use import MemoryUse
from prefault.limits.process_limits import lock_refusal
from prefault.limits.table import refusal_ahead
from prefault.memory.borrowing import Borrowed, borrow
from prefault.memory.file_verbs import FileNames, HeldFiles, verbs_on
from prefault.memory.page_locks import page_locks
from prefault.ranges import PageRange
from prefault.sizes import Size, format_size

FileRanges: TypeAlias = Iterable[tuple[int, int | None]] | Callable[[Any], Iterable[tuple[int, int | None]]]
"""Byte ranges of each file, or a function from an open file to those of one."""


class LockResult(NamedTuple):
    """All pages of the range are present, and stay.

    Attributes:
        bytes: locked now, whole pages; those that were locked before included.
        populated: what had to be brought in first.
        seconds: the call took.
    """

    bytes: int
    populated: PopulateResult
    seconds: float

    def __str__(self) -> str:
        return f"{format_size(self.bytes)} locked in {self.seconds:.2g} s; {self.populated}"


@overload
def lock(
    buffer: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | FileNames, *,
    access: Literal["read"] | None = ..., offset: Size = ...,
    length: Size | None = ..., ranges: FileRanges | None = ..., progress: Progress | bool = ...,
    rate: RateLimit | Size | None = ..., headroom: HeadroomChoice = ...,
) -> HeldFiles: ...  # fmt: skip
@overload
def lock(
    buffer: Any, *, access: Access | None = ..., offset: Size = ..., length: Size | None = ...,
    progress: Progress | bool = ..., rate: RateLimit | Size | None = ..., headroom: HeadroomChoice = ...,
) -> LockResult: ...  # fmt: skip
def lock(
    buffer: Any,
    *,
    access: Access | None = None,
    offset: Size = 0,
    length: Size | None = None,
    ranges: FileRanges | None = None,
    progress: Progress | bool = False,
    rate: RateLimit | Size | None = None,
    headroom: HeadroomChoice = "check",
) -> LockResult | HeldFiles:
    """Make every page of a buffer or of files present, and lock it: it is neither swapped out nor dropped.

    Locks of a buffer do not add up: one :func:`unlock` ends them all, also those of a neighbour in the same page, except
    pages that a block of :func:`prefault.ready` needs, until that ends.
    ``discard`` works on locked memory. The driver of device memory may take its pages back all the same; they are locked
    when they return. Locks of files last until the :class:`FileLock` is closed.

    Args:
        buffer: any buffer or collection, as for :func:`prefault.populate`; rounded outward to whole pages. Each separate
            range of an array with gaps becomes a mapping of its own, of which a process has 65 530 (``vm.max_map_count``).
            Or the path of a file or directory (a ``str`` or a ``pathlib.Path``), a list of paths, or a
            :func:`prefault.select` of files.
        access: of a buffer: ``"read"``, ``"write"`` or None: how it is populated.
        offset: where to start, in bytes from the start of the buffer or of each file.
        length: how far; None: to its end.
        ranges: of files: several byte ranges, or a function from an open file to them, instead of offset and length.
        progress: True draws a bar on stderr, or logs where that is no terminal; a function is called with the bytes done and
            in all.
        rate: limit of the bytes a second that are brought in, as ``"2 GiB/s"``; None: none.
        headroom: ``"check"`` checks RLIMIT_MEMLOCK and the limits on memory before the start; ``"ignore"`` does not.

    Returns:
        A :class:`LockResult` for a buffer; a :class:`FileLock` for files.

    Raises:
        HeadroomError: RLIMIT_MEMLOCK or another limit leaves less than that; nothing was populated.
        OutOfMemoryError: the kernel refuses to lock a buffer, though it is populated.
        PopulateError, PopulateInterrupted, TypeError, ValueError: as :func:`prefault.populate`. Nothing is locked then.
        OSError: no file could be locked. Where some could, the others are in the ``failures`` of the FileLock.

    Source: mlock2(2), MLOCK_ONFAULT (Linux 4.4).
    """
    began = perf_counter()
    try:
        memory = borrow(buffer)
    except TypeError as error:
        verbs = verbs_on(buffer)
        if verbs is not None:
            return verbs.lock(
                buffer, offset=offset, length=length, access=access, ranges=ranges, progress=progress, rate=rate,
                headroom=headroom,
            )  # fmt: skip
        _check_no_ranges(ranges)
        # Imported here: a part of the import time that most programs need not spend.
        from prefault.engine.scattered.populating_many import populate_members
        from prefault.memory.borrowed_members import borrowed_collection

        options = PopulateOptions(
            access, None, None, rollback=False, progress=progress, rate=rate_limit(rate), headroom=headroom,
            began=perf_counter_ns(), huge=False,
        )  # fmt: skip
        with borrowed_collection(buffer, offset, length, error) as members:
            return lock_pages(members.pages, 0, partial(populate_members, members, options), headroom, began)
    with memory:
        _check_no_ranges(ranges)
        populating = partial(
            populate, buffer, access=access, offset=offset, length=length, progress=progress, rate=rate, headroom=headroom
        )
        return lock_pages(pages_of(memory, offset, length), memory.address, populating, headroom, began)


def _check_no_ranges(ranges: object) -> None:
    if ranges is not None:
        raise TypeError("ranges are those of files; a buffer has offset= and length=")


def lock_pages(
    pages: Intervals, origin: int, populating: Callable[[], PopulateResult], headroom: HeadroomChoice, began: float, *,
    lasting: bool = True,
) -> LockResult:  # fmt: skip
    """Populate pages and lock them.

    Args:
        pages: their addresses.
        origin: the address that offsets in errors are counted from.
        populating: populates them.
        headroom: as of :func:`lock`.
        began: when the call began, by :func:`time.perf_counter`.
        lasting: until they are unlocked; else for the blocks that :data:`~prefault.memory.page_locks.page_locks` knows.
    """
    if headroom == "check":
        _ensure_allowed(pages, origin)
    populated = populating()
    refused = page_locks.lock(pages, lasting=lasting)
    if refused is not None:
        start, error = refused
        raise OutOfMemoryError(
            error.errno or errno.ENOMEM,
            f"{format_size(pages.length)} are populated, but cannot be locked: {_why_not(start, error)}",
            address=start, offset=start - origin,
        ) from error  # fmt: skip
    return LockResult(pages.length, populated, perf_counter() - began)


def pages_of(memory: Borrowed, offset: Size, length: Size | None) -> Intervals:
    """Return the pages that hold a byte of a part of borrowed memory."""
    span = memory.select(offset, length)
    if memory.strides is None:
        return Intervals([PageRange.outward(*span)])
    from prefault.memory.borrowed_members import member_of

    return member_of("", memory, Intervals([span])).pages


def unlock(buffer: Any, *, offset: Size = 0, length: Size | None = None) -> int:
    """Unlock the pages of ``buffer``. They stay present until the kernel wants the memory.

    Pages that a block of :func:`prefault.ready` needs, in any thread, stay locked until it ends.

    Returns:
        Bytes in whole pages. Pages that were not locked are counted as well.

    Raises:
        HoleError: a part of it is not mapped.
        TypeError, ValueError: not a buffer; an offset or length outside.

    Source: munlock(2).
    """
    try:
        memory = borrow(buffer)
    except TypeError as error:
        from prefault.memory.borrowed_members import borrowed_collection

        with borrowed_collection(buffer, offset, length, error) as members:
            return _unlock(members.pages, 0)
    with memory:
        return _unlock(pages_of(memory, offset, length), memory.address)


def _unlock(pages: Intervals, origin: int) -> int:
    try:
        page_locks.unlock(pages)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        start = error.filename
        raise HoleError(
            errno.ENOMEM, "a part of the range is not mapped; what lies before it is unlocked",
            address=start, offset=start - origin,
        ) from error  # fmt: skip
    return pages.length


def _ensure_allowed(pages: Intervals, origin: int) -> None:
    start, stop = pages.span
    short = refusal_ahead([Demand(MemoryUse(start, stop, locks=True), pages, None, pages)], "RLIMIT_MEMLOCK")
    if short is not None:
        raise short.error(
            f"locking takes {format_size(short.needed_bytes)} more, and {short.limit.advice}",
            address=start, offset=start - origin,
        )  # fmt: skip


def _why_not(start: int, error: OSError) -> str:
    if error.errno in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        return f"{lock_refusal()}, and vm.max_map_count bounds the number of its parts"
    return f"the kernel refuses it at {start:#x}: {error.strerror}"
