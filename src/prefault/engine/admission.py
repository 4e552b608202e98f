"""The watch over a populate call: before the start, and between its chunks."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from time import perf_counter_ns, sleep
from typing import NamedTuple

from prefault.engine.allowance import allowance
from prefault.engine.demand import Demand, ScatteredDemand
from prefault.engine.space_demand import space_demand
from prefault.errors import HeadroomError
from prefault.limits import Limit, ask_for_memory
from prefault.ranges import RangeSet
from prefault.sizes import MIB, format_size


class Shortfall(NamedTuple):
    """A limit that leaves less than is needed."""

    limit: Limit
    needed_bytes: int
    available_bytes: int

    @property
    def sentence(self) -> str:
        """What is short, by both numbers, and what to do."""
        limit = self.limit
        used = f"{format_size(limit.used_bytes)} of {format_size(limit.limit_bytes)} used"
        if limit.reclaimable_bytes:
            used += f", {format_size(limit.reclaimable_bytes)} reclaimable"
        if limit.reserve_bytes:
            used += f", {format_size(limit.reserve_bytes)} kept in reserve"
        return (
            f"{format_size(self.needed_bytes)} of {limit.bounds} are needed, and {limit.name} leaves"
            f" {format_size(self.available_bytes)} ({used}; at the limit: {limit.consequence}):"
            f" {limit.remedy}, populate less, or go on regardless with headroom='ignore'"
        )

    def error(self, message: str, *, address: int = 0, offset: int = 0, populated: RangeSet | None = None) -> HeadroomError:
        """The exception with this message."""
        return HeadroomError(
            errno.ENOMEM, message, address=address, offset=offset, populated=populated,
            limit=self.limit.name, needed_bytes=self.needed_bytes, available_bytes=self.available_bytes,
        )  # fmt: skip


class AdmissionControl:
    """Looks at the limits before a populate call, and between its chunks.

    populate() uses it, and so does whoever populates in other ways, such as vectors of ranges::

        segment = make_plan(memory, access, first, last - first, None, 1).segments[0]
        watch = Watch([Part(segment, missing, memory.fd)], memory.address)
        watch.start()  # HeadroomError: the whole does not fit, and nothing is populated
        for start, stop in chunks:
            with watch.ahead(start, stop):  # HeadroomError: it does not fit any more
                ...  # populate what is missing there

    ``missing`` holds addresses, start and stop in turn, ascending: all that is to be populated, of one kind of memory.
    Several threads may be at work; each says what is ahead of itself.

    Args:
        parts: what is to be populated, in order of address.
        origin: the address that offsets in errors are counted from.
    """

    def __init__(self, parts: Sequence[Demand], origin: int = 0) -> None:
        self._parts = parts
        # Those of single segments follow each other and are found by address; of the others there are few.
        self._spread = [part for part in parts if isinstance(part, ScatteredDemand)]
        self._single = [part for part in parts if not isinstance(part, ScatteredDemand)]
        self._starts = [part.segment.start for part in self._single]
        self._origin = origin
        self._lock = threading.Lock()
        self._ahead: dict[int, int] = {}
        self.largest_chunk = _LARGEST_CHUNK
        """Bytes that one system call should populate at most: little where little is left."""
        self.abandoned = False
        """The call has ended: admit waits for no other thread any more."""

    def start(self) -> None:
        """Look at every limit, for all of it.

        Raises:
            HeadroomError: a limit leaves less than is needed.
        """
        shortage = self.whole()
        if shortage is not None:
            first = min(part.segment.start for part in self._parts)
            last = max(part.segment.stop for part in self._parts)
            raise shortage.error(
                f"cannot populate {format_size(last - first)}: {shortage.sentence}; nothing was populated",
                address=first, offset=first - self._origin,
            )  # fmt: skip

    def whole(self) -> Shortfall | None:
        """What is short for all of it, if anything."""
        spans = [(part, part.segment.start, part.segment.stop) for part in self._parts]
        bound = sum(part.at_most(start, stop) for part, start, stop in spans)
        shortage = None
        if bound and not (bound <= _SMALL and allowance.spend(bound, perf_counter_ns())):
            shortage = self._ask(bound, spans, 1.0)
        return shortage or self._short_of_space()

    def ahead(self, start: int, stop: int) -> _ChunkAhead:
        """A context manager around populating ``[start, stop)``.

        Raises:
            HeadroomError: memory for it is not there any more, on entering.
        """
        return _ChunkAhead(self, start, stop)

    def admit(self, start: int, stop: int) -> Shortfall | None:
        """What is short for ``[start, stop)``, on top of what other threads have ahead of them; None admits it.

        :meth:`release` must follow where it is admitted. Where it would fit but for the others, it waits for them: how much
        of theirs is charged already is not known.
        """
        spans = self._within(start, stop)
        bound = sum(part.at_most(first, last) for part, first, last in spans)
        if not bound:
            return None
        self.release()
        while True:
            with self._lock:
                others = sum(list(self._ahead.values()))
                # Half of the reserve: the estimates of the start may have been a little too small.
                shortage = self._ask(bound, spans, 0.5, others)
                if shortage is None:
                    self._ahead[threading.get_ident()] = bound
                    return None
            if not others or self.abandoned:
                return shortage
            # Not a Condition: Ctrl-C between two of its steps leaves its lock taken, and the others wait for ever.
            sleep(_PAUSE_S)

    def _within(self, start: int, stop: int) -> list[tuple[Demand, int, int]]:
        """The parts that share a byte with a range, each with what they share at most."""
        index = max(0, bisect_right(self._starts, start) - 1)
        near = [*self._single[index : bisect_left(self._starts, stop)], *self._spread]
        spans = [(part, max(start, part.segment.start), min(stop, part.segment.stop)) for part in near]
        return [span for span in spans if span[1] < span[2]]

    def release(self) -> None:
        """This thread is done with what was admitted, if anything was. A second call does nothing."""
        self._ahead.pop(threading.get_ident(), None)

    def _ask(self, bound: int, spans: list[tuple[Demand, int, int]], reserve: float, others: int = 0) -> Shortfall | None:
        """By the bound first; a look at the pages only where that does not fit."""
        now_ns = perf_counter_ns()
        needed = bound
        # Limits of cgroups can shrink from one moment to the next; the machine's memory is only used up.
        lately = reserve < 1 and allowance.spend(bound, now_ns)
        answer = ask_for_memory(needed + others, reserve=reserve, only_cgroups=lately)
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

    def _short_of_space(self) -> Shortfall | None:
        for part in self._parts:
            for limit, needed in space_demand(part):
                if needed > limit.available_bytes:
                    return Shortfall(limit, needed, limit.available_bytes)
        return None


def _counted(spans: list[tuple[Demand, int, int]], left: int) -> tuple[int, int]:
    """Count the memory that spans need, and the overhead, by a look at the pages.

    Where more is needed than ``left``, and the reserve on top, the rest is not looked at, and counted as needed: a look at
    1 TiB takes seconds, of shared memory 10.
    """
    memory = overhead = 0
    enough = left + _RESERVE
    for part, start, stop in spans:
        for at in range(start, stop, _LOOK):
            end = min(stop, at + _LOOK)
            memory += part.memory(at, end) if memory <= enough else part.at_most(at, end)
        overhead += part.overhead(start, stop)
    return memory, overhead


_LOOK = 1024 * MIB
_RESERVE = 64 * MIB
"""More than what is kept in reserve of any limit."""
_SMALL = 8 * MIB
"""Calls beyond this, milliseconds of work, look at the limits themselves."""
_PAUSE_S = 0.0005
"""About what a chunk takes where little is left."""
_SMALLEST_CHUNK = 1 * MIB
_LARGEST_CHUNK = 1024 * MIB


class _ChunkAhead:
    __slots__ = ("_start", "_stop", "_watch")

    def __init__(self, watch: AdmissionControl, start: int, stop: int) -> None:
        self._watch, self._start, self._stop = watch, start, stop

    def __enter__(self) -> None:
        shortage = self._watch.admit(self._start, self._stop)
        if shortage is not None:
            offset = self._start - self._watch._origin
            raise shortage.error(
                f"stopped at offset {offset} ({self._start:#x}): {shortage.sentence}", address=self._start, offset=offset
            )

    def __exit__(self, *_: object) -> None:
        self._watch.release()
