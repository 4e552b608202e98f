"""Driver of a dedicated pool of memory blocks for virtual machines."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from prefault.device.device_pool import Access, ClientProcess, DeviceObject, DevicePool
from prefault.device.driver import ZERO, Device, DeviceArea, Recipe, Supplied
from prefault.drivers.vmpool.machine_requests import (
    AskUsage,
    Carried,
    CreateMachine,
    MachineRequest,
    MachineUsage,
    PoolUsage,
    RemoveMachine,
    SetLimit,
    decode_request,
)
from prefault.ipc.messages import encode
from prefault.ipc.transport import ProtocolError
from prefault.sizes import MIB, Size, format_size, parse_size

_SLOT = 2 * MIB
"""Objects lie at multiples of this: the number of an object's first one is its row in the table of machines."""

_OWNER, _LIMIT, _FIELDS = 0, 1, 2
_MACHINES_AT_ONCE = 200


class VmPool(Device):
    """Device that gives blocks of a pool to virtual machines: the memory of ``prefault.SparseMemory(device=...)``.

    Each machine is an object of the device, with a range of addresses of its own, of which only plugged blocks take memory.
    A block is zeros when it is plugged, whichever machine had it before. Machines and their blocks belong to the process
    that made them by :class:`VmPoolControl`, and go when it ends, however it ends; they survive the server of the pool.

    Args:
        capacity: bytes that all machines together may have plugged, rounded down to blocks.
        block: bytes of a block, ``"2 MiB"`` or ``"4 KiB"``. Blocks of 2 MiB are hugetlb pages where the system's pool has
            as many as the capacity.
        address_space: bytes of addresses for the ranges of all machines.

    Raises:
        ValueError: less than one block, or less addresses than capacity.
    """

    restartable = True
    batch = 16 * MIB

    def __init__(self, capacity: Size, *, block: Size = "2 MiB", address_space: Size = "1 TiB") -> None:
        self.page_size = parse_size(block)
        if self.page_size not in (4096, _SLOT):
            raise ValueError(f"a block is 4 KiB or 2 MiB, not {self.page_size} bytes")
        self.capacity = parse_size(capacity) // self.page_size * self.page_size
        self.length = parse_size(address_space) // _SLOT * _SLOT
        if not 0 < self.capacity <= self.length:
            raise ValueError(
                f"the pool has {self.capacity} bytes in whole blocks of {self.page_size}, and {self.length} bytes of"
                " addresses: at least one block is needed, and no fewer addresses than blocks"
            )

    def recipe(self) -> Recipe:
        """See :class:`~prefault.device.Device`."""
        arguments = {"capacity": self.capacity, "block": self.page_size, "address_space": self.length}
        return Recipe("prefault.drivers.vmpool.vm_pool:VmPool", arguments)

    def start(self, pool: DevicePool) -> None:
        """See :class:`~prefault.device.Device`. The pool, which survives the server, tells which blocks a machine has."""
        self._pool = pool
        self._areas: dict[str, int] = {}  # open ones by machine; those of none have an empty name
        # Two numbers for each slot of the address space, of which the first slot of a machine's range has some: its owner,
        # the number of a connection, and its limit. A store of eight bytes is not torn by a crash.
        self._table = pool.keep("machines", self.length // _SLOT * _FIELDS * 8).cast("Q")

    # --- blocks

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        """See :class:`~prefault.device.Device`."""
        return self.populate(area, range(page, page + 1), access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> Supplied:  # noqa: ARG002
        """Admit blocks that a machine plugs: the frames are zeros, whoever had them before, as the kernel allocates them."""
        for machine, count in self._by_machine(pages):
            limit, plugged = self._limit(machine), self._plugged(machine)
            if plugged + count * self.page_size > limit:
                raise OSError(
                    errno.ENOSPC,
                    f"machine {machine.name!r} has {format_size(plugged)} of at most {format_size(limit)} plugged, which"
                    f" leaves no room for {format_size(count * self.page_size)}: unplug other blocks, or raise its limit",
                )
        return ZERO

    def _by_machine(self, pages: range) -> Iterator[tuple[DeviceObject, int]]:
        """Yield the machines that pages belong to, with the number of pages; those of no machine are left out."""
        at = pages.start
        while at < pages.stop:
            machine = self._pool.object_at(at)
            if machine is None:
                at += 1
                continue
            stop = min(pages.stop, machine.pages(self.page_size).stop)
            yield machine, stop - at
            at = stop

    def _plugged(self, machine: DeviceObject) -> int:
        return sum(map(len, self._pool.ready(machine.pages(self.page_size)))) * self.page_size

    # --- machines

    def open(self, area: DeviceArea) -> None:
        """See :class:`~prefault.device.Device`."""
        if area.object is None:
            self._remove_unowned()
        if area.object is None and self._pool.objects():
            raise PermissionError(errno.EACCES, "the pool has machines: map one by its name (object=)")
        name = "" if area.object is None else area.object.name
        self._areas[name] = self._areas.get(name, 0) + 1

    def close(self, area: DeviceArea) -> None:
        """See :class:`~prefault.device.Device`. Removes a machine that only others mapped still when its owner was gone."""
        name = "" if area.object is None else area.object.name
        self._areas[name] -= 1
        if self._areas[name]:
            return
        del self._areas[name]
        if area.object is None:
            # Blocks of no machine, and there is none: an object is made without pages, so this one empties the pool.
            self._pool.delete_object(self._pool.create_object("-", self.length).name)
        elif not self._owner(area.object):
            self._pool.delete_object(name)

    def disconnect(self, client: ClientProcess) -> None:
        """See :class:`~prefault.device.Device`. The machines of the process are gone, and their blocks are free."""
        for machine in self._pool.objects():
            if self._owner(machine) == client.number:
                self._set(machine, _OWNER, 0)
        self._remove_unowned()

    def _remove_unowned(self) -> None:
        """Remove machines that nobody owns or maps: a process ended, or a server while it made or removed one."""
        for machine in self._pool.objects():
            if not self._owner(machine) and machine.name not in self._areas:
                self._pool.delete_object(machine.name)

    def _owner(self, machine: DeviceObject) -> int:
        return self._field(machine, _OWNER)

    def _limit(self, machine: DeviceObject) -> int:
        return self._field(machine, _LIMIT)

    def _field(self, machine: DeviceObject, field: int) -> int:
        value: int = self._table[machine.offset // _SLOT * _FIELDS + field]
        return value

    def _set(self, machine: DeviceObject, field: int, value: int) -> None:
        self._table[machine.offset // _SLOT * _FIELDS + field] = value

    # --- control

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        """Carry out a request of :class:`VmPoolControl`."""
        try:
            asked: MachineRequest = decode_request(request)
        except ProtocolError as error:
            raise OSError(errno.EINVAL, f"no request of a VmPool: {error}") from None
        match asked:
            case CreateMachine():
                self._create(client, asked)
            case RemoveMachine():
                self._remove(self._owned(client, asked.name), client)
            case SetLimit():
                self._set(self._owned(client, asked.name), _LIMIT, asked.limit)
            case AskUsage():
                return encode(self._usage(asked.first))
        return encode(Carried())

    def _create(self, client: ClientProcess, asked: CreateMachine) -> None:
        if asked.size < self.page_size or asked.size % self.page_size:
            raise OSError(errno.EINVAL, f"a machine has whole blocks of {self.page_size} bytes, not {asked.size} bytes")
        if "" in self._areas:
            raise OSError(errno.EBUSY, "an area without a name maps the pool, and would see the blocks of the machine")
        self._remove_unowned()
        try:
            machine = self._pool.create_object(asked.name, asked.size)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        # The owner is the last store: a server that dies before it leaves a machine that goes before the next one is made.
        self._set(machine, _LIMIT, asked.limit)
        self._set(machine, _OWNER, client.number)

    def _remove(self, machine: DeviceObject, client: ClientProcess) -> None:
        # The owner first: a machine that is made at this place next must not have it, should the server die in between.
        self._set(machine, _OWNER, 0)
        try:
            self._pool.delete_object(machine.name)
        except BaseException:
            self._set(machine, _OWNER, client.number)
            raise

    def _owned(self, client: ClientProcess, name: str) -> DeviceObject:
        machine = self._pool.object(name)
        if self._owner(machine) != client.number:
            raise PermissionError(errno.EPERM, f"machine {name!r} belongs to another process")
        return machine

    def _usage(self, first: int) -> PoolUsage:
        machines = self._pool.objects()
        pids = {client.number: client.pid for client in self._pool.clients()}
        some = machines[first : first + _MACHINES_AT_ONCE]
        return PoolUsage(
            self.capacity or 0,
            sum(map(self._plugged, machines)),
            self.page_size,
            tuple(
                MachineUsage(
                    machine.name, machine.length, self._limit(machine), self._plugged(machine),
                    pids.get(self._owner(machine), 0),
                )
                for machine in some
            ),
            first + len(some) < len(machines),
        )  # fmt: skip
