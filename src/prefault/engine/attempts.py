"""Attempts to populate memory by the methods of segments: by one call, by vectors of ranges, and to find a page that fails.

A vector is one process_madvise(2) call on this process for up to 1024 ranges. Each return from a system call takes the GIL
again, for which a thread waits through several switch intervals (5 ms each) beside busy threads. The kernel gives up the
mmap lock between two ranges of a vector.
"""

from array import array
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from prefault._kernel import mman
from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.engine.methods import Method
from prefault.engine.planning import Segment
from prefault.limits.limit import Shortfall
from prefault.ranges import PageRange
from prefault.sizes import MIB

PIECE = 4 * MIB
"""Bytes for which the kernel holds the mmap lock at a time: a thread that maps memory waits 1 to 2 ms for it."""

LONG = 16 * MIB
"""Bytes up to which a plain call holds the mmap lock no longer than a chunk may take."""


class ChunkFailure(NamedTuple):
    """The first page that could not be populated, and why: an error of the kernel, or a limit."""

    address: int
    segment: Segment
    error: OSError | Shortfall


def attempt(segment: Segment, start: int, length: int) -> OSError | None:
    """Run the method on a part of its segment; return the error, if there is one.

    The error has no traceback: that would refer to these frames, they to the error, and so to the buffer: an array of many
    GiB would wait for the garbage collector because populating it failed.
    """
    try:
        segment.method.run(start, length, segment.target)
    except OSError as error:
        return error.with_traceback(None)
    return None


def locate(chunk: PageRange, segment: Segment) -> ChunkFailure | None:
    """Return the first page of a chunk that cannot be populated; None where by now all of it is populated.

    Methods go from the first page on and may be run again on what is populated, so bisection finds the page in at most some
    30 calls, whichever method it is; everything before the page is populated then.
    """
    low, step = chunk.start, segment.target.page_size
    length = chunk.length
    while low < chunk.stop:
        error = attempt(segment, low, length)
        if error is None:
            low, length = low + length, chunk.stop - low - length
        elif length == step:
            return ChunkFailure(low, segment, error)
        else:
            length = max(step, length // 2 // step * step)
    return None


def can_advise(method: Method) -> bool:
    """Return whether the method is an advice that this kernel takes for vectors."""
    return method.advice is not None and capabilities.PROCESS_MADVISE.available


def populate_long(segment: Segment, start: int, stop: int) -> bool:
    """Populate a part of a segment, in pieces; return whether the kernel says that all of it is populated."""
    piece = max(PIECE, segment.target.page_size)
    cuts = [start, *range(start - start % piece + piece, stop, piece), stop]
    return _advise(list(pairwise(cuts)), segment.method)


def populate_whole(segments: Sequence[Segment]) -> bool:
    """Populate whole segments, those of one method together; return whether the kernel says that all are populated."""
    return all(
        _advise([segment for segment in segments if segment.method is method], method)
        for method in dict.fromkeys(segment.method for segment in segments)
    )


def _advise(ranges: Sequence[tuple[int, int] | Segment], method: Method) -> bool:
    """Advise ranges, each given by its start and stop, until the kernel fails; return whether all are advised."""
    assert method.advice is not None
    vector = array("Q", chain.from_iterable([(item[0], item[1] - item[0]) for item in ranges]))
    address = vector.buffer_info()[0]
    with own_process() as pidfd:
        for first in range(0, len(ranges), mman.IOV_MAX):
            count = min(mman.IOV_MAX, len(ranges) - first)
            wanted = sum(vector[2 * first + 1 : 2 * (first + count) : 2])
            try:
                if mman.process_madvise_vector(pidfd, address + 16 * first, count, method.advice) != wanted:
                    return False
            except OSError:  # of the first range; the caller finds the page, and the error
                return False
    return True
