"""Plan for pages of many buffers: one segment for each kind of memory, each page in one of them."""

from __future__ import annotations

from collections.abc import Sequence

from prefault.engine.methods import Access
from prefault.engine.planning import Plan, Segment, Threads, chosen_method, explained, segments_of
from prefault.engine.rollback import is_memory_file
from prefault.intervals import Intervals
from prefault.memory.borrowed_members import Members
from prefault.memory.borrowing import Borrowed, ProvidedSpan, Span, provided_spans
from prefault.memory.vma import Backing
from prefault.sizes import MIB, PAGE_SIZE

_NEAR = 64 * MIB
"""A gap between two buffers over which one walk over the mappings goes on."""


def plan_members(
    members: Members, access: Access | None, method: str | None, threads: Threads
) -> tuple[list[Plan], list[ProvidedSpan]]:
    """Return a plan for each kind of memory of all members, and the spans that page providers supply.

    A page that several members touch is populated once, for writing if one of them is to be written.
    """
    provided: dict[int, ProvidedSpan] = {}
    kinds: dict[tuple[object, ...], tuple[Segment, list[Intervals]]] = {}
    for readonly, huge, pages in members.by_kind():
        if method in (None, "device"):
            for span in provided_spans(*pages.span):
                provided[span.start] = span
            pages = pages - Intervals(span[:2] for span in provided.values())
        _add_kinds(kinds, pages, access, method, readonly=readonly, huge=huge)
    return [_plan_of(segment, access, method, threads) for segment in _disjoint(kinds.values())], list(provided.values())


def _add_kinds(
    kinds: dict[tuple[object, ...], tuple[Segment, list[Intervals]]], pages: Intervals, access: Access | None,
    method: str | None, *, readonly: bool, huge: bool,
) -> None:  # fmt: skip
    chosen = None if method is None else chosen_method(method, access)
    clusters = pages if len(pages) <= 1 else pages.bridged(_NEAR)
    for start, stop in clusters:
        # Without descriptor: scattered pages are not worth a call of fallocate for each range.
        memory = Borrowed(start, stop - start, readonly=readonly, huge=huge)
        for segment in segments_of(memory, Span(start, stop), access, chosen):
            mine = pages.clipped(segment.start, segment.stop)
            unit = segment.target.page_size
            if unit > PAGE_SIZE:
                mine = mine.shifted(-segment.start).outward(unit).shifted(segment.start)
            if mine:
                kinds.setdefault(_kind_of(segment), (segment, []))[1].append(mine)


def _kind_of(segment: Segment) -> tuple[object, ...]:
    target = segment.target
    # To undo it, pages of a file in memory are punched through a descriptor, which is that of one file; and each tmpfs has a
    # limit of its own.
    alone = is_memory_file(segment) and target.fd is None and not (target.shared and target.writable)
    alone = alone or segment.backing in (Backing.TMPFS, Backing.HUGETLB)
    return segment.method, target, segment.backing, segment.start if alone else None


def _disjoint(kinds: Sequence[tuple[Segment, list[Intervals]]] | object) -> list[Segment]:
    """Return a segment for each kind; those that are written take the pages that others would only read."""
    found: list[Segment] = []
    taken = Intervals()
    assert not isinstance(kinds, Segment)
    for like, some in sorted(kinds, key=lambda kind: kind[0].method.access != "write"):  # type: ignore[call-overload]
        pages = Intervals.union_of(some) - taken
        if pages:
            taken |= pages
            found.append(_segment_of(like, pages))
    return sorted(found, key=lambda segment: segment.start)


def _segment_of(like: Segment, pages: Intervals) -> Segment:
    start, stop = pages.span
    if len(pages) == 1:
        return like._replace(start=start, stop=stop, pages=None)
    # fallocate first pays for large ranges only (docs/design/sparse.md).
    method = like.method if like.backing is Backing.FILE else like.method.without_fallocate
    return like._replace(start=start, stop=stop, pages=pages, method=method, reason=f"{like.reason}, in {len(pages)} ranges")


def _plan_of(segment: Segment, access: Access | None, method: str | None, threads: Threads) -> Plan:
    chosen = None if method is None else chosen_method(method, access)
    memory = Borrowed(segment.start, segment.stop - segment.start, readonly=not segment.target.writable)
    return explained(memory, Span(segment.start, segment.stop), (segment,), access, chosen, threads)


def joined(plans: Sequence[Plan], provided_bytes: int) -> Plan:
    """Return the plans of all kinds as one, for people: its segments may lie inside each other."""
    if not plans and not provided_bytes:
        return Plan(Span(0, 0), (), 1, ())
    notes: dict[str, None] = {}
    if provided_bytes:
        notes[f"{'' if not plans else 'a part is '}device memory: one call of its driver's populate hook"] = None
    for plan in plans:
        notes.update(dict.fromkeys(plan.notes))
    span = Span(min((p.span.start for p in plans), default=0), max((p.span.stop for p in plans), default=0))
    most = max(plans, key=lambda plan: plan.threads, default=None)
    segments = tuple(segment for plan in plans for segment in plan.segments)
    return Plan(
        span, segments, 1 if most is None else most.threads, tuple(notes), "" if most is None else most.threads_reason
    )  # fmt: skip
