"""Headroom for more frames: the limits that the OOM killer or a SIGBUS would enforce otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from prefault.limits.limit import Shortfall
from prefault.limits.memory_limits import counts_hugetlb
from prefault.limits.memory_use import MemoryUse
from prefault.limits.table import ask_for_memory, shortfall_of
from prefault.memory.vma import Backing
from prefault.sizes import PAGE_SIZE

if TYPE_CHECKING:
    from prefault.device.pages.served_areas import ServerState

_OVERHEAD_SHARE = 128
"""Page tables and the page cache's tree take less than this part of ordinary frames."""


class FrameShortfall(NamedTuple):
    """A limit that leaves less than new frames need, both in bytes, and the page at which their batch begins."""

    message: str
    limit: str
    needed_bytes: int
    available_bytes: int
    page: int = 0


class FrameHeadroom:
    """Check of the limits on the frames' memory, which is charged to the server: it touches every frame first."""

    def __init__(self, state: ServerState) -> None:
        self._frames = state.frames

    def short_of(self, pages: int, *, whole: bool = False, page: int = 0) -> FrameShortfall | None:
        """Return the limit that leaves too little for new frames; None if they fit.

        Args:
            pages: number of new frames.
            whole: True for a whole request, False for a batch of it.
            page: first page of the batch.
        """
        if not pages:
            return None
        frames = self._frames
        size = pages * frames.page_size
        if frames.huge:
            # The frames' mapping reserves nothing, so pages that others have reserved are out of reach.
            use = MemoryUse(backing=Backing.HUGETLB, page_size=frames.page_size, shared=True)
            shortfall = shortfall_of(use, size)
            needed = size if counts_hugetlb() else 0
        else:
            shortfall = shortfall_of(MemoryUse(backing=Backing.MEMFD, shared=True), size) if whole else None
            needed = size + size // _OVERHEAD_SHARE + 3 * PAGE_SIZE
        if shortfall is None and needed:
            # Half of the reserve between batches: the estimate of the start may have been a little too small.
            answer = ask_for_memory(needed, reserve=1.0 if whole else 0.5)
            if answer.short is not None:
                shortfall = Shortfall(answer.short, needed, answer.left_bytes)
        if shortfall is None:
            return None
        message = shortfall.sentence if whole else f"stopped before page {page}: {shortfall.sentence}"
        return FrameShortfall(message, shortfall.limit.name, shortfall.needed_bytes, shortfall.available_bytes, page)
