"""The client side of buffer objects: what libdrm is to a graphics driver."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from prefault.device import Area, DeviceClient
from prefault.device.object_table import encode_object_name
from prefault.drivers.buffers import buffer_messages as messages
from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.drivers.buffers.buffer_messages import (
    AnyReply,
    BufferRequest,
    BufferStatistics,
    Caching,
    Description,
    DirtyRuns,
)
from prefault.drivers.buffers.placements import Placement
from prefault.drivers.client_checks import check_choice, check_client, check_request
from prefault.errors import DeviceError, DeviceGoneError
from prefault.ipc.messages import encode
from prefault.sizes import PAGE_SIZE, Size, parse_size

_Reply = TypeVar("_Reply", bound=AnyReply)
_PAUSE_S = 0.0005
_SERVERS = 3
"""Servers that are asked to end a ticket, each after the death of the one before."""


@dataclass(slots=True)
class Reservation:
    """Objects that a ticket has reserved.

    Attributes:
        ticket: number of the ticket; the smaller one is the older one.
        held: names of the objects, in the order in which they were reserved.
        backoffs: how often the ticket had to release everything and begin again.
    """

    ticket: int
    held: list[str] = field(default_factory=list)
    backoffs: int = 0


class Buffers:
    """Buffer objects of a device: make, map, move, reserve.

    ::

        with prefault.device.open(BufferObjects(vram="64 MiB", system="256 MiB")) as client:
            buffers = Buffers(client)
            buffers.create("frame", "8 MiB")
            with buffers.map("frame") as area:
                ...

    A request that the device refuses raises BufferObjectError with an errno, and has changed nothing. One that is
    interrupted by the death of the server raises :class:`~prefault.DeviceGoneError`: ask :meth:`describe` whether it was
    carried out.

    Args:
        client: connection to the device, by :func:`prefault.device.open` or :func:`prefault.device.connect`.
        timeout: seconds to wait for each reply; None: as long as the driver may take.
    """

    def __init__(self, client: DeviceClient, timeout: float | None = None) -> None:
        check_client("Buffers", client)
        self.client = client
        self.timeout = timeout

    def ask(self, request: BufferRequest, kind: type[_Reply]) -> _Reply:
        """Send a request, and return its reply.

        Raises:
            TypeError, ValueError: the name in it cannot be one; nothing is sent.
        """
        check_request(request)
        try:
            reply = messages.decode_reply(self.client.control(encode(request), timeout=self.timeout))
        except DeviceGoneError:
            raise
        except DeviceError as error:
            raise BufferObjectError(error.errno or errno.EIO, error.strerror) from error
        if not isinstance(reply, kind):
            raise BufferObjectError(errno.EBADMSG, f"the device answered {type(request).__name__} with {reply}")
        return reply

    # --- objects

    def create(
        self, name: str, size: Size, *, placements: Iterable[str] = ("vram", "system"), alignment: Size = PAGE_SIZE,
        contiguous: bool = False, priority: int = 0, caching: str = Caching.CACHED,
    ) -> Description:  # fmt: skip
        """Make an object of zeros.

        Args:
            name: one to 200 bytes in UTF-8, without NUL.
            size: bytes or text.
            placements: "vram" and "system" in the order of preference, or one of them.
            alignment: power of two from a page up: of each of its blocks in VRAM.
            contiguous: its memory in VRAM is one piece.
            priority: 0 to 3; a lower one is evicted earlier.
            caching: "cached", "write-combined", "uncached" or "encrypted": recorded, not enforced.

        Raises:
            TypeError, ValueError: an argument is of another type, or none of the choices; nothing is sent.
        """
        if isinstance(placements, str):
            raise TypeError(f"placements is a list of placements, such as [{placements!r}], not the str {placements!r}")
        if not isinstance(priority, int):
            raise TypeError(f"priority is an int, 0 to 3, not {priority!r}")
        check_choice("caching", caching, Caching)
        request = messages.CreateBuffer(
            name, parse_size(size), tuple(map(_placement, placements)), parse_size(alignment), contiguous,
            priority, Caching(caching),
        )  # fmt: skip
        return self.ask(request, Description)

    def delete(self, name: str) -> None:
        """Delete an object that no client maps."""
        self.ask(messages.Delete(name), messages.RequestDone)

    def describe(self, name: str) -> Description:
        """Return the facts about an object."""
        return self.ask(messages.Describe(name), Description)

    def map(self, name: str, *, shared: bool = True, **options: Any) -> Area:
        """Map an object; ``options`` are those of :meth:`DeviceClient.map`.

        Raises:
            TypeError: ``name`` is None, which would be the whole device.
            ValueError: ``shared=False``: a copy-on-write mapping of an object is refused, as TTM does. A private copy of a
                page would not follow the object to where it moves.
        """
        encode_object_name(name)
        if not shared:
            raise ValueError(f"{name!r} is mapped shared only: a copy-on-write mapping would not follow it when it moves")
        return self.client.map(object=name, **options)

    # --- placement

    def move(self, name: str, placement: str, *, ticket: int = 0) -> None:
        """Bring an object into a placement; others leave it in the order of their last use."""
        self.ask(messages.Move(name, _placement(placement), ticket), messages.RequestDone)

    def evict(self, name: str, *, ticket: int = 0) -> None:
        """Have an object leave VRAM for SYSTEM, or SYSTEM for the swap file."""
        self.ask(messages.Evict(name, False, ticket), messages.RequestDone)

    def swap_out(self, name: str, *, ticket: int = 0) -> None:
        """Have an object leave for the swap file; the next touch brings it back."""
        self.ask(messages.Evict(name, True, ticket), messages.RequestDone)

    def pin(self, name: str) -> None:
        """Have an object stay where it is, until it is unpinned as often."""
        self.ask(messages.PinBuffer(name, True), messages.RequestDone)

    def unpin(self, name: str) -> None:
        """Remove a pin."""
        self.ask(messages.PinBuffer(name, False), messages.RequestDone)

    def set_caching(self, name: str, caching: str, *, ticket: int = 0) -> None:
        """Change the caching attribute while no client has an entry for the object."""
        check_choice("caching", caching, Caching)
        self.ask(messages.SetCaching(name, Caching(caching), ticket), messages.RequestDone)

    def protect(self, name: str, access: Literal["read", "write"], *, ticket: int = 0) -> None:
        """Change the protection of all mappings while no client has an entry: a store to a "read" object is SIGBUS."""
        check_choice("access", access, ("read", "write"))
        self.ask(messages.Protect(name, access, ticket), messages.RequestDone)

    # --- content

    def madvise(self, name: str, advice: Literal["dontneed", "willneed"]) -> bool:
        """Say whether the content of an object is needed; return whether it is retained.

        An object that is not needed is purged when memory is short. A purged one stays so: touching it is SIGBUS.
        """
        check_choice("advice", advice, ("dontneed", "willneed"))
        return self.ask(messages.Advise(name, advice), messages.Retained).retained

    def purge(self, name: str) -> None:
        """Drop the content of an object that is not needed, now."""
        self.ask(messages.Purge(name), messages.Retained)

    def track_dirty(self, name: str, tracked: bool = True) -> None:
        """Begin or end dirty tracking of an object."""
        self.ask(messages.TrackDirty(name, tracked), messages.RequestDone)

    def take_dirty(self, name: str) -> DirtyRuns:
        """Return the pages that were written since the last call, and make them clean."""
        return self.ask(messages.TakeDirty(name), DirtyRuns)

    # --- reservations

    @contextmanager
    def reserve(self, *names: str, timeout: float = 10.0) -> Iterator[Reservation]:
        """Reserve objects, in whatever order others reserve theirs: no deadlock; release them at the end.

        Raises:
            TimeoutError: not all of them in so many seconds; none is held then.
        """
        found = Reservation(self.ask(messages.BeginTicket(), messages.TicketState).number)
        try:
            self._acquire(found, list(names), timeout)
            yield found
        finally:
            self._give_back(found.ticket, names)

    def _give_back(self, ticket: int, names: Iterable[str]) -> None:
        """Release those of these objects that a ticket has, and end it."""
        # A request that the server's death interrupts may not have been carried out: the next server is told again.
        for _ in range(_SERVERS):
            with suppress(DeviceGoneError):
                for name in dict.fromkeys(names):
                    with suppress(BufferObjectError):  # the ticket does not have it
                        self.ask(messages.Release(ticket, name), messages.RequestDone)
                with suppress(BufferObjectError):
                    self.ask(messages.EndTicket(ticket), messages.RequestDone)
                return

    def _acquire(self, found: Reservation, names: list[str], timeout: float) -> None:
        until = time.monotonic() + timeout
        while left := [name for name in names if name not in found.held]:
            state = self.ask(messages.Reserve(found.ticket, left[0]), messages.TicketState)
            if state.outcome == "granted":
                found.held.append(left[0])
                continue
            if time.monotonic() > until:
                holder = self.describe(left[0]).ticket
                who = f"ticket {holder} has it" if holder else "another ticket is before it"
                raise TimeoutError(
                    f"{left[0]!r} was not reserved within {timeout} s: {who}, and ticket {found.ticket}, which asks, has"
                    f" {', '.join(map(repr, found.held)) or 'nothing'}: end the other reservation, or give a longer timeout"
                )
            if state.outcome == "back off":
                found.backoffs = state.backoffs
                self._release(found)
                names = [left[0], *(name for name in names if name != left[0])]  # the contended one first
            time.sleep(_PAUSE_S)

    def _release(self, found: Reservation) -> None:
        while found.held:
            self.ask(messages.Release(found.ticket, found.held.pop()), messages.RequestDone)

    # --- the device

    def unplug(self, policy: Literal["dummy", "poison"]) -> None:
        """Unplug the device: each touch of an object gets a page of zeros ("dummy"), or SIGBUS ("poison")."""
        check_choice("policy", policy, ("dummy", "poison"))
        self.ask(messages.Unplug(policy), messages.RequestDone)

    def statistics(self) -> BufferStatistics:
        """Return counters, and the state of the memory."""
        return self.ask(messages.AskBufferStatistics(), BufferStatistics)


def _placement(place: str) -> Placement:
    check_choice("a placement", place, (Placement.VRAM, Placement.SYSTEM))
    return Placement(place)
