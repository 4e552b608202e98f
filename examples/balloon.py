"""A balloon: two guests share a pool that is too small for both, and the less important one yields memory.

A guest's memory is a sparse range. Inflating its balloon discards blocks that the guest does not use, so that the pool can
give them to the other guest. Deflating populates blocks again: all of them or none.

    python examples/balloon.py
"""

from __future__ import annotations

import threading

import prefault

BLOCK = 2 << 20
MIB = 1 << 20


class Guest:
    """A guest with its own memory, which reports unused blocks to the balloon."""

    def __init__(self, pool: prefault.Pool, name: str, size: int, reserved: int) -> None:
        self.name = name
        self.memory = pool.sparse(size, reserved=reserved, name=name)
        self.unused: list[int] = []

    def boot(self, length: int) -> None:
        """Populate the first `length` bytes, all unused."""
        self.memory.populate(0, length)
        self.unused = list(range(0, length, BLOCK))

    def work(self, blocks: int) -> None:
        """Use some of the populated blocks."""
        for _ in range(blocks):
            offset = self.unused.pop(0)
            self.memory.write(offset, self.name.encode())

    def grow(self, length: int) -> None:
        """Populate and use more memory."""
        start = self.memory.populated.span.stop
        self.memory.populate(start, length)
        for offset in range(start, start + length, BLOCK):
            self.memory.write(offset, self.name.encode())


class Balloon:
    """A balloon that takes unused memory from a guest and gives it back."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.taken: list[int] = []

    def inflate(self, length: int) -> int:
        """Discard up to `length` bytes that the guest does not use, and return how many."""
        count = min(length // BLOCK, len(self.guest.unused))
        blocks = self.guest.unused[-count:] if count else []
        del self.guest.unused[len(self.guest.unused) - count :]
        self.guest.memory.discard_many((offset, BLOCK) for offset in blocks)
        self.taken += blocks
        return count * BLOCK

    def deflate(self, length: int) -> None:
        """Populate `length` bytes again, or none of them: prefault.PopulateError if the pool has too few."""
        blocks = self.taken[-(length // BLOCK) :]
        self.guest.memory.populate_many((offset, BLOCK) for offset in blocks)
        del self.taken[-len(blocks) :]
        self.guest.unused += blocks


def main() -> None:
    """Run two guests and a balloon on a pool that is too small."""
    balloons: list[Balloon] = []
    inflated = threading.Event()

    def on_high_water(statistics: prefault.PoolStatistics) -> None:
        for balloon in balloons:
            if taken := balloon.inflate(64 * MIB):
                print(f"at {prefault.format_size(statistics.charged)} of {prefault.format_size(statistics.capacity)}"
                      f" the balloon takes {prefault.format_size(taken)} from {balloon.guest.name}")  # fmt: skip
        inflated.set()

    with prefault.Pool("256 MiB", block=BLOCK, high_water=0.85, on_high_water=on_high_water) as pool:
        batch = Guest(pool, "batch", 1 << 30, reserved=32 * MIB)
        database = Guest(pool, "database", 1 << 30, reserved=64 * MIB)
        balloons.append(Balloon(batch))
        batch.boot(160 * MIB)
        batch.work(48)
        database.boot(64 * MIB)  # crosses the high-water mark: a thread of the pool inflates the balloon
        inflated.wait(10)
        database.grow(64 * MIB)  # takes the blocks that the balloon freed
        print(pool.statistics())

        try:
            balloons[0].deflate(64 * MIB)
        except prefault.PoolFullError as error:
            print(f"the balloon stays: {error}")
        database.memory.discard(0, 64 * MIB)
        balloons[0].deflate(32 * MIB)
        assert batch.memory.read(0, 5) == b"batch"  # blocks in use were never discarded
        print(pool.statistics())
        batch.memory.close()
        database.memory.close()


if __name__ == "__main__":
    main()
