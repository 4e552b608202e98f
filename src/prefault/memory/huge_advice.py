"""Advice to use transparent huge pages, given chunk by chunk while memory is populated, and no longer than it pays."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Callable
from time import perf_counter_ns
from typing import NamedTuple, TypeVar

from prefault._kernel import mman
from prefault._system import capabilities, thp
from prefault._system.vmstat import read_vmstat
from prefault.intervals import Intervals
from prefault.memory.vma import vm_flags, vmas
from prefault.ranges import PageRange
from prefault.sizes import MIB, PAGE_SIZE, format_size

Failure = TypeVar("Failure")

SLOWER = 2
"""Times as long as base pages that advised memory may take while the kernel compacts memory for it."""

_AHEAD = 256 * MIB
"""Bytes that are advised before their chunk's turn at most: giving up does not take that back."""

_STALLS, _FALLBACKS = "compact_stall", "thp_fault_fallback"


class _Events(NamedTuple):
    """Counters of the whole machine: direct compactions, and faults that got a base page for want of a huge one."""

    stalls: int
    fallbacks: int

    @classmethod
    def now(cls) -> _Events:
        return cls(*read_vmstat(_STALLS, _FALLBACKS))

    def since(self, before: _Events) -> _Events:
        return _Events(self.stalls - before.stalls, self.fallbacks - before.fallbacks)


def obstacle() -> str | None:
    """Return why memory is not advised anywhere on this system, in words; None where it can be."""
    if thp.pmd_size() is None:
        return "this kernel has no transparent huge pages"
    word = thp.pmd_setting()
    if word == "always":
        return "the system gives huge pages without being asked (transparent_hugepage/enabled is always)"
    return None if word == "madvise" else f"the administrator allows none (transparent_hugepage/enabled is {word})"


