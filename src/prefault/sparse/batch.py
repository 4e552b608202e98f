"""populate_many and discard_many: vectors of 1024 ranges, all or nothing over all of them."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING

from prefault._kernel import mman
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities
from prefault.engine.chunking import FIRST_CHUNK
from prefault.engine.discarding import DiscardResult, drop
from prefault.engine.execution import Execution
from prefault.engine.methods import Access
from prefault.engine.parts import KernelPart, Part, ProgressOfParts, access_to, admit, device_parts, run_parts
from prefault.engine.planning import plan_span
from prefault.engine.populating import HeadroomChoice, PopulateResult
from prefault.engine.progress import Progress, check_progress, reporting
from prefault.engine.rate import RateLimit
from prefault.engine.rollback import Rollback
from prefault.engine.scattered.advice_vector import advise
from prefault.engine.scattered.row_queue import RowQueue
from prefault.engine.scattered.scattered_pages import NEAR, look_at, scattered_demand
from prefault.errors import DiscardError
from prefault.inspection.scan import occupied
from prefault.intervals import Intervals
from prefault.limits.admission import AdmissionControl
from prefault.memory.borrowing import Borrowed, ProvidedSpan, Span, provided_spans
from prefault.memory.vma import Backing
from prefault.sizes import MIB, format_size
from prefault.sparse.exclusion import BlockGuard
from prefault.sparse.operations import DiscardingMany, Populating

if TYPE_CHECKING:
    from collections.abc import Callable

_STEP = 64 * MIB

_PRESENT, _ZERO_PAGE = int(PageCategory.PRESENT), int(PageCategory.PFNZERO)


def populate_many(
    memory: Borrowed, guard: BlockGuard, blocks: Intervals, access: Access | None, headroom: HeadroomChoice,
    progress: Progress | bool = False, rate: RateLimit | None = None,
) -> PopulateResult:  # fmt: skip
    """Populate the blocks, all or none."""
    began = perf_counter_ns()
    check_progress(progress)
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")
    if not blocks:
        return PopulateResult(0, 0, 0.0, access or "write", "none", 1)
    with Populating(guard, blocks) as operation, reporting(progress, "populate") as report:
        pages = blocks.shifted(memory.address)
        provided = provided_spans(*pages.span)
        if not provided:
            return _prepare(memory, operation, pages, access, headroom, report, rate).run(began)
        progresses = ProgressOfParts(report, pages.length)
        parts: list[Part] = []
        kernel = pages - _pages_of(provided)
        if kernel:
            told = progresses.of_next(kernel.length)
            parts.append(KernelPart(_prepare(memory, operation, kernel, access, headroom, told, rate)))
        else:
            admit(None, None, operation)
        for start, stop, page_provider in provided:
            if mine := pages.clipped(start, stop):
                parts += device_parts(
                    page_provider, mine, memory.address, access_to(page_provider, memory, access),
                    rollback=True, progresses=progresses, rate=rate, check_headroom=headroom == "check",
                )  # fmt: skip
        return run_parts(parts, memory.address, began)


def _pages_of(provided: Iterable[ProvidedSpan]) -> Intervals:
    return Intervals((start, stop) for start, stop, _ in provided)


def _prepare(
    memory: Borrowed, operation: Populating, pages: Intervals, access: Access | None, headroom: HeadroomChoice,
    progress: Progress | None, rate: RateLimit | None,
) -> Execution:  # fmt: skip
    """Return the execution for pages that the kernel populates; all blocks of the operation are charged and unprotected."""
    # All pages are parts of one mapping, so what is best for the first is best for all.
    start, stop = pages.span
    plan = plan_span(memory, Span(start, pages.edges[1]), access, None, 1)
    (segment,) = plan.segments
    if segment.backing is not Backing.FILE:
        # fallocate first pays for large ranges only (docs/design/sparse.md)
        segment = segment._replace(method=segment.method.without_fallocate)
    segment = segment._replace(start=start, stop=stop, pages=pages)
    look = look_at(segment, rollback=True)
    admission = None
    if headroom == "check":
        admission = AdmissionControl([scattered_demand(segment, look, memory.fd, guarded=True)], memory.address)
    protected = admit(segment, admission, operation)
    rollback = Rollback((segment,), look.kept - protected, look.resident)
    queue = RowQueue(plan._replace(segments=(segment,)))
    if queue.vector.stop_of(0, FIRST_CHUNK) == len(queue.vector):
        admission = None  # its only chunk has just been looked at
    return Execution(queue, memory.address, look.before, progress, rollback, admission, rate)


def discard_many(memory: Borrowed, guard: BlockGuard, blocks: Intervals) -> DiscardResult:
    """Discard the blocks."""
    began = perf_counter()
    if not blocks:
        return DiscardResult(0, 0, 0.0, "none")
    pages = blocks.shifted(memory.address)
    provided = provided_spans(*pages.span)
    kernel = pages - _pages_of(provided)
    freed = _allocated(kernel) if kernel else 0
    used: list[str] = []
    operation = DiscardingMany(guard, blocks, punches=bool(provided))
    with operation:
        at = 0
        try:
            for start, stop, page_provider in provided:
                for at, end in pages.clipped(start, stop):
                    supplied_bytes = page_provider.discard(Span(at, end))[1]
                    freed = None if freed is None else freed + supplied_bytes
                    used[:] = ["device"]
        except BaseException:
            operation.refused = (pages - kernel).clipped(at, pages.span[1]).shifted(-memory.address)
            raise
        if kernel:
            used.append(_discard_kernel(kernel, guard))
    return DiscardResult(blocks.length, freed, perf_counter() - began, ", ".join(used))


def _discard_kernel(pages: Intervals, guard: BlockGuard) -> str:
    """Discard pages of the kernel whose blocks are protected, if they ever are; return the name of the method."""
    if guard.memory_file is not None:
        return _each(pages, guard.punch)
    return _drop(pages) if guard.protection is None else "MADV_DONTNEED"


def _allocated(pages: Intervals) -> int | None:
    if not capabilities.PAGEMAP_SCAN.available:
        return None
    rows = occupied(pages.bridged(NEAR).edges)
    allocated = (rows[:, 2] & (_PRESENT | _ZERO_PAGE)) == _PRESENT
    return (Intervals.from_arrays(rows[allocated, 0], rows[allocated, 1]) & pages).length


def _drop(pages: Intervals) -> str:
    try:
        advise(pages, mman.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Locked memory: there is another advice for it, or an error that says where.
        return _each(pages, drop)
    return "MADV_DONTNEED"


def _each(pages: Intervals, discard_one: Callable[[int, int], str]) -> str:
    """Discard range by range, long ones in steps; return the name of the method of the last one."""
    how = ""
    starts, lengths = pages.pieces(_STEP)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        try:
            how = discard_one(start, length)
        except OSError as error:
            raise DiscardError(
                error.errno or 0,
                f"cannot discard {format_size(length)} at {start:#x}: {error.strerror}"
                " (memory that is locked must be unlocked first)",
                address=start,
            ) from error
    return how
