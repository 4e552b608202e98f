"""Buffer objects: their life, placements, moves and faults, in the role of TTM (drivers/gpu/drm/ttm)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from prefault.device import RETRY, ClientProcess, Device, DeviceArea, DevicePool, FaultAround
from prefault.device.device_pool import Access
from prefault.device.driver import Supplied
from prefault.drivers.buffers import buffer_messages as messages
from prefault.drivers.buffers.buddy import CHUNK, Block
from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.drivers.buffers.buffer_messages import Caching
from prefault.drivers.buffers.dirty_tracking import DirtyTracking
from prefault.drivers.buffers.kept_table import KeptTable
from prefault.drivers.buffers.placements import Placement, Placements, Resource, Step
from prefault.drivers.buffers.reservations import Reservations, Ticket
from prefault.drivers.buffers.swap_file import SwapFile
from prefault.ipc.messages import msgspec
from prefault.sizes import PAGE_SIZE

_TABLE_BYTES = 16 << 20
_TICKETS = b"tickets"
_UNPLUGGED = b"unplugged"
_SERVER = "the driver"
_CHUNK_PAGES = CHUNK // PAGE_SIZE


@dataclass(slots=True)
class Buffer:
    """Buffer object.

    Attributes:
        resource: its place and its size.
        pages: of the device.
        caching: attribute of its mappings.
        access: protection of its mappings.
        purged: its content is gone for good.
        tracking: dirty tracking; None: off.
        waits: faults were told to wait until its reservation is released.
    """

    resource: Resource
    pages: range
    caching: Caching = Caching.CACHED
    access: Access = "write"
    purged: bool = False
    tracking: DirtyTracking | None = None
    waits: bool = False

    def chunks(self) -> Iterator[range]:
        """Yield the runs of its pages that lie in whole, aligned chunks of VRAM."""
        at = 0
        for block in self.resource.blocks:
            if block.size >= CHUNK and not at % CHUNK:
                first = self.pages.start + at // PAGE_SIZE
                yield range(first, min(first + block.size // PAGE_SIZE, self.pages.stop))
            at += block.size


class _Record(msgspec.Struct, array_like=True):
    """Buffer object in the kept table."""

    allowed: tuple[Placement, ...]
    size: int
    alignment: int
    contiguous: bool
    priority: int
    placement: Placement | None
    blocks: tuple[tuple[int, int], ...]
    pins: int
    purgeable: bool
    caching: Caching
    access: Literal["read", "write"]
    purged: bool
    tracked: bool


class BufferManager(Device):
    """Buffer objects in their placements: everything but the requests of clients.

    Args:
        vram, system, swap: capacities in bytes.
        swap_file: path; None: nothing is swapped out.
        space: address space in bytes.
    """

    evicts = True
    huge_faults = True
    restartable = True
    fault_around = FaultAround(16 * PAGE_SIZE, 16 * PAGE_SIZE)  # as TTM_BO_VM_NUM_PREFAULT
    batch = 64 << 20

    def __init__(self, vram: int, system: int, swap_file: str | None, swap: int, space: int) -> None:
        self.length = space
        self.placements = Placements(vram, system, swap)
        self.buffers: dict[str, Buffer] = {}
        self.reservations = Reservations()
        self.unplugged: Literal["dummy", "poison"] | None = None
        self.counts = dict.fromkeys(("moves", "moved", "swapouts", "purges", "retries", "backoffs"), 0)
        self._swap = SwapFile(swap_file)

    # --- the life of the server

    def start(self, pool: DevicePool) -> None:
        """Take up the objects, placements and reservations that the last server left, if any."""
        self.pool = pool
        self._swap.open()
        self._table = KeptTable(pool.keep("buffers", _TABLE_BYTES))
        records = self._table.records()
        if (policy := records.pop(_UNPLUGGED, None)) is not None:
            self.unplugged = "poison" if policy == b"poison" else "dummy"
        tickets = msgspec.msgpack.decode(records.pop(_TICKETS, b"\x90"))
        extents = {extent.name: extent for extent in pool.objects()}
        for name in extents.keys() - {_name(key) for key in records}:
            pool.delete_object(name)  # the last server died before it had entered the object
        for key, value in records.items():
            if _name(key) in extents:
                self._restore(_name(key), extents[_name(key)].pages(PAGE_SIZE), value)
            else:
                self._table.remove(key)
        living = {client.number for client in pool.clients()}
        self.reservations.restore((number, owner, held) for number, owner, held in tickets if owner in living)

    def _restore(self, name: str, pages: range, value: bytes) -> None:
        record = msgspec.msgpack.decode(value, type=_Record)
        resource = Resource(
            name, record.size, record.allowed, record.alignment, record.contiguous, record.priority, record.placement,
            [Block(*block) for block in record.blocks], record.pins, record.purgeable,
        )  # fmt: skip
        self.placements.restore(resource)
        buffer = self.buffers[name] = Buffer(resource, pages, record.caching, record.access, record.purged)
        if record.tracked:
            buffer.tracking = DirtyTracking(len(pages), _CHUNK_PAGES)
            buffer.tracking.mark_all()
        for chunk in buffer.chunks():
            self.pool.prefer_huge(chunk)
        if record.access == "read":
            self.pool.protect(pages, "read")  # the last server may have died before that
        if record.purged:
            self.pool.poison(pages, f"{name!r} was purged")

    def stop(self) -> None:
        """Close the swap file."""
        self._swap.close()

    def save(self, buffer: Buffer) -> None:
        """Enter an object into the kept table."""
        resource = buffer.resource
        record = _Record(
            resource.allowed, resource.size, resource.alignment, resource.contiguous, resource.priority, resource.placement,
            tuple(resource.blocks), resource.pins, resource.purgeable, buffer.caching, buffer.access, buffer.purged,
            buffer.tracking is not None,
        )  # fmt: skip
        self._table.put(_key(resource.name), msgspec.msgpack.encode(record))

    def save_tickets(self) -> None:
        """Enter the tickets into the kept table."""
        tickets = [
            (ticket.number, ticket.owner, ticket.held)
            for ticket in self.reservations.tickets.values()
            if ticket.owner != _SERVER
        ]
        self._table.put(_TICKETS, msgspec.msgpack.encode(tickets))

    def disconnect(self, client: ClientProcess) -> None:
        """Release the reservations of a client that is gone."""
        released = self.reservations.release_owner(client.number)
        self.save_tickets()
        for name in released:
            self.fault_again(self.buffers[str(name)])

    # --- faults

    def open(self, area: DeviceArea) -> None:
        """Refuse an area that may span several objects: a fault is a matter of one, its placement and its reservation."""
        if area.object is None:
            raise BufferObjectError(errno.EINVAL, "buffer objects are mapped one by one: map one by its name")

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        """Supply a page: see :meth:`populate`."""
        return self.populate(area, range(page, page + 1), access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> Supplied:  # noqa: ARG002
        """Supply pages of an object, which is brought into memory if it is in the swap file (``ttm_bo_vm_fault()``).

        A fault on an object that is reserved waits for the release, and the server does not.
        """
        extent = self.pool.object_at(pages.start)
        if extent is None:
            raise BufferObjectError(errno.EFAULT, f"page {pages.start} belongs to no buffer object")
        if self.unplugged is not None:
            return None  # the dummy page: zeros
        buffer = self.buffers[extent.name]
        if self.reservations.holder(extent.name) is not None:
            buffer.waits = True
            self.counts["retries"] += 1
            return RETRY
        if buffer.resource.placement in (None, Placement.SWAP):
            self.validate(buffer)
        self._swap.load(pages, area.frames(pages))
        self.placements.touch(extent.name)
        return None

    def mkwrite(self, area: DeviceArea, page: int) -> None:  # noqa: ARG002
        """Note a write to a page that was clean, or refuse it where the object is protected."""
        extent = self.pool.object_at(page)
        if extent is None:
            raise BufferObjectError(errno.EFAULT, f"page {page} belongs to no buffer object")
        buffer = self.buffers[extent.name]
        if buffer.access == "read":
            raise PermissionError(errno.EACCES, f"{extent.name!r} is protected against writing")
        if buffer.tracking is not None:
            first = buffer.pages.start
            run = buffer.tracking.mark(page - first)
            self.pool.protect(range(first + run.start, first + run.stop), "write")

    def discard(self, area: DeviceArea, pages: range) -> None:  # noqa: ARG002
        """Forget the swapped-out content of pages that a client gave back."""
        self._swap.forget(pages)

    # --- moves

    @contextmanager
    def reserved(self, buffer: Buffer, ticket: Ticket | None = None) -> Iterator[None]:
        """Hold the reservation of an object, or make use of that of a ticket which has it.

        Raises:
            BufferObjectError: EBUSY: another ticket has it.
        """
        name = buffer.resource.name
        holder = self.reservations.holder(name)
        if holder is not None:
            if ticket is not holder:
                raise BufferObjectError(errno.EBUSY, f"{name!r} is reserved by ticket {holder.number}: wait for its release")
            yield
            return
        own = self.reservations.begin(_SERVER)
        self.reservations.try_acquire(own, name)
        try:
            yield
        finally:
            self.reservations.release(own, name)
            self.reservations.end(own)

    def validate(self, buffer: Buffer, wanted: tuple[Placement, ...] | None = None) -> None:
        """Bring an object into a placement that it allows, or into one of those wanted; others leave for it."""
        self.take(self.placements.plan(buffer.resource.name, wanted, self.busy()))

    def leave(self, buffer: Buffer) -> None:
        """Have an object leave VRAM for SYSTEM, or SYSTEM for the swap file; others leave for it."""
        self.take(self.placements.plan_leave(buffer.resource.name, self.busy()))

    def busy(self) -> list[str]:
        """Return the names of the objects that are reserved."""
        return [name for name in self.buffers if self.reservations.holder(name) is not None]

    def take(self, steps: list[Step]) -> None:
        """Take the steps of a plan. Each is complete, and kept, before the next begins."""
        for step in steps:
            buffer = self.buffers[step.name]
            match step.target:
                case None:
                    self.purge(buffer)
                    continue
                case Placement.SWAP:
                    self.pool.evict(buffer.pages, self._swap.save)
                    self._settle(buffer, step)
                    self.counts["swapouts"] += 1
                case _ if step.source in (None, Placement.SWAP):
                    self._settle(buffer, step)
                case _:
                    with self.pool.shoot_down(buffer.pages) as move:
                        # No client has an entry now. Leaving copies the content into new frames, of the new kind.
                        self._settle(buffer, step)
                        self.counts["moved"] += sum(map(len, move.runs)) * PAGE_SIZE
                    self.counts["moves"] += 1

    def _settle(self, buffer: Buffer, step: Step) -> None:
        """Enter a step into the accounts, and have frames that are allocated from now on be of the target's kind."""
        for chunk in buffer.chunks():
            self.pool.prefer_huge(chunk, huge=False)
        self.placements.commit(step)
        for chunk in buffer.chunks():
            self.pool.prefer_huge(chunk)
        self.save(buffer)

    def purge(self, buffer: Buffer, why: str = "memory was short") -> None:
        """Drop the content of an object for good: touching it is an error from now on, which says why."""
        name = buffer.resource.name
        buffer.purged, buffer.tracking = True, None
        self._settle(buffer, Step(name, buffer.resource.placement, None))
        self.pool.poison(buffer.pages, f"{name!r} was purged: its content was not needed, and {why}")
        self._swap.forget(buffer.pages)
        self.counts["purges"] += 1

    # --- objects

    def create(self, resource: Resource, caching: Caching) -> Buffer:
        """Make an object, in the first placement that has room."""
        name = resource.name
        self.placements.add(resource)
        try:
            extent = self.pool.create_object(name, resource.size)
        except OSError as error:
            self.placements.remove(name)
            raise BufferObjectError(error.errno or errno.ENOSPC, f"cannot make {name!r}: {error.strerror}") from error
        buffer = self.buffers[name] = Buffer(resource, extent.pages(PAGE_SIZE), caching)
        try:
            self._swap.forget(buffer.pages)
            self.pool.protect(buffer.pages, "write")
            self.validate(buffer)
        except BaseException:
            self._forget(buffer)
            raise
        return buffer

    def delete(self, buffer: Buffer) -> None:
        """Delete an object that no client maps."""
        name = buffer.resource.name
        try:
            self.pool.delete_object(name)
        except OSError as error:
            raise BufferObjectError(error.errno or errno.EBUSY, f"cannot delete {name!r}: {error.strerror}") from error
        self._swap.forget(buffer.pages)
        self.reservations.forget(name)
        for chunk in buffer.chunks():
            self.pool.prefer_huge(chunk, huge=False)
        self._remove(buffer)

    def _forget(self, buffer: Buffer) -> None:
        self.pool.delete_object(buffer.resource.name)
        self._remove(buffer)

    def _remove(self, buffer: Buffer) -> None:
        name = buffer.resource.name
        self.placements.remove(name)
        del self.buffers[name]
        self._table.remove(_key(name))
        self.save_tickets()

    # --- other changes, without a valid entry

    def change(self, buffer: Buffer, *, caching: Caching | None = None, access: Access | None = None) -> None:
        """Change the caching attribute or the protection of an object while no client has an entry for it."""
        with self.pool.shoot_down(buffer.pages) as move:
            if caching is not None:
                buffer.caching = caching
            if access is not None:
                buffer.access = access
                clean = access == "write" and buffer.tracking is not None
                move.protect(buffer.pages, "read" if clean else access)
            self.save(buffer)

    def track(self, buffer: Buffer, tracked: bool) -> None:
        """Begin or end dirty tracking of an object."""
        if tracked != (buffer.tracking is not None):
            if buffer.access == "write":
                self.pool.protect(buffer.pages, "read" if tracked else "write")
            buffer.tracking = DirtyTracking(len(buffer.pages), _CHUNK_PAGES) if tracked else None
            self.save(buffer)

    def take_dirty(self, buffer: Buffer) -> messages.DirtyRuns:
        """Return the pages of an object that were written since the last time; they are clean now."""
        tracking = buffer.tracking
        if tracking is None:
            raise BufferObjectError(errno.EINVAL, f"{buffer.resource.name!r} is not tracked: begin with track_dirty()")
        method = tracking.method
        runs = tracking.scan()
        first = buffer.pages.start
        try:
            for run in runs:
                self.pool.protect(range(first + run.start, first + run.stop), "read")
        except BaseException:
            # Some can be written to without a fault: they are reported again, by the next call.
            tracking.restore(runs)
            raise
        return messages.DirtyRuns(tuple((run.start, run.stop) for run in runs), method)

    def fault_again(self, buffer: Buffer) -> None:
        """Have faults that met a reservation ask again."""
        if buffer.waits:
            buffer.waits = False
            self.pool.retry(buffer.pages)

    def unplug(self, policy: Literal["dummy", "poison"]) -> None:
        """Take all memory away: each touch gets a page of zeros, or an error."""
        self._table.put(_UNPLUGGED, policy.encode())
        self.unplugged = policy
        for buffer in self.buffers.values():
            if policy == "poison":
                self.pool.poison(buffer.pages, "the device is unplugged")
            else:
                with self.pool.shoot_down(buffer.pages) as move:
                    move.drop(buffer.pages)
                    move.protect(buffer.pages, "write")
            buffer.waits = False
            self.pool.retry(buffer.pages)


def _key(name: str) -> bytes:
    return b"object " + name.encode()


def _name(key: bytes) -> str:
    return key.removeprefix(b"object ").decode()
