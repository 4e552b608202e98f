"""Populating many ranges by few system calls: process_madvise on this process, up to 1024 ranges a call.

Each return from a system call takes the GIL again, for which a thread waits through several switch intervals (5 ms each)
beside busy threads. The kernel lets the mmap lock go between two ranges of a vector.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from itertools import chain, pairwise

from prefault._kernel import mman
from prefault._system import capabilities
from prefault.engine.methods import POPULATE_READ, POPULATE_WRITE, Method
from prefault.engine.planning import Segment
from prefault.sizes import MIB

_ADVICE: dict[Method, int] = {POPULATE_READ: mman.MADV_POPULATE_READ, POPULATE_WRITE: mman.MADV_POPULATE_WRITE}

PIECE = 4 * MIB
"""The kernel holds the mmap lock for so much at a time: a thread that maps memory waits 1 to 2 ms for it."""


LONG = 16 * MIB
"""Up to so much a plain call holds the mmap lock no longer than a chunk may take."""


def can_advise(method: Method) -> bool:
    """Return whether the method is an advice that this kernel takes for vectors."""
    return method in _ADVICE and capabilities.PROCESS_MADVISE.available


def populate_long(segment: Segment, start: int, stop: int) -> bool:
    """Populate a part of a segment, in pieces; return whether the kernel says that all of it is populated."""
    piece = max(PIECE, segment.target.page_size)
    cuts = [start, *range(start - start % piece + piece, stop, piece), stop]
    return _advise(list(pairwise(cuts)), _ADVICE[segment.method])


def populate_whole(segments: Sequence[Segment]) -> bool:
    """Populate whole segments, those of one method together; return whether the kernel says that all are populated."""
    return all(
        _advise([segment for segment in segments if segment.method is method], _ADVICE[method])
        for method in dict.fromkeys(segment.method for segment in segments)
    )


def _advise(ranges: Sequence[tuple[int, int] | Segment], advice: int) -> bool:
    """Advise ranges, each given by its start and stop, as far as the kernel does; return whether that was all."""
    vector = array("Q", chain.from_iterable([(item[0], item[1] - item[0]) for item in ranges]))
    address = vector.buffer_info()[0]
    pidfd = mman.own_pidfd()
    try:
        for first in range(0, len(ranges), mman.IOV_MAX):
            count = min(mman.IOV_MAX, len(ranges) - first)
            wanted = sum(vector[2 * first + 1 : 2 * (first + count) : 2])
            try:
                if mman.process_madvise_vector(pidfd, address + 16 * first, count, advice) != wanted:
                    return False
            except OSError:  # the first range: who asks finds the page, and the error
                return False
        return True
    finally:
        if pidfd >= 0:
            os.close(pidfd)
