"""SparseMemory against a dictionary: which blocks are populated, and which bytes they hold.

The oracle is pagemap, the blocks of the file, and the bytes. Faults are real: the tmpfs is full, the hugetlb pool is empty.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import prefault
from prefault._system import hugetlb
from prefault.errors import NotPopulatedError
from prefault.memory.backings import TemporaryFile
from prefault.sparse import SparseMemory
from prefault.testing import without
from support.sparse import HUGE, HUGE_KINDS, KINDS, PAGE, SparseKind, mappings, present_blocks

_BLOCKS = 24

blocks = st.integers(0, _BLOCKS - 1)
counts = st.sampled_from([1, 1, 2, 3, 5, 8, _BLOCKS])
many = st.lists(st.tuples(blocks, st.sampled_from([0, 1, 1, 2, 4])), max_size=10)


class Machine(RuleBasedStateMachine):
    """One memory and its model."""

    kinds: ClassVar[tuple[SparseKind, ...]] = KINDS
    small: ClassVar[Path | None] = None
    """A tmpfs that has room for 16 pages: a kind of its own."""
    pool: ClassVar[int | None] = None
    """Huge pages that are free."""

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        self.stack = ExitStack()
        kind = data.draw(st.sampled_from(self.kinds))
        self.kind = kind
        self.unpopulated = data.draw(st.sampled_from(["zeros", "fault"]))
        # Where a fault maps what lies around it in the page cache, it is unknown which pages are there.
        if kind.is_disk:
            self.unpopulated = "fault"
        self.block = kind.page_size * (1 if self.pool is not None or self.small else data.draw(st.sampled_from([1, 3])))
        self.size = _BLOCKS * self.block
        missing = data.draw(st.sampled_from([(), (), ("guard_regions",), ("process_madvise",)]))
        options: dict[str, Any] = {"block": self.block, "unpopulated": self.unpopulated}
        self.stack.enter_context(without(*missing))
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        if self.small is not None:
            self.memory = SparseMemory(self.size, backing=TemporaryFile(self.small), **options)
        else:
            self.memory = kind.make(self.size, directory, **options)
        self.model: dict[int, bytes] = {}  # populated blocks and what they hold
        self.file: dict[int, bytes] = {}  # what a file on a disk holds by now, block by block

    def _unwritten(self, block: int) -> bytes:
        if self.kind.is_disk and self.kind.shared and block in self.file:
            return self.file[block]
        return self.kind.unwritten(block * self.block, self.block)

    def _room(self) -> int | None:
        """Return how many blocks fit; None where there is no limit."""
        return 16 if self.small is not None else self.pool

    def _populate(self, wanted: set[int], call: Callable[[], prefault.PopulateResult]) -> None:
        new = wanted - set(self.model)
        room = self._room()
        if room is not None and len(self.model) + len(new) > room:
            with pytest.raises(prefault.BackingFullError) as caught:
                call()
            assert caught.value.populated_bytes == 0
            return
        result = call()
        assert result.bytes == len(new) * self.block
        assert result.present_bytes == (len(wanted) - len(new)) * self.block
        for block in new:
            self.model[block] = self._unwritten(block)

    @rule(first=blocks, count=counts, inside=st.booleans(), check=st.booleans())
    def populate(self, first: int, count: int, inside: bool, check: bool) -> None:
        stop = min(first + count, _BLOCKS)
        start, end = first * self.block, stop * self.block
        if inside:  # outward: the same blocks
            start, end = start + 1, end - 1
        headroom: Any = "check" if check and self._room() is None else "ignore"
        self._populate(
            set(range(first, stop)),
            lambda: self.memory.populate(start, end - start, access="write", headroom=headroom),
        )

    @rule(ranges=many, check=st.booleans())
    def populate_many(self, ranges: list[tuple[int, int]], check: bool) -> None:
        cut = [(first, min(count, _BLOCKS - first)) for first, count in ranges]
        wanted = {block for first, count in cut for block in range(first, first + count)}
        headroom: Any = "check" if check and self._room() is None else "ignore"
        some = [(first * self.block, count * self.block) for first, count in cut]
        self._populate(wanted, lambda: self.memory.populate_many(some, access="write", headroom=headroom))

    def _discarded(self, gone: set[int]) -> None:
        for block in gone:
            content = self.model.pop(block, None)
            if content is not None:
                self.file[block] = content

    @rule(first=blocks, count=counts, outside=st.booleans())
    def discard(self, first: int, count: int, outside: bool) -> None:
        stop = min(first + count, _BLOCKS)
        start, end = first * self.block, stop * self.block
        if outside:  # inward: the same blocks
            start, end = max(0, start - 1), min(self.size, end + 1)
        self.memory.discard(start, end - start)
        self._discarded(set(range(first, stop)))

    @rule(ranges=many)
    def discard_many(self, ranges: list[tuple[int, int]]) -> None:
        cut = [(first, min(count, _BLOCKS - first)) for first, count in ranges]
        self.memory.discard_many([(first * self.block, count * self.block) for first, count in cut])
        self._discarded({block for first, count in cut for block in range(first, first + count)})

    @rule(block=blocks, byte=st.integers(1, 255))
    def write(self, block: int, byte: int) -> None:
        data = bytes([byte]) * self.block
        if block in self.model:
            self.memory.write(block * self.block, data)
            self.model[block] = data
        elif self.unpopulated == "fault":
            with pytest.raises(NotPopulatedError) as caught:
                self.memory.write(block * self.block, data)
            assert caught.value.offset == block * self.block

    @rule(bad=st.sampled_from([(-1, 1), (0, -1), (1 << 40, 1), (0, 1 << 40)]), ranges=many)
    def bad_range(self, bad: tuple[int, int], ranges: list[tuple[int, int]]) -> None:
        for call in (self.memory.populate_many, self.memory.discard_many):
            with pytest.raises(ValueError, match=f"range {len(ranges)}, "):
                call([*((first * self.block, 0) for first, _ in ranges), bad, (0, self.block)])

    @precondition(lambda self: self._room() is None)
    @rule()
    def everything(self) -> None:
        self._populate(set(range(_BLOCKS)), lambda: self.memory.populate(access="write"))

    @invariant()
    def the_kernel_agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        memory = self.memory
        assert present_blocks(memory) == sorted(self.model)
        assert memory.populated.length == len(self.model) * self.block
        for block, content in self.model.items():
            assert memory.read(block * self.block, self.block) == content
        if self.kind.is_memory_file and self.kind.page_size == PAGE:
            assert memory.fd is not None
            assert os.fstat(memory.fd).st_blocks * 512 == len(self.model) * self.block
        if self.pool is not None:
            assert hugetlb.read_pool(HUGE).available == self.pool - len(self.model)
        if memory._guard.protection is not None:
            runs = memory._guard.protection.unprotected
            assert {at // self.block for start, stop in runs for at in range(start, stop, self.block)} == set(self.model)
        # Mappings of hugetlb are not joined, and without guards each run of blocks is one.
        assert mappings(memory) <= 2 * _BLOCKS + 1

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()
        if hasattr(self, "stack"):
            self.stack.close()
        if self.pool is not None:
            assert hugetlb.read_pool(HUGE).available == self.pool


def _run(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def _full(small: Path, examples: int, steps: int) -> None:
    tmpfs = next(kind for kind in KINDS if kind.name == "shared-tmpfs")
    _run(type("FullMachine", (Machine,), {"small": small, "kinds": (tmpfs,)}), examples, steps)


def _huge(examples: int, steps: int) -> None:
    pool = hugetlb.read_pool(HUGE).available
    _run(type("HugeMachine", (Machine,), {"pool": pool, "kinds": HUGE_KINDS}), examples, steps)


def test_every_backing() -> None:
    _run(Machine, 50, 20)


def test_a_tmpfs_that_is_full(small_tmpfs: Callable[[str], Path]) -> None:
    _full(small_tmpfs("64k"), 15, 20)


def test_a_hugetlb_pool_that_is_empty(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(5)
    _huge(5, 20)


@pytest.mark.stress
def test_every_backing_for_long() -> None:
    _run(Machine, 200, 60)


@pytest.mark.stress
def test_a_tmpfs_that_is_full_for_long(small_tmpfs: Callable[[str], Path]) -> None:
    _full(small_tmpfs("64k"), 60, 60)


@pytest.mark.stress
def test_a_hugetlb_pool_that_is_empty_for_long(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(5)
    _huge(20, 60)
