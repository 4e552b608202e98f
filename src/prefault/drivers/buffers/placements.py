"""Placements of buffer objects: capacities, least recently used order with priorities, pins, and plans that make room.

The roles of ``ttm_resource_manager``, ``ttm_lru_bulk_move`` and ``ttm_bo_validate()``. A plan is made on a copy of the
accounts: if no plan leads to room, nothing has changed.
"""

from __future__ import annotations

import copy
import enum
import errno
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prefault.drivers.buffers.buddy import Block, BuddyAllocator, NoRoomError, check_alignment
from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.sizes import PAGE_SIZE, format_size

PRIORITIES = 4
"""Number of priorities (TTM_MAX_BO_PRIORITY): objects of priority 0 are evicted first."""


class Placement(enum.StrEnum):
    """Place of a buffer object's content."""

    VRAM = "vram"
    SYSTEM = "system"
    SWAP = "swap"
    """In the swap file; the next fault brings it back into an allowed placement."""


@dataclass(slots=True)
class Resource:
    """Buffer object as the placements see it.

    Attributes:
        name: of the object.
        size: in bytes, as asked for.
        allowed: VRAM and SYSTEM, in the order of preference.
        alignment: of its blocks in VRAM, in bytes.
        contiguous: its memory in VRAM is one piece.
        priority: 0 to 3; a lower one is evicted earlier.
        placement: where it is.
        blocks: its memory in VRAM.
        pins: number of pins; a pinned object stays where it is.
        purgeable: its user does not need the content (madvise "dontneed").
    """

    name: str
    size: int
    allowed: tuple[Placement, ...]
    alignment: int = PAGE_SIZE
    contiguous: bool = False
    priority: int = 0
    placement: Placement | None = None
    blocks: list[Block] = field(default_factory=list)
    pins: int = 0
    purgeable: bool = False

    @property
    def charge(self) -> int:
        """Bytes that it takes in SYSTEM and in the swap file: whole pages."""
        return self.size + -self.size % PAGE_SIZE


class Step(NamedTuple):
    """Change of one object's placement.

    Attributes:
        name: of the object.
        source: where it is; None: nowhere yet.
        target: where it goes; None: it is purged.
    """

    name: str
    source: Placement | None
    target: Placement | None


