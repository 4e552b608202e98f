"""populate: plan it, check the limits, carry it out."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from operator import itemgetter
from time import perf_counter_ns
from typing import Any, NamedTuple

from prefault.engine.chunk_queue import PlanQueue
from prefault.engine.execution import Execution
from prefault.engine.methods import Access
from prefault.engine.outcomes import NO_MEMORY, PopulateResult
from prefault.engine.parts import KernelPart, Part, ProgressOfParts, access_to, admit, device_parts, run_parts
from prefault.engine.planning import Huge, Plan, Segment, Threads, huge_page_candidates, plan_span, wants_huge
from prefault.engine.populated_pages import pages_before, populated_pages
from prefault.engine.progress import Progress, check_progress, reporting
from prefault.engine.rate import RateLimit, rate_limit
from prefault.engine.rollback import Rollback, file_pages
from prefault.engine.small_calls import is_small, run_small, small_plan, surely_fits
from prefault.errors import OutOfMemoryError
from prefault.intervals import Intervals
from prefault.limits.admission import AdmissionControl, HeadroomChoice
from prefault.limits.demand import demands_of
from prefault.memory.borrowing import (
    Borrowed,
    GuardedPopulate,
    PageProvider,
    ProvidedSpan,
    Span,
    borrow,
    other_spans,
    provided_spans,
)
from prefault.memory.huge_advice import HugeAdvice
from prefault.sizes import Size

__all__ = ["HeadroomChoice", "PopulateResult", "Progress", "populate"]

_NONE = Intervals()


def populate(
    buffer: Any,
    *,
    access: Access | None = None,
    offset: Size = 0,
    length: Size | None = None,
    method: str | None = None,
    threads: Threads = None,
    rollback: bool = False,
    progress: Progress | bool = False,
    rate: RateLimit | Size | None = None,
    headroom: HeadroomChoice = "check",
    huge: Huge = None,
) -> PopulateResult:
    """Make every page of ``buffer`` present, so that touching it faults no more; or fail, and report how far it came.

    A command, not a hint: success means all of the range. No byte changes. Memory that is not available is an exception,
    never a SIGBUS, and a memory limit is an exception before the OOM killer strikes: see :func:`prefault.headroom`.

    Args:
        buffer: ndarray, mmap, memoryview, bytearray, SharedMemory, tensor, :class:`~prefault.Mapping`, ...: see
            :func:`prefault.memory.borrow`. It is rounded outward to whole pages, which does no harm to the neighbours.
        access: ``"read"``: readable, without breaking copy-on-write, perhaps with the shared zero page and no memory.
            ``"write"``: memory allocated and writable. None: ``"read"`` for what may not be written, for files shared with
            a disk (their holes are allocated as well) and for private mappings of files, which would be copied into
            anonymous memory; else ``"write"``.
        offset: where to start, in bytes from the start of the buffer (``"64 MiB"`` or a number).
        length: how far; None: to its end.
        method: the name of a method of :mod:`prefault.engine.methods`, instead of the best one. For device memory the best
            is ``"device"``, its driver's hook; the others fault it in page by page, and Ctrl-C waits for their chunk.
        threads: how many at once, never more than the CPUs that this process may use; ``"auto"`` or None: chosen by size,
            affinity and CPU quota. :func:`prefault.plan` gives the reason; notes of the result, where it was reduced.
        rollback: on failure or Ctrl-C discard the pages that this call brought in. What another thread wrote to just those
            pages meanwhile is lost.
        progress: True draws a bar on stderr, or logs a line every few seconds where that is no terminal; a function is
            called with the bytes done and in all.
        rate: limit of the bytes a second that are brought in, as ``"2 GiB/s"``; a :class:`prefault.RateLimit` is shared by
            all calls that are given it. None: as fast as possible.
        headroom: ``"check"`` checks the limits before the start, for the pages that are really missing, and at those of
            memory between chunks; ``"ignore"`` does not: the kernel finds out.
        huge: ``"auto"`` advises transparent huge pages for what is missing of private anonymous memory, where that changes
            nothing that was asked for, and until compaction makes them slow; the notes say how much got them. The advice
            stays on the mapping. None leaves the memory as it is.

    Returns:
        The bytes that were brought in. Pages that were populated before are counted apart.

    Raises:
        HeadroomError: a limit leaves less than is needed: nothing was populated; or less than at the start, in the middle.
        PopulateError: one of its subclasses says why, ``offset`` where, ``populated_bytes`` how much there is now.
        PopulateInterrupted: Ctrl-C; also says how much. At most one chunk (some tens of milliseconds) late.
        OSError: this process has no descriptor left, or no /proc is mounted; nothing was populated.
        TypeError, ValueError: not a buffer; closed or released; an offset or length outside; an unknown option.

    Source: madvise(2), MADV_POPULATE_READ and MADV_POPULATE_WRITE (Linux 5.14, commit 4ca9b3859dac, David Hildenbrand).
    """
    began = perf_counter_ns()
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    check_progress(progress)
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")
    memory = borrow(buffer)
    try:
        span = memory.select(offset, length)
        options = _Options(access, method, threads, rollback, progress, rate_limit(rate), headroom, began, wants_huge(huge))
        if memory.access_guard is None:
            return _populate(memory, span, None, options)
        with memory.access_guard.populating(span) as guarded:
            return _populate(memory, guarded.span, guarded, options._replace(rollback=True))
    except MemoryError as error:
        if error.args:
            raise
        raise OutOfMemoryError(errno.ENOMEM, NO_MEMORY, address=memory.address) from error
    finally:
        memory.release()


class _Options(NamedTuple):
    """Arguments of :func:`populate`, and when it began, by :func:`time.perf_counter_ns`."""

    access: Access | None
    method: str | None
    threads: Threads
    rollback: bool
    progress: Progress | bool
    rate: RateLimit | None
    headroom: HeadroomChoice
    began: int
    huge: bool


def _populate(memory: Borrowed, span: Span, guarded: GuardedPopulate | None, options: _Options) -> PopulateResult:
    access, method, threads = options[:3]
    provided = provided_spans(*span) if method in (None, "device") and span.start < span.stop else ()
    if provided:
        return _populate_parts(memory, span, provided, guarded, options)
    simple = method is None and threads in (None, "auto") and not options.huge
    plan = small_plan(memory, span, access) if simple else None
    return _carry_out(plan or plan_span(memory, span, access, method, threads), memory, guarded, options)


def _carry_out(plan: Plan, memory: Borrowed, guarded: GuardedPopulate | None, options: _Options) -> PopulateResult:
    _, _, _, rollback, progress, rate, headroom, began, huge = options
    if not plan.segments:
        return PopulateResult(0, 0, 0.0, plan.access, "none", 1)
    if rollback:
        before, kept = pages_before(plan.segments)
    else:
        before, kept = populated_pages(plan.segments), _NONE
    advice = None
    if huge:
        private, note = huge_page_candidates(plan, memory)
        advice = HugeAdvice(private - before, memory.address) if note is None else None
        plan = plan if note is None else plan._replace(notes=(*plan.notes, note))
    small = is_small(plan) and rate is None and advice is None
    admission = None
    if headroom == "check" and not (small and surely_fits(plan.segments[0], began)):
        admission = _admission(plan.segments, before, memory, guarded)
    kept -= admit(plan.segments[0], admission, guarded)
    if small:
        admission = None  # its only chunk has just been looked at
    undo = Rollback(plan.segments, kept, file_pages(plan.segments)) if rollback else None  # looks before anything is done
    if small and progress is False:
        return run_small(plan, memory.address, began, before, undo)
    with reporting(progress, "populate") as report:
        return Execution(PlanQueue(plan), memory.address, before, report, undo, admission, rate, advice).run(began)


def _populate_parts(
    memory: Borrowed, span: Span, provided: Sequence[ProvidedSpan], guarded: GuardedPopulate | None, options: _Options
) -> PopulateResult:  # fmt: skip
    """Populate memory that page providers supply, in whole or in part."""
    access, method, threads, rollback, progress, rate, headroom, began, _ = options
    origin = memory.address
    plans = [plan_span(memory, part, access, method, threads) for part in other_spans(*span, provided)]
    segments = [segment for plan in plans for segment in plan.segments]
    looks = [pages_before(p.segments) if rollback else (populated_pages(p.segments), _NONE) for p in plans]
    admission = None
    if headroom == "check" and segments:
        # Memory of the kernel in all parts together; a device's server checks for its frames.
        admission = _admission(segments, Intervals.union_of(before for before, _ in looks), memory, guarded)
    protected = admit(segments[0] if segments else None, admission, guarded)
    with reporting(progress, "populate") as report:
        lengths = sum(stop - start for start, stop, _ in provided) + sum(plan.length for plan in plans)
        progresses = ProgressOfParts(report, lengths)
        parts: list[Part] = []
        kernel = iter(zip(plans, looks, strict=True))
        for start, stop, page_provider in _in_order(span, provided):
            if page_provider is None:
                plan, (before, kept) = next(kernel)
                undo = Rollback(plan.segments, kept - protected, file_pages(plan.segments)) if rollback else None
                report_part = progresses.of_next(plan.length)
                parts.append(KernelPart(Execution(PlanQueue(plan), origin, before, report_part, undo, admission, rate)))
                continue
            parts += device_parts(
                page_provider, Intervals([(start, stop)]), origin, access_to(page_provider, memory, access),
                rollback=rollback, progresses=progresses, rate=rate, check_headroom=headroom == "check",
            )  # fmt: skip
        return run_parts(parts, origin, began)


def _in_order(span: Span, provided: Sequence[ProvidedSpan]) -> list[tuple[int, int, PageProvider | None]]:
    """Return all parts of a span by address, with the page provider of each; None for memory of the kernel."""
    parts: list[tuple[int, int, PageProvider | None]] = [*provided]
    parts += [(start, stop, None) for start, stop in other_spans(*span, provided)]
    return sorted(parts, key=itemgetter(0))


def _admission(
    segments: Sequence[Segment], before: Intervals, memory: Borrowed, guarded: GuardedPopulate | None
) -> AdmissionControl:
    uses = [segment.use._replace(guarded=guarded is not None) for segment in segments]
    return AdmissionControl(demands_of(uses, before, memory.fd), memory.address)
