"""Control requests of a pool for virtual machines, and their replies, in MessagePack."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from prefault.device.object_table import NAME_MOST
from prefault.ipc.messages import Decoder, Number, TaggedMessage, msgspec

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_MOST)]


class CreateMachine(TaggedMessage, frozen=True):
    """Make the address range of a machine, owned by the process that asks; ``limit``: bytes that it may have plugged."""

    name: Name
    size: Number
    limit: Number


class RemoveMachine(TaggedMessage, frozen=True):
    """Give the blocks of a machine back, and forget it."""

    name: Name


class SetLimit(TaggedMessage, frozen=True):
    """Change the limit of a machine, in bytes. Blocks beyond it stay until they are unplugged."""

    name: Name
    limit: Number


class AskUsage(TaggedMessage, frozen=True):
    """Ask for the usage of the pool, and of machines from number ``first`` on, in the order of their ranges."""

    first: Number


class Carried(TaggedMessage, frozen=True):
    """Reply: it is done."""


class MachineUsage(TaggedMessage, frozen=True):
    """Usage of a machine.

    Attributes:
        name: of the machine.
        size: bytes of its address range.
        limit: bytes that it may have plugged.
        plugged: bytes that it has.
        pid: of the process that owns it; 0: that is gone, and another process still maps the machine.
    """

    name: str
    size: int
    limit: int
    plugged: int
    pid: int


class PoolUsage(TaggedMessage, frozen=True):
    """Usage of the pool, and of some machines.

    Attributes:
        capacity: bytes of the pool.
        plugged: bytes that machines have.
        block: bytes of a block.
        machines: at most 200 in one reply.
        more: there are further machines.
    """

    capacity: int
    plugged: int
    block: int
    machines: tuple[MachineUsage, ...]
    more: bool


MachineRequest: TypeAlias = CreateMachine | RemoveMachine | SetLimit | AskUsage

decode_request: Decoder[MachineRequest] = Decoder(MachineRequest)
"""Decode a request; ProtocolError if it is none."""

decode_reply: Decoder[Carried | PoolUsage] = Decoder(Carried | PoolUsage)
"""Decode a reply; ProtocolError if it is none."""
