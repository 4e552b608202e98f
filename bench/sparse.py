"""Measure sparse memory. Prints text for docs/results/sparse.md, and asserts nothing: the reader judges the figures.

python bench/sparse.py [many] [scaling] [islands] [protection] [cycles] [huge] [device]
"""

from __future__ import annotations

import functools
import gc
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy

import prefault.device
from measures import alternate
from prefault._kernel import mman
from prefault.drivers import VmPool, VmPoolControl
from prefault.inspection.scan import residency
from prefault.mapping.mapping import HugeAdvice, Mapping
from prefault.sizes import GIB, KIB, MIB, PAGE_SIZE
from prefault.sparse import SparseMemory
from prefault.sparse.sparse_memory import Unpopulated

_UNPOPULATED: tuple[Unpopulated, ...] = ("zeros", "fault")
_HUGE: tuple[HugeAdvice, ...] = ("never", "advise")
_GAP = 3 * PAGE_SIZE
_BLOCK = 2 * MIB


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _median_us(seconds: list[float], count: int = 1) -> str:
    return f"{statistics.median(seconds) / count * 1e6:.2f}"


def _status(key: str) -> int:
    """Return KiB of a line of /proc/self/status."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def _mappings(memory: SparseMemory) -> int:
    start, stop = memory.range.start, memory.range.start + memory.reservation
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(text, 16) for text in line.split()[0].split("-"))
        found += low < stop and high > start
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def many(count: int = 100_000, rounds: int = 7) -> None:
    """Measure populate_many of scattered pages against a Python loop of madvise calls, on fresh memory of the same kind."""
    ranges = numpy.empty((count, 2), numpy.int64)
    ranges[:, 0] = numpy.arange(count, dtype=numpy.int64) * _GAP
    ranges[:, 1] = PAGE_SIZE
    pairs = [(int(offset), int(length)) for offset, length in ranges]
    for backing, unpopulated in itertools.product(("anonymous", "memfd"), _UNPOPULATED):

        def loop(backing: str = backing) -> float:
            with Mapping(count * _GAP, backing=backing, huge="never", noreserve=True) as memory:
                start, madvise, advice = memory.range.start, mman.madvise, mman.MADV_POPULATE_WRITE

                def run() -> None:
                    for offset, length in pairs:
                        madvise(start + offset, length, advice)

                return _seconds(run)

        def ours(backing: str = backing, unpopulated: Unpopulated = unpopulated) -> float:
            with SparseMemory(count * _GAP, backing=backing, huge="never", unpopulated=unpopulated) as memory:
                return _seconds(lambda: memory.populate_many(ranges))

        with _quiet():
            one, other = alternate(loop, ours, rounds)
        print(
            f"{count} pages, every third, {backing}, unpopulated={unpopulated}:"
            f" loop {_median_us(one, count)} us a range (best {min(one) / count * 1e6:.2f}),"
            f" populate_many {_median_us(other, count)} (best {min(other) / count * 1e6:.2f}):"
            f" {statistics.median(one) / statistics.median(other):.2f}x"
            f" (best against best {min(one) / min(other):.2f}x)"
        )


def scaling() -> None:
    """Measure the cost per range, of 1 000 to 1 000 000 ranges."""
    for unpopulated in _UNPOPULATED:
        for count in (1_000, 10_000, 100_000, 1_000_000):
            ranges = numpy.empty((count, 2), numpy.int64)
            ranges[:, 0] = numpy.arange(count, dtype=numpy.int64) * _GAP
            ranges[:, 1] = PAGE_SIZE
            populated, discarded = [], []
            for _ in range(max(3, min(7, 1_000_000 // count))):
                with SparseMemory(count * _GAP, huge="never", unpopulated=unpopulated) as memory, _quiet():
                    populated.append(_seconds(functools.partial(memory.populate_many, ranges)))
                    discarded.append(_seconds(functools.partial(memory.discard_many, ranges)))
            print(
                f"{count} ranges, unpopulated={unpopulated}: populate_many {_median_us(populated, count)} us a range,"
                f" discard_many {_median_us(discarded, count)}"
            )


def islands(count: int = 10_000) -> None:
    """Measure the property ``populated`` of 1 TiB with scattered islands."""
    generator = numpy.random.default_rng(1)
    for unpopulated in _UNPOPULATED:
        with SparseMemory("1 TiB", huge="never", unpopulated=unpopulated) as memory:
            pages = generator.choice(len(memory) // PAGE_SIZE, count, replace=False) * PAGE_SIZE
            ranges = numpy.column_stack((pages, numpy.full(count, PAGE_SIZE)))
            took = _seconds(functools.partial(memory.populate_many, ranges))
            times = [_seconds(functools.partial(getattr, memory, "populated")) for _ in range(9)]
            found = len(memory.populated)
            print(
                f"populated of 1 TiB with {found} islands, unpopulated={unpopulated}:"
                f" {statistics.median(times) * 1e3:.1f} ms (best {min(times) * 1e3:.1f});"
                f" populate_many took {took * 1e3:.0f} ms,"
                f" {_mappings(memory)} mappings, VmPTE {_status('VmPTE')} KiB"
            )


def protection(rounds: int = 2000) -> None:
    """Measure mprotect against guard regions on a block of 2 MiB, and their cost in mappings and page tables."""
    for populate in (False, True):
        with Mapping(GIB, huge="never", noreserve=True) as protected, Mapping(GIB, huge="never", noreserve=True) as guarded:
            a, b = protected.range.start + GIB // 2, guarded.range.start + GIB // 2
            mman.mprotect(protected.range.start, GIB, mman.PROT_NONE)
            mman.madvise(guarded.range.start, GIB, mman.MADV_GUARD_INSTALL)

            def by_protection(at: int = a, populate: bool = populate) -> None:
                mman.mprotect(at, _BLOCK, mman.PROT_READ | mman.PROT_WRITE)
                if populate:
                    mman.madvise(at, _BLOCK, mman.MADV_POPULATE_WRITE)
                    mman.madvise(at, _BLOCK, mman.MADV_DONTNEED)
                mman.mprotect(at, _BLOCK, mman.PROT_NONE)

            def by_guards(at: int = b, populate: bool = populate) -> None:
                mman.madvise(at, _BLOCK, mman.MADV_GUARD_REMOVE)
                if populate:
                    mman.madvise(at, _BLOCK, mman.MADV_POPULATE_WRITE)
                mman.madvise(at, _BLOCK, mman.MADV_GUARD_INSTALL)

            count = rounds // 10 if populate else rounds

            def repeated(call: Callable[[], None], count: int = count) -> float:
                def all_of_them() -> None:
                    for _ in range(count):
                        call()

                return _seconds(all_of_them) / count * 1e6

            one, other = alternate(lambda: repeated(by_protection), lambda: repeated(by_guards), 5)
            what = "open, populate, discard and shut" if populate else "open and shut"
            print(f"{what} 2 MiB: mprotect {statistics.median(one):.1f} us, guards {statistics.median(other):.1f} us")
    for size, scattered in ((GIB, 256), (64 * GIB, 4096)):
        for name, block in (("extents are blocks", _BLOCK), ("blocks of 64 KiB", 64 * KIB)):
            before = _status("VmPTE")
            with SparseMemory(size, huge="never", unpopulated="fault", block=block) as memory:
                memory.populate_many([(at * (size // scattered), PAGE_SIZE) for at in range(scattered)])
                print(
                    f"{scattered} blocks open in {size // GIB} GiB, {name}: {_mappings(memory)} mappings,"
                    f" VmPTE {_status('VmPTE') - before} KiB"
                )


def cycles(count: int = 2000) -> None:
    """Measure populate and discard of one 2 MiB block."""
    for unpopulated in _UNPOPULATED:
        for huge in _HUGE:
            with SparseMemory("1 TiB", huge=huge, unpopulated=unpopulated, block=_BLOCK) as memory:

                def run(memory: SparseMemory = memory) -> None:
                    memory.populate(64 * _BLOCK, _BLOCK)
                    memory.discard(64 * _BLOCK, _BLOCK)

                took = [_seconds(run) for _ in range(count)]
                start = memory.range.start + 64 * _BLOCK

                def bare(start: int = start) -> None:
                    mman.madvise(start, _BLOCK, mman.MADV_POPULATE_WRITE)
                    mman.madvise(start, _BLOCK, mman.MADV_DONTNEED)

                mman.mprotect(start, _BLOCK, mman.PROT_READ | mman.PROT_WRITE)
                alone = [_seconds(bare) for _ in range(count)]
                print(
                    f"populate + discard 2 MiB, unpopulated={unpopulated}, huge={huge}: {_median_us(took)} us,"
                    f" the two bare calls {_median_us(alone)} us"
                )


def huge() -> None:
    """Count transparent huge pages in memory with guard regions."""
    with SparseMemory("1 TiB", huge="advise", unpopulated="fault", block=_BLOCK) as memory:
        for block in (10, 30, 20):  # block 20 lies between the others, where guard regions are
            memory.populate(block * _BLOCK, _BLOCK)
        for block in (10, 20, 30):
            found = residency(memory, offset=block * _BLOCK, length=_BLOCK)
            print(f"block {block}: {(found.huge_bytes or 0) // KIB} KiB of huge pages")


def device(rounds: int = 400) -> None:
    """Measure plug and unplug of one 2 MiB block of a device against one of a memfd, in turn."""
    for unpopulated in _UNPOPULATED:
        with (
            prefault.device.open(VmPool("64 MiB", address_space="1 TiB")) as client,
            VmPoolControl(client).create("machine", "512 GiB", unpopulated=unpopulated) as of_device,
            SparseMemory("512 GiB", backing="memfd", block=_BLOCK, huge="never", unpopulated=unpopulated) as of_memfd,
        ):
            frames = "shmem, collapsed" if client.notes else "hugetlb"
            for verb in ("plug", "unplug", "plug + unplug"):
                ours, theirs = alternate(
                    functools.partial(_one, of_device, verb), functools.partial(_one, of_memfd, verb), rounds
                )
                ratio = statistics.median(ours) / statistics.median(theirs)
                print(
                    f"{verb} of 2 MiB, unpopulated={unpopulated}: device ({frames}) {_median_us(ours)} us, memfd"
                    f" {_median_us(theirs)} us: {ratio:.2f}x (best against best {min(ours) / min(theirs):.2f}x)"
                )


def _one(memory: SparseMemory, verb: str) -> float:
    """Return the seconds of a plug, an unplug or both, of a block that is unplugged before and afterwards."""
    began = time.perf_counter()
    memory.populate(64 * _BLOCK, _BLOCK)
    plugged = time.perf_counter()
    memory.discard(64 * _BLOCK, _BLOCK)
    unplugged = time.perf_counter()
    return {"plug": plugged - began, "unplug": unplugged - plugged}.get(verb, unplugged - began)


_MEASURES = {measure.__name__: measure for measure in (many, scaling, islands, protection, cycles, huge, device)}


def main() -> None:
    print(f"{date.today()}, Linux {platform.release()}, Python {platform.python_version()}")
    for name in sys.argv[1:] or _MEASURES:
        _MEASURES[name]()


if __name__ == "__main__":
    main()
