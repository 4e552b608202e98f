"""Control requests of buffer objects, and their replies: what the ioctls of a graphics driver are."""

from __future__ import annotations

import enum
from typing import Annotated, Literal, TypeAlias

from prefault.drivers.buffers.dirty_tracking import Method
from prefault.drivers.buffers.placements import Placement
from prefault.ipc.messages import Decoder, Number, TaggedMessage, msgspec

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
TicketNumber: TypeAlias = Number
"""Number of a ticket; 0: none."""


class Caching(enum.StrEnum):
    """Caching attribute of an object's mappings, recorded and visible: user space cannot set it in page tables."""

    CACHED = "cached"
    WRITE_COMBINED = "write-combined"
    UNCACHED = "uncached"
    ENCRYPTED = "encrypted"


class BufferRequest(TaggedMessage, frozen=True):
    """Base of requests."""


class CreateBuffer(BufferRequest, frozen=True):
    """Make an object. The reply is a Description."""

    name: Name
    size: Number
    placements: tuple[Placement, ...]
    alignment: Number
    contiguous: bool
    priority: int
    caching: Caching


class Delete(BufferRequest, frozen=True):
    """Delete an object."""

    name: Name


class Describe(BufferRequest, frozen=True):
    """Ask for the Description of an object."""

    name: Name


class Move(BufferRequest, frozen=True):
    """Bring an object into one placement (ttm_bo_validate())."""

    name: Name
    placement: Placement
    ticket: TicketNumber


class Evict(BufferRequest, frozen=True):
    """Have an object leave VRAM for SYSTEM, or SYSTEM for the swap file; ``swap``: for the swap file at once."""

    name: Name
    swap: bool
    ticket: TicketNumber


class PinBuffer(BufferRequest, frozen=True):
    """Pin an object where it is, or remove a pin."""

    name: Name
    pinned: bool


class SetCaching(BufferRequest, frozen=True):
    """Change the caching attribute of an object."""

    name: Name
    caching: Caching
    ticket: TicketNumber


class Protect(BufferRequest, frozen=True):
    """Change the protection of an object: enforced for all mappings."""

    name: Name
    access: Literal["read", "write"]
    ticket: TicketNumber


class Advise(BufferRequest, frozen=True):
    """Say whether the content of an object is needed. The reply is Retained."""

    name: Name
    advice: Literal["dontneed", "willneed"]


class Purge(BufferRequest, frozen=True):
    """Drop the content of an object that is not needed."""

    name: Name


class TrackDirty(BufferRequest, frozen=True):
    """Begin or end dirty tracking of an object."""

    name: Name
    tracked: bool


class TakeDirty(BufferRequest, frozen=True):
    """Ask which pages of an object were written since the last time. The reply is DirtyRuns."""

    name: Name


class BeginTicket(BufferRequest, frozen=True):
    """Ask for a ticket. The reply is TicketState."""


class Reserve(BufferRequest, frozen=True):
    """Reserve an object. The reply is TicketState."""

    ticket: TicketNumber
    name: Name


class Release(BufferRequest, frozen=True):
    """Release a reservation."""

    ticket: TicketNumber
    name: Name


class TicketDone(BufferRequest, frozen=True):
    """Declare that a ticket reserves nothing more."""

    ticket: TicketNumber


class EndTicket(BufferRequest, frozen=True):
    """Give a ticket back."""

    ticket: TicketNumber


class Unplug(BufferRequest, frozen=True):
    """Unplug the device (drm_dev_unplug()): its memory is gone."""

    policy: Literal["dummy", "poison"]


class AskBufferStatistics(BufferRequest, frozen=True):
    """Ask for BufferStatistics."""


class RequestDone(TaggedMessage, frozen=True):
    """The request was carried out."""


class Description(TaggedMessage, frozen=True):
    """Facts about an object.

    Attributes:
        size: in bytes.
        placements: allowed ones.
        placement: where it is; None: nowhere, it was purged.
        vram: offset and size in bytes of its blocks in VRAM.
        huge: bytes that lie in whole 2 MiB chunks of VRAM.
        access: protection.
        pins: number of pins.
        advice: the last advice.
        purged: its content is gone.
        ticket: the ticket that has it reserved; 0: none.
        tracking: method of dirty tracking; None: off.
    """

    name: str
    size: int
    placements: tuple[Placement, ...]
    placement: Placement | None
    vram: tuple[tuple[int, int], ...]
    huge: int
    caching: Caching
    access: Literal["read", "write"]
    pins: int
    advice: Literal["dontneed", "willneed"]
    purged: bool
    ticket: int
    tracking: Method | None


class Retained(TaggedMessage, frozen=True):
    """Reply to advice: True if the object still has its content."""

    retained: bool


class DirtyRuns(TaggedMessage, frozen=True):
    """Pages of an object that were written, numbered from its start, in runs; and the method by which that was found."""

    runs: tuple[tuple[int, int], ...]
    method: Method


class TicketState(TaggedMessage, frozen=True):
    """A ticket after a request: its number, the outcome, and how often it was told to back off."""

    number: int
    outcome: Literal["granted", "wait", "back off"]
    backoffs: int


class BufferStatistics(TaggedMessage, frozen=True):
    """Counters of the device since its server started, and the state of its memory.

    Attributes:
        capacity, used: bytes of each placement.
        internal: bytes of VRAM that objects have beyond what was asked for.
        external: share of the free bytes of VRAM, 0 to 1, that no 2 MiB page can use.
        largest: largest free block of VRAM, in bytes.
        moves, swapouts, purges: number of objects.
        moved: bytes of supplied pages that were moved.
        retries: faults that met a reservation.
        backoffs: times that a ticket was told to back off.
    """

    capacity: dict[Placement, int]
    used: dict[Placement, int]
    internal: int
    external: float
    largest: int
    moves: int
    moved: int
    swapouts: int
    purges: int
    retries: int
    backoffs: int


AnyRequest: TypeAlias = (
    CreateBuffer | Delete | Describe | Move | Evict | PinBuffer | SetCaching | Protect | Advise | Purge | TrackDirty
    | TakeDirty | BeginTicket | Reserve | Release | TicketDone | EndTicket | Unplug | AskBufferStatistics
)  # fmt: skip
AnyReply: TypeAlias = RequestDone | Description | Retained | DirtyRuns | TicketState | BufferStatistics

decode_request: Decoder[AnyRequest] = Decoder(AnyRequest)
decode_reply: Decoder[AnyReply] = Decoder(AnyReply)
