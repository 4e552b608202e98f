"""Protocol between a device's server and its clients: one message per packet, one class per message, in MessagePack.

Packet sockets (SOCK_SEQPACKET) deliver whole messages, so that a new server can go on with the connections of one that
died. Each request gets one final reply with the same ``id``; :class:`Progress` and parts of a list (:class:`Runs` with
``more``) may precede it. :class:`Restarted` and :class:`Gone` are not replies. Descriptors travel with :class:`Hello` and
:class:`Welcome` only.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from prefault.device.device_pool import DeviceObject
from prefault.errors import (
    BackingFullError,
    DeviceError,
    DeviceGoneError,
    DriverError,
    HeadroomError,
    NoPopulateError,
    PopulateError,
)
from prefault.ipc.messages import Decoder, Number, NumberedMessage, make_error, msgspec
from prefault.ipc.messages import encode as encode

VERSION = 1
"""Version of the protocol: another one is refused. A new request does not raise it, a changed one does."""

MAX_MESSAGE = 64 << 10
"""Most bytes in a message. Longer lists are sent in parts."""

MAX_RUNS = 2000
"""Most runs of pages in a message."""

MAX_CONTROL = 63 << 10
"""Most bytes of a control request and of its reply, so that the message around them stays below :data:`MAX_MESSAGE`."""

MAX_DESCRIPTORS = 3

Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=4000)]
Run: TypeAlias = tuple[Number, Number]
"""Half-open run of the device's pages: first page and stop page."""
Content: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=MAX_CONTROL)]
RunList: TypeAlias = Annotated[tuple[Run, ...], msgspec.Meta(max_length=MAX_RUNS)]


# --- from the client


class Hello(NumberedMessage, frozen=True):
    """Open a connection: the first message of a client process, with three descriptors.

    The descriptors are the client's userfaultfd; the write end of the lifeline, a pipe whose read end signals the client
    (O_ASYNC) once all write ends are closed; and a duplicate of the read end, with which a server that ends in an orderly
    way switches the signal off.
    """

    version: Number


class Map(NumberedMessage, frozen=True):
    """Announce an area that the client has mapped and registered with its userfaultfd; in bytes, whole pages."""

    address: Number
    offset: Number
    length: Number
    access: Literal["read", "write"]
    track_dirty: bool
    """Map pages write-protected, so that the server, or the kernel with WP_ASYNC, records first writes."""
    cpu: Number | None = None
    """Pin the server to this CPU until the area is unmapped (``colocate``)."""
    object: DeviceObject | None = None
    """The object that is mapped, as ObjectFound described it. If it is not there any more, the refusal is "stale"."""


class FindObject(NumberedMessage, frozen=True):
    """Ask for the place of an object, to be mapped at once."""

    name: str


class AskObjectStatistics(NumberedMessage, frozen=True):
    """Ask for the counters of the server's work for all areas of an object, the closed ones included."""

    name: str


class AreaRequest(NumberedMessage, frozen=True):
    """Base of requests about a mapped area."""

    area: Number


class Unmap(AreaRequest, frozen=True):
    """Announce that the client is about to unmap an area."""


class Populate(AreaRequest, frozen=True):
    """Supply and map the pages of these runs, which the client's page table lacks."""

    runs: RunList
    access: Literal["read", "write"]
    rollback: bool
    progress: bool
    check_headroom: bool
    beside: RunList = ()
    """Other pages of the call: present, or asked for by another request. Room for these runs is not made at their cost."""


class Cancel(NumberedMessage, frozen=True):
    """Stop the populate with this id, which then ends with :class:`Failed`; Cancel itself gets no reply."""


class Discard(AreaRequest, frozen=True):
    """Give pages back to the device."""

    first: Number
    stop: Number


class Undo(AreaRequest, frozen=True):
    """Roll a finished Populate back: give the pages that were supplied for it back, but for those that others may map."""

    runs: RunList


class DirtyPages(AreaRequest, frozen=True):
    """Ask for the pages that were written since they were supplied, or since the last request with ``clear``."""

    clear: bool


class AskStatistics(AreaRequest, frozen=True):
    """Ask for the counters of the server's work for an area."""


class AskLog(AreaRequest, frozen=True):
    """Ask for the pages that were faulted in or populated, in order."""


class Control(NumberedMessage, frozen=True):
    """Request to the driver, which alone knows what the bytes mean. Never repeated: it may have been carried out."""

    request: Content


# --- to the client