class Placements:
    """Accounts of VRAM, SYSTEM and the swap file, and the order in which objects leave them.

    Args:
        vram: capacity in bytes; 0: there is none.
        system: capacity in bytes.
        swap: capacity in bytes; 0: nothing is swapped out.

    Raises:
        ValueError: a capacity is negative or not whole pages, or VRAM and SYSTEM both have none.
    """

    def __init__(self, vram: int, system: int, swap: int = 0) -> None:
        for name, capacity in (("vram", vram), ("system", system), ("swap", swap)):
            if capacity < 0 or capacity % PAGE_SIZE:
                raise ValueError(f"the capacity of {name} is a multiple of {PAGE_SIZE} bytes, not {capacity}")
        if not vram and not system:
            raise ValueError("VRAM and SYSTEM both have a capacity of 0: give one of them room for objects")
        self.capacity = {Placement.VRAM: vram, Placement.SYSTEM: system, Placement.SWAP: swap}
        self.used = dict.fromkeys(Placement, 0)
        self.vram = BuddyAllocator(vram) if vram else None
        self.resources: dict[str, Resource] = {}
        # A dict keeps the order in which names were entered: the first one is the least recently used.
        self._lru: dict[tuple[Placement, int], dict[str, None]] = {
            (placement, priority): {} for placement in Placement for priority in range(PRIORITIES)
        }

    # --- objects

    def add(self, resource: Resource) -> None:
        """Enter an object that has no placement yet.

        Raises:
            BufferObjectError: EEXIST, EINVAL, or ENOSPC: it is larger than each placement that it allows.
        """
        self.check(resource)
        self.resources[resource.name] = resource

    def check(self, resource: Resource) -> None:
        """Raise BufferObjectError if an object cannot be entered."""
        name, size = resource.name, resource.size
        if name in self.resources:
            raise BufferObjectError(errno.EEXIST, f"there is an object {name!r} already")
        if size <= 0:
            raise BufferObjectError(errno.EINVAL, f"an object has at least one byte, not {size}")
        if not 0 <= resource.priority < PRIORITIES:
            raise BufferObjectError(errno.EINVAL, f"a priority is 0 to {PRIORITIES - 1}, not {resource.priority}")
        try:
            check_alignment(resource.alignment)
        except ValueError as error:
            raise BufferObjectError(errno.EINVAL, str(error)) from None
        self._check_allowed(resource, resource.allowed)
        if len(set(resource.allowed)) < len(resource.allowed):
            raise BufferObjectError(errno.EINVAL, f"a placement is listed twice: {', '.join(resource.allowed)}")

    def remove(self, name: str) -> None:
        """Forget an object, and free what it takes."""
        self._set(self.resources[name], None)
        del self.resources[name]

    def restore(self, resource: Resource) -> None:
        """Enter an object with the placement that it had before a restart."""
        self.resources[resource.name] = resource
        placement, blocks = resource.placement, resource.blocks
        resource.placement, resource.blocks = None, []
        if placement is Placement.VRAM and self.vram is not None:
            self.vram.take(blocks, resource.size)
        self._enter(resource, placement, blocks)

    def touch(self, name: str) -> None:
        """Make an object the most recently used one of its placement and priority."""
        resource = self.resources[name]
        if resource.placement is not None and not resource.pins:
            order = self._lru[resource.placement, resource.priority]
            del order[name]
            order[name] = None

    def pin(self, name: str) -> None:
        """Pin an object: it stays where it is until it is unpinned as often."""
        resource = self.resources[name]
        if resource.placement in (None, Placement.SWAP):
            raise BufferObjectError(errno.EINVAL, f"{name!r} is in no memory: place it before you pin it")
        self._leave_lru(resource)
        resource.pins += 1

    def unpin(self, name: str) -> None:
        """Remove a pin."""
        resource = self.resources[name]
        if not resource.pins:
            raise BufferObjectError(errno.EINVAL, f"{name!r} is not pinned")
        resource.pins -= 1
        self._enter_lru(resource)

    def order(self, placement: Placement) -> Iterator[str]:
        """Yield the objects of a placement that may be evicted, in the order in which they are."""
        for priority in range(PRIORITIES):
            yield from self._lru[placement, priority]

    # --- plans

    def plan(self, name: str, wanted: Sequence[Placement] | None = None, busy: Collection[str] = ()) -> list[Step]:
        """Return the steps that bring an object into a placement, in the order in which they are to be taken.

        Free room in any of the placements comes before room that others have to leave (as in ttm_bo_validate()). Objects
        that may be purged leave first, then those of the lowest priority that were not used for the longest time.

        Args:
            name: of the object.
            wanted: placements in the order of preference, of those that it allows; None: all of these.
            busy: objects that may not be moved now, since they are reserved.

        Returns:
            The steps; the last one is that of the object itself. None at all if it is in a wanted placement.

        Raises:
            BufferObjectError: EINVAL: a placement is not allowed. EBUSY: the object is pinned elsewhere. ENOSPC: no plan.
        """
        resource = self.resources[name]
        targets = resource.allowed if wanted is None else tuple(wanted)
        self._check_allowed(resource, targets)
        if resource.placement in targets:
            return []
        if resource.pins:
            raise BufferObjectError(errno.EBUSY, f"{name!r} is pinned in {resource.placement}: unpin it before it is moved")
        for evicting in (False, True):
            for target in targets:
                trial = copy.deepcopy(self)
                steps = trial._try(name, target, {*busy, name} if evicting else None)
                if steps is not None:
                    return steps
        raise BufferObjectError(errno.ENOSPC, self._no_room(resource, targets, busy))

    def plan_leave(self, name: str, busy: Collection[str] = ()) -> list[Step]:
        """Return the steps that bring an object from VRAM to SYSTEM, or from SYSTEM into the swap file.

        Args:
            name: of the object.
            busy: objects that may not be moved now, since they are reserved.

        Raises:
            BufferObjectError: EBUSY: it is pinned. ENOSPC: there is no room.
        """
        resource = self.resources[name]
        if resource.pins:
            raise BufferObjectError(errno.EBUSY, f"{name!r} is pinned in {resource.placement}: it cannot be evicted")
        trial = copy.deepcopy(self)
        steps = trial._leave(name, {*busy, name}, purge=False)
        if steps is None:
            raise BufferObjectError(
                errno.ENOSPC,
                f"no room for the {format_size(resource.charge)} of {name!r} elsewhere: {self._rooms(tuple(Placement))};"
                f" {len({*busy} - {name})} of the other objects are reserved, which stay where they are",
            )
        return steps

    def commit(self, step: Step) -> None:
        """Enter a step that was taken into the accounts.

        Raises:
            BufferObjectError: ENOSPC: the room is gone; nothing has changed.
        """
        resource = self.resources[step.name]
        if not self._fits(resource, step.target):
            raise BufferObjectError(errno.ENOSPC, f"no room for {step.name!r} in {step.target} any more")

    def _try(self, name: str, target: Placement, busy: set[str] | None) -> list[Step] | None:
        """Take the steps that bring an object to a target; return None if they do not. ``busy`` None: no other leaves."""
        resource = self.resources[name]
        last, steps = Step(name, resource.placement, target), list[Step]()
        if self._fits(resource, target):
            return [last]
        if busy is None or resource.charge > self.capacity[target]:
            return None
        for victim in self._victims(target, busy):
            left = self._leave(victim, busy, purge=True)
            if left is None:
                continue
            steps += left
            if self._fits(resource, target):
                return [*steps, last]
        return None

    def _victims(self, placement: Placement, busy: Collection[str]) -> list[str]:
        order = [name for name in self.order(placement) if name not in busy]
        purgeable = [name for name in order if self.resources[name].purgeable]
        return purgeable + [name for name in order if not self.resources[name].purgeable]

    def _leave(self, name: str, busy: set[str], *, purge: bool) -> list[Step] | None:
        """Take the steps by which an object leaves its placement; return None if it cannot."""
        resource, source = self.resources[name], self.resources[name].placement
        if purge and resource.purgeable:
            self._set(resource, None)
            return [Step(name, source, None)]
        if source is Placement.VRAM and Placement.SYSTEM in resource.allowed:
            steps = self._try(name, Placement.SYSTEM, {*busy, name})
            if steps is not None:
                return steps
        if self._fits(resource, Placement.SWAP):
            return [Step(name, source, Placement.SWAP)]
        return None

    # --- accounts

    def _fits(self, resource: Resource, target: Placement | None) -> bool:
        """Move an object to a target if there is room."""
        blocks: list[Block] = []
        if target is Placement.VRAM:
            try:
                if self.vram is None:
                    return False
                blocks = self.vram.allocate(resource.size, resource.alignment, contiguous=resource.contiguous)
            except NoRoomError:
                return False
        elif target is not None and self.used[target] + resource.charge > self.capacity[target]:
            return False
        self._set(resource, target, blocks)
        return True

    def _set(self, resource: Resource, target: Placement | None, blocks: Sequence[Block] = ()) -> None:
        source = resource.placement
        self._leave_lru(resource)
        if source is Placement.VRAM and self.vram is not None:
            self.used[source] -= sum(block.size for block in resource.blocks)
            self.vram.release(resource.blocks)
        elif source is not None:
            self.used[source] -= resource.charge
        self._enter(resource, target, blocks)

    def _enter(self, resource: Resource, target: Placement | None, blocks: Sequence[Block]) -> None:
        resource.placement, resource.blocks = target, list(blocks)
        if target is not None:
            self.used[target] += sum(block.size for block in blocks) if target is Placement.VRAM else resource.charge
        self._enter_lru(resource)

    def _enter_lru(self, resource: Resource) -> None:
        if resource.placement is not None and not resource.pins:
            self._lru[resource.placement, resource.priority][resource.name] = None

    def _leave_lru(self, resource: Resource) -> None:
        if resource.placement is not None:
            self._lru[resource.placement, resource.priority].pop(resource.name, None)

    # --- errors

    def _check_allowed(self, resource: Resource, targets: Sequence[Placement]) -> None:
        if not targets:
            raise BufferObjectError(errno.EINVAL, f"{resource.name!r} needs a placement at least: vram, system, or both")
        for target in targets:
            if target is Placement.SWAP or target not in resource.allowed:
                allowed = ", ".join(resource.allowed)
                raise BufferObjectError(
                    errno.EINVAL, f"{target} is not a placement of {resource.name!r}: it allows {allowed}"
                )
        if all(resource.charge > self.capacity[target] for target in targets):
            raise BufferObjectError(
                errno.ENOSPC,
                f"{resource.name!r} has {format_size(resource.size)}, more than each placement that it allows:"
                f" {self._rooms(targets)}",
            )

    def _rooms(self, targets: Sequence[Placement]) -> str:
        left = {target: self.capacity[target] - self.used[target] for target in targets}
        return ", ".join(f"{at} has {format_size(self.capacity[at])}, {format_size(free)} free" for at, free in left.items())

    def _no_room(self, resource: Resource, targets: Sequence[Placement], busy: Collection[str]) -> str:
        there = [other for other in self.resources.values() if other.placement in targets]
        pinned = sum(other.charge for other in there if other.pins)
        reserved = sum(other.charge for other in there if not other.pins and other.name in busy)
        return (
            f"no room for the {format_size(resource.size)} of {resource.name!r}: {self._rooms(targets)};"
            f" {format_size(pinned)} are pinned, {format_size(reserved)} are reserved, and the rest has nowhere to go"
        )
