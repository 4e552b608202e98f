"""Pages of a plan that need no population."""

from __future__ import annotations

from collections.abc import Sequence

from prefault.engine.planning import Segment
from prefault.inspection.scan import populated_among, populated_before
from prefault.intervals import Intervals
from prefault.ranges import PageRange


def populated_pages(segments: Sequence[Segment], part: PageRange | None = None) -> Intervals:
    """Return the addresses of the segments (or of a part of them) that are populated."""
    start, stop = (segments[0].start, segments[-1].stop) if part is None else part
    if len(segments) == 1:
        return populated_before(start, stop, write=_writes(segments[0]), private=not segments[0].target.shared)
    copied = (item for item in segments if _writes(item) and not item.target.shared)
    return populated_among(start, stop, [edge for item in copied for edge in item[:2]])


def _writes(segment: Segment) -> bool:
    return segment.method.access == "write"
