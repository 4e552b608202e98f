"""Populating mappings of files that were advised MADV_RANDOM, as databases advise theirs.

The kernel obeys that advice in MADV_POPULATE_* too, and reads page by page: 512 MiB took 7.1 s instead of 0.8. Whether a
mapping has the advice only smaps tells, which walks the page tables of the whole process. So the faults that waited for the
disk are counted first, which costs nothing: without read-ahead there is one for each page.

MADV_WILLNEED reads whatever the advice is, without a look at smaps, but into single pages and not into large folios. It
is twice as slow for many MiB, so it reads only the last few.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from resource import RUSAGE_THREAD, getrusage
from typing import TypeVar

from prefault._kernel import mman
from prefault._system import capabilities, proc
from prefault._system.own_process import own_process
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import KIB, MIB, PAGE_SIZE

_Result = TypeVar("_Result")

_FEW = 8 * MIB
"""Bytes that MADV_WILLNEED reads sooner than smaps is read."""
_READ_AT_ONCE = 128 * KIB
"""Bytes of one MADV_WILLNEED. The kernel may read only the first part of more, depending on ``read_ahead_kb``."""


class ReadAhead:
    """Watches the chunks of one thread, and reads ahead where the advice of the mapping forbids it.

    The advice is taken off the chunk while it is populated, and given again. Meanwhile faults of other threads in this chunk
    read ahead as well. A second mapping of the file would spare them that, but needs a descriptor: to open one and
    close it drops the POSIX locks that this process holds on the file (fcntl(2)).
    """

    def __init__(self, whole: PageRange) -> None:
        self._whole = whole
        self._random: RangeSet | None = None
        """The ranges that have the advice; None before smaps was read."""
        self._is_read_by_page = False

    def run(self, chunk: PageRange, populate: Callable[[], _Result]) -> _Result:
        """Call ``populate``, which populates the chunk, and return its result."""
        if self._is_read_by_page:
            if self._whole.stop - chunk.start <= _FEW and capabilities.PROCESS_MADVISE.available:
                _read(chunk)
                return populate()
            if self._random is None:
                self._random = _advised_random(self._whole)
            return _without_advice(RangeSet([chunk]) & self._random, populate)
        before = getrusage(RUSAGE_THREAD).ru_majflt
        result = populate()
        if (getrusage(RUSAGE_THREAD).ru_majflt - before) * PAGE_SIZE * 2 >= chunk.length:
            self._is_read_by_page = True
        return result


def _read(chunk: PageRange) -> None:
    """Start to read all of a chunk, in one call: each return from a call waits for the GIL."""
    pieces = [(piece.start, piece.length) for piece in chunk.chunks(_READ_AT_ONCE)]
    with contextlib.suppress(OSError), own_process() as pidfd:  # a hint, also in a hole: populating finds the error
        mman.process_madvise(pidfd, pieces, mman.MADV_WILLNEED)


def _without_advice(ranges: RangeSet, populate: Callable[[], _Result]) -> _Result:
    if not ranges:
        return populate()
    try:
        _advise(ranges, mman.MADV_NORMAL)
        return populate()
    finally:
        try:
            _advise(ranges, mman.MADV_RANDOM)
        except BaseException:  # Ctrl-C, which may have come before the advice
            _advise(ranges, mman.MADV_RANDOM)
            raise


def _advise(ranges: RangeSet, advice: int) -> None:
    for item in ranges:
        with contextlib.suppress(OSError):  # no room for another VMA (vm.max_map_count): it is slow then, no more
            mman.madvise(item.start, item.length, advice)


def _advised_random(whole: PageRange) -> RangeSet:
    """Return the mappings in a range that have the flag of MADV_RANDOM in smaps, ``rr``."""
    found = (PageRange(start, stop) for start, stop in proc.mappings_with_flag("rr"))
    return RangeSet(found) & RangeSet([whole])
