"""One advice on many ranges: process_madvise on this process, 1024 ranges a call, without an object a range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefault._kernel import mman
from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.sizes import MIB

if TYPE_CHECKING:
    from prefault.sparse.range_arguments import Numbers

_FEW = 4
"""For so few ranges single calls are as fast."""

_LONGEST = 4 * MIB
"""Longer ranges are cut: a call cannot be interrupted."""


_AT_ONCE = 64 * MIB


class AdviceVector:
    """Ranges as the kernel wants them: an array of ``struct iovec``.

    Args:
        starts: addresses.
        lengths: in bytes, none of them 0.
    """

    def __init__(self, starts: Numbers, lengths: Numbers) -> None:
        import numpy

        self.starts = starts
        self.lengths = lengths
        self._iovecs = numpy.empty((len(starts), 2), numpy.uint64)
        self._iovecs[:, 0], self._iovecs[:, 1] = starts, lengths
        self._reach = numpy.cumsum(lengths)
        self._before = numpy.concatenate((self._reach[:1] * 0, self._reach[:-1]))

    def __len__(self) -> int:
        return len(self.starts)

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """Addresses from the start of one range to the end of the one before ``stop``, what lies between included."""
        return int(self.starts[first]), int(self.starts[stop - 1] + self.lengths[stop - 1])

    def stop_of(self, first: int, limit: int) -> int:
        """Where a call that begins with range number ``first`` ends: 1024 ranges, or about ``limit`` bytes, at least one."""
        within = int(self._reach.searchsorted(self._before[first] + limit, side="right"))
        return min(first + mman.IOV_MAX, max(first + 1, within), len(self))

    def advise(self, pidfd: int, first: int, stop: int, advice: int) -> int:
        """Advise the ranges of these numbers, at most 1024; the number of the first that is not advised.

        Raises:
            OSError: the first of them. A later one that fails ends the call.
        """
        try:
            done = mman.process_madvise_vector(pidfd, self._iovecs.ctypes.data + 16 * first, stop - first, advice)
        except InterruptedError:
            return first  # a signal; Python runs its handler before the next call
        return int(self._before.searchsorted(self._before[first] + done))


def advise(address: int, edges: Sequence[int] | Numbers, advice: int) -> None:
    """Advise ranges, given as edges from ``address`` on, all of them.

    Raises:
        OSError: one of them; those before it are advised.
    """
    if len(edges) <= 2 * _FEW or not capabilities.PROCESS_MADVISE.available:
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            mman.madvise(address + int(start), int(stop - start), advice)
        return
    import numpy

    from prefault.sparse.range_arguments import pieces

    starts, lengths = pieces(numpy.asarray(edges, numpy.int64), _LONGEST)
    vector = AdviceVector(starts + address, lengths)
    with own_process() as pidfd:
        at = 0
        while at < len(vector):
            at = vector.advise(pidfd, at, vector.stop_of(at, _AT_ONCE), advice)
