"""Reservations of many objects without deadlock: wait-die tickets, as the kernel's ww_mutex of ``dma_resv``.

A task takes a *ticket* and reserves objects with it, in any order. Tickets are numbered: the smaller number is the older
ticket. Where two want what the other has, the younger one *backs off*: it releases everything and begins again, with its old
number, until it is the oldest and gets all: the class Wait-Die of Documentation/locking/ww-mutex-design.rst, to which
``reservation_ww_class`` belongs.

This is a state machine without a thread and without a clock. :meth:`Reservations.acquire` never blocks: a task that has to
wait asks again.
"""

from __future__ import annotations

import enum
from bisect import insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field


class Outcome(enum.Enum):
    """Answer to a request for a reservation."""

    GRANTED = "granted"
    WAIT = "wait"
    """Another ticket has the object. Ask again: the request keeps its place in the queue."""
    BACK_OFF = "back off"
    """EDEADLK of ww_mutex_lock(): an older ticket has the object or waits for it. Release everything, then ask again."""


class ReservationError(Exception):
    """Request that no correct task makes: a reservation twice, a ticket out of order, a release of what is not held."""


@dataclass(slots=True)
class Ticket:
    """Context of a task that reserves several objects (``struct ww_acquire_ctx``).

    Attributes:
        number: age; the smaller one is the older one.
        owner: task that has the ticket; with its end, everything is released.
        held: objects that are reserved, in the order of their reservation.
        waits_for: the object that the ticket waits for.
        must_back_off: the ticket may reserve nothing before it has released everything.
        done: everything that the task wants is reserved: nothing more may be asked for (ww_acquire_done()).
        backoffs: number of times that it was told to back off.
    """

    number: int
    owner: Hashable
    held: list[Hashable] = field(default_factory=list)
    waits_for: Hashable | None = None
    must_back_off: bool = False
    done: bool = False
    backoffs: int = 0


