"""Size of chunks: the memory that one system call populates."""

from __future__ import annotations

from collections.abc import Iterable
from resource import RUSAGE_THREAD, getrusage
from time import perf_counter_ns, thread_time_ns

from prefault.sizes import KIB, MIB

# A system call is neither interruptible nor does it release the mmap lock, so each gets a chunk of some milliseconds:
# Ctrl-C, progress and other threads' mmap() wait no longer than that. The size follows what the memory turns out to cost.
FIRST_CHUNK = 4 * MIB
SMALLEST_CHUNK = 1 * MIB
FIRST_CHUNK_OF_A_DISK = 16 * KIB
"""Bytes; few, in case that the disk is read page by page (prefault.engine.readahead)."""
LARGEST_CHUNK = 64 * MIB
_LARGEST_VECTOR = 256 * MIB
_CALL_NS = 2_000_000, 6_000_000
# Vectors of ranges give up the mmap lock between pieces of 4 MiB; yet a thread that wants it for writing may wait for all of
# a vector. Python costs some 100 us a chunk.
_VECTOR_CALL_NS = 4_000_000, 10_000_000
_CALL_NS_WITHOUT_GIL = 8_000_000, 20_000_000
# Beside several threads that compute the GIL comes back after several switch intervals. Ctrl-C waits as long as a call.
_LONGEST_CALL_NS = 64_000_000
_LARGEST_CHUNK_WITHOUT_GIL = 1024 * MIB


class ChunkSize:
    """Size of the next chunk of one thread, such that each call takes some milliseconds of its CPU time.

    Args:
        on_disk: the pages come from a file on a disk.
        threads: number of threads that populate.
        vectors: chunks of more than LONG bytes are populated by a vector of ranges.
    """

    __slots__ = ("_call_ns", "_cpu_ns", "_growth", "_largest", "_on_disk", "_sleeps", "_threads", "_wall_ns", "size")

    def __init__(self, *, on_disk: bool, threads: int = 1, vectors: bool = False) -> None:
        self.size = FIRST_CHUNK_OF_A_DISK if on_disk else FIRST_CHUNK
        self._call_ns = _call_ns(_VECTOR_CALL_NS, threads) if vectors else _CALL_NS
        self._largest, self._growth = (_LARGEST_VECTOR, 8) if vectors else (LARGEST_CHUNK, 2)
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
        shortest, longest = self._call_ns
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
            shortest, longest = _call_ns((max(at, waited_ns) for at in _CALL_NS_WITHOUT_GIL), self._threads)
            # At once, since each step on the way would wait as long.
            while 2 * cpu_ns < shortest and self.size < _LARGEST_CHUNK_WITHOUT_GIL:
                self.size, cpu_ns = 2 * self.size, 2 * cpu_ns
            if cpu_ns <= longest:
                return
        if cpu_ns > longest:
            self.size = max(self.size // 2, SMALLEST_CHUNK)
        elif cpu_ns < shortest:
            times = max(2, min(self._growth, 1 << (shortest // max(cpu_ns, 1)).bit_length() - 1))
            self.size = max(self.size, min(self.size * times, self._largest))

    def _slept(self) -> bool:
        """Return whether this thread gave up its CPU since the last call by itself; being preempted does not count."""
        before, self._sleeps = self._sleeps, getrusage(RUSAGE_THREAD).ru_nvcsw
        return self._sleeps > before


def _call_ns(wanted: Iterable[int], threads: int) -> tuple[int, int]:
    """Return the shortest and the longest time of a call, of those wanted for all threads together."""
    shortest, longest = (max(least, both // threads) for least, both in zip(_CALL_NS, wanted, strict=True))
    return shortest, longest
