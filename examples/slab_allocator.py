"""A small slab allocator on sparse memory that returns memory to the system and survives a refusal.

It reserves an address range once, populates a slab (one block) when no slab of a size has room, and discards the slab when
its last object is freed. An object never moves. When memory is refused, `allocate` raises, and everything allocated before
is untouched. Freed slabs are inaccessible: a stray access is a SIGSEGV at once, and never reads another object's bytes.

    python examples/slab_allocator.py
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import prefault

SLAB = 2 << 20
SMALLEST, LARGEST = 64, SLAB // 4


@dataclass
class Slab:
    """One block, cut into objects of one size."""

    offset: int
    object_bytes: int
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(range(self.offset, self.offset + SLAB, self.object_bytes))

    @property
    def empty(self) -> bool:
        """True if no object of the slab is in use."""
        return len(self.free) == SLAB // self.object_bytes


class SlabAllocator:
    """An allocator of 64 bytes to 512 KiB, which returns offsets in one reservation."""

    def __init__(self, reservation: str = "64 GiB") -> None:
        self.memory = prefault.SparseMemory(reservation, block=SLAB, unpopulated="fault")
        self._slabs: dict[int, Slab] = {}
        self._with_room: dict[int, set[int]] = {}
        self._unused: list[int] = []
        self._next = 0

    def allocate(self, length: int) -> int:
        """Return the offset of `length` free bytes. Raises prefault.PopulateError without memory, and changes nothing."""
        if not 0 < length <= LARGEST:
            raise ValueError(f"objects have 1 to {LARGEST} bytes, not {length}")
        size = max(SMALLEST, 1 << (length - 1).bit_length())
        room = self._with_room.setdefault(size, set())
        if not room:
            room.add(self._new_slab(size))
        slab = self._slabs[next(iter(room))]
        offset = slab.free.pop()
        if not slab.free:
            room.remove(slab.offset)
        return offset

    def free(self, offset: int) -> None:
        """Free an object, and discard its slab if it was the last one."""
        slab = self._slabs[offset - offset % SLAB]
        slab.free.append(offset)
        room = self._with_room[slab.object_bytes]
        room.add(slab.offset)
        if slab.empty:
            room.remove(slab.offset)
            del self._slabs[slab.offset]
            self.memory.discard(slab.offset, SLAB)
            self._unused.append(slab.offset)

    def _new_slab(self, size: int) -> int:
        offset = self._unused[-1] if self._unused else self._next
        if offset + SLAB > len(self.memory):
            raise MemoryError(f"the reservation of {prefault.format_size(len(self.memory))} is used up")
        self.memory.populate(offset, SLAB)  # the only line that can fail; until here nothing has changed
        if self._unused:
            self._unused.pop()
        else:
            self._next += SLAB
        self._slabs[offset] = Slab(offset, size)
        return offset

    def close(self) -> None:
        """Unmap the reservation."""
        self.memory.close()


def main() -> None:
    """Allocate, free, and print how much is populated."""
    rng = random.Random(1)
    allocator = SlabAllocator()
    memory = allocator.memory
    objects: dict[int, bytes] = {}
    for _ in range(20_000):
        content = rng.randbytes(rng.choice((60, 100, 1000, 4096, 20_000)))
        offset = allocator.allocate(len(content))
        memory.write(offset, content)
        objects[offset] = content
    print(f"{len(objects)} objects, {prefault.format_size(memory.populated.length)} populated of {memory!r}")

    for offset in list(objects)[:15_000]:  # the oldest; a slab stays while one of its objects does
        allocator.free(offset)
        del objects[offset]
    print(f"{len(objects)} objects, {prefault.format_size(memory.populated.length)} populated")
    assert all(memory.read(offset, len(content)) == content for offset, content in objects.items())

    for offset in objects:
        allocator.free(offset)
    print(f"0 objects, {prefault.format_size(memory.populated.length)} populated")
    assert not memory.populated
    try:
        memory.read(0, 8)
    except prefault.NotPopulatedError as error:
        print(f"reading a freed object: {error}")
    allocator.close()


if __name__ == "__main__":
    main()
