"""The order in which pages came into the page cache, which is the order of reclaim."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterator


class ArrivalOrder:
    """Pages in the order in which they came in; a page that comes in again goes to the end.

    User space has no better order: the accessed bits of another process's page table are not shown anywhere, and idle page
    tracking (CONFIG_IDLE_PAGE_TRACKING) is neither common nor for ordinary users.
    """

    def __init__(self) -> None:
        self._pages: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def add(self, page: int) -> None:
        """Append a page that was not there."""
        self._pages[page] = None

    def add_run(self, pages: range) -> None:
        """Append pages that were not there."""
        self._pages.update(dict.fromkeys(pages))

    def remove(self, pages: range) -> None:
        """Remove those of these pages that are there."""
        if len(pages) <= len(self._pages):
            for page in pages:
                self._pages.pop(page, None)
        else:
            for page in [page for page in self._pages if page in pages]:
                del self._pages[page]

    def take(self, count: int, spared: list[range], starts: Container[int]) -> list[range]:
        """Remove the oldest pages; return them in runs, which end where an enclave starts.

        Args:
            count: most pages.
            spared: runs in order, whose pages stay.
            starts: first pages of the enclaves.
        """
        chosen = [page for page, _ in zip(self._not_in(spared), range(count), strict=False)]
        for page in chosen:
            del self._pages[page]
        return list(runs_of(sorted(chosen), starts))

    def runs(self, starts: Container[int]) -> list[range]:
        """Return all pages in runs, which end where an enclave starts."""
        return list(runs_of(sorted(self._pages), starts))

    def _not_in(self, spared: list[range]) -> Iterator[int]:
        firsts = [run.start for run in spared]
        for page in self._pages:
            index = bisect_right(firsts, page) - 1
            if index < 0 or page >= spared[index].stop:
                yield page


def runs_of(pages: list[int], starts: Container[int]) -> Iterator[range]:
    """Join sorted pages to runs, which end where an enclave starts."""
    start = stop = -1
    for page in pages:
        if page != stop or page in starts:
            if stop > start:
                yield range(start, stop)
            start = page
        stop = page + 1
    if stop > start:
        yield range(start, stop)
