"""Chunks: how much memory one system call populates, in which order, and which are done."""

from __future__ import annotations

import threading
from bisect import bisect_right
from resource import RUSAGE_THREAD, getrusage
from time import perf_counter_ns, thread_time_ns
from typing import NamedTuple

from prefault.engine.attempts import can_advise
from prefault.engine.planning import NO_FALLOCATE, Plan, Segment
from prefault.ranges import PageRange
from prefault.sizes import KIB, MIB

# A system call is neither interruptible nor does it release the mmap lock, so each gets a chunk of some milliseconds:
# Ctrl-C, progress and other threads' mmap() wait no longer than that. The size follows what the memory turns out to cost.
FIRST_CHUNK = 4 * MIB
SMALLEST_CHUNK = 1 * MIB
FIRST_CHUNK_OF_A_DISK = 16 * KIB
"""Bytes; few, in case that the disk is read page by page (prefault.engine.readahead)."""
LARGEST_CHUNK = 64 * MIB
_CALL_NS = 2_000_000, 6_000_000
_CALL_NS_WITHOUT_GIL = 8_000_000, 20_000_000
# Beside several threads that compute the GIL comes back after several switch intervals. Ctrl-C waits as long as a call.
_LONGEST_CALL_NS = 64_000_000
_LARGEST_CHUNK_WITHOUT_GIL = 1024 * MIB

_MANY_SEGMENTS = 64
_SEGMENTS_AT_ONCE = 1024


class ChunkSize:
    """Size of the next chunk of one thread, such that each call takes some milliseconds of its CPU time."""

    __slots__ = ("_cpu_ns", "_on_disk", "_sleeps", "_threads", "_wall_ns", "size")

    def __init__(self, *, on_disk: bool, threads: int = 1) -> None:
        self.size = FIRST_CHUNK_OF_A_DISK if on_disk else FIRST_CHUNK
        self._on_disk = on_disk
        self._threads = threads
        self._sleeps = getrusage(RUSAGE_THREAD).ru_nvcsw
        self.start()

    def start(self) -> None:
        """Start the clock of a chunk."""
        self._wall_ns, self._cpu_ns = perf_counter_ns(), thread_time_ns()

    def finish(self) -> None:
        """Stop the clock of a chunk, and adjust ``size``."""
        wall_ns, cpu_ns = perf_counter_ns() - self._wall_ns, thread_time_ns() - self._cpu_ns
        shortest, longest = _CALL_NS
        if self._on_disk:
            if self.size < SMALLEST_CHUNK:
                self.size = FIRST_CHUNK
                return
            shortest = 0  # a disk's time is not CPU time: its chunks stay small
        elif wall_ns - cpu_ns > cpu_ns // 4 and self._slept():
            # Not for want of a CPU: another thread computes and gives the GIL back after sys.getswitchinterval(), 5 ms,
            # only. To wait that long after every 2 ms of work makes it several times slower.
            # Shared among the threads: one that wants the mmap lock for writing, and may hold the GIL meanwhile (mmap.mmap
            # does), waits for all of their calls, which looks the same from here.
            waited_ns = min(2 * (wall_ns - cpu_ns), _LONGEST_CALL_NS)
            shortest, longest = (
                max(a, max(b, waited_ns) // self._threads) for a, b in zip(_CALL_NS, _CALL_NS_WITHOUT_GIL, strict=True)
            )
            # At once, since each step on the way would wait as long.
            while 2 * cpu_ns < shortest and self.size < _LARGEST_CHUNK_WITHOUT_GIL:
                self.size, cpu_ns = 2 * self.size, 2 * cpu_ns
            if cpu_ns <= longest:
                return
        if cpu_ns > longest:
            self.size = max(self.size // 2, SMALLEST_CHUNK)
        elif cpu_ns < shortest:
            self.size = max(self.size, min(self.size * 2, LARGEST_CHUNK))

    def _slept(self) -> bool:
        """Return whether this thread gave up its CPU since the last call by itself; being preempted does not count."""
        before, self._sleeps = self._sleeps, getrusage(RUSAGE_THREAD).ru_nvcsw
        return self._sleeps > before


class Chunk(NamedTuple):
    """Pages that one thread populates at once: a part of one segment, or several whole segments."""

    pages: PageRange
    segments: tuple[Segment, ...]


class ChunkQueue:
    """Hands out the chunks of a plan in order of address, and records which are done.

    Attributes:
        plan: what is carried out; its methods may change on the way (:meth:`replace`).
        taken: the pages of all chunks that were handed out.
        done: the pages that are populated.
        done_bytes: how many bytes these are.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.taken: list[PageRange] = []
        self.done: list[PageRange] = []
        self.done_bytes = 0
        self._lock = threading.Lock()
        self._index = 0
        self._at = plan.segments[0].start
        self._open: dict[int, Chunk] = {}
        """By thread: the chunk that it is at work on."""
        # Few segments are taken one by one, so that nothing above a page that fails is populated.
        methods = {segment.method for segment in plan.segments}
        self._joins_segments = len(plan.segments) >= _MANY_SEGMENTS and all(can_advise(method) for method in methods)
        self._stops = [segment.stop for segment in plan.segments]

    def take(self, size: int) -> Chunk | None:
        """Return the next chunk, cut at a multiple of ``size`` to split no huge page; None after the last."""
        with self._lock:
            segments = self.plan.segments
            if self._at == segments[self._index].stop:
                if self._index + 1 == len(segments):
                    return None
                self._index += 1
                self._at = segments[self._index].start
            segment = segments[self._index]
            size = max(size, segment.target.page_size)
            end, last = self._at - self._at % size + size, self._index + 1
            if self._joins_segments and self._at == segment.start and segment.stop < end:
                last = max(last, min(self._index + _SEGMENTS_AT_ONCE, bisect_right(self._stops, end, self._index)))
            chunk = Chunk(PageRange(self._at, min(self._stops[last - 1], end)), segments[self._index : last])
            self._at, self._index = chunk.pages.stop, last - 1
            self._open[threading.get_ident()] = chunk
            self.taken.append(chunk.pages)
            return chunk

    def finish(self, done: PageRange) -> None:
        """Record that this thread is done with its chunk, and which pages of it are populated."""
        with self._lock:
            del self._open[threading.get_ident()]
            self.done.append(done)
            self.done_bytes += done.length

    def unfinished(self) -> list[Chunk]:
        """Return the chunks that an interruption or a failure caught before they were recorded as done."""
        return list(self._open.values())

    def catch(self, pages: PageRange) -> None:
        """Record that a chunk, of the first segment, was interrupted that was not taken from this queue."""
        self._open[0] = Chunk(pages, self.plan.segments[:1])

    def replace(self, segment: Segment, without: Segment) -> None:
        """Populate a segment by a method without fallocate from now on, and say so in the notes."""
        with self._lock:
            segments = tuple(without if other is segment else other for other in self.plan.segments)
            notes = tuple(dict.fromkeys((*self.plan.notes, NO_FALLOCATE)))
            self.plan = self.plan._replace(segments=segments, notes=notes)
