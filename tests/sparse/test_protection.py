"""Touching an unpopulated block is a SIGSEGV, tried in children; and the mappings stay few."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  its libraries are mappings
import pytest

import prefault
from prefault._kernel import mman
from prefault.errors import OutOfMemoryError
from prefault.memory.backings import Descriptor, TemporaryFile
from prefault.sizes import GIB, KIB, MIB
from prefault.sparse import SparseMemory
from prefault.sparse.protection import BlockProtection
from prefault.testing import without
from support import needs, oracle
from support.children import in_child
from support.sparse import (
    HUGE_KINDS,
    KINDS,
    PAGE,
    SparseKind,
    faults,
    mappings,
    present_blocks,
    signal_of,
    status_kib,
)

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def _no_leaks(no_leaks: None) -> None:
    """Every test gives back what it takes."""


def _faulting(memory: SparseMemory) -> list[int]:
    """Numbers of the blocks that cannot be read at their first and last byte; no other cannot at either.

    The kernel reads what the protection does not forbid, in this very process. That the others are a SIGSEGV is tried in
    children at a few of them, since a fork takes 5 ms.
    """
    protected: list[int] = []
    accessible: list[int] = []
    for block in range(memory.reservation // memory.block):
        first = _kernel_can_read(memory.range.start + block * memory.block)
        last = _kernel_can_read(memory.range.start + (block + 1) * memory.block - 1)
        assert first == last
        (accessible if first else protected).append(block)
    for block in {*protected[:1], *protected[-1:], *accessible[:1], *accessible[-1:]}:
        at = (block + 1) * memory.block - 1 if block % 2 else block * memory.block
        assert faults(memory, at) == (block in protected)
    return protected


@kinds
@pytest.mark.parametrize("guards", [True, False])
def test_unpopulated_blocks_fault(kind: SparseKind, guards: bool, tmp_path: Path) -> None:
    with without(*(() if guards else ("guard_regions",))):
        memory = kind.make(10 * PAGE, tmp_path, unpopulated="fault", **({} if kind.is_disk else {"reservation": 12 * PAGE}))
    with memory:
        beyond = [10, 11] if not kind.is_disk else []
        every = [*range(10), *beyond]
        assert _faulting(memory) == every
        for block in (2, 7, 4, 5):  # the gaps between them are guards, where there are any
            memory.populate(block * PAGE, PAGE)
        assert _faulting(memory) == [block for block in every if block not in (2, 4, 5, 7)]
        assert mappings(memory) <= (3 if guards else 7)
        assert faults(memory, 3 * PAGE, write=True)
        assert not faults(memory, 4 * PAGE, write=True)
        memory.discard(4 * PAGE, PAGE)  # inside
        assert _faulting(memory) == [block for block in every if block not in (2, 5, 7)]
        memory.discard(7 * PAGE, PAGE)  # at the end
        memory.discard_many([(2 * PAGE, PAGE)])  # at the start
        assert _faulting(memory) == [block for block in every if block != 5]
        memory.populate_many([(9 * PAGE, 1), (1, 1), (6 * PAGE, PAGE)])
        assert _faulting(memory) == [block for block in every if block not in (0, 5, 6, 9)]
        memory.discard()
        assert _faulting(memory) == every
        assert mappings(memory) == 1


@pytest.mark.parametrize("kind", HUGE_KINDS, ids=lambda kind: kind.name)
def test_unpopulated_huge_pages_fault(
    kind: SparseKind, tmp_path: Path, hugetlb_pool: Callable[[int], None]
) -> None:  # fmt: skip
    hugetlb_pool(3)
    with kind.make(8 * kind.page_size, tmp_path, unpopulated="fault") as memory:
        memory.populate(kind.page_size, 1)
        memory.populate_many([(4 * kind.page_size, 1), (6 * kind.page_size, 1)])
        assert _faulting(memory) == [0, 2, 3, 5, 7]
        memory.discard(4 * kind.page_size, kind.page_size)
        assert _faulting(memory) == [0, 2, 3, 4, 5, 7]
        memory.populate(4 * kind.page_size, kind.page_size)
        with pytest.raises(prefault.BackingFullError):
            memory.populate_many([(0, 1), (7 * kind.page_size, 1)], headroom="ignore")
        assert _faulting(memory) == [0, 2, 3, 5, 7]


def test_a_failing_populate_unprotects_nothing(small_tmpfs: Callable[[str], Path]) -> None:
    with SparseMemory(32 * PAGE, backing=TemporaryFile(small_tmpfs("64k")), unpopulated="fault") as memory:
        memory.populate(2 * PAGE, PAGE)
        memory.populate(8 * PAGE, PAGE)
        memory.write(8 * PAGE, b"kept")
        attempts: list[Callable[[], object]] = [
            lambda: memory.populate(0, 20 * PAGE, headroom="ignore"),
            lambda: memory.populate_many([(at * PAGE, PAGE) for at in range(20)], headroom="ignore"),
            lambda: memory.populate_many([(at * PAGE, PAGE) for at in range(1, 32)], headroom="ignore"),
        ]
        for attempt in attempts:
            with pytest.raises(prefault.BackingFullError):
                attempt()
            assert _faulting(memory) == [block for block in range(32) if block not in (2, 8)]
            assert present_blocks(memory) == [2, 8]
            assert memory.fd is not None
            assert os.fstat(memory.fd).st_blocks * 512 == 2 * PAGE
        assert memory.read(8 * PAGE, 4) == b"kept"
        memory.populate(10 * PAGE, 10 * PAGE)


def test_protection_in_a_fork() -> None:
    for shared in (False, True):
        with SparseMemory(16 * PAGE, shared=shared, unpopulated="fault") as memory:
            memory.populate(PAGE, PAGE)
            memory.populate(5 * PAGE, PAGE)
            memory.write(PAGE, b"parent")

            def child(memory: SparseMemory = memory) -> list[int]:
                assert memory.read(PAGE, 6) == b"parent"
                memory.populate(3 * PAGE, PAGE)
                memory.discard(PAGE, PAGE)
                memory.write(3 * PAGE, b"child")
                faulting = _faulting(memory)
                memory.close()
                return faulting

            assert in_child(child) == [block for block in range(16) if block not in (3, 5)]
            # Protection is each process's own; a page of shared memory that one discards is gone for both.
            assert _faulting(memory) == [block for block in range(16) if block not in (1, 5)]
            memory.populate()
            assert memory.read(PAGE, 6) == (bytes(6) if shared else b"parent")
            assert memory.read(3 * PAGE, 5) == (b"child" if shared else bytes(5))


def test_two_mappings_are_protected_separately() -> None:
    with SparseMemory(8 * PAGE, backing="memfd", unpopulated="fault") as one:
        assert one.fd is not None
        with SparseMemory(None, backing=Descriptor(one.fd), unpopulated="fault") as other:
            one.populate(0, PAGE)
            other.populate(PAGE, PAGE)
            assert (faults(one, PAGE), faults(other, 0)) == (True, True)
            other.discard(0, PAGE)  # not populated by this one: protected already, and taken from the file all the same
            assert not faults(one, 0)
            assert one.read(0, 1) == b"\0"


@pytest.mark.parametrize("guards", [True, False])
def test_random_blocks_against_a_set(guards: bool) -> None:
    rng = random.Random(3)
    blocks = 3000  # six extents
    with without(*(() if guards else ("guard_regions",))):
        memory = SparseMemory(blocks * PAGE, block=PAGE, unpopulated="fault")
    with memory:
        model: set[int] = set()
        for _ in range(150):
            first = rng.randrange(blocks)
            count = min(rng.choice((1, 1, 3, 50, 700)), blocks - first)
            some = set(range(first, first + count))
            many = [rng.randrange(blocks) for _ in range(rng.choice((1, 40)))]
            match rng.randrange(4):
                case 0:
                    memory.populate(first * PAGE, count * PAGE)
                    model |= some
                case 1:
                    memory.discard(first * PAGE, count * PAGE)
                    model -= some
                case 2:
                    memory.populate_many([(at * PAGE, PAGE) for at in many])
                    model |= set(many)
                case 3:
                    memory.discard_many([(at * PAGE, PAGE) for at in many])
                    model -= set(many)
            assert present_blocks(memory) == sorted(model)
            assert memory._guard.protection is not None
            runs = memory._guard.protection.unprotected
            assert {at // PAGE for low, high in runs for at in range(low, high, PAGE)} == model
            assert mappings(memory) <= (2 * 6 + 1 if guards else 2 * len(runs) + 1)
            # Not in children, of which it would take thousands: the kernel reads what the protection does not forbid.
            for at in [rng.randrange(blocks) for _ in range(20)]:
                assert _kernel_can_read(memory.range.start + at * PAGE) == (at in model)
        memory.discard()
        assert mappings(memory) == 1


def _kernel_can_read(address: int) -> bool:
    from prefault._kernel import uio

    byte = (ctypes.c_char * 1)()
    local, remote = mman.IoVec(ctypes.addressof(byte), 1), mman.IoVec(address, 1)
    try:
        uio.process_vm_readv(os.getpid(), ctypes.addressof(local), 1, ctypes.addressof(remote), 1)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("size", "block", "count"), [("1 TiB", 4 * KIB, 200), ("1 TiB", 2 * MIB, 200), ("1 GiB", PAGE, 3000)]
)
def test_mappings_stay_few(size: str, block: int, count: int) -> None:
    _scatter(size, block, count)


@pytest.mark.stress
def test_mappings_of_twenty_thousand_blocks_in_a_terabyte() -> None:
    _scatter("1 TiB", 4 * KIB, 20_000)
    _scatter("1 TiB", 64 * KIB, 20_000)


def _scatter(size: str, block: int, count: int) -> None:
    rng = random.Random(1)
    tables = status_kib("VmPTE")
    with SparseMemory(size, block=block, unpopulated="fault", huge="never") as memory:
        blocks = len(memory) // block
        chosen = rng.sample(range(blocks), count)
        for at in chosen[: count // 2]:
            memory.populate(at * block, block)
        memory.populate_many([(at * block, 1) for at in chosen[count // 2 :]])
        assert mappings(memory) <= min(2 * count, 2 * 8192) + 1
        assert memory.populated.length == count * block
        for at in chosen[:3]:
            assert not faults(memory, at * block)
        rng.shuffle(chosen)
        for at in chosen[: count // 2]:
            memory.discard(at * block, block)
        assert memory.populated.length == (count - count // 2) * block
        memory.discard_many([(at * block, block) for at in chosen])
        assert mappings(memory) == 1
        assert not memory.populated
        assert not memory._guard.protection or not memory._guard.protection._unprotected  # no extent keeps a state
    assert status_kib("VmPTE") <= tables + 1024  # the page tables of guards went back


def test_too_many_mappings_without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefault.sparse.protection._max_map_count", lambda: 40)
    with without("guard_regions"):
        memory = SparseMemory(100 * PAGE, unpopulated="fault")
    with memory:
        memory.populate_many([(at * 2 * PAGE, PAGE) for at in range(10)])
        attempts: list[Callable[[], object]] = [
            lambda: memory.populate(50 * PAGE, PAGE),
            lambda: memory.populate_many([(50 * PAGE, 1)]),
        ]
        for attempt in attempts:
            with pytest.raises(OutOfMemoryError, match=r"vm\.max_map_count"):
                attempt()
        assert len(present_blocks(memory)) == 10
        memory.populate(0, 19 * PAGE)  # joins them
        memory.populate(50 * PAGE, PAGE)


def test_the_kernel_refuses_another_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, length: int, prot: int, real: Any = mman.mprotect) -> None:
        if prot:
            raise OSError(12, "Cannot allocate memory")
        real(address, length, prot)

    with SparseMemory(100 * PAGE, unpopulated="fault") as memory:
        memory.populate(50 * PAGE, PAGE)
        with monkeypatch.context() as patch:
            patch.setattr(mman, "mprotect", refuse)
            attempts: list[Callable[[], object]] = [
                lambda: memory.populate(0, 2 * PAGE),
                lambda: memory.populate_many([(0, 1), (8 * PAGE, 1)]),
            ]
            for attempt in attempts:
                with pytest.raises(OutOfMemoryError, match="nothing was populated"):
                    attempt()
        assert present_blocks(memory) == [50]
        assert _faulting(memory) == [block for block in range(100) if block != 50]
        memory.populate()


def test_locked_memory_has_no_guards() -> None:
    def locked() -> list[int]:
        with SparseMemory(64 * PAGE, unpopulated="fault") as memory:
            memory.populate(0, PAGE)
            memory.populate(8 * PAGE, 3 * PAGE)
            mman.mlock2(memory.range.start, PAGE)
            mman.mlock2(memory.range.start + 8 * PAGE, 3 * PAGE)
            memory.discard(9 * PAGE, PAGE)  # a guard is refused here
            memory.populate(20 * PAGE, PAGE)
            return _faulting(memory)

    assert in_child(locked) == [block for block in range(64) if block not in (0, 8, 10, 20)]


def test_transparent_huge_pages_between_guards() -> None:
    block = 2 * MIB
    with SparseMemory("64 GiB", block=block, unpopulated="fault", huge="advise") as memory:
        needs.capability(prefault._system.capabilities.PAGEMAP_SCAN)
        for at in (0, 3, 1):  # 1 was a guard region, in an extent of four blocks
            memory.populate(at * block, block)
        assert memory._guard.protection is not None
        assert memory._guard.protection._extent == 4 * block
        huge = [oracle.smaps(memory.range.start).get("AnonHugePages", 0)]
        if not huge[0]:
            needs.missing("transparent huge pages are off")
        assert huge == [3 * block]
        memory.discard(block, block)
        assert oracle.smaps(memory.range.start)["AnonHugePages"] == 2 * block


def test_a_signal_is_what_a_c_program_gets() -> None:
    with SparseMemory(PAGE, unpopulated="fault") as memory, memory.view() as view:
        assert signal_of(lambda: view[0]) == 11
        memory.populate()
        assert signal_of(lambda: view[0]) == 0


def test_extents() -> None:
    for size, block, extent in (
        (GIB, PAGE, 2 * MIB),
        (GIB, 2 * MIB, 2 * MIB),
        (1 << 40, 2 * MIB, 128 * MIB),
        (1 << 40, 3 * PAGE, 3 * PAGE << 14),
        (1 << 46, PAGE, 8 * GIB),
    ):
        assert BlockProtection(0, size, block, merges=False)._extent == extent
