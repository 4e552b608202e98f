"""Admission control of a populate call: before the start, and between its chunks."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from time import perf_counter_ns, sleep
from typing import Literal, TypeAlias

from prefault.limits.allowance import allowance
from prefault.limits.demand import Demand, length_of_all, missing_in_all, uncached_in_all
from prefault.limits.evicted_meanwhile import EvictedPages, evicted_meanwhile
from prefault.limits.limit import Shortfall
from prefault.limits.memory_limits import node_limits
from prefault.limits.table import ask_for_memory, has_free_memory, refusal_ahead, takes_node_memory
from prefault.sizes import MIB, format_size

HeadroomChoice: TypeAlias = Literal["check", "ignore"]
"""``"check"``: the limits are checked before memory is populated and meanwhile. ``"ignore"``: they are not."""


class AdmissionControl:
    """Check of the limits before a populate call, and between its chunks.

    populate() uses it, and so do other ways to populate, such as vectors of ranges::

        use = make_plan(memory, access, first, last - first, None, 1).segments[0].use
        control = AdmissionControl([Demand(use, missing, memory.fd)], memory.address)
        control.start()  # HeadroomError: the whole does not fit, and nothing is populated
        for start, stop in chunks:
            with control.ahead(start, stop):  # HeadroomError: it does not fit any more
                ...  # populate the missing pages there

    ``missing`` holds the addresses of all that is to be populated, of one kind of memory.
    Several threads may be at work; each announces the chunk ahead of it.

    Args:
        demands: the memory to populate, in order of address.
        origin: the address that offsets in errors are counted from.
    """

    def __init__(self, demands: Sequence[Demand], origin: int = 0) -> None:
        self._demands = demands
        # Demands of single segments follow each other and are found by address; there are few of the others.
        self._scattered = [demand for demand in demands if len(demand.stretches) > 1]
        self._single = sorted((demand for demand in demands if len(demand.stretches) == 1), key=lambda one: one.use.start)
        self._starts = [demand.use.start for demand in self._single]
        self._nodes = {demand.use.nodes for demand in demands if takes_node_memory(demand.use)}
        self._origin = origin
        self._lock = threading.Lock()
        self._admitted: dict[int, int] = {}  # bytes by thread
        self.largest_chunk = _LARGEST_CHUNK
        """Bytes that one system call should populate at most: few if little is left."""
        self._page_cache_bytes = 0
        self._is_free = True
        self.abandoned = False
        """True when the call has ended: admit waits for no other thread any more."""

    def start(self) -> None:
        """Check every limit for the whole call.

        Raises:
            HeadroomError: a limit leaves less than is needed.
        """
        shortfall = self.whole()
        if shortfall is not None:
            first = min(demand.use.start for demand in self._demands)
            raise shortfall.error(
                f"cannot populate {format_size(length_of_all(self._demands))}: {shortfall.sentence}; nothing was populated",
                address=first, offset=first - self._origin,
            )  # fmt: skip

    def whole(self) -> Shortfall | None:
        """Return the limit that leaves too little for the whole call; None if it fits."""
        spans = [(demand, demand.use.start, demand.use.stop) for demand in self._demands]
        bound = sum(demand.at_most(start, stop) for demand, start, stop in spans)
        shortfall = None
        self._page_cache_bytes = missing_in_all(self._of_page_cache())
        if self._page_cache_bytes:
            self._is_free = has_free_memory(self._page_cache_bytes + bound)
        if bound and not (bound <= _SMALL and allowance.spend(bound, perf_counter_ns())):
            shortfall = self._ask(bound, spans, 1.0)
        return shortfall or refusal_ahead(self._demands, is_free=self._is_free)

    def outlook(self) -> list[str]:
        """Return sentences for a plan: what the page cache lacks, and the limit that leaves too little, if there is one."""
        short = self.whole()
        lacking = uncached_in_all(self._of_page_cache())
        sentences = [f"{format_size(lacking)} are missing from the page cache"] if lacking else []
        return sentences if short is None else [*sentences, f"it does not fit: {short.sentence}"]

    def _of_page_cache(self) -> list[Demand]:
        return [demand for demand in self._demands if demand.use.fills_page_cache]

    def look_again(self) -> EvictedPages | None:
        """Return the pages of files that were evicted while others came in; to be called when all are populated.

        Whether they fit cannot be told before: pages that are cached already may be charged to any cgroup, and the kernel
        counts those of this call as reclaimable. Nothing is looked at where memory was free for all from start to end; to
        a short call the start tells enough.
        """
        if not self._page_cache_bytes:
            return None
        if self._is_free and (self._page_cache_bytes <= _SHORT or has_free_memory(_FREE_AT_THE_END)):
            return None
        return evicted_meanwhile(self._demands)

    def ahead(self, start: int, stop: int) -> _ChunkAhead:
        """Make a context manager around populating ``[start, stop)``.

        Raises:
            HeadroomError: on entering: memory for it is not there any more.
        """
        return _ChunkAhead(self, start, stop)

    def admit(self, start: int, stop: int) -> Shortfall | None:
        """Admit ``[start, stop)`` beside the chunks of other threads; return the limit that leaves too little, else None.

        :meth:`release` must follow an admission. A chunk that fits alone, but not beside those of other threads, waits for
        them: how much of theirs is charged already is not known.
        """
        spans = self._within(start, stop)
        bound = sum(demand.at_most(first, last) for demand, first, last in spans)
        if not bound:
            return None
        self.release()
        while True:
            with self._lock:
                others = sum(list(self._admitted.values()))
                # Half of the reserve: the estimates of the start may have been a little too small.
                shortfall = self._ask(bound, spans, 0.5, others) or self._ask_nodes(spans, others)
                if shortfall is None:
                    self._admitted[threading.get_ident()] = bound
                    return None
            if not others or self.abandoned:
                return shortfall
            # Not a Condition: Ctrl-C between two of its steps leaves its lock taken, and the others wait for ever.
            sleep(_PAUSE_S)

    def _within(self, start: int, stop: int) -> list[tuple[Demand, int, int]]:
        """Find the demands that may share a byte with a range, each with the part of the range that it spans."""
        index = max(0, bisect_right(self._starts, start) - 1)
        near = [*self._single[index : bisect_left(self._starts, stop)], *self._scattered]
        spans = [(demand, max(start, demand.use.start), min(stop, demand.use.stop)) for demand in near]
        return [span for span in spans if span[1] < span[2]]

    def release(self) -> None:
        """End the admission of this thread, if it has one. Idempotent."""
        self._admitted.pop(threading.get_ident(), None)

    def _ask(self, bound: int, spans: list[tuple[Demand, int, int]], reserve: float, others: int = 0) -> Shortfall | None:
        """Check the bound first; count the pages only if that does not fit."""
        now_ns = perf_counter_ns()
        needed = bound
        # Some limits shrink from one moment to the next; the machine's memory is only used up.
        lately = reserve < 1 and allowance.spend(bound, now_ns)
        answer = ask_for_memory(needed + others, reserve=reserve, only_shrinking=lately)
        if answer.short is not None:
            memory, overhead = _counted(spans, answer.left_bytes)
            needed = min(bound, memory + overhead)
            if not needed:
                return None
            # Page tables alone may come out of the reserve.
            answer = ask_for_memory(needed + others, reserve=reserve if memory else 0.0)
            if answer.short is not None:
                allowance.empty()
                return Shortfall(answer.short, needed, max(0, answer.left_bytes - others))
        if not lately:
            allowance.fill(answer.left_bytes - needed - others, now_ns)
        self.largest_chunk = min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, (answer.left_bytes - others) // 8 & -MIB))
        return None

    def _ask_nodes(self, spans: list[tuple[Demand, int, int]], others: int) -> Shortfall | None:
        """Return a NUMA node that has too little left for a chunk, whatever other nodes have."""
        for nodes in self._nodes:
            mine = [span for span in spans if span[0].use.nodes == nodes and takes_node_memory(span[0].use)]
            needed = sum(demand.missing_bytes(start, stop) for demand, start, stop in mine)
            for limit in node_limits(nodes, 0.5) if needed else ():  # half of the reserve, as above
                left = max(0, limit.available_bytes - others)
                if needed > left and (memory := _counted(mine, left)[0]) > left:
                    return Shortfall(limit, memory, left)
        return None


def _counted(spans: list[tuple[Demand, int, int]], left: int) -> tuple[int, int]:
    """Count the memory that spans need, and the overhead, page by page.

    Once more is needed than ``left`` and the reserve, the rest counts as needed: to read the pages of 1 TiB takes seconds,
    of shared memory 10.
    """
    memory = overhead = 0
    enough = left + _RESERVE
    for demand, start, stop in spans:
        for at in range(start, stop, _STEP):
            end = min(stop, at + _STEP)
            memory += demand.memory(at, end) if memory <= enough else demand.at_most(at, end)
        overhead += demand.overhead(start, stop)
    return memory, overhead


_STEP = 1024 * MIB
_RESERVE = 64 * MIB
"""More than the reserve of any limit."""
_SMALL = 8 * MIB
"""Calls beyond this, milliseconds of work, read the limits themselves."""
_SHORT = 32 * MIB
"""Page cache that comes in so soon that memory which was free for it is hardly gone meanwhile."""
_FREE_AT_THE_END = 16 * MIB
"""Free memory that is found at the end of a call where nothing was reclaimed for it meanwhile."""
_PAUSE_S = 0.0005
"""About the time that a chunk takes when little is left."""
_SMALLEST_CHUNK = 1 * MIB
_LARGEST_CHUNK = 1024 * MIB


class _ChunkAhead:
    __slots__ = ("_control", "_start", "_stop")

    def __init__(self, control: AdmissionControl, start: int, stop: int) -> None:
        self._control, self._start, self._stop = control, start, stop

    def __enter__(self) -> None:
        shortfall = self._control.admit(self._start, self._stop)
        if shortfall is not None:
            offset = self._start - self._control._origin
            raise shortfall.error(
                f"stopped at offset {offset} ({self._start:#x}): {shortfall.sentence}", address=self._start, offset=offset
            )

    def __exit__(self, *_: object) -> None:
        self._control.release()
