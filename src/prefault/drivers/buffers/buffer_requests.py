"""Control requests of clients, checked and carried out."""

from __future__ import annotations

import errno

from prefault.drivers.buffers import buffer_messages as messages
from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.drivers.buffers.buffer_manager import Buffer, BufferManager
from prefault.drivers.buffers.buffer_messages import AnyReply
from prefault.drivers.buffers.placements import Placement, Resource, Step
from prefault.drivers.buffers.reservations import Outcome, ReservationError, Ticket
from prefault.ipc.transport import ProtocolError
from prefault.sizes import format_size

_DONE = messages.RequestDone()


class BufferRequests:
    """Requests to a device of buffer objects."""

    def __init__(self, device: BufferManager) -> None:
        self._device = device

    def handle(self, client: int, request: bytes) -> AnyReply:
        """Carry out a request of a client.

        Raises:
            BufferObjectError: it is refused, and nothing has changed.
        """
        try:
            decoded = messages.decode_request(request)
        except ProtocolError as error:
            raise BufferObjectError(errno.EBADMSG, f"not a request of buffer objects: {error}") from None
        if self._device.unplugged is not None and not isinstance(decoded, _AFTER_UNPLUG):
            raise BufferObjectError(
                errno.ENODEV, "the device is unplugged: only its objects can be deleted, and tickets ended"
            )
        try:
            return self._handle(client, decoded)
        except ReservationError as error:
            raise BufferObjectError(errno.EALREADY, str(error)) from error

    def _handle(self, client: int, request: messages.AnyRequest) -> AnyReply:
        device = self._device
        match request:
            case messages.CreateBuffer():
                return self._describe(self._create(request))
            case messages.Delete():
                with device.reserved(self._buffer(request.name)):
                    pass
                device.delete(self._buffer(request.name))
            case messages.Describe():
                return self._describe(self._buffer(request.name))
            case messages.PinBuffer():
                self._pin(self._buffer(request.name), request.pinned)
            case messages.Move() | messages.Evict() | messages.SetCaching() | messages.Protect():
                buffer = self._buffer(request.name, usable=True)
                with device.reserved(buffer, self._ticket(client, request.ticket)):
                    self._change(buffer, request)
            case messages.Advise() | messages.Purge():
                return self._advise(self._buffer(request.name), request)
            case messages.TrackDirty():
                device.track(self._buffer(request.name, usable=True), request.tracked)
            case messages.TakeDirty():
                return device.take_dirty(self._buffer(request.name))
            case messages.Unplug():
                device.unplug(request.policy)
            case messages.AskBufferStatistics():
                return self._statistics()
            case _:
                return self._reservation(client, request)
        return _DONE

    # --- objects

    def _buffer(self, name: str, *, usable: bool = False) -> Buffer:
        buffer = self._device.buffers.get(name)
        if buffer is None:
            raise BufferObjectError(errno.ENOENT, f"there is no buffer object {name!r}")
        if usable and buffer.purged:
            raise BufferObjectError(errno.ENODATA, f"{name!r} was purged: delete it, and make it anew")
        return buffer

    def _create(self, request: messages.CreateBuffer) -> Buffer:
        resource = Resource(
            request.name, request.size, request.placements, request.alignment, request.contiguous, request.priority
        )
        return self._device.create(resource, request.caching)

    def _change(
        self, buffer: Buffer, request: messages.Move | messages.Evict | messages.SetCaching | messages.Protect
    ) -> None:  # fmt: skip
        device, resource = self._device, buffer.resource
        match request:
            case messages.Move():
                device.validate(buffer, (request.placement,))
            case messages.Evict(swap=False):
                if resource.placement not in (None, Placement.SWAP):
                    device.leave(buffer)
            case messages.Evict():
                self._swap_out(buffer)
            case messages.SetCaching():
                device.change(buffer, caching=request.caching)
            case messages.Protect():
                device.change(buffer, access=request.access)

    def _swap_out(self, buffer: Buffer) -> None:
        resource, placements = buffer.resource, self._device.placements
        if resource.placement in (None, Placement.SWAP):
            return
        if resource.pins:
            raise BufferObjectError(errno.EBUSY, f"{resource.name!r} is pinned in {resource.placement}: unpin it first")
        left = placements.capacity[Placement.SWAP] - placements.used[Placement.SWAP]
        if resource.charge > left:
            raise BufferObjectError(
                errno.ENOSPC,
                f"no room for the {format_size(resource.charge)} of {resource.name!r} in the swap file, which has"
                f" {format_size(left)} left",
            )
        self._device.take([Step(resource.name, resource.placement, Placement.SWAP)])

    def _pin(self, buffer: Buffer, pinned: bool) -> None:
        placements = self._device.placements
        (placements.pin if pinned else placements.unpin)(buffer.resource.name)
        self._device.save(buffer)

    def _advise(self, buffer: Buffer, request: messages.Advise | messages.Purge) -> messages.Retained:
        resource = buffer.resource
        if isinstance(request, messages.Advise):
            if not buffer.purged:
                resource.purgeable = request.advice == "dontneed"
                self._device.save(buffer)
        elif resource.pins:
            raise BufferObjectError(errno.EBUSY, f"{resource.name!r} is pinned: it cannot be purged")
        elif not resource.purgeable:
            raise BufferObjectError(errno.EINVAL, f"{resource.name!r} is needed: advise 'dontneed' before it is purged")
        elif not buffer.purged:
            with self._device.reserved(buffer):
                self._device.purge(buffer, "a client had it purged")
        return messages.Retained(not buffer.purged)

    def _describe(self, buffer: Buffer) -> messages.Description:
        resource = buffer.resource
        holder = self._device.reservations.holder(resource.name)
        return messages.Description(
            resource.name, resource.size, resource.allowed, resource.placement, tuple(resource.blocks),
            sum(len(chunk) // 512 * (2 << 20) for chunk in buffer.chunks()), buffer.caching, buffer.access, resource.pins,
            "dontneed" if resource.purgeable else "willneed", buffer.purged, 0 if holder is None else holder.number,
            None if buffer.tracking is None else buffer.tracking.method,
        )  # fmt: skip

    def _statistics(self) -> messages.BufferStatistics:
        placements, counts = self._device.placements, self._device.counts
        found = None if placements.vram is None else placements.vram.fragmentation()
        return messages.BufferStatistics(
            dict(placements.capacity), dict(placements.used), found.internal if found else 0,
            found.external if found else 0.0, found.largest if found else 0, counts["moves"], counts["moved"],
            counts["swapouts"], counts["purges"], counts["retries"], counts["backoffs"],
        )  # fmt: skip

    # --- reservations

    def _ticket(self, client: int, number: int) -> Ticket | None:
        return self._device.reservations.ticket(number, client) if number else None

    def _reservation(
        self, client: int,
        request: messages.BeginTicket | messages.Reserve | messages.Release | messages.TicketDone | messages.EndTicket,
    ) -> AnyReply:  # fmt: skip
        device, reservations = self._device, self._device.reservations
        if isinstance(request, messages.BeginTicket):
            ticket = reservations.begin(client)
            device.save_tickets()
            return messages.TicketState(ticket.number, "granted", 0)
        ticket = reservations.ticket(request.ticket, client)
        match request:
            case messages.Reserve():
                self._buffer(request.name)
                outcome = reservations.acquire(ticket, request.name)
                if outcome is Outcome.BACK_OFF:
                    device.counts["backoffs"] += 1
                elif outcome is Outcome.GRANTED:
                    device.save_tickets()
                return messages.TicketState(ticket.number, outcome.value, ticket.backoffs)
            case messages.Release():
                reservations.release(ticket, request.name)
                device.placements.touch(request.name)
                device.save_tickets()
                device.fault_again(self._buffer(request.name))
            case messages.TicketDone():
                reservations.done(ticket)
            case messages.EndTicket():
                reservations.end(ticket)
                device.save_tickets()
        return _DONE


_AFTER_UNPLUG = (
    messages.Delete, messages.Describe, messages.Release, messages.EndTicket, messages.AskBufferStatistics, messages.Unplug,
)  # fmt: skip
