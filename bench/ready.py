"""Measure how fast memory is made ready: shared memory with a name, and private arrays, against the ways that users have.

    python bench/ready.py [--size "4 GiB"] [--rounds 7] [--quick]

Prints tables in Markdown for docs/results, and asserts nothing: the reader judges the figures. The ways take turns, and the
first round, in which the host may still have to give memory, is not counted. Freeing is not measured. As root it runs in a
mount namespace of its own, whose /dev/shm allows huge pages (huge=advise); without, the row that needs them is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from multiprocessing import shared_memory
from typing import Any, NamedTuple

import numpy

import prefault
from prefault.shared_memory import nameless_files
from prefault.sizes import PAGE_SIZE

_INSIDE = "--in-a-namespace"
_POPULATE_WRITE = 23

Release = Callable[[], object]


class Way(NamedTuple):
    """One way to have ready memory: ``make(bytes)`` is timed and returns what frees it."""

    name: str
    make: Callable[[int], Release]
    demand: str = ""


# --- shared memory with a name


def _unlink(memory: shared_memory.SharedMemory) -> Release:
    def release() -> None:
        gc.collect()
        memory.close()
        memory.unlink()

    return release


def standard_touched(size: int) -> Release:
    memory = shared_memory.SharedMemory(create=True, size=size)
    assert memory.buf is not None
    view = numpy.frombuffer(memory.buf, "uint8")
    view[::PAGE_SIZE] = 0
    del view
    return _unlink(memory)


def standard_filled(size: int) -> Release:
    memory = shared_memory.SharedMemory(create=True, size=size)
    assert memory.buf is not None
    view = numpy.frombuffer(memory.buf, "uint8")
    view[:] = 0
    del view
    return _unlink(memory)


def ours(**options: Any) -> Callable[[int], Release]:
    return lambda size: _unlink(prefault.SharedMemory(create=True, size=size, **options))


# --- private arrays


def _array(make: Callable[[int], Any]) -> Callable[[int], Release]:
    def timed(size: int) -> Release:
        kept = [make(size)]
        return kept.clear

    return timed


def _touched(array: Any) -> Any:
    array[::PAGE_SIZE] = 0
    return array


def _by_hand(size: int, *, huge: bool) -> mmap.mmap:
    """Map, advise and populate in one call, as engines do; aligned by the kernel."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(_POPULATE_WRITE)
    return memory


def _ctypes_filled(size: int) -> Any:
    array = numpy.empty(size, "uint8")
    ctypes.memset(array.ctypes.data, 0, size)
    return array


# --- measuring


def measure(ways: list[Way], size: int, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways if number % 2 else reversed(ways):
            began = time.perf_counter()
            release = way.make(size)
            seconds = time.perf_counter() - began
            release()
            if number:
                times[way.name].append(seconds)
    return times


def table(ways: list[Way], times: dict[str, list[float]], size: int, reference: str) -> str:
    base = statistics.median(times[reference])
    lines = [f"| way | best s | median s | GB/s | times as fast as {reference} | demand |", "|---|--:|--:|--:|--:|--:|"]
    for way in ways:
        seconds = times[way.name]
        middle = statistics.median(seconds)
        figures = f"{min(seconds):.3f} | {middle:.3f} | {size / middle / 1e9:.1f} | {base / middle:.2f}"
        lines.append(f"| {way.name} | {figures} | {way.demand} |")
    return "\n".join(lines)


def _allows_huge_pages() -> bool:
    fd = nameless_files.create_nameless()
    if fd is None:
        return False
    try:
        return nameless_files.huge_option(fd) in ("advise", "within_size", "always")
    finally:
        os.close(fd)


def _enter_a_namespace(size: int) -> None:
    """Run this program again, with a /dev/shm that has room for the size and allows huge pages."""
    mount = f'mount -t tmpfs -o size={size + size // 8},huge=advise prefault-bench /dev/shm && exec "$@"'
    os.execvp(
        "unshare",
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh", sys.executable, *sys.argv, _INSIDE],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast memory is made ready.")
    parser.add_argument("--size", default="4 GiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="256 MiB, three rounds")
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS, dest="inside")
    options = parser.parse_args()
    size, rounds = prefault.parse_size("256 MiB" if options.quick else options.size), 3 if options.quick else options.rounds
    if os.geteuid() == 0 and not options.inside:
        _enter_a_namespace(size)

    print(f"{date.today()}, Linux {platform.release()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f},", end=" ")
    print(f"Python {platform.python_version()}, numpy {numpy.__version__};", end=" ")
    print(f"{prefault.format_size(size)}, {rounds} rounds, alternating\n")

    shared = [
        Way("SharedMemory + touching", standard_touched),
        Way("SharedMemory + filling", standard_filled),
        Way("prefault.SharedMemory, one thread", ours(threads=1)),
        Way("prefault.SharedMemory", ours(), "2.2"),
        Way("prefault.SharedMemory(populate=False)", ours(populate=False)),
    ]
    if _allows_huge_pages():
        shared.append(Way('prefault.SharedMemory(huge="advise")', ours(huge="advise"), "15"))
    print(f"Shared memory:\n\n{table(shared, measure(shared, size, rounds), size, shared[0].name)}\n")

    users = [
        Way("numpy.empty + touching", _array(lambda n: _touched(numpy.empty(n, "uint8")))),
        Way("numpy.zeros + touching", _array(lambda n: _touched(numpy.zeros(n, "uint8")))),
        Way("numpy.empty + memset", _array(_ctypes_filled)),
        Way("numpy.ones", _array(lambda n: numpy.ones(n, "uint8"))),
        Way("numpy.full", _array(lambda n: numpy.full(n, 7, "uint8"))),
        Way("mmap + MADV_POPULATE_WRITE", _array(lambda n: _by_hand(n, huge=False))),
        Way("mmap + MADV_HUGEPAGE + MADV_POPULATE_WRITE", _array(lambda n: _by_hand(n, huge=True))),
    ]
    of_prefault = [
        Way("prefault.empty", _array(lambda n: prefault.empty(n, "uint8")), "1.00"),
        Way('prefault.empty(huge="advise")', _array(lambda n: prefault.empty(n, "uint8", huge="advise"))),
        Way("prefault.full", _array(lambda n: prefault.full(n, 7, "uint8"))),
    ]
    times = measure(users + of_prefault, size, rounds)
    best = min(users, key=lambda way: statistics.median(times[way.name])).name
    print(f"Private arrays; the fastest of the users' ways is {best}:\n\n{table(users + of_prefault, times, size, best)}\n")

    of_full = [*(way for way in users if way.name in ("numpy.ones", "numpy.full")), of_prefault[2]]
    print(f"Arrays that are filled:\n\n{table(of_full, times, size, 'numpy.full')}\n")
    print(f"Load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
