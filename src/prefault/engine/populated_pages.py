"""Pages of a plan that need no population, and those that a rollback must leave."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from prefault.engine.planning import Segment
from prefault.errors import PopulateError
from prefault.inspection.result import PageState
from prefault.inspection.scan import populated_among, populated_before, residency_of
from prefault.intervals import Intervals
from prefault.ranges import PageRange


def populated_pages(segments: Sequence[Segment], part: PageRange | None = None) -> Intervals:
    """Return the addresses of the segments (or of a part of them) that are populated."""
    start, stop = (segments[0].start, segments[-1].stop) if part is None else part
    if len(segments) == 1:
        return populated_before(start, stop, write=_writes(segments[0]), private=not segments[0].target.shared)
    copied = (item for item in segments if _writes(item) and not item.target.shared)
    return populated_among(start, stop, [edge for item in copied for edge in item[:2]])


def pages_before(segments: Sequence[Segment]) -> tuple[Intervals, Intervals]:
    """Return the pages that are populated, and these together with pages in swap or under migration, which hold bytes too.

    One look at each entry decides: between two looks a page could be swapped out or migrate, and be in neither answer.

    Raises:
        PopulateError: the kernel does not tell which pages this process had before, so that nothing could be undone.
    """
    states = [state for segment in segments for state in _held_pages(segment)]
    return Intervals(state[:2] for state in states if state[2]), Intervals(state[:2] for state in states)


def _held_pages(segment: Segment) -> Iterator[tuple[int, int, bool]]:
    """Yield the start and stop of pages that hold bytes, and whether they are populated."""
    found = residency_of(PageRange(segment.start, segment.stop))
    if found.source == "mincore":
        raise cannot_undo(segment)
    copies = _writes(segment) and not segment.target.shared
    for start, stop, state in found.runs:
        present = bool(state & PageState.PRESENT)
        if present and copies:
            zero = PageState.ALLOCATED not in found.unknown and not state & PageState.ALLOCATED
            present = not zero and not state & PageState.FILE
        if present or state & PageState.SWAPPED:
            yield start, stop, present


def cannot_undo(segment: Segment) -> PopulateError:
    """Return the error for a rollback of what the kernel does not tell apart."""
    # mincore does not tell which pages this process had before, and to discard those would lose what they hold.
    return PopulateError(
        errno.EOPNOTSUPP,
        "rollback is not possible here: /proc/self/pagemap cannot be read, so the pages that a call brings in"
        " cannot be told from those before; nothing was populated",
        address=segment.start,
    )


def _writes(segment: Segment) -> bool:
    return segment.method.access == "write"
