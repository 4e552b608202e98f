"""The ledger of a pool against a model that adds up everything each time."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefault import PAGE_SIZE, PageRange, RangeSet
from prefault.errors import PoolFullError
from prefault.pool.block_charges import BlockCharges
from prefault.pool.block_charges import PoolAccount as Remote
from prefault.pool.ledger import Ledger, MemberAccount

_CAPACITY = 24


class _Share(NamedTuple):
    charged: int
    reserved: int
    limit: int | None


class _Model:
    """Every member's share; a step is allowed if all promises can be kept after it."""

    def __init__(self, capacity: int, mark: int) -> None:
        self.capacity, self.mark = capacity, mark
        self.shares: dict[int, _Share] = {}
        self.peak = 0

    def charged(self) -> int:
        return sum(share.charged for share in self.shares.values())

    def sound(self, shares: dict[int, _Share]) -> bool:
        if any(share.limit is not None and share.charged > share.limit for share in shares.values()):
            return False
        return sum(max(share.charged, share.reserved) for share in shares.values()) <= self.capacity

    def put(self, member: int, share: _Share) -> bool | None:
        """None: refused; else whether the mark was crossed upward."""
        after = self.shares | {member: share}
        grows = member not in self.shares or share.charged > self.shares[member].charged
        if grows and not self.sound(after):
            return None
        before = self.charged()
        self.shares = after
        self.peak = max(self.peak, self.charged())
        return before < self.mark <= self.charged()


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(_CAPACITY, high_water=18)
        self.model = _Model(_CAPACITY, 18)
        self.number = 0

    @rule(reserved=st.integers(0, 12), above=st.none() | st.integers(1, 12))
    def open(self, reserved: int, above: int | None) -> None:
        self.number += 1
        limit = None if above is None else reserved + above
        if self.model.put(self.number, _Share(0, reserved, limit)) is None:
            with pytest.raises(PoolFullError):
                self.ledger.open(self.number, MemberAccount("m", 0, reserved, limit))
        else:
            self.ledger.open(self.number, MemberAccount("m", 0, reserved, limit))

    @precondition(lambda self: self.model.shares)
    @rule(data=st.data(), charged=st.integers(0, _CAPACITY + 2))
    def settle(self, data: st.DataObject, charged: int) -> None:
        member = data.draw(st.sampled_from(sorted(self.model.shares)))
        crossed = self.model.put(member, self.model.shares[member]._replace(charged=charged))
        if crossed is None:
            with pytest.raises(PoolFullError):
                self.ledger.settle(member, charged)
        else:
            assert self.ledger.settle(member, charged) is crossed

    @precondition(lambda self: self.model.shares)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.model.shares)))
        self.ledger.close(member)
        del self.model.shares[member]

    @invariant()
    def agree(self) -> None:
        shares = self.model.shares.values()
        assert self.ledger.charged == self.model.charged()
        assert self.ledger.reserved_free == sum(max(0, share.reserved - share.charged) for share in shares)
        assert self.ledger.available == _CAPACITY - sum(max(share.charged, share.reserved) for share in shares) >= 0
        assert self.ledger.peak == self.model.peak
        assert len(self.ledger) == len(shares)
        for member, share in self.model.shares.items():
            account = self.ledger[member]
            assert (account.charged, account.reserved, account.limit) == share


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.stress
def test_the_ledger_for_long() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(LedgerMachine, settings=settings(max_examples=1000, stateful_step_count=60, deadline=None))


@given(st.lists(st.integers(0, 8), min_size=2, max_size=6), st.integers(0, 1 << 30))
def test_every_promise_can_be_kept_whatever_the_others_do(reserved: list[int], seed: int) -> None:
    ledger = Ledger(40)
    members = []
    for number, promise in enumerate(reserved):
        if promise <= ledger.available:
            ledger.open(number, MemberAccount("m", 0, promise, None))
            members.append(number)
    rng = random.Random(seed)
    for _ in range(30):
        try:
            ledger.settle(rng.choice(members), rng.randrange(40))
        except PoolFullError:
            continue
    for number in members:
        ledger.settle(number, max(ledger[number].charged, ledger[number].reserved))


