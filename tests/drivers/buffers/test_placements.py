"""Placements, order of eviction and pins against a model of plain lists and sums."""

from __future__ import annotations

import copy
import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.drivers.buffers.placements import Placement, Placements, Resource, Step
from prefault.sizes import MIB, PAGE_SIZE

VRAM, SYSTEM, SWAP = Placement.VRAM, Placement.SYSTEM, Placement.SWAP
_UNIT = 2 * MIB
_ALLOWED = [(VRAM,), (SYSTEM,), (VRAM, SYSTEM), (SYSTEM, VRAM)]


class Oracle:
    """The rules in the plainest form: a list of objects, the least recently used one first, and sums of units."""

    def __init__(self, room: dict[Placement, int]) -> None:
        self.room = room
        self.objects: list[dict] = []  # type: ignore[type-arg]

    def find(self, name: str) -> dict:  # type: ignore[type-arg]
        return next(one for one in self.objects if one["name"] == name)

    def free(self, place: Placement) -> int:
        return self.room[place] - sum(int(one["units"]) for one in self.objects if one["place"] is place)

    def to(self, name: str, place: Placement | None) -> None:
        one = self.find(name)
        one["place"] = place
        self.objects.remove(one)
        self.objects.append(one)

    def touch(self, name: str) -> None:
        one = self.find(name)
        if not one["pins"]:
            self.to(name, one["place"])

    def victims(self, place: Placement, busy: set[str]) -> list[str]:
        there = [one for one in self.objects if one["place"] is place and not one["pins"] and one["name"] not in busy]
        return [one["name"] for one in sorted(there, key=lambda one: (not one["purgeable"], one["priority"]))]

    def into(self, name: str, place: Placement, busy: set[str]) -> bool:
        """Bring an object in, with others leaving; the caller forgets what was done if it fails."""
        units = self.find(name)["units"]
        if units > self.room[place]:
            return False
        if self.free(place) < units:
            for victim in self.victims(place, busy):
                self.leave(victim, busy)
                if self.free(place) >= units:
                    break
            else:
                return False
        self.to(name, place)
        return True

    def leave(self, name: str, busy: set[str]) -> None:
        one = self.find(name)
        if one["purgeable"]:
            self.to(name, None)
            return
        if one["place"] is VRAM and SYSTEM in one["allowed"] and self.into(name, SYSTEM, busy | {name}):
            return
        if self.free(SWAP) >= one["units"]:
            self.to(name, SWAP)

    def validate(self, name: str, wanted: tuple[Placement, ...], busy: set[str]) -> bool:
        one = self.find(name)
        for place in wanted:
            if self.free(place) >= one["units"]:
                self.to(name, place)
                return True
        for place in wanted:
            before = copy.deepcopy(self.objects)
            if self.into(name, place, busy | {name}):
                return True
            self.objects = before
        return False


def _has_objects(machine: RuleBasedStateMachine) -> bool:
    return isinstance(machine, Machine) and bool(machine.real.resources)


