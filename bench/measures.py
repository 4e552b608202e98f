"""Measure the populate call against the bare system call in C, in the same process, alternating.

``make bench-measures`` prints a table in Markdown for docs/results/measures.md. It asserts nothing: the reader judges the
figures.
"""

from __future__ import annotations

import argparse
import compileall
import ctypes
import mmap
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import prefault
from prefault.sizes import GIB

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the report."""

    name: str
    figure: str
    demand: str
    detail: str


@contextmanager
def native() -> Iterator[ctypes.CDLL]:
    """Compile bench/native.c and load it as a library."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "native.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, _HERE / "native.c"], check=True)
        loaded = ctypes.CDLL(str(library))
        for name in ("populate", "touch", "populate_alternating", "discard_each", "read_pagemap", "scan"):
            function = getattr(loaded, f"{name}_ns")
            function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
            function.restype = ctypes.c_int64
        yield loaded


def alternate(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Return the results of both, called in the order A B B A A B B A ..., after one round that does not count."""
    first(), second()
    a: list[float] = []
    b: list[float] = []
    for round_ in range(rounds):
        for one, results in ((first, a), (second, b)) if round_ % 2 else ((second, b), (first, a)):
            results.append(one())
    return a, b


def against_c(
    length: int, *, huge: bool, threads: int | None, rounds: int, library: ctypes.CDLL
) -> tuple[list[float], list[float]]:
    """Return nanoseconds of the C call and of ``prefault.populate``, on the same empty private anonymous memory."""
    with prefault.Mapping(length, huge="advise" if huge else "never") as mapping:
        start = mapping.range.start

        def in_c() -> float:
            prefault.discard(mapping)
            return float(library.populate_ns(start, length))

        def ours() -> float:
            prefault.discard(mapping)
            began = time.perf_counter_ns()
            result = prefault.populate(mapping, threads=threads)
            took = time.perf_counter_ns() - began
            assert result.bytes == length
            return float(took)

        return alternate(in_c, ours, rounds)


def large_ranges(library: ctypes.CDLL, rounds: int) -> Iterator[Measure]:
    for huge, demand in ((False, "at most 1.03x"), (True, "at most 1.05x")):
        for threads in (1, None):
            c, ours = against_c(GIB, huge=huge, threads=threads, rounds=rounds, library=library)
            best, middle = min(ours) / min(c), statistics.median(ours) / statistics.median(c)
            yield Measure(
                f"1 GiB private anonymous, {'2 MiB' if huge else '4 KiB'} pages, threads={threads or 'default'}, against C",
                f"{best:.3f}x best, {middle:.3f}x median",
                demand,
                f"C {min(c) / 1e6:.1f} ms best, {statistics.median(c) / 1e6:.1f} median;"
                f" prefault {min(ours) / 1e6:.1f} and {statistics.median(ours) / 1e6:.1f}; {rounds} of each",
            )


def one_page(library: ctypes.CDLL, rounds: int) -> Iterator[Measure]:
    c, ours = against_c(prefault.PAGE_SIZE, huge=False, threads=None, rounds=rounds, library=library)
    more = [o - n for o, n in zip(sorted(ours), sorted(c), strict=True)]
    yield Measure(
        "one page of a Mapping, more than C",
        f"{(min(ours) - min(c)) / 1e3:.1f} us best, {(statistics.median(ours) - statistics.median(c)) / 1e3:.1f} us median",
        "at most 15 us",
        f"C {min(c) / 1e3:.2f} us best, {statistics.median(c) / 1e3:.2f} median; 90th percentile of the difference"
        f" {more[len(more) * 9 // 10] / 1e3:.1f} us; {rounds} of each",
    )
    array = bytearray(1 << 20)
    times = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        prefault.populate(array, length=1)
        times.append(time.perf_counter_ns() - began)
    yield Measure(
        "one page of a bytearray that is populated already",
        f"{min(times) / 1e3:.1f} us best, {statistics.median(times) / 1e3:.1f} us median",
        "(none)",
        f"{rounds} calls",
    )


def shared_memory(library: ctypes.CDLL, rounds: int) -> Iterator[Measure]:
    """Populate a new SharedMemory of 4 GiB by default, against writing a byte of each of its pages in C."""

    def fresh(work: Callable[[SharedMemory, int], object]) -> Callable[[], float]:
        def once() -> float:
            memory = SharedMemory(create=True, size=4 * GIB)
            try:
                assert memory.buf is not None
                address = ctypes.addressof(ctypes.c_char.from_buffer(memory.buf))
                began = time.perf_counter_ns()
                work(memory, address)
                return float(time.perf_counter_ns() - began)
            finally:
                memory.close()
                memory.unlink()

        return once

    touch = fresh(lambda memory, address: library.touch_ns(address, memory.size))
    touched, ours = alternate(touch, fresh(lambda memory, _: prefault.populate(memory)), rounds)
    best, middle = min(touched) / min(ours), statistics.median(touched) / statistics.median(ours)
    yield Measure(
        "SharedMemory of 4 GiB, threads=default: times faster than touching it in C",
        f"{best:.2f}x best, {middle:.2f}x median",
        "2.2x",
        f"touching {min(touched) / 1e6:.0f} ms best, {statistics.median(touched) / 1e6:.0f} median;"
        f" prefault {min(ours) / 1e6:.0f} and {statistics.median(ours) / 1e6:.0f}; {rounds} of each",
    )


class Stalls:
    """A thread that reads the clock in a loop, and keeps the longest time between two reads."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._stop = False
        self.longest_ns = 0
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        last = time.perf_counter_ns()
        while not self._stop:
            self._action()
            time.sleep(0.0005)
            now = time.perf_counter_ns()
            self.longest_ns = max(self.longest_ns, now - last)
            last = now

    def __enter__(self) -> Stalls:
        self._thread.start()
        time.sleep(0.05)
        self.longest_ns = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()


def map_and_unmap() -> None:
    """Map and unmap 1 MiB, as malloc and free of a large block do: both take the mmap lock for writing."""
    mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


_IN_ANOTHER_PROCESS = "import prefault; prefault.populate(prefault.Mapping(4 << 30, huge='never'), threads=1)"


def stalls(rounds: int) -> Iterator[Measure]:
    size = 4 * GIB
    # The control: stalls by the machine itself, where populate can hold neither the GIL nor the mmap lock of the thread.
    controls: tuple[tuple[str, Callable[[], object]], ...] = (
        ("nothing happens for 2 s", lambda: time.sleep(2)),
        (
            "another process populates 4 GiB",
            lambda: subprocess.run([sys.executable, "-c", _IN_ANOTHER_PROCESS], check=True),
        ),
    )
    for name, control in controls:
        longest = []
        for _ in range(rounds):
            with Stalls(lambda: None) as other:
                control()
            longest.append(other.longest_ns / 1e6)
        yield Measure(
            f"longest stall of a thread while {name}",
            f"{statistics.median(longest):.1f} ms median, {max(longest):.1f} worst",
            "(none: the control)",
            f"{rounds} runs",
        )
    for name, action in (("that computes", lambda: None), ("that maps and unmaps memory", map_and_unmap)):
        for threads in (1, None):
            longest = []
            for _ in range(rounds):
                with prefault.Mapping(size, huge="never") as mapping, Stalls(action) as other:
                    prefault.populate(mapping, threads=threads)
                longest.append(other.longest_ns / 1e6)
            yield Measure(
                f"longest stall of another thread {name}, 4 GiB populated, threads={threads or 'default'}",
                f"{statistics.median(longest):.1f} ms median, {max(longest):.1f} worst",
                "at most 25 ms",
                f"{rounds} runs",
            )
    longest = []
    for _ in range(max(2, rounds // 2)):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        with Stalls(lambda: None) as other:
            memory.madvise(23)
        longest.append(other.longest_ns / 1e6)
        memory.close()
    yield Measure("the same, that computes, with mmap.madvise(23)", f"{statistics.median(longest):.0f} ms", "(none)", "")


_INTERRUPTED = """
import signal, sys, time, prefault
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this program was started in the background
mapping = prefault.Mapping(4 << 30, huge="never")
print("ready", flush=True)
try:
    prefault.populate(mapping, threads=int(sys.argv[1]) or None)
except KeyboardInterrupt as interruption:
    print(time.clock_gettime_ns(time.CLOCK_MONOTONIC), interruption, flush=True)
else:
    print(0, "finished before the signal", flush=True)
"""


def interrupts(rounds: int) -> Iterator[Measure]:
    for threads in (1, 0):
        delays, ends, said = [], [], ""
        for _ in range(rounds):
            child = subprocess.Popen([sys.executable, "-c", _INTERRUPTED, str(threads)], stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.3)
            sent = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            os.kill(child.pid, signal.SIGINT)
            at, _, said = child.stdout.readline().partition(" ")
            child.wait()
            ends.append((time.clock_gettime_ns(time.CLOCK_MONOTONIC) - sent) / 1e6)
            if int(at):
                delays.append((int(at) - sent) / 1e6)
        yield Measure(
            f"Ctrl-C while 4 GiB are populated, threads={threads or 'default'}: until the exception is there",
            f"{statistics.median(delays):.1f} ms median, {max(delays):.1f} worst",
            "at most 100 ms",
            f"{len(delays)} of {rounds} runs; with the exit of the process, which frees the memory:"
            f" {statistics.median(ends):.0f} ms; it says: {said.strip()!r}",
        )


def import_time(rounds: int) -> Iterator[Measure]:
    def run(code: str) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter_ns()
            subprocess.run([sys.executable, "-c", code], check=True)
            return time.perf_counter_ns() - began

        return once

    # An installer compiles bytecode too; some environments never write it (PYTHONDONTWRITEBYTECODE).
    compileall.compile_dir(Path(prefault.__file__).parent, quiet=1)
    empty, ours = alternate(run("pass"), run("import prefault"), rounds)
    yield Measure(
        "import prefault, more than python -c pass",
        f"{(min(ours) - min(empty)) / 1e6:.1f} ms best,"
        f" {(statistics.median(ours) - statistics.median(empty)) / 1e6:.1f} median",
        "at most 40 ms",
        f"{rounds} of each",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["large", "page", "shared", "stalls", "interrupts", "import"])
    options = parser.parse_args()
    rounds = options.rounds
    with prefault.Mapping(5 * GIB) as warm:  # afterwards the host has backed this memory: its own page faults are over
        prefault.populate(warm)
    cpus = len(os.sched_getaffinity(0))
    print(f"{date.today()}, Linux {platform.release()}, {cpus} CPUs, Python {platform.python_version()}\n")
    print("| measure | figure | demand | detail |\n|---|---|---|---|")
    with native() as library:
        parts: dict[str, Callable[[], Iterator[Measure]]] = {
            "large": lambda: large_ranges(library, rounds),
            "page": lambda: one_page(library, 200 * rounds),
            "shared": lambda: shared_memory(library, max(3, rounds // 3)),
            "stalls": lambda: stalls(max(3, rounds // 3)),
            "interrupts": lambda: interrupts(max(3, rounds // 3)),
            "import": lambda: import_time(2 * rounds),
        }
        for name, part in parts.items():
            if options.only in (None, name):
                for row in part():
                    print(f"| {row.name} | {row.figure} | {row.demand} | {row.detail} |", flush=True)


if __name__ == "__main__":
    main()
