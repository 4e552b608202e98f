"""One advice on many ranges: process_madvise on this process, 1024 ranges per call, without an object for each range."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefault._kernel import mman
from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.intervals import Intervals
from prefault.sizes import MIB

if TYPE_CHECKING:
    from prefault.intervals import Numbers

_FEW = 4
"""Number of ranges up to which single calls are as fast."""

_LONGEST = 4 * MIB
"""Longer ranges are cut: a call cannot be interrupted."""

_AT_ONCE = 64 * MIB
"""Bytes of one call, about."""


class AdviceVector:
    """Ranges as process_madvise takes them: an array of ``struct iovec``.

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
        """Return the addresses from the start of one range to the end of the one before ``stop``."""
        return int(self.starts[first]), int(self.starts[stop - 1] + self.lengths[stop - 1])

    def stop_of(self, first: int, limit: int) -> int:
        """Return where a call from range number ``first`` on ends: after 1024 ranges or ``limit`` bytes, at least one."""
        within = int(self._reach.searchsorted(self._before[first] + limit, side="right"))
        return min(first + mman.IOV_MAX, max(first + 1, within), len(self))

    def advise(self, pidfd: int, first: int, stop: int, advice: int) -> int:
        """Advise the ranges of these numbers, at most 1024; return the number of the first that is not advised.

        Raises:
            OSError: the kernel refuses the first of them. A later one that it refuses ends the call.
        """
        try:
            done = mman.process_madvise_vector(pidfd, self._iovecs.ctypes.data + 16 * first, stop - first, advice)
        except InterruptedError:
            return first  # a signal; Python runs its handler before the next call
        return int(self._before.searchsorted(self._before[first] + done))


def advise(pages: Intervals, advice: int) -> None:
    """Advise ranges of addresses, all of them.

    Raises:
        OSError: the kernel refuses one of them; those before it are advised.
    """
    if len(pages) <= _FEW or not capabilities.PROCESS_MADVISE.available:
        for start, stop in pages:
            mman.madvise(start, stop - start, advice)
        return
    vector = AdviceVector(*pages.pieces(_LONGEST))
    with own_process() as pidfd:
        at = 0
        while at < len(vector):
            at = vector.advise(pidfd, at, vector.stop_of(at, _AT_ONCE), advice)
