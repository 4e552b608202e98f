"""discard: give pages back, by the way that the mapping needs."""

import errno
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from prefault._kernel import mman
from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault._system import capabilities
from prefault.errors import DiscardError
from prefault.inspection.result import PageState
from prefault.inspection.scan import residency_of
from prefault.memory.borrowing import Borrowed, ProvidedSpan, Span, borrow, other_spans, provided_spans
from prefault.memory.vma import Backing, Vma, vm_flags, vmas_by_kind
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, PAGE_SIZE, Size, format_size

if TYPE_CHECKING:
    from prefault.memory.borrowed_members import Members

_STEP = 64 * MIB
"""One system call gives back at most this much, some 10 ms of work, so that Ctrl-C is answered."""


class DiscardResult(NamedTuple):
    """All whole pages of the range are given back.

    Attributes:
        bytes: in the whole pages inside the range; partial pages at its ends keep their content.
        freed_bytes: that were present and allocated for this process before; shared memory that only others had mapped
            is given back too, but not counted here. None where the kernel cannot tell.
        seconds: the call took.
        method: the advice or call that did it.
        notes: sentences that a user should know.
    """

    bytes: int
    freed_bytes: int | None
    seconds: float
    method: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.bytes:
            return "; ".join(("nothing to discard: no whole page lies in the range", *self.notes))
        freed = "" if self.freed_bytes is None else f", {format_size(self.freed_bytes)} of it were allocated"
        return "; ".join(
            (f"{format_size(self.bytes)} discarded in {self.seconds:.2g} s ({self.method}{freed})", *self.notes)
        )


def discard(buffer: Any, *, offset: Size = 0, length: Size | None = None) -> DiscardResult:
    """Give the whole pages inside the range back to the system.

    What is read next is zeros; for mappings of a file on disk it is the file's content, and for private ones what was
    written to them is lost. Memory files (memfd, tmpfs, shared anonymous memory, hugetlb) lose these pages for every process
    that maps them: that is what frees the memory. A file on disk is never changed.

    Args:
        buffer: any writable memory, or a collection of it, as for :func:`~prefault.populate`. Rounded **inward**: no
            neighbour's byte is lost. Of a collection all is checked before the first page is discarded.
        offset: where to start, in bytes from the start of the buffer.
        length: how far; None: to its end.

    Raises:
        DiscardError: the kernel refuses, for example locked shared memory; ``address`` says where.
        TypeError, ValueError: not a buffer, a read-only one in private memory, or one with gaps that are not its own.

    Source: madvise(2), MADV_DONTNEED and MADV_REMOVE; fallocate(2), FALLOC_FL_PUNCH_HOLE.
    """
    began = perf_counter()
    try:
        borrowed = borrow(buffer)
    except TypeError as error:
        # Imported here: a part of the import time that most programs need not spend.
        from prefault.memory.borrowed_members import borrowed_collection

        with borrowed_collection(buffer, offset, length, error) as members:
            return _discard_members(members, began)
    with borrowed as memory:
        span = memory.select(offset, length)
        if not memory.contiguous:
            raise ValueError(_GAPS)
        if memory.access_guard is None:
            return _discard(memory, span, began)
        with memory.access_guard.discarding(span) as whole_blocks:
            return _discard(memory, whole_blocks, began)


_GAPS = "the array is not contiguous: discarding the pages it spans would lose bytes between its items"


def _discard(memory: Borrowed, span: Span, began: float) -> DiscardResult:
    return _discard_looked([_look(memory, span)], began)


def _discard_members(members: "Members", began: float) -> DiscardResult:
    """Discard the pages all of whose bytes are those of members."""
    name = members.with_gaps
    if name is not None:
        raise ValueError(f"{name}: {_GAPS}")
    looks = []
    for readonly, spans in members.bytes_by_kind():
        for start, stop in spans:
            try:
                looks.append(_look(Borrowed(start, stop - start, readonly=readonly), Span(start, stop)))
            except ValueError as error:
                member = members.member_at(start)
                raise ValueError(f"{member.name if member else 'a part'}: {error}") from error
    return _discard_looked(looks, began)


_Part: TypeAlias = tuple[PageRange, Vma]
"""Whole pages of one mapping, and its kind."""


class _Look(NamedTuple):
    """Memory that may be discarded: the spans that page providers supply, and the kernel's parts, each with its holes."""

    provided: tuple[ProvidedSpan, ...]
    others: list[tuple[list[_Part], bool]]
    fd: int | None


def _look(memory: Borrowed, span: Span) -> _Look:
    provided = provided_spans(*span)
    spans = other_spans(*span, provided) if provided else [span]
    return _Look(provided, [_parts(memory, part) for part in spans], memory.fd)


def _discard_looked(looks: list[_Look], began: float) -> DiscardResult:
    # First the devices: they may refuse, and then nothing of the kernel's memory is lost.
    results = [
        DiscardResult(*page_provider.discard(Span(start, stop)), 0.0, "device")
        for look in looks
        for start, stop, page_provider in look.provided
    ]
    results += (_discard_parts(parts, holes, look.fd, began) for look in looks for parts, holes in look.others)
    if len(results) == 1:
        return results[0]
    freed = [result.freed_bytes for result in results]
    return DiscardResult(
        sum(result.bytes for result in results),
        None if None in freed else sum(count or 0 for count in freed),
        perf_counter() - began,
        ", ".join(dict.fromkeys(name for result in results if result.bytes for name in result.method.split(", "))) or "none",
        tuple(dict.fromkeys(note for result in results for note in result.notes)),
    )


