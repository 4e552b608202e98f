"""populate: plan it, check the limits, carry it out."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import ExitStack
from operator import itemgetter
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from prefault.engine.chunk_queue import PlanQueue
from prefault.engine.execution import Execution
from prefault.engine.methods import Access
from prefault.engine.outcomes import NO_MEMORY, PopulateResult
from prefault.engine.parts import (
    FOREIGN_NODES,
    KernelPart,
    Part,
    PopulateOptions,
    ProgressOfParts,
    access_to,
    admit,
    device_parts,
    run_parts,
)
from prefault.engine.planning import (
    Huge,
    Plan,
    Segment,
    Threads,
    huge_note,
    huge_page_candidates,
    make_plan,
    plan_span,
    wants_huge,
)
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
from prefault.memory.file_verbs import verbs_on
from prefault.memory.node_policy import Interleave, NodePolicy, policy_for, under_policy
from prefault.ranges import Ranges
from prefault.sizes import Size

if TYPE_CHECKING:
    from prefault.memory.borrowed_members import Members

__all__ = ["HeadroomChoice", "PopulateResult", "Progress", "plan", "populate", "populate_many"]

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
    node: int | None = None,
    interleave: Interleave = False,
) -> PopulateResult:
    """Make every page of ``buffer`` present, so that touching it faults no more; or fail, and report how far it came.

    A command, not a hint: success means all of the range. No byte changes. Memory that is not available is an exception,
    never a SIGBUS, and a memory limit is an exception before the OOM killer strikes: see :func:`prefault.headroom`.

    Args:
        buffer: ndarray, mmap, memoryview, bytearray, SharedMemory, tensor, :class:`~prefault.Mapping`, ...: see
            :func:`prefault.memory.borrow`. It is rounded outward to whole pages, which does no harm to the neighbours. An
            array with gaps (``a[:, 3]``) brings in the pages that it touches, and not what lies between. Also any
            collection of buffers: a list, tuple or dictionary (a state_dict), a torch module, SafeTensors, an Arrow table,
            a pandas or polars frame, one inside the other; pages that they share are populated once. Or the path of a file
            or directory (a ``str`` or a ``pathlib.Path``), or a :func:`prefault.select` of files, which
            :func:`prefault.warm` brings into the page cache; ``method`` is one of its methods then.
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
            memory between chunks, and looks at the end whether pages of files were evicted for others; ``"ignore"`` does
            not: the kernel finds out.
        huge: ``"auto"`` advises transparent huge pages for what is missing of private anonymous memory, where that changes
            nothing that was asked for, and until compaction makes them slow; the notes say how much got them. The advice
            stays on the mapping. None leaves the memory as it is.
        node: number of the NUMA node that the missing pages come from; HeadroomError where it has too little. With
            ``headroom="ignore"`` other nodes help out when it is full. The policy of the memory is as before afterwards.
        interleave: True has missing pages come in turn from all nodes that this process may use, numbers from these.

    Returns:
        The bytes that were brought in. Pages that were populated before are counted apart.

    Raises:
        HeadroomError: a limit leaves less than is needed: nothing was populated; or less than at the start, in the middle;
            or pages of files were evicted for others, which shows at the end: ``populated`` is what is there. Of a path:
            nothing was brought in, or less than all.
        PopulateError: one of its subclasses says why, ``offset`` where, ``populated_bytes`` how much there is now.
        PopulateInterrupted: Ctrl-C; also says how much. At most one chunk (some tens of milliseconds) late.
        OSError: this process has no descriptor left, or no /proc is mounted; nothing was populated. Of a path: a file, or a
            part of one, could not be brought in; what was brought in stays.
        WarmInterrupted: Ctrl-C, of a path.
        TypeError, ValueError: not a buffer; closed or released; an offset or length outside; an unknown option.

    Source: madvise(2), MADV_POPULATE_READ and MADV_POPULATE_WRITE (Linux 5.14, commit 4ca9b3859dac, David Hildenbrand).
    """
    began = perf_counter_ns()
    options = parse_options(began, access, method, threads, rollback, progress, rate, headroom, huge, node, interleave)
    try:
        memory = borrow(buffer)
    except TypeError as error:
        verbs = verbs_on(buffer)
        if verbs is not None:
            of_files: PopulateResult = verbs.populate(
                buffer, offset=offset, length=length, access=access, method=method, threads=threads, rollback=rollback,
                progress=progress, rate=options.rate, headroom=headroom, huge=huge, node=node, interleave=interleave,
            )  # fmt: skip
            return of_files
        from prefault.memory.borrowed_members import borrowed_collection

        with borrowed_collection(buffer, offset, length, error) as members:
            return populate_borrowed(members, offset, length, options)
    try:
        return populate_borrowed(memory, offset, length, options)
    finally:
        memory.release()


def parse_options(
    began: int, access: Access | None = None, method: str | None = None, threads: Threads = None, rollback: bool = False,
    progress: Progress | bool = False, rate: RateLimit | Size | None = None, headroom: HeadroomChoice = "check",
    huge: Huge = None, node: int | None = None, interleave: Interleave = False,
) -> PopulateOptions:  # fmt: skip
    """Return the options of a call that began at a time of :func:`time.perf_counter_ns`; errors as of :func:`populate`."""
    if access is not None or headroom != "check" or progress is not False:
        _check_choices(access, headroom, progress)
    return PopulateOptions(
        access, method, threads, rollback, progress, None if rate is None else rate_limit(rate), headroom, began,
        huge is not None and wants_huge(huge),
        None if node is None and interleave is False else policy_for(node, interleave, strict=headroom == "check"),
    )  # fmt: skip


def populate_borrowed(
    memory: Borrowed | Members, offset: Size, length: Size | None, options: PopulateOptions
) -> PopulateResult:  # fmt: skip
    """Populate borrowed memory; the caller releases it."""
    if not isinstance(memory, Borrowed):
        _check_not_huge(options.huge)
        from prefault.engine.scattered.populating_many import populate_members

        return populate_members(memory, options)
    try:
        memory.has_policy = memory.has_policy or options.node_policy is not None
        span = memory.select(offset, length)
        if memory.strides is not None:
            _check_not_huge(options.huge)
            return _populate_pages(memory, Intervals([span]), options)
        if memory.access_guard is None:
            return _populate(memory, span, None, options)
        with memory.access_guard.populating(span) as guarded:
            return _populate(memory, guarded.span, guarded, options._replace(rollback=True))
    except MemoryError as error:
        if error.args:
            raise
        raise OutOfMemoryError(errno.ENOMEM, NO_MEMORY, address=memory.address) from error


def plan(
    buffer: Any,
    *,
    access: Access | None = None,
    offset: Size = 0,
    length: Size | None = None,
    method: str | None = None,
    threads: Threads = None,
    huge: Huge = None,
    node: int | None = None,
    interleave: Interleave = False,
) -> Plan:
    """Return the plan of :func:`prefault.populate` for the same arguments, with its reasons. Nothing is populated.

    Of a collection, or an array with gaps, there is one segment for each kind of memory, which may lie inside another's. Of
    a path there is none, and the notes tell what is missing from the page cache, and how it would be brought in. A note says
    if a limit leaves too little for it.

    Raises:
        OSError: of a path: a file cannot be opened.
        TypeError, ValueError: those of :func:`prefault.populate`.
    """
    _check_choices(access, "check", False)
    policy = policy_for(node, interleave)
    try:
        memory = borrow(buffer)
    except TypeError as error:
        verbs = verbs_on(buffer)
        if verbs is not None:
            of_files: Plan = verbs.plan(
                buffer, offset=offset, length=length, access=access, method=method, threads=threads, huge=huge, node=node,
                interleave=interleave,
            )  # fmt: skip
            return of_files
        _check_not_huge(wants_huge(huge))
        # Imported here, and below: a part of the import time that most programs need not spend.
        from prefault.memory.borrowed_members import borrowed_collection

        with borrowed_collection(buffer, offset, length, error) as members:
            return _plan_members(members, access, method, threads, policy)
    with memory:
        memory.has_policy = memory.has_policy or policy is not None
        if memory.strides is None:
            made = make_plan(memory, access, offset, length, method, threads)
            notes = [huge_note(made, memory)] if wants_huge(huge) and made.segments else []
            if policy is not None:
                notes.append(_policy_note(policy))
            if made.segments and memory.access_guard is None:  # whose owner charges a pool before its limit has room
                notes += _admission(made.segments, populated_pages(made.segments), memory, None, policy).outlook()
            return made._replace(notes=(*made.notes, *notes))
        _check_not_huge(wants_huge(huge))
        from prefault.memory.borrowed_members import Members, member_of

        member = member_of("", memory, Intervals([memory.select(offset, length)]))
        return _plan_members(Members.of_one(member), access, method, threads, policy)


def _plan_members(
    members: Members, access: Access | None, method: str | None, threads: Threads, policy: NodePolicy | None
) -> Plan:  # fmt: skip
    from prefault.engine.scattered.planning_pages import joined, plan_members
    from prefault.engine.scattered.populating_many import outlook_of

    plans, provided = plan_members(members, access, method, threads)
    made = joined(plans, sum(stop - start for start, stop, _ in provided))
    notes = [*made.notes, *outlook_of(plans, () if policy is None else policy.bound)]
    if policy is not None:
        notes.append(_policy_note(policy))
    return made._replace(notes=tuple(notes))


def _policy_note(policy: NodePolicy) -> str:
    return f"memory comes {policy.words}"


def _check_choices(access: object, headroom: object, progress: object) -> None:
    if headroom not in ("check", "ignore"):
        raise ValueError(f"headroom is 'check' or 'ignore', not {headroom!r}")
    check_progress(progress)
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")


def _check_not_huge(huge: bool) -> None:
    if huge:
        raise ValueError("huge='auto' is for one buffer without gaps: give the buffers one by one, or leave it out")


def populate_many(
    buffer: Any,
    ranges: Ranges,
    *,
    access: Access | None = None,
    threads: Threads = None,
    rollback: bool = False,
    progress: Progress | bool = False,
    rate: RateLimit | Size | None = None,
    headroom: HeadroomChoice = "check",
) -> PopulateResult:
    """Make many ranges of ``buffer`` present, and nothing that lies between them: the rows of a table, say.

    A system call takes up to 1024 ranges. A page that several ranges touch is populated once.

    Args:
        buffer: any buffer, as for :func:`prefault.populate`, that is not sparse memory (which has a method of this name).
        ranges: pairs of offset and length in bytes, :class:`PageRange`, a :class:`RangeSet`, or an integer array of shape
            ``(n, 2)``, in any order; each is rounded outward to whole pages, empty ones are left out.
        access: ``"read"``, ``"write"`` or None, as for :func:`prefault.populate`.
        threads: how many at once; ``"auto"`` or None: chosen by size, affinity and CPU quota.
        rollback: on failure or Ctrl-C discard the pages that this call brought in.
        progress: True draws a bar on stderr, or logs where that is no terminal; a function is called with the bytes done and
            in all.
        rate: limit of the bytes a second that are brought in, as ``"2 GiB/s"``; None: none.
        headroom: ``"check"`` checks the limits, but not the space of a disk; ``"ignore"`` does not.

    Raises:
        ValueError: an item is no range inside the buffer; the message has its index. Nothing was populated.
        PopulateError, PopulateInterrupted, TypeError: as :func:`prefault.populate`.

    Source: process_madvise(2), which takes MADV_POPULATE_* for ranges of the own process since Linux 6.13.
    """
    from prefault.engine.scattered.range_arguments import parse_ranges

    began = perf_counter_ns()
    _check_choices(access, headroom, progress)
    options = PopulateOptions(access, None, threads, rollback, progress, rate_limit(rate), headroom, began, huge=False)
    with borrow(buffer) as memory:
        if memory.access_guard is not None:
            raise TypeError("this is sparse memory, which is populated all or nothing: call its own populate_many")
        wanted = parse_ranges(ranges, memory.length).shifted(memory.address)
        return _populate_pages(memory, wanted, options)


def _populate_pages(memory: Borrowed, wanted: Intervals, options: PopulateOptions) -> PopulateResult:
    """Populate those pages among ``wanted`` addresses that hold a byte of the buffer."""
    from prefault.engine.scattered.populating_many import populate_members
    from prefault.memory.borrowed_members import Members, member_of

    return populate_members(Members.of_one(member_of("", memory, wanted)), options)


def _populate(memory: Borrowed, span: Span, guarded: GuardedPopulate | None, options: PopulateOptions) -> PopulateResult:
    access, method, threads = options[:3]
    provided = provided_spans(*span) if method in (None, "device") and span.start < span.stop else ()
    if provided:
        return _populate_parts(memory, span, provided, guarded, options)
    simple = method is None and threads in (None, "auto") and not options.huge and options.node_policy is None
    plan = small_plan(memory, span, access) if simple else None
    return _carry_out(plan or plan_span(memory, span, access, method, threads), memory, guarded, options)


def _carry_out(plan: Plan, memory: Borrowed, guarded: GuardedPopulate | None, options: PopulateOptions) -> PopulateResult:
    _, _, _, rollback, progress, rate, headroom, began, huge, policy = options
    if not plan.segments:
        return PopulateResult(0, 0, 0.0, plan.access, "none", 1)
    if rollback:
        before, kept = pages_before(plan.segments)
    else:
        before, kept = populated_pages(plan.segments), None
    advice = None
    if huge:
        private, note = huge_page_candidates(plan, memory)
        from prefault.memory.huge_advice import HugeAdvice

        advice = HugeAdvice(private - before, memory.address) if note is None else None
        plan = plan if note is None else plan._replace(notes=(*plan.notes, note))
    small = is_small(plan) and rate is None and advice is None and policy is None and not memory.nodes
    admission = None
    if headroom == "check" and not (small and surely_fits(plan.segments[0], began)):
        admission = _admission(plan.segments, before, memory, guarded, policy)
    protected = admit(plan.segments[0], admission, guarded)
    if small:
        admission = None  # its only chunk has just been looked at
    # Looks before anything is done.
    undo = None if kept is None else Rollback(plan.segments, kept - protected, file_pages(plan.segments))
    if small and progress is False:
        return run_small(plan, memory.address, began, before, undo)
    with ExitStack() as stack:
        pages = Intervals((segment.start, segment.stop) for segment in plan.segments)
        if policy is not None:
            stack.enter_context(under_policy(policy, pages))
        report = stack.enter_context(reporting(progress, "populate"))
        result = Execution(PlanQueue(plan), memory.address, before, report, undo, admission, rate, advice).run(began)
    if policy is None:
        return result
    from prefault.inspection.nodes import note_on_others

    # The kernel puts missing private pages nowhere else; a file may have had pages before, and asking for all takes long.
    sure = bool(policy.bound) and not any(segment.target.shared for segment in plan.segments)
    note = note_on_others(before if sure else pages, policy.nodes)
    return result if note is None else result._replace(notes=(*result.notes, note))


def _populate_parts(
    memory: Borrowed, span: Span, provided: Sequence[ProvidedSpan], guarded: GuardedPopulate | None, options: PopulateOptions
) -> PopulateResult:  # fmt: skip
    """Populate memory that page providers supply, in whole or in part."""
    access, method, threads, rollback, progress, rate, headroom, began, _, policy = options
    if policy is not None:
        raise ValueError(FOREIGN_NODES)
    origin = memory.address
    plans = [plan_span(memory, part, access, method, threads) for part in other_spans(*span, provided)]
    segments = [segment for plan in plans for segment in plan.segments]
    looks = [pages_before(p.segments) if rollback else (populated_pages(p.segments), _NONE) for p in plans]
    admission = None
    if headroom == "check" and segments:
        # Memory of the kernel in all parts together; a device's server checks for its frames.
        admission = _admission(segments, Intervals.union_of(before for before, _ in looks), memory, guarded, None)
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
        return run_parts(parts, origin, began, admission)


def _in_order(span: Span, provided: Sequence[ProvidedSpan]) -> list[tuple[int, int, PageProvider | None]]:
    """Return all parts of a span by address, with the page provider of each; None for memory of the kernel."""
    parts: list[tuple[int, int, PageProvider | None]] = [*provided]
    parts += [(start, stop, None) for start, stop in other_spans(*span, provided)]
    return sorted(parts, key=itemgetter(0))


def _admission(
    segments: Sequence[Segment], before: Intervals, memory: Borrowed, guarded: GuardedPopulate | None,
    policy: NodePolicy | None,
) -> AdmissionControl:  # fmt: skip
    nodes = memory.nodes if policy is None else policy.bound
    uses = [segment.use._replace(guarded=guarded is not None, nodes=nodes) for segment in segments]
    return AdmissionControl(demands_of(uses, before, memory.fd), memory.address)
