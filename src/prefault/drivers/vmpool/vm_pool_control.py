"""Client side of a pool for virtual machines: make, limit and remove machines, and ask for the usage."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from prefault.drivers.client_checks import check_client, check_request
from prefault.drivers.vmpool.machine_requests import (
    AskUsage,
    Carried,
    CreateMachine,
    MachineRequest,
    MachineUsage,
    PoolUsage,
    RemoveMachine,
    SetLimit,
    decode_reply,
)
from prefault.errors import DeviceError
from prefault.ipc.messages import encode
from prefault.sizes import Size, parse_size
from prefault.sparse import SparseMemory

if TYPE_CHECKING:
    from prefault.device.opening import DeviceClient

_Reply = TypeVar("_Reply", Carried, PoolUsage)


class VmPoolControl:
    """Machines of this process in a :class:`VmPool`.

    ::

        with prefault.device.connect(path) as client:
            machines = VmPoolControl(client)
            with machines.create("guest-1", "64 GiB", limit="8 GiB") as memory:
                device = prefault.virtio_mem.VirtioMem(memory, addr=4 << 30)

    Args:
        client: a connection to the device: from :func:`prefault.device.connect` or :func:`prefault.device.open`.
    """

    def __init__(self, client: DeviceClient) -> None:
        check_client("VmPoolControl", client)
        self._client = client

    def create(self, name: str, size: Size, *, limit: Size | None = None, **options: Any) -> SparseMemory:
        """Make a machine, and return its memory, of which nothing is plugged; touching it is a SIGSEGV.

        Closing the memory keeps the machine: it is removed, and its blocks go back to the pool, by :meth:`remove` or when
        this process has ended. If this fails there is no such machine.

        Args:
            name: 1 to 200 bytes in UTF-8, without NUL.
            size: bytes of its address range, whole blocks.
            limit: bytes that it may have plugged; None: all of its range.
            options: further arguments of :class:`~prefault.SparseMemory`.

        Raises:
            TypeError, ValueError: ``name`` or an option cannot be one.
            DeviceError: a machine has that name (EEXIST), the pool has no such range of addresses left (ENOSPC), or the size
                is not whole blocks (EINVAL).
        """
        length = parse_size(size)
        self._ask(CreateMachine(name, length, length if limit is None else parse_size(limit)), Carried)
        try:
            return SparseMemory(None, **{"device": self._client, "object": name, "unpopulated": "fault", **options})
        except BaseException:
            with suppress(DeviceError):  # the error above is the one that tells
                self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Remove a machine, whose memory is closed; its blocks go back to the pool.

        Raises:
            DeviceError: there is no such machine (ENOENT), it is another process's (EPERM), or it is mapped (EBUSY).
        """
        self._ask(RemoveMachine(name), Carried)

    def set_limit(self, name: str, limit: Size) -> None:
        """Change the bytes that a machine may have plugged. Blocks beyond the limit stay until they are unplugged."""
        self._ask(SetLimit(name, parse_size(limit)), Carried)

    def usage(self) -> PoolUsage:
        """Return the usage of the pool, and of all machines of all processes."""
        usage = self._ask(AskUsage(0), PoolUsage)
        machines: list[MachineUsage] = list(usage.machines)
        part = usage
        while part.more:
            part = self._ask(AskUsage(len(machines)), PoolUsage)
            machines += part.machines
        return PoolUsage(part.capacity, part.plugged, part.block, tuple(machines), False)

    def _ask(self, request: MachineRequest, kind: type[_Reply]) -> _Reply:
        check_request(request)
        reply = decode_reply(self._client.control(encode(request)))
        assert isinstance(reply, kind)
        return reply
