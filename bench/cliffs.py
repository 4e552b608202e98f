"""Measure inputs that could make a call far slower than a simple loop in C, as ratios.

``make bench-cliffs`` prints a table in Markdown for docs/results/cliffs.md. It asserts nothing: the reader judges the
figures.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

import numpy

import prefault
from measures import Measure, alternate, native
from prefault._kernel import mman
from prefault.sizes import GIB, MIB, PAGE_SIZE


def timed(action: Callable[[], object]) -> float:
    """Return how many nanoseconds a call takes."""
    began = time.perf_counter_ns()
    action()
    return float(time.perf_counter_ns() - began)


def row(name: str, loop: list[float], ours: list[float], demand: str, what: str) -> Measure:
    best, middle = min(ours) / min(loop), statistics.median(ours) / statistics.median(loop)
    detail = (
        f"{what} {min(loop) / 1e6:.2f} ms best, {statistics.median(loop) / 1e6:.2f} median;"
        f" prefault {min(ours) / 1e6:.2f} and {statistics.median(ours) / 1e6:.2f}; {len(ours)} of each"
    )
    return Measure(name, f"{best:.2f}x best, {middle:.2f}x median", demand, detail)


def many_mappings(library: ctypes.CDLL, rounds: int) -> Iterator[Measure]:
    for count in (5000, 20000):
        with prefault.Mapping(count * PAGE_SIZE, huge="never") as mapping:
            start = mapping.range.start
            for page in range(1, count, 2):
                mman.mprotect(start + page * PAGE_SIZE, PAGE_SIZE, mman.PROT_READ)

            def in_c(start: int = start, count: int = count) -> float:
                mman.madvise(start, count * PAGE_SIZE, mman.MADV_DONTNEED)
                return float(library.populate_alternating_ns(start, count))

            def ours(mapping: prefault.Mapping = mapping, start: int = start, count: int = count) -> float:
                mman.madvise(start, count * PAGE_SIZE, mman.MADV_DONTNEED)
                return timed(lambda: prefault.populate(mapping))

            def discard_in_c(mapping: prefault.Mapping = mapping, start: int = start, count: int = count) -> float:
                prefault.populate(mapping)
                return float(library.discard_each_ns(start, count))

            def discard(mapping: prefault.Mapping = mapping) -> float:
                prefault.populate(mapping)
                return timed(lambda: prefault.discard(mapping))

            name = f"{count} mappings of one page, in turn writable and not"
            yield row(f"populate {name}", *alternate(in_c, ours, rounds), "at most 3x", "a madvise each, in C")
            yield row(f"discard {name}", *alternate(discard_in_c, discard, rounds), "at most 3x", "a madvise each, in C")


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Run ``count`` threads that compute in Python all the time."""
    stop = False

    def compute() -> None:
        while not stop:
            pass

    threads = [threading.Thread(target=compute) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop = True
        for thread in threads:
            thread.join()


def beside_busy_threads(rounds: int) -> Iterator[Measure]:
    for length in (PAGE_SIZE, 64 * MIB, GIB):
        with prefault.Mapping(length, huge="never") as mapping:
            start = mapping.range.start

            def bare(start: int = start, length: int = length) -> float:
                mman.madvise(start, length, mman.MADV_DONTNEED)
                return timed(lambda: mman.madvise(start, length, mman.MADV_POPULATE_WRITE))

            def ours(mapping: prefault.Mapping = mapping, start: int = start, length: int = length) -> float:
                mman.madvise(start, length, mman.MADV_DONTNEED)
                return timed(lambda: prefault.populate(mapping, threads=1))

            with busy_threads(8):
                results = alternate(bare, ours, rounds)
            name = f"populate {length // PAGE_SIZE} pages beside 8 busy Python threads, threads=1"
            yield row(name, *results, "at most 1.5x", "one madvise that gives up the GIL")


def scattered(library: ctypes.CDLL, rounds: int) -> Iterator[Measure]:
    for name, length, every in (
        ("524 288 pages scattered over 64 GiB", 64 * GIB, 32),
        ("a checkerboard of 8 GiB", 8 * GIB, 2),
    ):
        with prefault.Mapping(length, huge="never", noreserve=True) as mapping:
            mapping.ndarray()[:: every * PAGE_SIZE] = 1
            start = mapping.range.start

            def pagemap(start: int = start, length: int = length) -> float:
                return float(library.read_pagemap_ns(start, length))

            def scan(start: int = start, length: int = length) -> float:
                return float(library.scan_ns(start, length))

            def present(mapping: prefault.Mapping = mapping) -> float:
                return timed(lambda: prefault.residency(mapping).present_bytes)

            def ranges(mapping: prefault.Mapping = mapping) -> float:
                return timed(lambda: prefault.residency(mapping).ranges())

            whole = f"residency of {name}"
            yield row(whole, *alternate(pagemap, present, rounds), "at most 1.5x", "reading pagemap in C")
            yield row(whole, *alternate(scan, present, rounds), "at most 1.5x", "PAGEMAP_SCAN in C")
            yield row(f"{whole}, and its ranges", *alternate(scan, ranges, rounds), "at most 3x", "PAGEMAP_SCAN in C")


def refused() -> Iterator[Measure]:
    for shared in (False, True):
        for tib in (1, 64):
            with prefault.Mapping(tib << 40, shared=shared, noreserve=True, huge="never") as mapping:
                took = []
                for _ in range(3):
                    began = time.perf_counter_ns()
                    try:
                        prefault.populate(mapping)
                    except prefault.HeadroomError:
                        took.append(time.perf_counter_ns() - began)
                kind = "shared" if shared else "private"
                figure = f"{min(took) / 1e6:.0f} ms best, {statistics.median(took) / 1e6:.0f} median"
                yield Measure(f"refuse {tib} TiB of {kind} anonymous memory", figure, "(none)", f"{len(took)} calls")


def cold_files(rounds: int) -> Iterator[Measure]:
    for length in (4 * MIB, 512 * MIB):
        with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
            for _ in range(length // MIB):
                file.write(numpy.random.default_rng().bytes(MIB))
            file.flush()
            os.fsync(file.fileno())

            def cold(advice: int, file: int = file.fileno(), length: int = length) -> float:
                with mmap.mmap(file, length, access=mmap.ACCESS_READ) as memory:
                    memory.madvise(advice)
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                    address = prefault.plan(memory).segments[0].start
                    resident = sum(byte & 1 for byte in mman.mincore(address, length))
                    if resident > 64:
                        raise RuntimeError(f"{resident} pages of the file are still in memory")
                    return timed(lambda: prefault.populate(memory))

            results = alternate(lambda: cold(mmap.MADV_NORMAL), lambda: cold(mmap.MADV_RANDOM), rounds)
            name = f"populate a cold file of {length // MIB} MiB whose mapping was advised MADV_RANDOM"
            yield row(name, *results, "at most 1.1x", "without the advice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["mappings", "busy", "scattered", "refused", "cold"])
    options = parser.parse_args()
    rounds = options.rounds
    cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{date.today()}, Linux {platform.release()}, {cpus} CPUs (load {load:.1f}), Python {platform.python_version()}\n")
    print("| measure | figure | demand | detail |\n|---|---|---|---|")
    with native() as library:
        parts: dict[str, Callable[[], Iterator[Measure]]] = {
            "mappings": lambda: many_mappings(library, rounds),
            "busy": lambda: beside_busy_threads(rounds),
            "scattered": lambda: scattered(library, rounds),
            "refused": refused,
            "cold": lambda: cold_files(rounds),
        }
        for name, part in parts.items():
            if options.only in (None, name):
                for measure in part():
                    print(f"| {measure.name} | {measure.figure} | {measure.demand} | {measure.detail} |", flush=True)


if __name__ == "__main__":
    main()
