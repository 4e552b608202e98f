"""Shortcuts for small calls: up to one chunk, in one mapping.

Populating one page takes the kernel about a microsecond, and the general way around it takes several times what these three
shortcuts take. They change nothing that a caller could see, and each falls back on the general way:

- :func:`small_plan` plans private anonymous memory by one look at one mapping;
- :func:`surely_fits` spends what the last check of the limits left over, so that a loop of small calls does not read the
  files of all limits each time;
- :func:`run_small` runs the method once, in this thread, without an :class:`~prefault.engine.execution.Execution`, which is
  made only for a page that fails, and for Ctrl-C.
"""

from __future__ import annotations

from time import perf_counter_ns

from prefault._kernel.procmap import PROCMAP_QUERY_VMA_SHARED, PROCMAP_QUERY_VMA_WRITABLE
from prefault._system import capabilities
from prefault.engine.attempts import attempt
from prefault.engine.chunk_queue import PlanQueue
from prefault.engine.chunking import FIRST_CHUNK
from prefault.engine.execution import Execution
from prefault.engine.methods import POPULATE_READ, POPULATE_WRITE, Access, Target
from prefault.engine.outcomes import PopulateResult
from prefault.engine.planning import Plan, Segment
from prefault.engine.rollback import Rollback
from prefault.intervals import Intervals
from prefault.limits.allowance import allowance
from prefault.memory.borrowing import Borrowed, Span
from prefault.memory.vma import Backing, row_at
from prefault.sizes import KIB, MAX_SIZE, PAGE_SIZE

_PRIVATE = Target()
_ONE_THREAD = "one chunk"
_REASON = Backing.ANONYMOUS.value  # which takes longer than to make the segment


def is_small(plan: Plan) -> bool:
    """Return whether one chunk of one segment is all of the plan."""
    segments = plan.segments
    return len(segments) == 1 and segments[0].stop - segments[0].start <= FIRST_CHUNK


def small_plan(memory: Borrowed, span: Span, access: Access | None) -> Plan | None:
    """Return the plan for a small part of one mapping of private anonymous memory; None where it is not that."""
    start, stop = span.start - span.start % PAGE_SIZE, span.stop + -span.stop % PAGE_SIZE
    if span.start == span.stop or stop - start > FIRST_CHUNK:
        return None
    if not (capabilities.PROCMAP_QUERY.available and capabilities.MADV_POPULATE.available):
        return None
    row = row_at(start)
    if row is None or row[0] > start or row[1] < stop:
        return None
    flags, inode = row[2], row[5]
    if inode or flags & PROCMAP_QUERY_VMA_SHARED:
        return None
    writable = (flags & PROCMAP_QUERY_VMA_WRITABLE or memory.access_guard is not None) and not memory.readonly
    method = POPULATE_WRITE if access == "write" or (access is None and writable) else POPULATE_READ
    return Plan(span, (Segment(start, stop, method, _PRIVATE, Backing.ANONYMOUS, _REASON),), 1, (), _ONE_THREAD)


def surely_fits(segment: Segment, now_ns: int) -> bool:
    """Return whether the last check of the limits left so much that a small call needs none of its own."""
    # An upper bound with page tables and all. Other memory has limits of its own as well.
    length = segment.stop - segment.start
    bound = length + length // 256 + 64 * KIB
    return segment.backing is Backing.ANONYMOUS and allowance.spend(bound, now_ns)


def run_small(plan: Plan, origin: int, began: int, before: Intervals, rollback: Rollback | None) -> PopulateResult:
    """Carry out a plan of one chunk in this thread. The arguments are those of :class:`Execution`."""
    segment = plan.segments[0]
    start, length = segment.start, segment.stop - segment.start
    queue, interruption = None, None
    try:
        if not segment.method.hint and segment.backing is not Backing.FILE:
            try:
                if attempt(segment, start, length) is None:
                    present = before.length
                    took = (perf_counter_ns() - began) / 1e9
                    method = segment.method
                    return PopulateResult(length - present, present, took, method.access, method.name, 1, plan.notes)
            except BaseException as caught:  # noqa: BLE001  raised again, or what it means
                interruption = caught
        queue = PlanQueue(plan)
        if interruption is not None:
            queue.take(MAX_SIZE)  # its only chunk, which is not recorded as done yet
        return Execution(queue, origin, before, None, rollback).run(began, interruption)
    finally:
        del interruption  # an exception must not refer to the frame that it refers to: see attempt()
