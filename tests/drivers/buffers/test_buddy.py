"""The buddy allocator against a bitmap, which knows nothing of blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefault.drivers.buffers.buddy import CHUNK, Block, BuddyAllocator, Fragmentation, NoRoomError
from prefault.sizes import MIB, PAGE_SIZE

_CAPACITY = 2 * CHUNK + 5 * PAGE_SIZE  # no power of two
_PAGES = _CAPACITY // PAGE_SIZE

_requests = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, CHUNK + 3 * PAGE_SIZE), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("free"), st.integers(0, 1000), st.just(0), st.just(False)),
    ),
    max_size=60,
)


def _fits(bitmap: list[bool], size: int, alignment: int, contiguous: bool) -> bool:
    """Tell from the bitmap alone whether a request has room."""
    wanted, step = -(-size // PAGE_SIZE), alignment // PAGE_SIZE
    wanted += -wanted % step
    if contiguous:
        return any(not any(bitmap[at : at + wanted]) for at in range(0, _PAGES - wanted + 1, step))
    units = sum(not any(bitmap[at : at + step]) for at in range(0, _PAGES - step + 1, step))
    return units * step >= wanted


def _chunks(bitmap: list[bool]) -> int:
    """Return the free bytes in whole aligned chunks."""
    step = CHUNK // PAGE_SIZE
    return CHUNK * sum(not any(bitmap[at : at + step]) for at in range(0, _PAGES - step + 1, step))


@settings(max_examples=150, deadline=None)
@given(_requests)
def test_d1_the_allocator_agrees_with_a_bitmap(requests: list[tuple[str, int, int, bool]]) -> None:
    memory, bitmap = BuddyAllocator(_CAPACITY), [False] * _PAGES
    held: list[tuple[list[Block], int]] = []
    for what, number, order, contiguous in requests:
        if what == "free" and held:
            blocks, _ = held.pop(number % len(held))
            memory.release(blocks)
            for block in blocks:
                for page in range(block.offset // PAGE_SIZE, (block.offset + block.size) // PAGE_SIZE):
                    bitmap[page] = False
        elif what == "allocate":
            alignment = PAGE_SIZE << order
            room = _fits(bitmap, number, alignment, contiguous)
            try:
                blocks = memory.allocate(number, alignment, contiguous=contiguous)
            except NoRoomError:
                assert not room
                continue
            assert room
            assert sum(block.size for block in blocks) == number + -number % alignment
            if contiguous:
                assert all(one.offset + one.size == two.offset for one, two in itertools.pairwise(blocks))
                assert blocks[0].offset % alignment == 0
            for block in blocks:
                assert block.size & (block.size - 1) == 0
                assert block.offset % block.size == 0
                assert contiguous or block.size >= alignment
                for page in range(block.offset // PAGE_SIZE, (block.offset + block.size) // PAGE_SIZE):
                    assert not bitmap[page], "one page for two"
                    bitmap[page] = True
            held.append((blocks, number))
        got = memory.fragmentation()
        assert got.free == memory.free == bitmap.count(False) * PAGE_SIZE
        assert got.internal == sum(sum(block.size for block in blocks) - size for blocks, size in held)
        assert got.free_in_chunks == _chunks(bitmap)
    for blocks, _ in held:
        memory.release(blocks)
    assert memory.fragmentation() == BuddyAllocator(_CAPACITY).fragmentation()  # all halves were joined


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, CHUNK), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_allocations_are_taken_again_after_a_restart(sizes: list[int], chance: object) -> None:
    memory = BuddyAllocator(8 * CHUNK)
    held = []
    for size in sizes:
        try:
            held.append((memory.allocate(size), size))
        except NoRoomError:
            break
    for blocks, _ in held[::2]:
        memory.release(blocks)
    again = BuddyAllocator(8 * CHUNK)
    for blocks, size in held[1::2]:
        again.take(blocks, size)
    assert again.fragmentation() == memory.fragmentation()


def test_d1_large_objects_get_whole_chunks_and_small_ones_share_one() -> None:
    memory = BuddyAllocator(64 * MIB)
    small = [memory.allocate(12 * 1024) for _ in range(20)]
    large = memory.allocate(5 * MIB + 12 * 1024)
    more = [memory.allocate(PAGE_SIZE) for _ in range(20)]
    chunks = {block.offset // CHUNK for blocks in small + more for block in blocks}
    assert chunks == {0}, "small objects lie in one chunk"
    whole = [block for block in large if block.size >= CHUNK]
    assert sum(block.size for block in whole) == 4 * MIB
    assert all(block.offset % CHUNK == 0 for block in whole)
    assert sum(block.size for block in large) == 5 * MIB + 12 * 1024


def test_fragmentation_tells_alignment_from_scattering() -> None:
    memory = BuddyAllocator(8 * CHUNK)
    assert memory.fragmentation() == Fragmentation(8 * CHUNK, 8 * CHUNK, 0, 8 * CHUNK, 8 * CHUNK)
    memory.allocate(PAGE_SIZE + 1, 64 * PAGE_SIZE)
    pieces = [memory.allocate(CHUNK // 2) for _ in range(6)]
    for piece in pieces[::2]:
        memory.release(piece)
    found = memory.fragmentation()
    assert found.internal == 63 * PAGE_SIZE - 1
    assert found.free > CHUNK
    assert 0 < found.external < 1
    for piece in pieces[1::2]:
        memory.release(piece)
    assert memory.fragmentation().external < found.external


def test_an_object_of_scattered_memory_is_allocated_in_small_blocks() -> None:
    """D2: no chunk is whole, and the memory is there all the same."""
    memory = BuddyAllocator(4 * CHUNK)
    halves = [memory.allocate(CHUNK // 2) for _ in range(8)]
    for half in halves[::2]:
        memory.release(half)
    blocks = memory.allocate(CHUNK)
    assert [block.size for block in blocks] == [CHUNK // 2] * 2
    with pytest.raises(NoRoomError, match="in one piece"):
        memory.allocate(CHUNK, contiguous=True)


@pytest.mark.parametrize("alignment", [0, -4096, 1, 2048, 3 * PAGE_SIZE, 4097])
def test_an_alignment_is_a_power_of_two_of_pages(alignment: int) -> None:
    memory = BuddyAllocator(MIB)
    with pytest.raises(ValueError, match=rf"power of two of at least {PAGE_SIZE} bytes, not {alignment}"):
        memory.allocate(PAGE_SIZE, alignment)
    assert memory.free == MIB


@pytest.mark.parametrize("contiguous", [False, True])
def test_what_is_too_large_is_refused_and_takes_nothing(contiguous: bool) -> None:
    memory = BuddyAllocator(3 * MIB)
    memory.allocate(MIB)
    for size, alignment in ((3 * MIB, PAGE_SIZE), (PAGE_SIZE, 4 * MIB), (1 << 60, PAGE_SIZE), (PAGE_SIZE, 1 << 60)):
        with pytest.raises(NoRoomError, match=r"2.0 MiB of 3.0 MiB are free, the largest block has"):
            memory.allocate(size, alignment, contiguous=contiguous)
        assert memory.free == 2 * MIB


@pytest.mark.parametrize("capacity", [0, -4096, 100, PAGE_SIZE + 1])
def test_a_capacity_is_whole_pages(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"not {capacity}"):
        BuddyAllocator(capacity)


def test_an_allocation_has_at_least_a_byte() -> None:
    with pytest.raises(ValueError, match="at least one byte, not 0"):
        BuddyAllocator(MIB).allocate(0)


def test_a_double_free_is_refused_and_changes_nothing() -> None:
    memory = BuddyAllocator(MIB)
    one, two = memory.allocate(PAGE_SIZE), memory.allocate(8 * PAGE_SIZE)
    memory.release(one)
    before = memory.fragmentation()
    for wrong in (one, [*two, *one], [*two, *two], [Block(two[0].offset, PAGE_SIZE)], [Block(1 << 40, PAGE_SIZE)]):
        with pytest.raises(ValueError, match=r"allocated at|twice"):
            memory.release(wrong)
        assert memory.fragmentation() == before
    with pytest.raises(ValueError, match="is not free"):
        memory.take([Block(one[0].offset, PAGE_SIZE), *two], 9 * PAGE_SIZE)
    assert memory.fragmentation() == before
