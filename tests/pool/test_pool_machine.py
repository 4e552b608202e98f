"""A pool with several members, here and through a socket, against a model of sets of blocks; the kernel is the oracle."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from prefault import PAGE_SIZE
from prefault.errors import PoolFullError
from prefault.pool import Pool, connect
from prefault.sparse import SparseMemory

_BLOCK = 2 * PAGE_SIZE
_CAPACITY = 12
_SIZE = 16


class _Member(NamedTuple):
    """The model: the blocks that are populated, each with the byte that it was filled with."""

    memory: SparseMemory
    blocks: dict[int, int]
    reserved: int
    limit: int


_spans = st.tuples(st.integers(0, _SIZE - 1), st.integers(1, 6)).map(lambda span: range(span[0], min(_SIZE, sum(span))))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="prefault-test-")
        self.pool = Pool(_CAPACITY * _BLOCK, block=_BLOCK)
        self.server = self.pool.serve(os.path.join(self.directory, "s"))
        self.client = connect(self.server.path)
        self.members: list[_Member] = []

    def teardown(self) -> None:
        for member in self.members:
            member.memory.close()
        assert self.pool.statistics().available == _CAPACITY * _BLOCK
        self.client.close()
        self.pool.close()
        shutil.rmtree(self.directory)

    def _taken(self) -> int:
        return sum(max(len(member.blocks), member.reserved) for member in self.members)

    @precondition(lambda self: len(self.members) < 5)
    @rule(here=st.booleans(), reserved=st.integers(0, 4), more=st.integers(1, 12))
    def join(self, here: bool, reserved: int, more: int) -> None:
        limit = reserved + more
        place = self.pool if here else self.client
        possible = self._taken() + reserved <= _CAPACITY
        with contextlib.nullcontext() if possible else pytest.raises(PoolFullError):
            memory = place.sparse(_SIZE * _BLOCK, reserved=reserved * _BLOCK, limit=limit * _BLOCK)
            self.members.append(_Member(memory, {}, reserved, limit))

    @precondition(lambda self: self.members)
    @rule(data=st.data(), spans=st.lists(_spans, min_size=1, max_size=3), byte=st.integers(1, 255))
    def populate(self, data: st.DataObject, spans: list[range], byte: int) -> None:
        member = data.draw(st.sampled_from(self.members))
        new = {number for span in spans for number in span} - set(member.blocks)
        after = len(member.blocks) + len(new)
        others = self._taken() - max(len(member.blocks), member.reserved)
        possible = not new or (after <= member.limit and others + max(after, member.reserved) <= _CAPACITY)
        with contextlib.nullcontext() if possible else pytest.raises(PoolFullError):
            if len(spans) == 1:
                member.memory.populate(spans[0].start * _BLOCK, len(spans[0]) * _BLOCK)
            else:
                member.memory.populate_many([(span.start * _BLOCK, len(span) * _BLOCK) for span in spans])
            for number in new:
                assert member.memory.read(number * _BLOCK, _BLOCK) == bytes(_BLOCK)
                member.memory.write(number * _BLOCK, bytes([byte]) * _BLOCK)
                member.blocks[number] = byte

    @precondition(lambda self: self.members)
    @rule(data=st.data(), span=_spans)
    def discard(self, data: st.DataObject, span: range) -> None:
        member = data.draw(st.sampled_from(self.members))
        member.memory.discard(span.start * _BLOCK, len(span) * _BLOCK)
        for number in span:
            member.blocks.pop(number, None)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.members))
        member.memory.close()
        self.members.remove(member)

    @invariant()
    def agree(self) -> None:
        statistics = self.pool.statistics()
        assert sorted((member.charged, member.allocated_bytes) for member in statistics.members) == sorted(
            (len(member.blocks) * _BLOCK, len(member.blocks) * _BLOCK) for member in self.members
        )
        assert statistics.available == (_CAPACITY - self._taken()) * _BLOCK
        for member in self.members:
            fd = member.memory.fd
            assert fd is not None
            assert os.fstat(fd).st_blocks * 512 == len(member.blocks) * _BLOCK
            for number, byte in member.blocks.items():
                assert os.pread(fd, _BLOCK, number * _BLOCK) == bytes([byte]) * _BLOCK


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.stress
def test_the_pool_for_ten_thousand_steps() -> None:
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