class Machine(RuleBasedStateMachine):
    real: Placements
    model: Oracle

    @initialize(vram=st.integers(0, 4), system=st.integers(1, 4), swap=st.integers(0, 4))
    def start(self, vram: int, system: int, swap: int) -> None:
        self.real = Placements(vram * _UNIT, system * _UNIT, swap * _UNIT)
        self.model = Oracle({VRAM: vram, SYSTEM: system, SWAP: swap})
        self.count = 0

    @rule(units=st.integers(1, 3), allowed=st.sampled_from(_ALLOWED), priority=st.integers(0, 3))
    def add(self, units: int, allowed: tuple[Placement, ...], priority: int) -> None:
        self.count += 1
        name = f"object {self.count}"
        resource = Resource(name, units * _UNIT, allowed, priority=priority)
        if all(units > self.model.room[place] for place in allowed):
            with pytest.raises(BufferObjectError, match="more than each placement"):
                self.real.add(resource)
            return
        self.real.add(resource)
        self.model.objects.append(
            {
                "name": name,
                "units": units,
                "allowed": allowed,
                "priority": priority,
                "place": None,
                "pins": 0,
                "purgeable": False,
            }
        )

    def names(self) -> list[str]:
        return sorted(self.real.resources)

    @precondition(_has_objects)
    @rule(data=st.data(), busy=st.sets(st.integers(1, 12), max_size=2))
    def validate(self, data: st.DataObject, busy: set[int]) -> None:
        name = data.draw(st.sampled_from(self.names()))
        one = self.model.find(name)
        wanted = data.draw(st.sampled_from([one["allowed"], *[(place,) for place in one["allowed"]]]))
        reserved = {f"object {number}" for number in busy} - {name}
        before = (dict(self.real.used), [self.real.resources[other].placement for other in self.names()])
        if one["place"] in wanted:
            assert self.real.plan(name, wanted, reserved) == []
            return
        try:
            steps = self.real.plan(name, wanted, reserved)
        except BufferObjectError as error:
            assert before == (dict(self.real.used), [self.real.resources[other].placement for other in self.names()])
            if error.errno == errno.EBUSY:
                assert one["pins"]
                return
            if error.errno == errno.ENOSPC:
                trial = copy.deepcopy(self.model)
                assert not trial.validate(name, wanted, reserved)
                return
            raise
        assert not one["pins"]
        assert self.model.validate(name, wanted, reserved)
        for step in steps:
            assert self.real.resources[step.name].placement is step.source
            self.real.commit(step)
            if step.target is None:  # purged: its user is told, and makes it anew
                self.real.resources[step.name].purgeable = False
                self.model.find(step.name)["purgeable"] = False
            assert step.name not in reserved
            assert not self.real.resources[step.name].pins

    @precondition(_has_objects)
    @rule(data=st.data(), what=st.sampled_from(["touch", "pin", "unpin", "purgeable", "needed", "remove"]))
    def change(self, data: st.DataObject, what: str) -> None:
        name = data.draw(st.sampled_from(self.names()))
        one = self.model.find(name)
        if what == "touch":
            self.real.touch(name)
            self.model.touch(name)
        elif what == "pin":
            if one["place"] in (None, SWAP):
                with pytest.raises(BufferObjectError, match="is in no memory"):
                    self.real.pin(name)
                return
            self.real.pin(name)
            one["pins"] += 1
        elif what == "unpin":
            if not one["pins"]:
                with pytest.raises(BufferObjectError, match="is not pinned"):
                    self.real.unpin(name)
                return
            self.real.unpin(name)
            one["pins"] -= 1
            if not one["pins"]:
                self.model.touch(name)
        elif what == "remove":
            self.real.remove(name)
            self.model.objects.remove(one)
        elif one["place"] is not None and not one["pins"]:
            one["purgeable"] = self.real.resources[name].purgeable = what == "purgeable"

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "real"):
            return
        for one in self.model.objects:
            real = self.real.resources[one["name"]]
            assert (real.placement, real.pins) == (one["place"], one["pins"])
        for place in Placement:
            assert self.real.used[place] == (self.model.room[place] - self.model.free(place)) * _UNIT
            assert self.real.used[place] <= self.real.capacity[place]
            waiting = list(self.real.order(place))
            there = [one for one in self.model.objects if one["place"] is place and not one["pins"]]
            assert waiting == [one["name"] for one in sorted(there, key=lambda one: one["priority"])]
        if self.real.vram is not None:
            assert self.real.vram.capacity - self.real.vram.free == self.real.used[VRAM]


Machine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestPlacements = Machine.TestCase


@pytest.mark.stress
def test_placements_for_long() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=1000, stateful_step_count=60, deadline=None))


def _placed(placements: Placements, name: str, size: int, allowed: tuple[Placement, ...] = (VRAM, SYSTEM)) -> None:
    placements.add(Resource(name, size, allowed))
    for step in placements.plan(name):
        placements.commit(step)


def test_free_room_anywhere_comes_before_eviction() -> None:
    placements = Placements(4 * MIB, 8 * MIB)
    _placed(placements, "a", 4 * MIB)
    _placed(placements, "b", 4 * MIB)
    assert [placements.resources[name].placement for name in "ab"] == [VRAM, SYSTEM]
    assert placements.plan("b", [VRAM]) == [Step("a", VRAM, SYSTEM), Step("b", SYSTEM, VRAM)]


