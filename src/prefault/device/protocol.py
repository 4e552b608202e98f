"""What is said between a device's server, its clients and its warden: typed messages in MessagePack, one a packet.

Unix sockets of packets (SOCK_SEQPACKET) keep messages whole: there are no half ones, so that a new server can go on with
the connections of one that died. A request is answered by one final reply with the same ``id``; before it may come
:class:`Progress` and parts of a list (:class:`Runs` with ``more``). :class:`Restarted` and :class:`Gone` come unasked.
Descriptors travel with :class:`Hello` and :class:`Welcome` only.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

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

MAX_MESSAGE = 64 << 10
"""Bytes in a message. Long lists are sent in parts."""

MAX_RUNS = 2000
"""Runs of pages in a message."""

MAX_DESCRIPTORS = 3

Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=4000)]
Run: TypeAlias = tuple[Number, Number]
"""First page and stop page, of the device's pages: half open."""
RunList: TypeAlias = Annotated[tuple[Run, ...], msgspec.Meta(max_length=MAX_RUNS)]


# --- from the client


class Hello(NumberedMessage, frozen=True):
    """The first message of a client process, with three descriptors.

    Its userfaultfd; the end of a pipe to write into, of which the client has the other with O_ASYNC (closed by all, it ends
    the client); and a duplicate of that other end, so that a server that ends in an orderly way can call that off.
    """

    version: Number


class Map(NumberedMessage, frozen=True):
    """A part of the frames is mapped and registered with the userfaultfd; in whole pages, as bytes."""

    address: Number
    offset: Number
    length: Number
    access: Literal["read", "write"]
    track_dirty: bool
    """Fill in pages write-protected, so that the server, or with WP_ASYNC the kernel, notes first writes."""
    cpu: Number | None = None
    """The server is to run on this CPU until the area is unmapped (``colocate``)."""


class Unmap(NumberedMessage, frozen=True):
    """The area is about to be unmapped."""

    area: Number


class Populate(NumberedMessage, frozen=True):
    """Map these pages: supply what is not. The runs are what the client's page table lacks."""

    area: Number
    runs: RunList
    access: Literal["read", "write"]
    rollback: bool
    progress: bool
    check_headroom: bool


class Cancel(NumberedMessage, frozen=True):
    """Stop the populate with that id, which then ends with Failed; not answered itself."""


class Discard(NumberedMessage, frozen=True):
    """Give pages back."""

    area: Number
    first: Number
    stop: Number


class DirtyPages(NumberedMessage, frozen=True):
    """Which pages were written since they were filled in, or since the last time with ``clear``."""

    area: Number
    clear: bool


class AskStatistics(NumberedMessage, frozen=True):
    """What the server did for an area."""

    area: Number


class AskLog(NumberedMessage, frozen=True):
    """Which pages were asked for, by fault or populate, in order."""

    area: Number


# --- to the client


class Welcome(NumberedMessage, frozen=True):
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


class Mapped(NumberedMessage, frozen=True):
    """To Map: the number of the area."""

    area: Number


class Done(NumberedMessage, frozen=True):
    """To Unmap."""


class Discarded(NumberedMessage, frozen=True):
    """To Discard: how many of the pages were supplied."""

    pages: Number


class Progress(NumberedMessage, frozen=True):
    """Pages done so far, in the middle of a populate."""

    pages: Number


class Populated(NumberedMessage, frozen=True):
    """To Populate: how many pages it mapped that were not.

    ``poisoned``: the client's entries of these say poison, though by now they are supplied. It drops the entries
    (MADV_DONTNEED) and asks again.
    """

    mapped: Number
    threads: Number
    poisoned: RunList


class Failed(NumberedMessage, frozen=True):
    """To Populate: why it stopped. ``mapped``: the runs that it mapped until then and that stay."""

    kind: Literal["driver", "no populate", "full", "headroom", "cancelled", "gone"]
    number: Number
    message: str
    page: Number
    mapped: RunList
    limit: str
    needed_bytes: Number
    available_bytes: Number


class Runs(NumberedMessage, frozen=True):
    """To DirtyPages and AskLog. ``more``: another part follows."""

    runs: RunList
    more: bool


class Statistics(NumberedMessage, frozen=True):
    """To AskStatistics. ``latency``: how many faults took less than ``2**n`` microseconds in the server, by ``n``."""

    missing: Number
    minor: Number
    write_protect: Number
    populated_pages: Number
    supplied_pages: Number
    errors: Number
    latency: tuple[Number, ...]


class Refused(NumberedMessage, frozen=True):
    """To anything: why not. After ``"protocol"`` the server hangs up."""

    kind: Literal["value", "device", "gone", "protocol"]
    number: Number
    message: str


class Restarted(NumberedMessage, frozen=True):
    """A new server goes on; requests that are not answered are to be asked again. Its ``id`` is 0."""

    generation: Number


class Gone(NumberedMessage, frozen=True):
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

_REFUSALS: dict[str, type[Exception]] = {
    "value": ValueError,
    "device": DeviceError,
    "gone": DeviceGoneError,
    "protocol": DeviceGoneError,
}

decode_request: Decoder[Request] = Decoder(Request)
"""Decodes a message of a client; ProtocolError if it is none."""

decode_reply: Decoder[Reply] = Decoder(Reply)
"""Decodes a message of a server; ProtocolError if it is none."""


def error_of(refused: Refused) -> Exception:
    """Return the exception that a refusal names."""
    return make_error(_REFUSALS[refused.kind], refused.number, refused.message)
