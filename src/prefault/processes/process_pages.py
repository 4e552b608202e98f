"""The page tables of another process: PAGEMAP_SCAN on its pagemap, else the entries one by one."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefault._kernel import pagemap
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities
from prefault.inspection.pagemap_scan import scan
from prefault.inspection.result import rows_of
from prefault.intervals import Intervals
from prefault.sizes import MIB, PAGE_SIZE

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_PRESENT = int(PageCategory.PRESENT)
_SWAPPED = int(PageCategory.SWAPPED)
_GUARD = int(PageCategory.GUARD)
_READ_AT_ONCE = 256 * MIB


class ProcessPages:
    """Pages of another process by state, as addresses.

    Attributes:
        present: pages with a page-table entry, the shared zero page included.
        swapped: pages in swap space. Pages under migration and poisoned ones are in it as well, guard regions are not where
            the kernel tells them (Linux 6.15).
        guards: guard regions (MADV_GUARD_INSTALL), where the kernel tells them.
    """

    def __init__(self, fd: int, spans: Sequence[int]) -> None:
        """Read the page tables under ``spans`` (start and stop in turn, ascending) from an open ``/proc/PID/pagemap``."""
        rows = _scanned(fd, spans) if capabilities.PAGEMAP_SCAN.available else _read(fd, spans)
        guard = (rows[:, 2] & _GUARD) != 0
        present = (rows[:, 2] & _PRESENT) != 0
        swapped = ((rows[:, 2] & _SWAPPED) != 0) & ~guard & ~present
        self.present = Intervals.from_arrays(rows[present, 0], rows[present, 1])
        self.guards = Intervals.from_arrays(rows[guard, 0], rows[guard, 1])
        self.swapped = Intervals.from_arrays(rows[swapped, 0], rows[swapped, 1])


def _scanned(fd: int, spans: Sequence[int]) -> numpy.typing.NDArray[numpy.int64]:
    guard = _GUARD if capabilities.PAGE_IS_GUARD.available else 0
    wanted = _PRESENT | _SWAPPED

    def call(argument: pagemap.PmScanArg, quick: bool) -> int:  # noqa: ARG001
        return int(fcntl.ioctl(fd, pagemap.PAGEMAP_SCAN, argument, True))

    return rows_of(scan(spans, 0, 0, wanted, wanted | guard, 0, call))


def _read(fd: int, spans: Sequence[int]) -> numpy.typing.NDArray[numpy.int64]:
    import numpy

    found: list[numpy.typing.NDArray[numpy.int64]] = [numpy.empty((0, 3), numpy.int64)]
    ends = iter(spans)
    for first, last in zip(ends, ends, strict=True):
        for start in range(first, last, _READ_AT_ONCE):
            pages = (min(last, start + _READ_AT_ONCE) - start) // PAGE_SIZE
            try:
                raw = pagemap.read_pagemap(fd, start // PAGE_SIZE, pages)
            except OSError as error:
                if error.errno != errno.EINVAL:  # beyond the end of user space: [vsyscall]
                    raise
                continue
            entries = numpy.frombuffer(raw, numpy.uint64)
            states = numpy.zeros(len(entries), numpy.int64)
            for bit, state in (
                (pagemap.PM_PRESENT, _PRESENT), (pagemap.PM_SWAP, _SWAPPED), (pagemap.PM_GUARD_REGION, _GUARD),
            ):  # fmt: skip
                states[(entries & numpy.uint64(bit)) != 0] |= state
            edges = numpy.concatenate(([0], numpy.flatnonzero(numpy.diff(states)) + 1, [len(states)]))
            rows = numpy.empty((len(edges) - 1, 3), numpy.int64)
            rows[:, 0], rows[:, 1] = start + edges[:-1] * PAGE_SIZE, start + edges[1:] * PAGE_SIZE
            rows[:, 2] = states[edges[:-1]] if len(states) else 0
            found.append(rows[rows[:, 2] != 0])
    return numpy.concatenate(found)
