"""Buddy allocator of video memory, in the role of the kernel's drm_buddy (drivers/gpu/drm/drm_buddy.c)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from prefault.sizes import MIB, PAGE_SIZE, format_size

CHUNK = 2 * MIB
"""Bytes of a chunk: what one huge page-table entry maps."""


class Block(NamedTuple):
    """Piece of memory: a power of two of bytes, at an offset that is a multiple of it.

    Attributes:
        offset: from the start of the memory, in bytes.
        size: in bytes.
    """

    offset: int
    size: int


class Fragmentation(NamedTuple):
    """Loss of memory to alignment and to scattering.

    Attributes:
        capacity: bytes of the memory.
        free: bytes that no allocation has.
        internal: bytes that allocations have beyond what was asked for.
        free_in_chunks: free bytes that lie in whole, aligned 2 MiB chunks.
        largest: size of the largest free block, in bytes.
    """

    capacity: int
    free: int
    internal: int
    free_in_chunks: int
    largest: int

    @property
    def external(self) -> float:
        """Share of the free bytes, 0 to 1, that no 2 MiB page can use."""
        return 1 - self.free_in_chunks / self.free if self.free else 0.0


class NoRoomError(MemoryError):
    """No block of the size and alignment is free."""


class BuddyAllocator:
    """Memory that is split into halves until a block fits, and joined again when both halves are free.

    Of several blocks that fit, the smallest is split, and of these the one at the lowest offset: small allocations are
    packed together, and chunks stay whole. A capacity that is no power of two consists of several largest blocks.

    Args:
        capacity: bytes, a multiple of the page size.

    Raises:
        ValueError: the capacity is not positive, or not a multiple of the page size.
    """

    def __init__(self, capacity: int) -> None:
        if capacity <= 0 or capacity % PAGE_SIZE:
            raise ValueError(
                f"a buddy allocator manages a positive multiple of {PAGE_SIZE} bytes, not {capacity}: give it a page"
            )
        self.capacity = capacity
        self._free: dict[int, int] = {}
        """Size of each free block, by its offset."""
        self._by_size: dict[int, list[int]] = {}
        """Heap of offsets for each size; entries that are no longer in ``_free`` with that size are stale."""
        self._allocated: dict[int, int] = {}
        self._internal: dict[int, int] = {}
        """Bytes beyond the request, by the offset of the last block of the allocation."""
        self._internal_sum = 0
        at = 0
        while at < capacity:
            size = 1 << ((capacity - at).bit_length() - 1)
            self._add(Block(at, size))
            at += size

    @property
    def free(self) -> int:
        """Bytes that no allocation has."""
        return sum(self._free.values())

    def allocate(self, size: int, alignment: int = PAGE_SIZE, *, contiguous: bool = False) -> list[Block]:
        """Allocate memory in as few blocks as there are, in the order in which they hold the bytes.

        Whole chunks of 2 MiB lie in aligned chunks while there are any. The rest of a size lies in smaller blocks.

        Args:
            size: bytes, rounded up to a multiple of ``alignment``.
            alignment: power of two, at least a page: each block's offset and size are multiples of it.
            contiguous: the blocks adjoin each other.

        Raises:
            ValueError: the size is not positive, or the alignment is not a power of two from a page up.
            NoRoomError: there is not enough free memory in blocks of that alignment; nothing was allocated.
        """
        check_alignment(alignment)
        if size <= 0:
            raise ValueError(f"an allocation has at least one byte, not {size}")
        rounded = size + -size % alignment
        blocks = self._allocate_run(rounded, alignment) if contiguous else self._allocate_blocks(rounded, alignment)
        if blocks is None:
            adjoining = " in one piece" if contiguous else ""
            raise NoRoomError(
                f"no room for {format_size(rounded)}{adjoining} at multiples of {format_size(alignment)}:"
                f" {format_size(self.free)} of {format_size(self.capacity)} are free, the largest block has"
                f" {format_size(self._largest())}"
            )
        self._note(blocks, rounded - size)
        return blocks

    def take(self, blocks: Iterable[Block], size: int) -> None:
        """Allocate exactly these blocks, which hold ``size`` bytes that were asked for: after a restart.

        Raises:
            ValueError: a block is not free; nothing was allocated.
        """
        taken: list[Block] = []
        for block in blocks:
            if not self._carve(block):
                self._release(taken)
                raise ValueError(f"the block of {format_size(block.size)} at offset {block.offset:#x} is not free")
            taken.append(block)
        self._note(taken, sum(block.size for block in taken) - size)

    def release(self, blocks: Iterable[Block]) -> None:
        """Free the blocks of an allocation, and join halves that are both free.

        Raises:
            ValueError: a block is not allocated (a double free); nothing was freed.
        """
        blocks = list(blocks)
        for block in blocks:
            if self._allocated.get(block.offset) != block.size:
                raise ValueError(f"no block of {format_size(block.size)} is allocated at offset {block.offset:#x}")
        if len(set(blocks)) < len(blocks):
            raise ValueError("a block is to be freed twice")
        for block in blocks:
            del self._allocated[block.offset]
            self._internal_sum -= self._internal.pop(block.offset, 0)
        self._release(blocks)

    def fragmentation(self) -> Fragmentation:
        """Return what is lost to alignment and to scattering now."""
        chunks = sum(size for size in self._free.values() if size >= CHUNK)
        return Fragmentation(self.capacity, self.free, self._internal_sum, chunks, self._largest())

    # --- blocks

    def _note(self, blocks: list[Block], internal: int) -> None:
        self._allocated.update(blocks)
        if internal:
            self._internal[blocks[-1].offset] = internal
            self._internal_sum += internal

    def _allocate_blocks(self, size: int, alignment: int) -> list[Block] | None:
        blocks: list[Block] = []
        left = size
        while left:
            wanted = 1 << (left.bit_length() - 1)
            block = self._smallest(wanted)
            if block is None:  # several smaller ones
                wanted = self._largest()
                block = self._smallest(wanted) if wanted >= alignment else None
            if block is None:
                self._release(blocks)
                return None
            blocks.append(self._split(block, Block(block.offset, wanted)))
            left -= wanted
        return blocks

    def _allocate_run(self, size: int, alignment: int) -> list[Block] | None:
        start = stop = -1
        for offset in sorted(self._free):
            if offset != stop:
                start = offset
            stop = offset + self._free[offset]
            first = start + -start % min(alignment, self.capacity * 2)
            if stop - first >= size:
                blocks = list(_pieces(first, first + size))
                for block in blocks:
                    self._carve(block)
                return blocks
        return None

    def _smallest(self, size: int) -> Block | None:
        """Return the smallest free block of at least ``size`` bytes, a power of two; of these the lowest."""
        while size <= self.capacity:
            heap = self._by_size.get(size, [])
            while heap and self._free.get(heap[0]) != size:
                heapq.heappop(heap)
            if heap:
                return Block(heap[0], size)
            size *= 2
        return None

    def _largest(self) -> int:
        return max(self._free.values(), default=0)

    def _add(self, block: Block) -> None:
        self._free[block.offset] = block.size
        heapq.heappush(self._by_size.setdefault(block.size, []), block.offset)

    def _split(self, block: Block, part: Block) -> Block:
        """Take ``part`` out of a free block, which leaves the other halves free."""
        del self._free[block.offset]
        at, size = block
        while size > part.size:
            size //= 2
            if part.offset >= at + size:
                self._add(Block(at, size))
                at += size
            else:
                self._add(Block(at + size, size))
        return part

    def _carve(self, part: Block) -> bool:
        """Take a block out of the free one that has it; return False if there is none."""
        size = part.size
        while size <= self.capacity:
            at = part.offset - part.offset % size
            if self._free.get(at) == size:
                self._split(Block(at, size), part)
                return True
            size *= 2
        return False

    def _release(self, blocks: Iterable[Block]) -> None:
        for at, size in blocks:
            while self._free.get(at ^ size) == size:
                del self._free[at ^ size]
                at &= ~size
                size *= 2
            self._add(Block(at, size))


def check_alignment(alignment: int) -> None:
    """Raise ValueError if an alignment is not a power of two of at least a page."""
    if alignment < PAGE_SIZE or alignment & (alignment - 1):
        raise ValueError(f"an alignment is a power of two of at least {PAGE_SIZE} bytes, not {alignment}")


def _pieces(start: int, stop: int) -> Iterable[Block]:
    """Yield the fewest aligned blocks that a range consists of."""
    while start < stop:
        fits = 1 << ((stop - start).bit_length() - 1)
        size = min(start & -start, fits) if start else fits
        yield Block(start, size)
        start += size