def test_the_refusal_names_all_numbers() -> None:
    ledger = Ledger(100 << 20)
    ledger.open(1, MemberAccount("guest", 0, 0, 64 << 20))
    ledger.open(2, MemberAccount("cache", 0, 30 << 20, None))
    ledger.settle(1, 60 << 20)
    with pytest.raises(PoolFullError) as limit:
        ledger.settle(1, 70 << 20)
    assert "guest needs 10.0 MiB more, beyond its limit of 64.0 MiB, of which 60.0 MiB are charged" in str(limit.value)
    with pytest.raises(PoolFullError) as full:
        ledger.settle(2, 50 << 20)
    assert str(full.value).startswith(
        "cache (with no limit of its own) needs 50.0 MiB more: of a capacity of 100.0 MiB, 60.0 MiB are charged (0 bytes to"
        " cache), which leaves 10.0 MiB, 30.0 MiB for itself; discard, close members or make the pool larger"
    )
    ledger.open(3, MemberAccount("third", 0, 0, None))
    with pytest.raises(PoolFullError, match=r"30\.0 MiB are reserved for others, which leaves 10\.0 MiB; discard"):
        ledger.settle(3, 20 << 20)
    with pytest.raises(PoolFullError, match=r"cannot reserve 11\.0 MiB for fourth: .* leaves 10\.0 MiB"):
        ledger.open(4, MemberAccount("fourth", 0, 11 << 20, None))
    assert full.value.populated_bytes == 0
    assert len(ledger) == 3


# --- which blocks


class _Paper(Remote):
    """An account that a limit is written on."""

    def __init__(self, limit: int) -> None:
        self.limit, self.charged, self.closed = limit, 0, 0

    def settle(self, charged: int) -> None:
        if charged > self.limit:
            raise PoolFullError(28, "full")
        self.charged = charged

    def close(self) -> None:
        self.closed += 1


_BLOCK = 2 * PAGE_SIZE
_BLOCKS = 20


def _set(numbers: set[int]) -> RangeSet:
    return RangeSet(PageRange(number * _BLOCK, (number + 1) * _BLOCK) for number in numbers)


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, _BLOCKS - 1))), max_size=20))
def test_blocks_against_a_set_of_numbers(steps: list[tuple[bool, set[int]]]) -> None:
    paper = _Paper(12 * _BLOCK)
    member = BlockCharges(paper, _BLOCKS * _BLOCK, _BLOCK, "m")
    model: set[int] = set()
    for charging, numbers in steps:
        if not charging:
            member.refund(_set(numbers))
            model -= numbers
        elif len(model | numbers) > 12:
            with pytest.raises(PoolFullError):
                member.charge(_set(numbers))
        else:
            assert member.charge(_set(numbers)) == _set(numbers - model)
            model |= numbers
        assert member.charged == paper.charged == len(model) * _BLOCK
    assert member.charge(_set(model)) == RangeSet()


def test_an_interrupted_charge_is_rolled_back() -> None:
    class Interrupted(_Paper):
        def settle(self, charged: int) -> None:
            super().settle(charged)
            if charged == _BLOCK and not self.closed:
                self.closed = 1
                raise KeyboardInterrupt

    paper = Interrupted(1 << 30)
    member = BlockCharges(paper, _BLOCKS * _BLOCK, _BLOCK, "m")
    with pytest.raises(KeyboardInterrupt):
        member.charge(_set({3}))
    assert member.charged == paper.charged == 0
    assert member.charge(_set({3})) == _set({3})


def test_a_closed_member() -> None:
    paper = _Paper(1 << 30)
    member = BlockCharges(paper, _BLOCKS * _BLOCK, _BLOCK, "guest")
    member.charge(_set({1}))
    member.close()
    member.close()
    assert paper.closed == 1
    member.refund(_set({1}))
    assert paper.charged == _BLOCK  # nothing is said of an account that is closed
    with pytest.raises(ValueError, match="guest is closed"):
        member.charge(_set({2}))
