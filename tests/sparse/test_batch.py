"""populate_many and discard_many: the same as one by one, and all or nothing over all ranges."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault._kernel import mman
from prefault._kernel.fiemap import fiemap
from prefault._system import hugetlb
from prefault.memory.backings import TemporaryFile
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB
from prefault.sparse import SparseMemory
from prefault.testing import without
from support import needs, oracle
from support.children import in_child
from support.sparse import KINDS, PAGE, SparseKind, present_blocks
from support.userfaultfd import UffdFeature, opened

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
both = pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
ways = pytest.mark.parametrize("missing", [(), ("process_madvise",), ("pagemap_scan",), ("madv_populate",)], ids=str)


@pytest.fixture(autouse=True)
def _no_leaks(no_leaks: None) -> None:
    """Every test gives back what it takes."""


@kinds
@ways
def test_populate_many_equals_populate_one_by_one(kind: SparseKind, missing: tuple[str, ...], tmp_path: Path) -> None:
    rng = random.Random(2)
    count = 3000
    unpopulated: Any = "fault"
    with kind.make(count * PAGE, tmp_path, unpopulated=unpopulated) as memory, without(*missing):
        memory.populate(0, 3 * PAGE, access="write")
        memory.write(0, b"kept")
        chosen = rng.sample(range(count), 1200)
        result = memory.populate_many([(at * PAGE, PAGE) for at in chosen], access="write")
        model = {0, 1, 2, *chosen}
        assert present_blocks(memory) == sorted(model)
        assert result.bytes == len(set(chosen) - {0, 1, 2}) * PAGE
        assert result.present_bytes == len({0, 1, 2} & set(chosen)) * PAGE
        assert memory.populated.length == len(model) * PAGE
        assert memory.read(0, 4) == b"kept"
        # It is writable for certain: no fault comes any more.
        view = memory.view()
        for at in chosen[:50]:
            view[at * PAGE] = 1
        del view
        gone = rng.sample(sorted(model), 700)
        discarded = memory.discard_many([(at * PAGE, PAGE) for at in gone])
        assert discarded.bytes == 700 * PAGE
        assert discarded.freed_bytes in (700 * PAGE, None)
        assert present_blocks(memory) == sorted(model - set(gone))
        if kind.is_memory_file:
            assert memory.fd is not None
            assert os.fstat(memory.fd).st_blocks * 512 == (len(model) - 700) * PAGE


@both
def test_ranges_are_merged_and_rounded(unpopulated: Any) -> None:
    block = 4 * PAGE
    with SparseMemory(64 * block, block=block, unpopulated=unpopulated) as memory:
        ranges: Any = [(5 * block + 7, 1), (5 * block, block), (6 * block - 1, 2), (20 * block, 0)]
        assert memory.populate_many(ranges).bytes == 2 * block
        assert present_blocks(memory) == [5, 6]
        # Merged first: two halves are a whole block.
        assert memory.discard_many([(5 * block, block // 2), (5 * block + block // 2, block)]).bytes == block
        assert present_blocks(memory) == [6]
        assert memory.populate_many(RangeSet([PageRange(0, block)])).bytes == block
        assert memory.populate_many(numpy.array([[0, 64 * block]])).bytes == 62 * block
        assert memory.discard_many(iter([(0, 64 * block)])).bytes == 64 * block
        for nothing in ([], [(3, 0)], numpy.empty((0, 2), int)):
            assert (memory.populate_many(nothing).bytes, memory.discard_many(nothing).bytes) == (0, 0)
        assert present_blocks(memory) == []


@both
def test_a_bad_range_changes_nothing(unpopulated: Any) -> None:
    with SparseMemory(64 * PAGE, unpopulated=unpopulated) as memory:
        memory.populate(PAGE, PAGE)
        ranges = [(at % 64 * PAGE, PAGE) for at in range(1_000_000)]
        ranges[500_000] = (64 * PAGE, 1)
        for call in (memory.populate_many, memory.discard_many):
            with pytest.raises(ValueError, match="range 500000, "):
                call(ranges)
        with pytest.raises(ValueError, match="access is"):
            memory.populate_many([(0, 1)], access="rw")  # type: ignore[arg-type]
        assert present_blocks(memory) == [1]


def test_populate_many_readable() -> None:
    with SparseMemory(64 * PAGE) as memory:
        assert memory.populate_many([(PAGE, PAGE), (9 * PAGE, PAGE)], access="read").access == "read"
        assert prefault.residency(memory).allocated_bytes == 0  # the zero page
        assert memory.populate_many([(PAGE, PAGE)], access="write").bytes == PAGE
        assert prefault.residency(memory).allocated_bytes == PAGE


def test_large_ranges_are_cut() -> None:
    with SparseMemory("128 MiB", huge="never") as memory:
        result = memory.populate_many([(MIB, 20 * MIB), (64 * MIB + 3, 50 * MIB)])
        assert result.bytes == 70 * MIB + PAGE
        assert oracle.present_bytes(memory.range.start, len(memory)) == 70 * MIB + PAGE


# --- all or nothing


def _fails(memory: SparseMemory, ranges: Any, error: type[Exception], page: int, **options: Any) -> prefault.PopulateError:
    """It fails at a page, and nothing else has changed."""
    before = present_blocks(memory)
    content = {at: memory.read(at * memory.block, memory.block) for at in before}
    blocks = None if memory.fd is None else os.fstat(memory.fd).st_blocks
    with pytest.raises(prefault.PopulateError) as caught:
        memory.populate_many(ranges, headroom="ignore", **options)
    assert type(caught.value) is error, caught.value
    assert caught.value.offset == page * memory.page_size
    assert caught.value.address == memory.range.start + caught.value.offset
    assert caught.value.populated_bytes == 0
    assert present_blocks(memory) == before
    assert {at: memory.read(at * memory.block, memory.block) for at in before} == content
    if memory.fd is not None:
        assert os.fstat(memory.fd).st_blocks == blocks
    return caught.value


@both
@ways
def test_tmpfs_full_in_the_middle(unpopulated: Any, missing: tuple[str, ...], small_tmpfs: Callable[[str], Path]) -> None:
    backing = TemporaryFile(small_tmpfs("8m"))
    with SparseMemory(8192 * PAGE, backing=backing, unpopulated=unpopulated) as memory, without(*missing):
        memory.populate_many([(8 * PAGE, PAGE), (100 * PAGE, PAGE)])
        memory.write(100 * PAGE, b"kept")
        ranges = [(at * PAGE, PAGE) for at in range(0, 8192, 2)]  # 2048 pages fit, and 8 and 100 are there
        error = _fails(memory, ranges, prefault.BackingFullError, 4096)
        assert "in one of 4096 ranges" in str(error)
        assert "discarded again" in str(error)
        memory.populate_many(ranges[:2000])


@both
def test_another_process_keeps_its_pages(unpopulated: Any, small_tmpfs: Callable[[str], Path]) -> None:
    with SparseMemory(64 * PAGE, backing=TemporaryFile(small_tmpfs("64k")), unpopulated=unpopulated) as memory:
        assert memory.fd is not None
        os.pwrite(memory.fd, b"x", 2 * PAGE)
        os.pwrite(memory.fd, bytes(PAGE), 6 * PAGE)  # zeros, but in memory before: another user's
        _fails(memory, [(at * PAGE, PAGE) for at in range(0, 64, 2)], prefault.BackingFullError, 32)
        assert os.pread(memory.fd, 1, 2 * PAGE) == b"x"
        assert os.fstat(memory.fd).st_blocks * 512 == 2 * PAGE


@both
@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
def test_hugetlb_empty_in_the_middle(unpopulated: Any, backing: str, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(3)
    with SparseMemory("64 MiB", backing=backing, unpopulated=unpopulated) as memory:
        huge = memory.page_size
        memory.populate(3 * huge, huge)
        memory.write(3 * huge, b"kept")
        before = hugetlb.read_pool(huge).free
        _fails(memory, [(at * huge, huge) for at in range(1, 20, 2)], prefault.BackingFullError, 7)
        assert hugetlb.read_pool(huge).free == before == 2
        memory.populate_many([(0, huge), (2 * huge, huge)])


def test_a_poisoned_page_in_the_middle() -> None:
    def poisoned() -> list[int]:
        with SparseMemory(4096 * PAGE, huge="never") as memory:
            uffd = opened(UffdFeature.POISON)
            try:
                uffd.register(memory.range.start + 2998 * PAGE, 4 * PAGE)
                uffd.poison(memory.range.start + 3000 * PAGE)
                memory.populate(10 * PAGE, PAGE)
                ranges = [(at * PAGE, PAGE) for at in range(0, 2998, 2)] + [(3000 * PAGE, PAGE)]
                with pytest.raises(prefault.PoisonedPageError) as caught:
                    memory.populate_many(ranges)
                assert caught.value.offset == 3000 * PAGE
                found = present_blocks(memory)
                memory.populate_many(ranges[:-1])
            finally:
                uffd.close()
            return found

    with opened(UffdFeature.POISON):  # or a skip
        pass
    assert in_child(poisoned) == [10]


def test_a_hole_in_the_middle() -> None:
    with SparseMemory(4096 * PAGE, huge="never") as memory:
        hole = memory.range.start + 2000 * PAGE
        mman.munmap(hole, PAGE)  # a mistake of the caller's
        ranges = [(at * PAGE, PAGE) for at in range(0, 4096, 2)]
        with pytest.raises(prefault.HoleError) as caught:
            memory.populate_many(ranges)
        assert caught.value.offset == 2000 * PAGE
        assert not oracle.present_bytes(memory.range.start, 2000 * PAGE)
        memory.populate_many(ranges[:1000])
        mman.mmap(hole, PAGE, 3, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED)


def test_a_hole_in_a_large_range() -> None:
    with SparseMemory("64 MiB", huge="never") as memory:
        hole = memory.range.start + 33 * MIB + 5 * PAGE
        mman.munmap(hole, PAGE)
        memory.populate(33 * MIB, PAGE)
        with pytest.raises(prefault.HoleError) as caught:
            memory.populate_many([(0, MIB), (2 * MIB, 60 * MIB)])
        assert caught.value.offset == 33 * MIB + 5 * PAGE
        assert memory.populated == RangeSet([PageRange(33 * MIB, 33 * MIB + PAGE)])
        mman.mmap(hole, PAGE, 3, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED)


def test_the_disk_gets_its_holes_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 4096 * PAGE)
    with SparseMemory(None, backing=prefault.File(path)) as memory:
        hole = memory.range.start + 3000 * PAGE
        mman.munmap(hole, PAGE)
        with pytest.raises(prefault.HoleError):
            memory.populate_many([(at * PAGE, PAGE) for at in range(0, 4096, 8)])
        # Not st_blocks: an extent tree that has grown keeps a block or two.
        assert _extents(path) == []
        memory.populate_many([(at * PAGE, PAGE) for at in range(0, 2048, 8)])
        if not _extents(path):
            needs.missing("the file system has no fallocate")
        assert path.stat().st_blocks * 512 >= 256 * PAGE
        mman.mmap(hole, PAGE, 1, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED)


def _extents(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return list(fiemap(file.fileno(), 0, path.stat().st_size, 1000))


def _assert_protected(memory: SparseMemory) -> None:
    """Check that blocks without a page are protected."""
    if memory._guard.protection is None:
        return
    there = set(present_blocks(memory))
    runs = memory._guard.protection.unprotected
    assert {at // PAGE for low, high in runs for at in range(low, high, PAGE)} == there


@contextmanager
def _interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Ctrl-C during a certain call of a function of the kernel."""
    real, count = getattr(mman, name), [0]

    def interrupting(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mman, name, interrupting)
        yield


