"""PAGEMAP_SCAN (Linux 6.7): the regions of equal categories in the page tables of this process."""

from __future__ import annotations

import errno
import functools
import struct
from array import array
from collections.abc import Callable, Sequence
from ctypes import sizeof
from typing import TypeAlias

from prefault._kernel import pagemap
from prefault._kernel.pagemap import PageCategory
from prefault._system.kept_files import KeptFile
from prefault.inspection.result import PageState
from prefault.sizes import GIB, MIB

_REGIONS = 4096
_QUICK_SCAN = 128 * MIB  # some 300 us if all of it is populated: to take the GIL again beside busy threads takes longer
_SCAN_STEP = GIB  # a call that walks this much takes at most some 10 ms, so Ctrl-C is not kept waiting

_pagemap_file = KeptFile("/proc/self/pagemap")

ScanCall: TypeAlias = Callable[[pagemap.PmScanArg, bool], int]
"""One PAGEMAP_SCAN: takes the argument, and whether the call is short enough to keep the GIL; returns the regions found."""


class _Scanner:
    """Argument and result vector of PAGEMAP_SCAN, for one scan at a time."""

    __slots__ = ("argument", "regions")

    def __init__(self) -> None:
        self.regions = array("Q", bytes(_REGIONS * sizeof(pagemap.PageRegion)))
        self.argument = pagemap.PmScanArg(
            size=sizeof(pagemap.PmScanArg), vec=self.regions.buffer_info()[0], vec_len=_REGIONS
        )  # fmt: skip


# One call each: to set the fields of a ctypes structure one by one takes longer than the scan of a page.
_PLACE = struct.Struct("3Q")
_CATEGORIES = struct.Struct("4Q")

_idle: list[_Scanner] = []
"""Scanners that no scan uses. A signal handler or a finalizer in the middle of a scan takes another one."""


def _own_scan(argument: pagemap.PmScanArg, quick: bool) -> int:
    return _pagemap_file.ioctl(pagemap.PAGEMAP_SCAN, argument, quick=quick)


def scan(
    spans: Sequence[int], mask: int, inverted: int, any_of: int, returned: int, flags: int = 0,
    call: ScanCall = _own_scan,
) -> array[int]:  # fmt: skip
    """Scan spans of addresses (start and stop in turn), and return the regions that match.

    Args:
        spans: the addresses.
        mask: ``category_mask`` of ``struct pm_scan_arg``.
        inverted: its ``category_inverted``.
        any_of: its ``category_anyof_mask``.
        returned: its ``return_mask``.
        flags: its ``flags``.
        call: makes the system call; by default on the page tables of this process.

    Returns:
        64-bit words: start, stop, categories, start, ... in order of address.
    """
    try:
        scanner = _idle.pop()
    except IndexError:
        scanner = _Scanner()
    try:
        return _scan(scanner, spans, mask, inverted, any_of, returned, flags, call)
    finally:
        _idle.append(scanner)


def _scan(
    scanner: _Scanner, spans: Sequence[int], mask: int, inverted: int, any_of: int, returned: int, flags: int, call: ScanCall
) -> array[int]:
    words = array("Q")
    argument, regions = scanner.argument, scanner.regions
    _CATEGORIES.pack_into(argument, pagemap.PmScanArg.category_inverted.offset, inverted, mask, any_of, returned)
    ends = iter(spans)
    for first, last in zip(ends, ends, strict=True):
        start, stop = int(first), int(last)
        while start < stop:
            end = min(stop, start + _SCAN_STEP)
            _PLACE.pack_into(argument, pagemap.PmScanArg.flags.offset, flags, start, end)
            try:
                count = call(argument, stop - start <= _QUICK_SCAN)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                return words  # beyond the end of user space, where no process has pages
            if count:
                words += regions[: 3 * count]
            # Not argument.walk_end: with more than 512 regions, the size of the kernel's own buffer, it may be where that
            # was full for the last time and not where the walk ended (seen on 6.18), and regions would come twice.
            start = end if count < _REGIONS else regions[3 * count - 2]
    return words


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
