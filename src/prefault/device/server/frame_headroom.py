"""What memory there is for more frames: the limits that would otherwise be met by the OOM killer, or by SIGBUS."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from prefault.engine.admission import Shortfall
from prefault.limits import Limit, ask_for_memory, commit_limits, counts_hugetlb, hugetlb_limits
from prefault.sizes import PAGE_SIZE

if TYPE_CHECKING:
    from prefault.device.server.served_areas import ServerState

_OVERHEAD_SHARE = 128
"""Page tables and the page cache's tree take less than this part of ordinary frames."""


class FrameShortfall(NamedTuple):
    """A limit leaves less than is needed."""

    message: str
    limit: str
    needed_bytes: int
    available_bytes: int
    page: int = 0


class FrameHeadroom:
    """Looks at the limits on the frames' memory; they are charged to the server, which touches them first."""

    def __init__(self, books: ServerState) -> None:
        self._frames = books.frames

    def short_of(self, pages: int, *, whole: bool = False, page: int = 0) -> FrameShortfall | None:
        """What is short for so many new frames: for the ``whole`` request, or for the batch that begins at ``page``."""
        if not pages:
            return None
        size = pages * self._frames.page_size
        if self._frames.huge:
            shortage = self._short_of_huge_pages(size)
            needed = size if counts_hugetlb() else 0
        else:
            shortage = self._short_of_commit(size) if whole else None
            needed = size + size // _OVERHEAD_SHARE + 3 * PAGE_SIZE
        if shortage is None and needed:
            # Half of the reserve between batches: the estimate of the start may have been a little too small.
            answer = ask_for_memory(needed, reserve=1.0 if whole else 0.5)
            if answer.short is not None:
                shortage = Shortfall(answer.short, needed, answer.left_bytes)
        if shortage is None:
            return None
        message = shortage.sentence if whole else f"stopped before page {page}: {shortage.sentence}"
        return FrameShortfall(message, shortage.limit.name, shortage.needed_bytes, shortage.available_bytes, page)

    def _short_of_huge_pages(self, size: int) -> Shortfall | None:
        # The frames' mapping reserves nothing: what others have reserved is not for us.
        return _first_short(hugetlb_limits(self._frames.page_size), size)

    def _short_of_commit(self, size: int) -> Shortfall | None:
        return _first_short(list(commit_limits()), size)


def _first_short(limits: list[Limit], size: int) -> Shortfall | None:
    for limit in limits:
        if size > limit.available_bytes:
            return Shortfall(limit, size, limit.available_bytes)
    return None