class HugeAdvice:
    """MADV_HUGEPAGE for private anonymous memory that is about to be populated in whole.

    Memory is advised shortly before it is populated, since giving up cannot take an advice back. Giving up pays when the
    kernel compacts memory for each huge page (direct compaction), and perhaps in vain: that can be many times slower than
    base pages.

    Args:
        missing: addresses that are to be populated for writing, of private anonymous memory. Huge pages of which a part is
            populated already are left out: the kernel does not make those huge on a fault.
        origin: the address that offsets in notes are counted from.
    """

    def __init__(self, missing: Intervals, origin: int) -> None:
        self.chunk_bytes = thp.pmd_size() or PAGE_SIZE
        """Bytes of a huge page: smaller chunks would never get one."""
        found = ((start, stop, vma) for start, stop in missing.inward(self.chunk_bytes) for vma in vmas(start, stop))
        whole = (PageRange.inward(max(a, vma.start), min(b, vma.stop), self.chunk_bytes) for a, b, vma in found)
        self._places = [place for place in whole if place]
        self._starts = [place.start for place in self._places]
        self._allowed: dict[int, bool] = {}
        self._advised = Intervals()
        self._origin = origin
        self._lock = threading.Lock()
        self._suspected: tuple[float, _Events, int] | None = None
        self._base_ns: float | None = None
        self._over: str | None = None
        self._refused = 0

    @property
    def length(self) -> int:
        """Bytes of whole huge pages that may be advised."""
        return sum(place.length for place in self._places)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about memory that was not advised after all."""
        refused = (
            f"{format_size(self._refused)} keep base pages: {self._why_not}" if self._refused else None,
            self._over,
        )
        return tuple(filter(None, refused))

    def run(self, pages: PageRange, populate: Callable[[], Failure | None]) -> Failure | None:
        """Advise the huge pages inside ``pages``, populate, and judge by the time and the machine's counters."""
        shared = (place & pages for place in self._places_among(pages))
        inside = [part for part in (PageRange.inward(*some, self.chunk_bytes) for some in shared) if part]
        if self._over is not None or not inside:
            return populate()
        comparable = 2 * sum(part.length for part in inside) > pages.length
        began, before = perf_counter_ns(), _Events.now()
        advised = [part for part in inside if self._advise(part)]
        failure = populate()
        if failure is None and comparable:
            self._judge(pages, bool(advised), (perf_counter_ns() - began) / pages.length, _Events.now().since(before))
        return failure

    def _places_among(self, pages: PageRange) -> list[PageRange]:
        first = max(0, bisect_right(self._starts, pages.start) - 1)
        return self._places[first : bisect_right(self._starts, pages.stop - 1)]

    def _advise(self, part: PageRange) -> bool:
        """Return whether a part of a place is advised, now or before.

        An advice takes the mmap lock for writing, and so waits for the chunks that other threads are at: it is given for the
        next chunks as well, but for no more than has gone well.
        """
        place = bisect_right(self._starts, part.start) - 1
        with self._lock:
            missing = Intervals([part]) - self._advised
            if not missing:
                return True
            if self._suspected is not None:
                return missing.length < part.length  # the next chunk that is not advised at all shows what base pages take
            allowed = self._allowed.get(place)
            if allowed is None:
                allowed = self._allowed[place] = self._is_allowed(PageRange(part.start, part.start + self.chunk_bytes))
                if not allowed:
                    self._refused += self._places[place].length
            if not allowed:
                return False
            ahead = min(self._advised.length, _AHEAD) // self.chunk_bytes * self.chunk_bytes
            start, stop = missing.span[0], min(part.stop + ahead, self._places[place].stop)
            try:
                mman.madvise(start, stop - start, mman.MADV_HUGEPAGE)
            except OSError:  # unmapped meanwhile, or no memory to split the mapping: populating tells
                return False
            self._advised |= Intervals([(start, stop)])
        return True

    def _is_allowed(self, page: PageRange) -> bool:
        """Return whether the program left its mapping open to huge pages; an advice would overwrite MADV_NOHUGEPAGE.

        Only smaps tells, and takes seconds for hundreds of GiB. MADV_COLLAPSE of the first huge page tells as well, once a
        page of it is there.
        """
        if not capabilities.MADV_COLLAPSE.available:
            return "nh" not in vm_flags(page.start)
        try:
            mman.madvise(page.start, PAGE_SIZE, mman.MADV_POPULATE_WRITE)
            mman.madvise(page.start, page.length, mman.MADV_COLLAPSE)
        except OSError as error:
            # Without 2 MiB in one piece (ENOMEM) or with a page that is in use (EAGAIN) it is allowed nevertheless.
            return error.errno in (errno.ENOMEM, errno.EAGAIN)
        return True

    @property
    def _why_not(self) -> str:
        refused = next(place for index, place in enumerate(self._places) if self._allowed.get(index) is False)
        if "nh" in vm_flags(refused.start):
            return "MADV_NOHUGEPAGE was given for them (huge='never')"
        if thp.is_disabled_for_process():
            return "prctl(PR_SET_THP_DISABLE) forbids others"
        return "the kernel refuses others here"

    def _judge(self, pages: PageRange, advised: bool, ns: float, events: _Events) -> None:
        """Learn from a chunk that took ``ns`` a byte, and give up where advised memory is slow because of compaction."""
        with self._lock:
            if not advised:
                self._base_ns = ns
                suspected, self._suspected = self._suspected, None
            elif events.stalls or events.fallbacks:
                suspected = ns, events, pages.start
            else:
                return
            if suspected is None:
                return
            if self._base_ns is None:
                self._suspected = suspected
            elif suspected[0] > SLOWER * self._base_ns and self._over is None:
                self._over = self._give_up(*suspected, self._base_ns)

    def _give_up(self, ns: float, events: _Events, address: int, base_ns: float) -> str:
        offset = max(0, address - self._origin)
        return (
            f"base pages from offset {offset} on: huge pages took {ns / base_ns:.0f} times as long there, as memory is"
            f" fragmented ({_STALLS} {events.stalls:+}, {_FALLBACKS} {events.fallbacks:+} in /proc/vmstat)"
        )