def test_c8_what_is_not_needed_is_purged_before_anything_is_evicted() -> None:
    placements = Placements(4 * MIB, 4 * MIB, 4 * MIB)
    _placed(placements, "old", 2 * MIB)
    _placed(placements, "garbage", 2 * MIB)
    placements.resources["garbage"].purgeable = True
    placements.add(Resource("new", 2 * MIB, (VRAM,)))
    assert placements.plan("new") == [Step("garbage", VRAM, None), Step("new", None, VRAM)]


def test_an_eviction_makes_room_in_the_next_placement_as_well() -> None:
    placements = Placements(2 * MIB, 2 * MIB, 2 * MIB)
    _placed(placements, "a", 2 * MIB)
    _placed(placements, "b", 2 * MIB)
    placements.add(Resource("c", 2 * MIB, (VRAM,)))
    assert placements.plan("c") == [Step("b", SYSTEM, SWAP), Step("a", VRAM, SYSTEM), Step("c", None, VRAM)]
    assert placements.plan_leave("b") == [Step("b", SYSTEM, SWAP)]


def test_all_pinned_or_reserved_is_told_with_numbers() -> None:
    placements = Placements(8 * MIB, 2 * MIB, 8 * MIB)
    _placed(placements, "a", 4 * MIB)
    _placed(placements, "b", 4 * MIB)
    placements.pin("a")
    placements.add(Resource("c", 8 * MIB, (VRAM,)))
    with pytest.raises(BufferObjectError, match=r"4\.0 MiB are pinned, 4\.0 MiB are reserved") as caught:
        placements.plan("c", busy=["b"])
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(BufferObjectError, match="pinned in vram") as caught:
        placements.plan_leave("a")
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    ("resource", "number", "message"),
    [
        (Resource("a", MIB, (VRAM,)), errno.EEXIST, "there is an object 'a' already"),
        (Resource("b", 0, (VRAM,)), errno.EINVAL, "at least one byte, not 0"),
        (Resource("b", 100 * MIB, (VRAM, SYSTEM)), errno.ENOSPC, "has 100.0 MiB, more than each placement"),
        (Resource("b", MIB, (VRAM,), alignment=3 * PAGE_SIZE), errno.EINVAL, "power of two"),
        (Resource("b", MIB, ()), errno.EINVAL, "needs a placement"),
        (Resource("b", MIB, (SWAP,)), errno.EINVAL, "swap is not a placement"),
        (Resource("b", MIB, (VRAM, VRAM)), errno.EINVAL, "listed twice"),
        (Resource("b", MIB, (VRAM,), priority=4), errno.EINVAL, "a priority is 0 to 3, not 4"),
    ],
)
def test_bad_objects_are_refused(resource: Resource, number: int, message: str) -> None:
    placements = Placements(4 * MIB, 4 * MIB)
    _placed(placements, "a", MIB)
    with pytest.raises(BufferObjectError, match=message) as caught:
        placements.add(resource)
    assert caught.value.errno == number
    assert list(placements.resources) == ["a"]


def test_a_placement_that_is_not_allowed() -> None:
    placements = Placements(4 * MIB, 4 * MIB)
    _placed(placements, "a", MIB, (VRAM,))
    with pytest.raises(BufferObjectError, match="system is not a placement of 'a': it allows vram"):
        placements.plan("a", [SYSTEM])


@pytest.mark.parametrize("capacities", [(0, 0), (-4096, 4096), (4096, 100), (4096, 4096, 1)])
def test_capacities_are_whole_pages_and_not_all_zero(capacities: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="capacity"):
        Placements(*capacities)


def test_placements_survive_a_restart() -> None:
    placements = Placements(8 * MIB, 8 * MIB, 8 * MIB)
    for name, size in (("a", 3 * MIB + 5), ("b", 5000), ("c", 4 * MIB)):
        _placed(placements, name, size)
    placements.pin("b")
    again = Placements(8 * MIB, 8 * MIB, 8 * MIB)
    for resource in placements.resources.values():
        again.restore(copy.deepcopy(resource))
    assert again.used == placements.used
    assert again.vram is not None
    assert placements.vram is not None
    assert again.vram.fragmentation() == placements.vram.fragmentation()
    assert list(again.order(VRAM)) == list(placements.order(VRAM))
