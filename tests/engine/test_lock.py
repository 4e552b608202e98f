"""lock and unlock: what smaps says of the memory, and what the limit says when it does not fit."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Callable

import numpy as np
import pytest

import prefault
from prefault._kernel import mman
from prefault.sizes import MIB, PAGE_SIZE
from support import oracle
from support.children import in_child


def _locked(address: int) -> int:
    return oracle.smaps(address)["Locked"]


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "tmpfs"])
def test_it_is_present_and_locked(backing: str) -> None:
    with prefault.Mapping(4 * MIB, backing=backing) as mapping:
        result = prefault.lock(mapping)
        address = mapping.range.start
        assert result.bytes == result.populated.bytes == 4 * MIB
        assert "lo" in oracle.vma_flags(address)
        assert _locked(address) == oracle.present_bytes(address, 4 * MIB) == 4 * MIB
        assert "4.0 MiB locked" in str(result)
        assert prefault.unlock(mapping) == 4 * MIB
        assert "lo" not in oracle.vma_flags(address)
        assert oracle.present_bytes(address, 4 * MIB) == 4 * MIB


def test_a_part_is_rounded_outward() -> None:
    with prefault.Mapping(MIB) as mapping:
        address = mapping.range.start
        assert prefault.lock(mapping, offset=PAGE_SIZE + 1, length=PAGE_SIZE).bytes == 2 * PAGE_SIZE
        assert "lo" not in oracle.vma_flags(address)
        assert _locked(address + PAGE_SIZE) == 2 * PAGE_SIZE
        assert oracle.present(address, 4 * PAGE_SIZE) == [False, True, True, False]
        assert prefault.unlock(mapping, offset=PAGE_SIZE, length=PAGE_SIZE) == PAGE_SIZE
        assert "lo" not in oracle.vma_flags(address + PAGE_SIZE)
        assert "lo" in oracle.vma_flags(address + 2 * PAGE_SIZE)


def test_an_array_keeps_its_bytes() -> None:
    array = np.arange(MIB, dtype="uint32")
    before = array.tobytes()
    prefault.lock(array)
    assert "lo" in oracle.vma_flags(array.ctypes.data + PAGE_SIZE)
    assert array.tobytes() == before
    prefault.unlock(array)


def test_nothing_to_lock() -> None:
    result = prefault.lock(bytearray())
    assert result.bytes == 0
    assert prefault.unlock(bytearray()) == 0


def test_a_populate_that_fails_locks_nothing() -> None:
    with prefault.Mapping(MIB, backing="memfd") as mapping:
        assert mapping.fd is not None
        os.ftruncate(mapping.fd, MIB // 2)
        with pytest.raises(prefault.PopulateError):
            prefault.lock(mapping)
        assert "lo" not in oracle.vma_flags(mapping.range.start)


def test_sparse_memory() -> None:
    with prefault.SparseMemory(8 * MIB, block=2 * MIB, unpopulated="fault") as memory:
        memory.populate(2 * MIB, 2 * MIB)
        view = memory.view(2 * MIB, 2 * MIB)
        assert prefault.lock(view).bytes == 2 * MIB
        del view
        memory.discard(2 * MIB, 2 * MIB)
        assert memory.populated == prefault.RangeSet()


def test_a_hole_is_named() -> None:
    area = mmap.mmap(-1, 4 * PAGE_SIZE)
    array = np.frombuffer(area, dtype="uint8")
    address = array.ctypes.data

    def hole() -> str:
        mman.munmap(address + 2 * PAGE_SIZE, PAGE_SIZE)
        with pytest.raises(prefault.HoleError) as caught:
            prefault.unlock(array)
        return str(caught.value)

    assert "not mapped" in in_child(hole)


def _as_nobody(limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit_bytes, limit_bytes))
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)


def _resident(mapping: prefault.Mapping) -> int:
    """Bytes present, by mincore: whoever gave up privileges may not read its own pagemap any more."""
    return sum(byte & 1 for byte in mman.mincore(mapping.range.start, len(mapping))) * PAGE_SIZE


def test_the_limit_is_looked_at_before_anything_is_populated() -> None:
    def attempt() -> tuple[str, int, int, int]:
        _as_nobody(2 * MIB)
        with prefault.Mapping(4 * MIB) as mapping:
            prefault.lock(mapping, length=MIB)
            with pytest.raises(prefault.HeadroomError) as caught:
                prefault.lock(mapping, offset=MIB)
            error = caught.value
            assert error.limit == "RLIMIT_MEMLOCK"
            assert error.offset == MIB
            present = _resident(mapping)
            # Locked already does not count twice.
            prefault.lock(mapping, length=2 * MIB - PAGE_SIZE)
            return str(error), error.needed_bytes, error.available_bytes, present

    message, needed, available, present = in_child(attempt)
    assert needed == 3 * MIB
    assert available == MIB
    assert present == MIB
    assert "locking takes 3.0 MiB more, and RLIMIT_MEMLOCK leaves 1.0 MiB of 2.0 MiB" in message


def test_the_kernel_refuses_what_was_not_looked_at() -> None:
    def attempt() -> tuple[str, int | None, int]:
        _as_nobody(MIB)
        with prefault.Mapping(4 * MIB) as mapping:
            with pytest.raises(prefault.OutOfMemoryError) as caught:
                prefault.lock(mapping, headroom="ignore")
            return str(caught.value), caught.value.errno, _resident(mapping)

    message, number, present = in_child(attempt)
    assert number == errno.ENOMEM
    assert "RLIMIT_MEMLOCK is 1.0 MiB" in message
    assert present == 4 * MIB


@pytest.mark.parametrize("by_block", [False, True])
def test_a_refused_lock_ends_no_lock_that_was_there(by_block: bool) -> None:
    def attempt() -> tuple[list[int], list[int], list[int]]:
        _as_nobody(5 * PAGE_SIZE)
        memory = np.frombuffer(mmap.mmap(-1, 64 * PAGE_SIZE), np.uint8)
        pages = memory.reshape(8, 8 * PAGE_SIZE)[:, :1]  # of each eight pages the first

        def locked() -> list[int]:
            return [row for row in range(8) if "lo" in oracle.vma_flags(pages[row].ctypes.data)]

        prefault.lock(pages[:4])
        before = locked()
        lock_all = (
            prefault.ready(pages, headroom="ignore").__enter__
            if by_block
            else lambda: prefault.lock(pages, headroom="ignore")
        )
        with pytest.raises(prefault.OutOfMemoryError):
            lock_all()
        after = locked()
        prefault.unlock(pages)
        return before, after, locked()

    assert in_child(attempt) == ([0, 1, 2, 3], [0, 1, 2, 3], [])


def test_huge_pages(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with prefault.Mapping(2 * MIB, backing="hugetlb") as mapping:
        assert prefault.lock(mapping).bytes == 2 * MIB
        # The kernel does not mark it: huge pages of hugetlb are never swapped.
        assert oracle.present_bytes(mapping.range.start, 2 * MIB) == 2 * MIB


@pytest.mark.parametrize("wrong", [3, None])
def test_not_a_buffer(wrong: object) -> None:
    with pytest.raises(TypeError):
        prefault.lock(wrong)
    with pytest.raises(TypeError):
        prefault.unlock(wrong)