class Welcome(NumberedMessage, frozen=True):
    """Reply to Hello: description of the device, with the descriptor of its frames."""

    name: str
    length: Number
    page_size: Number
    writable: bool
    populates: bool
    evicts: bool
    huge_faults: bool
    huge: bool
    """True if the frames are huge pages (hugetlb)."""
    notes: tuple[str, ...]


class Mapped(NumberedMessage, frozen=True):
    """Reply to Map: the number of the area."""

    area: Number


class ObjectFound(NumberedMessage, frozen=True):
    """Reply to FindObject."""

    object: DeviceObject


class Done(NumberedMessage, frozen=True):
    """Reply to Unmap and Undo."""


class Discarded(NumberedMessage, frozen=True):
    """Reply to Discard: how many of the pages had been supplied."""

    pages: Number


class Progress(NumberedMessage, frozen=True):
    """Progress of a Populate: the number of pages done so far."""

    pages: Number


class Populated(NumberedMessage, frozen=True):
    """Reply to Populate: the number of pages that it mapped.

    ``poisoned``: runs that are supplied by now, but whose page-table entries in the client are still poison. The client
    drops these entries (MADV_DONTNEED) and asks again.
    ``supplied``: runs that the driver supplied for a request with ``rollback``, for :class:`Undo`. Those beyond the longest
    list stay supplied.
    """

    mapped: Number
    threads: Number
    poisoned: RunList
    supplied: RunList = ()


class Failed(NumberedMessage, frozen=True):
    """Reply to a Populate that failed or was cancelled. ``mapped``: runs that it had mapped and that stay."""

    kind: Literal["driver", "no populate", "full", "headroom", "cancelled", "gone"]
    number: Number
    message: str
    page: Number
    mapped: RunList
    limit: str
    needed_bytes: Number
    available_bytes: Number


class Runs(NumberedMessage, frozen=True):
    """Reply to DirtyPages and AskLog. ``more``: another part of the list follows."""

    runs: RunList
    more: bool


class Statistics(NumberedMessage, frozen=True):
    """Reply to AskStatistics and AskObjectStatistics.

    ``latency``: number of faults, by ``n``, that took less than ``2**n`` microseconds.
    """

    missing: Number
    minor: Number
    write_protect: Number
    populated_pages: Number
    supplied_pages: Number
    errors: Number
    latency: tuple[Number, ...]


class ControlReply(NumberedMessage, frozen=True):
    """Reply of the driver to Control."""

    content: Content


class Refused(NumberedMessage, frozen=True):
    """Error reply to any request. After ``"protocol"`` the server closes the connection."""

    kind: Literal["value", "device", "stale", "gone", "protocol"]
    number: Number
    message: str


class Restarted(NumberedMessage, frozen=True):
    """Notification (id 0) that a new server has taken over: the client repeats requests without a reply."""

    generation: Number


class Gone(NumberedMessage, frozen=True):
    """Notification (id 0) that the server is gone for good: supplied pages stay, others raise SIGBUS."""

    reason: str


Request: TypeAlias = (
    Hello
    | Map
    | Unmap
    | Populate
    | Cancel
    | Discard
    | Undo
    | DirtyPages
    | AskStatistics
    | AskLog
    | Control
    | FindObject
    | AskObjectStatistics
)
Reply: TypeAlias = (
    Welcome
    | Mapped
    | ObjectFound
    | Done
    | Discarded
    | Progress
    | Populated
    | Failed
    | Runs
    | Statistics
    | ControlReply
    | Refused
    | Restarted
    | Gone
)


class StaleObjectError(DeviceError):
    """The object was deleted, and perhaps made anew, between FindObject and Map: the client looks it up again."""


FAILURES: dict[str, type[PopulateError]] = {
    "driver": DriverError,
    "no populate": NoPopulateError,
    "full": BackingFullError,
    "headroom": HeadroomError,
    "gone": DeviceGoneError,
}
"""Exception of a failed populate, by :attr:`Failed.kind`; "cancelled" has none of its own."""

_REFUSALS: dict[str, type[Exception]] = {
    "value": ValueError,
    "device": DeviceError,
    "stale": StaleObjectError,
    "gone": DeviceGoneError,
    "protocol": DeviceGoneError,
}

decode_request: Decoder[Request] = Decoder(Request)
"""Decode a message of a client; ProtocolError if it is malformed."""

decode_reply: Decoder[Reply] = Decoder(Reply)
"""Decode a message of a server; ProtocolError if it is malformed."""


def error_of(refused: Refused) -> Exception:
    """Return the exception that a refusal names."""
    return make_error(_REFUSALS[refused.kind], refused.number, refused.message)
