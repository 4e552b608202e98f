"""The protocol between a pool's server and its clients: typed messages in MessagePack, each preceded by its length.

Every request has exactly one reply, in order, with the same ``id``. On a connection that subscribed to the high-water mark
the server sends :class:`HighWaterReached`, and the client nothing. The only descriptor that travels is that of a new
member's file, with the first byte of :class:`Created`.
"""

from __future__ import annotations

import errno
import struct
from typing import Annotated, TypeAlias

from prefault.errors import HugePagesError, MappingError, PoolFullError, PoolGoneError
from prefault.ipc import messages
from prefault.ipc.messages import Decoder, Number, NumberedMessage, make_error, msgspec
from prefault.ipc.transport import ProtocolError
from prefault.pool.pool_statistics import PoolStatistics

VERSION = 1

MAX_REQUEST = 4096
"""The most bytes in a message of a client. A charge is a sum, not a list of blocks, so that all are short."""

MAX_REPLY = 4 << 20
"""The most bytes in a message of a server: statistics of some ten thousand members."""

_LENGTH = struct.Struct("<I")

_Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=1000)]


class PoolHello(NumberedMessage, frozen=True, tag="hello"):
    """The first message of a client. ``events``: the connection subscribes to the high-water mark, and nothing else."""

    version: Number
    events: bool


class Create(NumberedMessage, frozen=True):
    """Create a member."""

    size: Number
    reserved: Number
    limit: Number | None
    name: _Text | None


class Settle(NumberedMessage, frozen=True):
    """Set the bytes that are charged to a member of this connection, in all."""

    member: Number
    charged: Number


class Close(NumberedMessage, frozen=True):
    """Empty and remove a member of this connection."""

    member: Number


class StatisticsRequest(NumberedMessage, frozen=True, tag="ask"):
    """Ask for the statistics."""


class PoolWelcome(NumberedMessage, frozen=True, tag="welcome"):
    """Reply to PoolHello: the facts of the pool."""

    capacity: Number
    block: Number
    notes: tuple[str, ...]


class Created(NumberedMessage, frozen=True):
    """Reply to Create; the descriptor of the file comes with it."""

    member: Number
    name: str
    size: Number


class PoolDone(NumberedMessage, frozen=True, tag="done"):
    """Reply to Settle and Close."""


class StatisticsReply(NumberedMessage, frozen=True, tag="statistics"):
    """Reply to StatisticsRequest."""

    statistics: PoolStatistics


class HighWaterReached(NumberedMessage, frozen=True, tag="highwater"):
    """The event that the charge has reached the high-water mark; its ``id`` is 0."""

    statistics: PoolStatistics


class PoolRefused(NumberedMessage, frozen=True, tag="refused"):
    """Refusal of any request. ``kind`` is a key of :data:`ERRORS`; after ``"protocol"`` the server hangs up."""

    kind: str
    number: int
    message: str


Request: TypeAlias = PoolHello | Create | Settle | Close | StatisticsRequest
Reply: TypeAlias = PoolWelcome | Created | PoolDone | StatisticsReply | HighWaterReached | PoolRefused

# Exceptions that travel by name, the most special first: the first that fits is sent.
ERRORS: dict[str, type[Exception]] = {
    "full": PoolFullError,
    "gone": PoolGoneError,
    "huge pages": HugePagesError,
    "mapping": MappingError,
    "value": ValueError,
    "system": OSError,
    "protocol": PoolGoneError,
}

decode_request: Decoder[Request] = Decoder(Request)
"""Decodes a message of a client; ProtocolError if it is none."""

decode_reply: Decoder[Reply] = Decoder(Reply)
"""Decodes a message of a server; ProtocolError if it is none."""


def encode(message: Request | Reply) -> bytes:
    """Encode a message, preceded by its length."""
    body = messages.encode(message)
    return _LENGTH.pack(len(body)) + body


def numbered(request: Request, number: int) -> Request:
    """Return a copy of a request with another ``id``."""
    return msgspec.structs.replace(request, id=number)


def take_message(received: bytearray, most: int) -> bytearray | None:
    """Remove the first message from the received bytes and return it; None while it is incomplete.

    Raises:
        ProtocolError: its length is 0 or more than ``most``.
    """
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if not 0 < length <= most:
        raise ProtocolError(f"a message of {length} bytes; 1 to {most} are allowed")
    if len(received) < _LENGTH.size + length:
        return None
    body = received[_LENGTH.size : _LENGTH.size + length]
    del received[: _LENGTH.size + length]
    return body


def refusal(request: int, error: Exception) -> PoolRefused:
    """Make the refusal that carries an exception."""
    kind = next(kind for kind, of in ERRORS.items() if isinstance(error, of))
    number = error.errno if isinstance(error, OSError) else None
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return PoolRefused(request, kind, number or 0, text)


def error_of(refused: PoolRefused) -> Exception:
    """Return the exception that a refusal names."""
    if refused.kind == "protocol":
        return PoolGoneError(errno.ECONNABORTED, f"the pool's server refuses: {refused.message}")
    return make_error(ERRORS.get(refused.kind, OSError), refused.number, refused.message)
