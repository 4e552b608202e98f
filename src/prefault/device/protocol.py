"""What is said between a device's server, its clients and its warden: typed messages in MessagePack, one a packet.

Unix sockets of packets (SOCK_SEQPACKET) keep messages whole: there are no half ones, so that a new server can go on with
the connections of one that died. A request is answered by one final reply with the same ``id``; before it may come
:class:`Progress` and parts of a list (:class:`Runs` with ``more``). :class:`Restarted` and :class:`Gone` come unasked.
Descriptors travel with :class:`Hello` and :class:`Welcome` only.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from prefault.device.requirements import msgspec
from prefault.errors import (
    BackingFullError,
    DeviceError,
    DeviceGoneError,
    DriverError,
    HeadroomError,
    NoPopulateError,
    PopulateError,
)
from prefault.ipc import encoding
from prefault.ipc.transport import ProtocolError

VERSION = 1

MAX_MESSAGE = 64 << 10
"""Bytes in a message. Long lists are sent in parts."""

MAX_RUNS = 2000
"""Runs of pages in a message."""

MAX_DESCRIPTORS = 3

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=4000)]
Run: TypeAlias = tuple[Number, Number]
"""First page and stop page, of the device's pages: half open."""
RunList: TypeAlias = Annotated[tuple[Run, ...], msgspec.Meta(max_length=MAX_RUNS)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower, array_like=True):
    id: Number


# --- from the client


class Hello(_Message, frozen=True):
    """The first message of a client process, with three descriptors.

    Its userfaultfd; the end of a pipe to write into, of which the client has the other with O_ASYNC (closed by all, it ends
    the client); and a duplicate of that other end, so that a server that ends in an orderly way can call that off.
    """

    version: Number


class Map(_Message, frozen=True):
    """A part of the frames is mapped and registered with the userfaultfd; in whole pages, as bytes."""

    address: Number
    offset: Number
    length: Number
    access: Literal["read", "write"]
    track_dirty: bool
    """Fill in pages write-protected, so that the server, or with WP_ASYNC the kernel, notes first writes."""
    cpu: Number | None = None
    """The server is to run on this CPU until the area is unmapped (``colocate``)."""


class Unmap(_Message, frozen=True):
    """The area is about to be unmapped."""

    area: Number


class Populate(_Message, frozen=True):
    """Map these pages: supply what is not. The runs are what the client's page table lacks."""

    area: Number
    runs: RunList
    access: Literal["read", "write"]
    rollback: bool
    progress: bool
    check_headroom: bool


class Cancel(_Message, frozen=True):
    """Stop the populate with that id, which then ends with Failed; not answered itself."""


class Discard(_Message, frozen=True):
    """Give pages back."""

    area: Number
    first: Number
    stop: Number


class DirtyPages(_Message, frozen=True):
    """Which pages were written since they were filled in, or since the last time with ``clear``."""

    area: Number
    clear: bool


class AskStatistics(_Message, frozen=True):
    """What the server did for an area."""

    area: Number


class AskLog(_Message, frozen=True):
    """Which pages were asked for, by fault or populate, in order."""

    area: Number


# --- to the client


class Welcome(_Message, frozen=True):
    """To Hello; the descriptor of the frames comes with it."""

    name: str
    length: Number
    page_size: Number
    writable: bool
    populates: bool
    evicts: bool
    huge: bool
    """The frames are huge pages (hugetlb)."""
    notes: tuple[str, ...]


class Mapped(_Message, frozen=True):
    """To Map: the number of the area."""

    area: Number


class Done(_Message, frozen=True):
    """To Unmap."""


class Discarded(_Message, frozen=True):
    """To Discard: how many of the pages were supplied."""

    pages: Number


class Progress(_Message, frozen=True):
    """Pages done so far, in the middle of a populate."""

    pages: Number


class Populated(_Message, frozen=True):
    """To Populate: how many pages it mapped that were not.

    ``poisoned``: the client's entries of these say poison, though by now they are supplied. It drops the entries
    (MADV_DONTNEED) and asks again.
    """

    mapped: Number
    threads: Number
    poisoned: RunList


class Failed(_Message, frozen=True):
    """To Populate: why it stopped. ``mapped``: the runs that it mapped until then and that stay."""

    kind: Literal["driver", "no populate", "full", "headroom", "cancelled", "gone"]
    number: Number
    message: str
    page: Number
    mapped: RunList
    limit: str
    needed_bytes: Number
    available_bytes: Number


class Runs(_Message, frozen=True):
    """To DirtyPages and AskLog. ``more``: another part follows."""

    runs: RunList
    more: bool


class Statistics(_Message, frozen=True):
    """To AskStatistics. ``latency``: how many faults took less than ``2**n`` microseconds in the server, by ``n``."""

    missing: Number
    minor: Number
    write_protect: Number
    populated_pages: Number
    supplied_pages: Number
    errors: Number
    latency: tuple[Number, ...]


class Refused(_Message, frozen=True):
    """To anything: why not. After ``"protocol"`` the server hangs up."""

    kind: Literal["value", "device", "gone", "protocol"]
    number: Number
    message: str


class Restarted(_Message, frozen=True):
    """A new server goes on; requests that are not answered are to be asked again. Its ``id`` is 0."""

    generation: Number


class Gone(_Message, frozen=True):
    """There is no server any more. Pages that are supplied stay, others are SIGBUS. Its ``id`` is 0."""

    reason: str


Request: TypeAlias = Hello | Map | Unmap | Populate | Cancel | Discard | DirtyPages | AskStatistics | AskLog
Reply: TypeAlias = (
    Welcome | Mapped | Done | Discarded | Progress | Populated | Failed | Runs | Statistics | Refused | Restarted | Gone
)

FAILURES: dict[str, type[PopulateError]] = {
    "driver": DriverError,
    "no populate": NoPopulateError,
    "full": BackingFullError,
    "headroom": HeadroomError,
    "gone": DeviceGoneError,
}
"""The exception that tells of a failed populate; "cancelled" has none of its own."""

REFUSALS: dict[str, type[Exception]] = {
    "value": ValueError,
    "device": DeviceError,
    "gone": DeviceGoneError,
    "protocol": DeviceGoneError,
}

_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

# The tag of a union is decoded outside of what msgspec makes a DecodeError of.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def encode(message: Request | Reply) -> bytes:
    """A message, as one packet."""
    return encoding.encode(message)


def decode_request(packet: bytes) -> Request:
    """A message of a client; ProtocolError if it is none."""
    try:
        return _requests.decode(packet)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a message: {error}") from None


def decode_reply(packet: bytes) -> Reply:
    """A message of a server; ProtocolError if it is none."""
    try:
        return _replies.decode(packet)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a message: {error}") from None
