"""PAGEMAP_SCAN (Linux 6.7): the regions of equal categories in the page tables of this process."""

from __future__ import annotations

import errno
import functools
import threading
from array import array
from collections.abc import Sequence
from ctypes import sizeof

from prefault._kernel import pagemap
from prefault._kernel.pagemap import PageCategory
from prefault._system.kept_files import KeptFile
from prefault.inspection.result import PageState
from prefault.sizes import GIB, MIB

_REGIONS = 1024
_QUICK_SCAN = 4 * MIB  # some 10 us: less than to take the GIL again
_SCAN_STEP = GIB  # a call that walks this much takes at most some 10 ms, so Ctrl-C is not kept waiting

_pagemap_file = KeptFile("/proc/self/pagemap")


class PagemapScanner(threading.local):
    """The argument and the result vector of PAGEMAP_SCAN, one for each thread, made once."""

    def __init__(self) -> None:
        self.busy = False
        self.regions = array("Q", bytes(_REGIONS * sizeof(pagemap.PageRegion)))
        self.argument = pagemap.PmScanArg(
            size=sizeof(pagemap.PmScanArg), vec=self.regions.buffer_info()[0], vec_len=_REGIONS
        )  # fmt: skip

    def scan(self, spans: Sequence[int], mask: int, inverted: int, any_of: int, returned: int, flags: int = 0) -> array[int]:
        """Scan spans of addresses (start and stop in turn), and return the regions that match.

        Returns:
            64-bit words: start, stop, categories, start, ... in order of address.
        """
        if self.busy:
            # A signal handler, or a finalizer, in the middle of a scan of this very thread.
            return PagemapScanner().scan(spans, mask, inverted, any_of, returned, flags)
        words = array("Q")
        self.busy = True
        try:
            argument, regions, ioctl = self.argument, self.regions, _pagemap_file.ioctl
            argument.flags, argument.category_mask, argument.category_inverted = flags, mask, inverted
            argument.category_anyof_mask, argument.return_mask = any_of, returned
            for first, stop in zip(spans[::2], spans[1::2], strict=True):
                start = int(first)
                while start < stop:
                    argument.start, argument.end = start, min(int(stop), start + _SCAN_STEP)
                    try:
                        count = ioctl(pagemap.PAGEMAP_SCAN, argument, quick=stop - start <= _QUICK_SCAN)
                    except OSError as error:
                        if error.errno != errno.EFAULT:
                            raise
                        return words  # beyond the end of user space, where no process has pages
                    if count:
                        words += regions[: 3 * count]
                    # Not argument.walk_end: with more than 512 regions, the size of the kernel's own buffer, it may be where
                    # that was full for the last time and not where the walk ended (seen on 6.18), and regions would come
                    # twice.
                    start = argument.end if count < _REGIONS else regions[3 * count - 2]
        finally:
            self.busy = False
        return words


scanner = PagemapScanner()


@functools.cache
def states_of_categories() -> tuple[int, ...]:
    """Return the page state for every number that PAGEMAP_SCAN reports as categories."""
    return tuple(int(_state_of(categories)) for categories in range(2 * PageCategory.GUARD))


def _state_of(categories: int) -> PageState:
    state = PageState(0)
    if categories & PageCategory.PRESENT:
        state |= PageState.PRESENT
        if not categories & PageCategory.PFNZERO:
            state |= PageState.ALLOCATED
        if categories & PageCategory.FILE:
            state |= PageState.FILE
        if categories & PageCategory.HUGE:
            state |= PageState.HUGE
    if categories & PageCategory.GUARD:
        return state | PageState.GUARD
    if categories & PageCategory.SWAPPED:
        state |= PageState.SWAPPED
    written = categories & PageCategory.WRITTEN and categories & PageCategory.WPALLOWED
    if written or categories & PageCategory.SOFT_DIRTY:
        state |= PageState.WRITTEN
    return state


def categories_of(state: PageState) -> int:
    """Return the categories that PAGEMAP_SCAN would tell of a page whose state comes from a weaker source."""
    category = PageCategory(0)
    if state & PageState.PRESENT:
        category |= PageCategory.PRESENT
    if state & PageState.SWAPPED:
        category |= PageCategory.SWAPPED
    if state & PageState.FILE:
        category |= PageCategory.FILE
    return int(category)
