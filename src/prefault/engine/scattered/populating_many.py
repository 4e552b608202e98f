"""Populating many buffers, scattered arrays, and many ranges of a buffer, all by one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from prefault.engine.chunk_queue import PlanQueue
from prefault.engine.chunking import FIRST_CHUNK
from prefault.engine.execution import Execution
from prefault.engine.outcomes import PopulateResult
from prefault.engine.parts import (
    FOREIGN_NODES,
    KernelPart,
    Part,
    PopulateOptions,
    ProgressOfParts,
    access_to,
    device_parts,
    run_parts,
)
from prefault.engine.planning import Plan, Segment
from prefault.engine.populated_pages import pages_before, populated_pages
from prefault.engine.progress import reporting
from prefault.engine.rollback import Rollback, file_pages
from prefault.engine.scattered.planning_pages import plan_members
from prefault.engine.scattered.row_queue import RowQueue
from prefault.engine.scattered.scattered_pages import ScatteredLook, look_at, pages_of, scattered_demand
from prefault.errors import PopulateError
from prefault.inspection.nodes import note_on_others
from prefault.intervals import Intervals
from prefault.limits.admission import AdmissionControl
from prefault.limits.demand import Demand, demands_of
from prefault.memory.borrowed_members import Member, Members
from prefault.memory.borrowing import ProvidedSpan
from prefault.memory.node_policy import under_policy


def populate_members(members: Members, options: PopulateOptions) -> PopulateResult:
    """Populate the pages of all members, each page once.

    Raises:
        PopulateError: its offset counts from the start of the member that it names.
    """
    policy = options.node_policy
    plans, provided = plan_members(members, options.access, options.method, options.threads)
    if policy is not None and provided:
        raise ValueError(FOREIGN_NODES)
    if not plans and not provided:
        return PopulateResult(0, 0, 0.0, options.access or "write", "none", 1)
    looks = [_look(plan.segments[0], rollback=options.rollback) for plan in plans]
    admission = None
    if options.headroom == "check" and plans:
        admission = AdmissionControl(
            [_demand(*one, () if policy is None else policy.bound) for one in zip(plans, looks, strict=True)]
        )
    try:
        if admission is not None:
            admission.start()
        with ExitStack() as stack:
            pages = Intervals.union_of(pages_of(plan.segments[0]) for plan in plans)
            if policy is not None:
                stack.enter_context(under_policy(policy, pages))
            report = stack.enter_context(reporting(options.progress, "populate"))
            device_bytes = _of_devices(members, provided) if provided else []
            total = sum(plan.length for plan in plans) + sum(pages.length for _, pages in device_bytes)
            progresses = ProgressOfParts(report, total)
            parts: list[Part] = [
                _part(plan, look, admission, progresses, members, options) for plan, look in zip(plans, looks, strict=True)
            ]
            seen = Intervals()
            for start, stop, page_provider in provided:
                for member, pages in device_bytes:
                    mine = pages.clipped(start, stop) - seen
                    seen |= mine
                    if mine:
                        parts += device_parts(
                            page_provider, mine, member.memory.address,
                            access_to(page_provider, member.memory, options.access), rollback=options.rollback,
                            progresses=progresses, rate=options.rate, check_headroom=options.headroom == "check",
                        )  # fmt: skip
            result = run_parts(parts, 0, options.began, admission, members.place_of)
        note = None if policy is None else note_on_others(pages, policy.nodes)
        return result if note is None else result._replace(notes=(*result.notes, note))
    except PopulateError as error:
        members.name_in(error)
        raise


def outlook_of(plans: Sequence[Plan], nodes: tuple[int, ...]) -> list[str]:
    """Return sentences on what plans take, and whether it fits; see :meth:`AdmissionControl.outlook`."""
    looks = [_look(plan.segments[0], rollback=False) for plan in plans]
    return AdmissionControl([_demand(*one, nodes) for one in zip(plans, looks, strict=True)]).outlook() if plans else []


def _of_devices(members: Members, provided: Sequence[ProvidedSpan]) -> list[tuple[Member, Intervals]]:
    """Return the members with pages that page providers supply, and these pages of each."""
    spans = Intervals(span[:2] for span in provided)
    return [(member, member.pages & spans) for member in members.within(*spans.span)]


def _look(segment: Segment, *, rollback: bool) -> ScatteredLook:
    if segment.pages is not None:
        return look_at(segment, rollback=rollback)
    before, kept = pages_before([segment]) if rollback else (populated_pages([segment]), Intervals())
    return ScatteredLook(before, kept, file_pages([segment]) if rollback else Intervals())


def _demand(plan: Plan, look: ScatteredLook, nodes: tuple[int, ...]) -> Demand:
    (segment,) = plan.segments
    if segment.pages is not None:
        return scattered_demand(segment, look, None, nodes=nodes)
    return demands_of([segment.use._replace(nodes=nodes)], look.before, None)[0]


def _part(
    plan: Plan, look: ScatteredLook, admission: AdmissionControl | None, progresses: ProgressOfParts,
    members: Members, options: PopulateOptions,
) -> Part:  # fmt: skip
    undo = Rollback(plan.segments, look.kept, look.resident) if options.rollback else None
    queue = PlanQueue(plan, members.place_of) if plan.segments[0].pages is None else RowQueue(plan, members.place_of)
    if plan.length <= FIRST_CHUNK:
        admission = None  # all of it has just been looked at
    report = progresses.of_next(queue.length)
    return KernelPart(Execution(queue, 0, look.before, report, undo, admission, options.rate))