@both
@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_between_vectors(unpopulated: Any, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needs.capability(prefault._system.capabilities.PROCESS_MADVISE)
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    with SparseMemory(16384 * PAGE, unpopulated=unpopulated, huge="never") as memory:
        memory.populate(8000 * PAGE, 2 * PAGE)
        memory.write(8000 * PAGE, b"kept")
        ranges = [(at * PAGE, PAGE) for at in range(0, 16384, 2)]
        with _interrupted_at(call, monkeypatch, "process_madvise_vector"), pytest.raises(KeyboardInterrupt):
            memory.populate_many(ranges)
        assert present_blocks(memory) == [8000, 8001]
        assert memory.read(8000 * PAGE, 4) == b"kept"
        assert not memory._guard.operations
        memory.populate_many(ranges)
        with _interrupted_at(call, monkeypatch, "process_madvise_vector"), suppress(KeyboardInterrupt):
            memory.discard_many(ranges)  # which may be done before that many calls
        _assert_protected(memory)
        memory.discard_many(ranges)
        assert present_blocks(memory) == [8001]


def test_without_pagemap_populating_is_refused() -> None:
    with SparseMemory(64 * PAGE) as memory, without("pagemap", "pagemap_scan"):
        with pytest.raises(prefault.PopulateError, match="rollback is not possible") as caught:
            memory.populate_many([(0, PAGE)])
        assert caught.value.errno == errno.EOPNOTSUPP


def test_a_signal_without_an_exception_changes_nothing() -> None:
    count = [0]

    def handler(*_: object) -> None:
        count[0] += 1

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with SparseMemory("512 MiB", huge="never", backing="memfd") as memory:
            ranges = [(at * PAGE, PAGE) for at in range(0, 60_000, 3)]
            assert memory.populate_many(ranges).bytes == 20_000 * PAGE
            assert memory.discard_many(ranges).bytes == 20_000 * PAGE
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count[0]
