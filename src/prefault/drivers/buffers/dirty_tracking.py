"""Dirty tracking of a buffer object: by page while few pages are written, by chunk while many are.

The policy is that of the kernel's vmwgfx (drivers/gpu/drm/vmwgfx/vmwgfx_page_dirty.c): a scan that finds more than 10 % of
the pages written counts for the coarse method, one that finds none counts against it, and three in a row switch. vmwgfx then
reads and clears the dirty bits of page-table entries, which user space cannot. The coarse method here is one write fault for
a chunk of 2 MiB, which dirties all of it: 1/512 of the faults, and pages that are reported without having been written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

Method: TypeAlias = Literal["page", "chunk"]

PERCENTAGE = 10
"""Share of written pages beyond which a scan counts for the coarse method (VMW_DIRTY_PERCENTAGE)."""
TRIGGERS = 2
"""Scans in a row that are not yet enough to switch (VMW_DIRTY_NUM_CHANGE_TRIGGERS)."""

_WRITTEN = re.compile(b"\x01+")


class DirtyTracking:
    """Pages of an object that were written since the last scan.

    Args:
        pages: number of the object's pages.
        chunk: pages of a chunk.

    Attributes:
        method: "page" or "chunk".
    """

    def __init__(self, pages: int, chunk: int) -> None:
        self.method: Method = "page"
        self._pages = pages
        self._chunk = chunk
        self._written = bytearray(pages)
        self._triggers = 0

    def mark(self, page: int) -> range:
        """Note a write to a page that was clean; return the pages that may be written from now on without a fault."""
        first, stop = page, page + 1
        if self.method == "chunk":
            first = page - page % self._chunk
            stop = min(first + self._chunk, self._pages)
        self._written[first:stop] = b"\x01" * (stop - first)
        return range(first, stop)

    def mark_all(self) -> None:
        """Note that any page may have been written: the process that tracked them died."""
        self._written[:] = b"\x01" * self._pages

    def restore(self, runs: Iterable[range]) -> None:
        """Note again that pages were written, which a scan returned: they did not become clean."""
        for run in runs:
            self._written[run.start : run.stop] = b"\x01" * len(run)

    def scan(self) -> list[range]:
        """Return the runs of pages that were written since the last scan, which are clean now; perhaps change the method."""
        runs = [range(*found.span()) for found in _WRITTEN.finditer(self._written)]
        written = sum(map(len, runs))
        self._written = bytearray(self._pages)
        counts = 100 * written > PERCENTAGE * self._pages if self.method == "page" else not written
        self._triggers = self._triggers + 1 if counts else 0
        if self._triggers > TRIGGERS:
            self.method = "chunk" if self.method == "page" else "page"
            self._triggers = 0
        return runs
