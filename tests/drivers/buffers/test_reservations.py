"""The tickets, checked exhaustively: 3 tasks, 3 objects, each order of requests, all interleavings, and a death anywhere."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from prefault.drivers.buffers.reservations import Outcome, ReservationError, Reservations, Ticket

_OBJECTS = ("a", "b", "c")


class Task(NamedTuple):
    """A task that wants all of its objects, in an order; ``phase``: lock, back_off, unlock, over or dead."""

    order: tuple[str, ...]
    held: tuple[str, ...] = ()
    phase: str = "lock"


class State(NamedTuple):
    """All tasks, and what the reservations remember: tickets that must back off, and what each waits for."""

    tasks: tuple[Task, ...]
    must_back_off: tuple[bool, ...]
    waits_for: tuple[str | None, ...]


def _rebuild(state: State) -> Reservations:
    """Put the code under test into a state."""
    found = Reservations()
    for index, task in enumerate(state.tasks):
        if task.phase in ("over", "dead"):
            continue
        ticket = found.tickets[index] = Ticket(index, f"task {index}")
        for thing in task.held:
            assert found.try_acquire(ticket, thing)
        ticket.must_back_off = state.must_back_off[index]
        wanted = state.waits_for[index]
        if wanted is not None:
            ticket.waits_for = wanted
            found._queue[wanted] = sorted([*found._queue.get(wanted, []), index])
    return found


def _read(tasks: tuple[Task, ...], found: Reservations) -> State:
    tickets = [found.tickets.get(index) for index in range(len(tasks))]
    return State(
        tasks, tuple(ticket is not None and ticket.must_back_off for ticket in tickets),
        tuple(None if ticket is None else ticket.waits_for for ticket in tickets),  # type: ignore[misc]
    )  # fmt: skip


def _step(state: State, index: int) -> State:
    """Let a task do one thing."""
    found, task = _rebuild(state), state.tasks[index]
    ticket = found.tickets[index]
    if task.phase == "lock":
        left = [thing for thing in task.order if thing not in task.held]
        outcome = found.acquire(ticket, left[0])
        if outcome is Outcome.GRANTED:
            held = (*task.held, left[0])
            task = task._replace(held=held, phase="unlock" if len(held) == len(task.order) else "lock")
        elif outcome is Outcome.BACK_OFF:
            oldest = min(found.tickets)
            assert index != oldest, "the oldest ticket never backs off: it would starve"
            # What was contended is asked for first, by a ticket that holds nothing (ww_mutex_lock_slow()).
            task = task._replace(order=(left[0], *(thing for thing in task.order if thing != left[0])), phase="back_off")
    else:
        found.release(ticket, task.held[-1])
        task = task._replace(held=task.held[:-1])
        if not task.held and task.phase == "back_off":
            task = task._replace(phase="lock")
        elif not task.held:
            found.end(ticket)
            task = task._replace(phase="over")
    return _read((*state.tasks[:index], task, *state.tasks[index + 1 :]), found)


def _die(state: State, index: int) -> State:
    found, task = _rebuild(state), state.tasks[index]
    assert sorted(map(str, found.release_owner(f"task {index}"))) == sorted(task.held)
    task = task._replace(held=(), phase="dead")
    return _read((*state.tasks[:index], task, *state.tasks[index + 1 :]), found)


def _explore(orders: tuple[tuple[str, ...], ...], *, deaths: bool) -> tuple[int, int]:
    """Visit every state that can be reached; return their number, and that of states with a task told to back off."""
    first = State(tuple(Task(order) for order in orders), (False,) * len(orders), (None,) * len(orders))
    before: dict[State, set[State]] = {first: set()}
    ends, left, backing_off = [], [first], 0
    while left:
        state = left.pop()
        held = [thing for task in state.tasks for thing in task.held]
        assert len(held) == len(set(held)), f"mutual exclusion: {state}"
        backing_off += any(state.must_back_off)
        alive = [index for index, task in enumerate(state.tasks) if task.phase not in ("over", "dead")]
        after = {_step(state, index) for index in alive}
        if alive:
            assert after != {state}, f"deadlock: {state}"
        else:
            ends.append(state)
        if deaths and not any(task.phase == "dead" for task in state.tasks):
            after |= {_die(state, index) for index in alive}
        for new in after:
            if new not in before:
                before[new] = set()
                left.append(new)
            before[new].add(state)
    # Progress: from each state an end is reached.
    reaching, left = set(ends), list(ends)
    while left:
        for state in before[left.pop()]:
            if state not in reaching:
                reaching.add(state)
                left.append(state)
    assert reaching == set(before), "livelock"
    return len(before), backing_off


def test_three_tasks_of_three_objects_in_all_interleavings() -> None:
    total = backing_off = 0
    orders = list(itertools.permutations(_OBJECTS))
    for second, third in itertools.product(orders, orders):  # the order of the first task is a matter of names
        states, backoffs = _explore((_OBJECTS, second, third), deaths=False)
        total, backing_off = total + states, backing_off + backoffs
    assert total > 10_000
    assert backing_off > 1000


@pytest.mark.parametrize("orders", [("abc", "cba", "bca"), ("ab", "bc", "ca"), ("abc", "abc", "abc"), ("a", "ba", "cab")])
def test_a_task_that_dies_anywhere_stops_no_other(orders: tuple[str, ...]) -> None:
    _explore(tuple(tuple(order) for order in orders), deaths=True)


def test_the_younger_ticket_backs_off_and_the_older_waits() -> None:
    locks = Reservations()
    old, young = locks.begin("one"), locks.begin("two")
    assert locks.acquire(old, "a") is Outcome.GRANTED
    assert locks.acquire(young, "b") is Outcome.GRANTED
    assert locks.acquire(young, "a") is Outcome.BACK_OFF
    assert (young.backoffs, young.must_back_off) == (1, True)
    assert locks.acquire(old, "b") is Outcome.WAIT
    assert locks.acquire(old, "b") is Outcome.WAIT, "asking again changes nothing"
    locks.release(young, "b")
    assert locks.acquire(young, "b") is Outcome.WAIT, "the older one waits for it"
    assert locks.acquire(old, "b") is Outcome.GRANTED
    assert old.backoffs == 0
    for thing in ("a", "b"):
        locks.release(old, thing)
    locks.end(old)
    assert locks.acquire(young, "b") is Outcome.GRANTED


def test_a_ticket_that_holds_nothing_waits_for_an_older_one() -> None:
    locks = Reservations()
    old, young = locks.begin("one"), locks.begin("two")
    locks.acquire(old, "a")
    assert locks.acquire(young, "a") is Outcome.WAIT
    assert locks.holder("a") is old
    locks.release(old, "a")
    assert locks.acquire(young, "a") is Outcome.GRANTED


def test_a_ticket_backs_off_at_once_if_an_older_one_waits_already() -> None:
    locks = Reservations()
    old, middle, young = (locks.begin(owner) for owner in ("one", "two", "three"))
    locks.acquire(young, "a")
    locks.acquire(old, "a")
    locks.acquire(middle, "b")
    assert locks.acquire(middle, "a") is Outcome.BACK_OFF, "it would have to when the older one has it"


def test_what_no_correct_task_asks_for() -> None:
    locks = Reservations()
    old, young = locks.begin("one"), locks.begin("two")
    locks.acquire(old, "a")
    with pytest.raises(ReservationError, match="ticket 1 has a reserved already"):
        locks.acquire(old, "a")
    with pytest.raises(ReservationError, match="ticket 1 does not have b reserved"):
        locks.release(old, "b")
    with pytest.raises(ReservationError, match="ticket 2 does not have a reserved"):
        locks.release(young, "a")
    with pytest.raises(ReservationError, match="still has 1 reservations"):
        locks.end(old)
    for number, owner in ((3, "one"), (1, "two"), (0, "one")):
        with pytest.raises(ReservationError, match=f"no ticket {number}"):
            locks.ticket(number, owner)
    assert locks.ticket(1, "one") is old
    locks.done(old)
    with pytest.raises(ReservationError, match="ticket 1 is out of order: it was declared done, and asks for b"):
        locks.acquire(old, "b")
    assert locks.acquire(young, "b") is Outcome.GRANTED
    assert locks.acquire(young, "a") is Outcome.BACK_OFF
    with pytest.raises(ReservationError, match="told to back off, it has to release its 1 reservations"):
        locks.acquire(young, "c")
    with pytest.raises(ReservationError, match="has to back off"):
        locks.done(young)
    locks.release(young, "b")
    assert locks.acquire(young, "a") is Outcome.WAIT
    with pytest.raises(ReservationError, match="it waits for a, and asks for c"):
        locks.acquire(young, "c")
    assert locks.holder("a") is old
    assert locks.holder("c") is None


def test_tickets_survive_a_restart() -> None:
    locks = Reservations()
    locks.restore([(7, "one", ["a", "b"]), (9, "two", [])])
    assert locks.begin("three").number == 10
    assert locks.holder("a") is locks.ticket(7, "one")
    assert locks.acquire(locks.ticket(9, "two"), "a") is Outcome.WAIT
    assert set(locks.release_owner("one")) == {"a", "b"}
    assert locks.acquire(locks.ticket(9, "two"), "a") is Outcome.GRANTED
    with pytest.raises(ReservationError, match="reserved by ticket 9 and by ticket 12"):
        locks.restore([(12, "four", ["a"])])


def test_an_object_that_is_deleted_is_waited_for_no_more() -> None:
    locks = Reservations()
    old, young = locks.begin("one"), locks.begin("two")
    locks.acquire(old, "a")
    locks.acquire(young, "a")
    locks.forget("a")
    assert (old.held, young.waits_for) == ([], None)
    locks.end(old)
    locks.end(young)
    assert not locks.tickets