class Reservations:
    """Reservation locks of objects. Objects and owners are any hashable values.

    Args:
        first: the number of the first ticket.
    """

    def __init__(self, first: int = 1) -> None:
        self.tickets: dict[int, Ticket] = {}
        self._next = first
        self._holder: dict[Hashable, int] = {}
        self._queue: dict[Hashable, list[int]] = {}

    # --- tickets

    def begin(self, owner: Hashable) -> Ticket:
        """Make a ticket, younger than all before (ww_acquire_init())."""
        ticket = Ticket(self._next, owner)
        self._next += 1
        self.tickets[ticket.number] = ticket
        return ticket

    def ticket(self, number: int, owner: Hashable) -> Ticket:
        """Return the ticket with a number; ReservationError if there is none, or another task has it."""
        ticket = self.tickets.get(number)
        if ticket is None or ticket.owner != owner:
            raise ReservationError(f"there is no ticket {number}: begin one, and use it until its end only")
        return ticket

    def done(self, ticket: Ticket) -> None:
        """Declare that the ticket asks for nothing more (ww_acquire_done())."""
        if ticket.waits_for is not None or ticket.must_back_off:
            raise ReservationError(f"ticket {ticket.number} has not got everything yet: it waits, or has to back off")
        ticket.done = True

    def end(self, ticket: Ticket) -> None:
        """Forget a ticket that holds nothing (ww_acquire_fini()).

        Raises:
            ReservationError: it holds something.
        """
        if ticket.held:
            raise ReservationError(f"ticket {ticket.number} still has {len(ticket.held)} reservations: release them first")
        self._stop_waiting(ticket)
        del self.tickets[ticket.number]

    # --- reservations

    def acquire(self, ticket: Ticket, thing: Hashable) -> Outcome:
        """Reserve an object, or say that the ticket has to wait or to back off (ww_mutex_lock()).

        Raises:
            ReservationError: the ticket has it already (EALREADY), waits for another one, was told to back off and still
                holds something, or is done.
        """
        number = ticket.number
        if self._holder.get(thing) == number:
            raise ReservationError(f"ticket {number} has {thing} reserved already")
        if ticket.done:
            raise ReservationError(f"ticket {number} is out of order: it was declared done, and asks for {thing}")
        if ticket.must_back_off:
            raise ReservationError(
                f"ticket {number} is out of order: told to back off, it has to release its {len(ticket.held)} reservations"
            )
        if ticket.waits_for not in (None, thing):
            raise ReservationError(f"ticket {number} is out of order: it waits for {ticket.waits_for}, and asks for {thing}")
        queue = self._queue.get(thing, [])
        if thing not in self._holder and (not queue or queue[0] >= number):
            self._stop_waiting(ticket)
            self._holder[thing] = number
            ticket.held.append(thing)
            return Outcome.GRANTED
        ahead = [self._holder[thing]] if thing in self._holder else []
        ahead += [other for other in queue if other < number]
        # A ticket that holds nothing keeps no other from going on: it may wait for older ones.
        if ticket.held and any(other < number for other in ahead):
            return self._back_off(ticket)
        if ticket.waits_for is None:
            ticket.waits_for = thing
            insort(self._queue.setdefault(thing, []), number)
        return Outcome.WAIT

    def try_acquire(self, ticket: Ticket, thing: Hashable) -> bool:
        """Reserve an object if it is free; never wait or back off (ww_mutex_trylock())."""
        if thing in self._holder:
            return False
        self._holder[thing] = ticket.number
        ticket.held.append(thing)
        return True

    def release(self, ticket: Ticket, thing: Hashable) -> None:
        """Release a reservation.

        Raises:
            ReservationError: the ticket does not have it.
        """
        if self._holder.get(thing) != ticket.number:
            raise ReservationError(f"ticket {ticket.number} does not have {thing} reserved: nothing to release")
        del self._holder[thing]
        ticket.held.remove(thing)
        if not ticket.held:
            ticket.must_back_off = False

    def holder(self, thing: Hashable) -> Ticket | None:
        """Return the ticket that has an object, if any."""
        number = self._holder.get(thing)
        return None if number is None else self.tickets[number]

    def release_owner(self, owner: Hashable) -> list[Hashable]:
        """Release everything of a task that is gone, and forget its tickets; return the objects."""
        released: list[Hashable] = []
        for ticket in [ticket for ticket in self.tickets.values() if ticket.owner == owner]:
            released += ticket.held
            for thing in list(ticket.held):
                self.release(ticket, thing)
            self.end(ticket)
        return released

    def forget(self, thing: Hashable) -> None:
        """Forget an object that is deleted: no ticket has it or waits for it any more."""
        holder = self.holder(thing)
        if holder is not None:
            self.release(holder, thing)
        for number in self._queue.pop(thing, []):
            self.tickets[number].waits_for = None

    def restore(self, tickets: Iterable[tuple[int, Hashable, Iterable[Hashable]]]) -> None:
        """Enter tickets of a former run: number, owner, and what each holds. Those that waited ask again."""
        for number, owner, held in tickets:
            ticket = self.tickets[number] = Ticket(number, owner)
            self._next = max(self._next, number + 1)
            for thing in held:
                if not self.try_acquire(ticket, thing):
                    raise ReservationError(f"{thing} is reserved by ticket {self._holder[thing]} and by ticket {number}")

    # --- waiting

    def _back_off(self, ticket: Ticket) -> Outcome:
        self._stop_waiting(ticket)
        ticket.must_back_off = bool(ticket.held)
        ticket.backoffs += 1
        return Outcome.BACK_OFF

    def _stop_waiting(self, ticket: Ticket) -> None:
        if ticket.waits_for is None:
            return
        queue = self._queue[ticket.waits_for]
        queue.remove(ticket.number)
        if not queue:
            del self._queue[ticket.waits_for]
        ticket.waits_for = None