def _discard_parts(parts: "list[_Part]", holes: bool, fd: int | None, began: float) -> DiscardResult:
    notes: dict[str, None] = {"a part of the range is not mapped": None} if holes else {}
    if not parts:
        return DiscardResult(0, 0, 0.0, "none", tuple(notes))
    freed = _allocated(parts)
    used: dict[str, None] = {}
    for together in _runs(parts):
        used.update(_discard_run(together, fd))
    if any(vma.shared and vma.backing is Backing.FILE for vma in {vma for _, vma in parts}):
        notes["the file's pages stay in the page cache until the kernel wants the memory"] = None
    total = sum(part.length for part, _ in parts)
    return DiscardResult(total, freed, perf_counter() - began, ", ".join(used), tuple(notes))


def _allocated(parts: list[_Part]) -> int | None:
    """Count bytes that are present and allocated, by one scan from the first part to the last."""
    found = residency_of(PageRange(parts[0][0].start, parts[-1][0].stop))
    # Between the parts lie holes, in which nothing is, and parts of huge pages, which stay.
    if len(parts) == 1 or found.allocated_bytes in (None, 0):
        return found.allocated_bytes
    there = found.ranges(PageState.ALLOCATED).shifted(found.range.start)
    return (there & RangeSet(part for part, _ in parts)).length


def _parts(memory: Borrowed, span: Span) -> tuple[list[_Part], bool]:
    """Return the whole pages of every mapping under ``span``, and whether there are holes between.

    All of the span is checked before any page is discarded.
    """
    parts = []
    at = span.start
    holes = False
    for start, stop, vma in vmas_by_kind(span.start, span.stop):
        holes = holes or start > at
        part = PageRange.inward(max(at, start), min(span.stop, stop), vma.page_size)
        if part:
            if vma.shared and vma.backing is Backing.SPECIAL:
                # MADV_DONTNEED would succeed: it empties the page tables, and frees nothing.
                raise DiscardError(
                    errno.EINVAL, f"cannot discard {vma.describe()}: only its driver can take it back", address=part.start
                )
            if memory.readonly and _loses_bytes(vma, part):
                raise ValueError("the buffer is read-only: its owner does not expect its bytes to change")
            if _punches(vma) and not vma.writable and memory.access_guard is None:  # a guard has just unprotected it
                raise ValueError(f"the mapping is read-only: discarding {vma.backing.value} would take its bytes from all")
            parts.append((part, vma))
        at = stop
    return parts, holes or at < span.stop


def _runs(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Yield parts that one call can empty: neighbours whose page tables are all that is to be emptied."""
    run: list[_Part] = []
    for part, vma in parts:
        alone = _punches(vma) or vma.page_size > PAGE_SIZE
        if run and (alone or part.start != run[-1][0].stop):
            yield run
            run = []
        run.append((part, vma))
        if alone:
            yield run
            run = []
    if run:
        yield run


def _discard_run(run: list[_Part], fd: int | None) -> dict[str, None]:
    """Discard neighbours together; one by one where the kernel refuses, which for locked memory says where and why."""
    if len(run) > 1:
        try:
            for chunk in PageRange(run[0][0].start, run[-1][0].stop).chunks(_STEP):
                mman.madvise(chunk.start, chunk.length, mman.MADV_DONTNEED)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOMEM):
                raise
        else:
            return {"MADV_DONTNEED": None}
    return {
        _discard_chunk(chunk, vma, fd): None for part, vma in run for chunk in part.chunks(max(_STEP, vma.page_size))
    }  # fmt: skip


def _punches(vma: Vma) -> bool:
    """Return whether the memory is freed only by punching holes, because the file is nothing but memory."""
    return vma.shared and (vma.backing.is_shmem or vma.backing is Backing.HUGETLB)


def _loses_bytes(vma: Vma, part: PageRange) -> bool:
    """Return whether discarding can change the bytes. It cannot where all pages are those of a file."""
    if vma.shared:
        return _punches(vma)
    if vma.writable or vma.backing is not Backing.FILE:
        return True
    # Written before it became read-only, as the relocated data of a program is: these pages are private copies.
    return any(run.state & PageState.SWAPPED or not run.state & PageState.FILE for run in residency_of(part).runs)


def _discard_chunk(chunk: PageRange, vma: Vma, fd: int | None) -> str:
    try:
        if not _punches(vma):
            return drop(chunk.start, chunk.length)
        if fd is not None:
            # Works on locked memory too, which MADV_REMOVE refuses.
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            fallocate(fd, mode, vma.file_offset + chunk.start - vma.start, chunk.length)
            return "FALLOC_FL_PUNCH_HOLE"
        mman.madvise(chunk.start, chunk.length, mman.MADV_REMOVE)
        return "MADV_REMOVE"
    except OSError as error:
        raise DiscardError(
            error.errno or 0,
            f"cannot discard {format_size(chunk.length)} at {chunk.start:#x}: {_why_not(vma, error)}",
            address=chunk.start,
        ) from error


def drop(start: int, length: int) -> str:
    """Empty the page tables: private memory is freed, a shared file only unmapped."""
    try:
        mman.madvise(start, length, mman.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL or not capabilities.DONTNEED_LOCKED.available:
            raise
        # EINVAL: locked memory (or special memory, which fails again). Linux 5.18 has an advice of its own for it.
        mman.madvise(start, length, mman.MADV_DONTNEED_LOCKED)
        return "MADV_DONTNEED_LOCKED"
    return "MADV_DONTNEED"


def _why_not(vma: Vma, error: OSError) -> str:
    if error.errno == errno.EINVAL and "lo" in vm_flags(vma.start):
        return "the memory is locked: munlock it first"
    return f"the kernel refuses it for {vma.describe()}: {error.strerror}"
