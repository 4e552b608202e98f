"""What is said between a pool's server and its clients: typed messages in MessagePack, each with its length before it.

A request is answered by exactly one reply, in order, with the same ``id``. On a connection that asked to be told of the
high-water mark the server sends :class:`HighWater` from then on, and nothing else is said. The only descriptor that ever
travels is that of a new member's file, with the first byte of :class:`Created`.
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
"""Bytes in the longest message of a client. A charge says how much, not which blocks, so that all are short."""

MAX_REPLY = 4 << 20
"""Bytes in the longest message of a server: statistics of some ten thousand members."""

_LENGTH = struct.Struct("<I")

_Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=1000)]


class _PoolMessage(NumberedMessage, frozen=True, tag=lambda name: name.removeprefix("Pool").lower()):
    pass


class PoolHello(_PoolMessage, frozen=True, tag="hello"):
    """The first message of a client. ``events``: this connection is there to be told of the high-water mark."""

    version: Number
    events: bool


class Create(_PoolMessage, frozen=True):
    """Have a member made."""

    size: Number
    reserved: Number
    limit: Number | None
    name: _Text | None


class Settle(_PoolMessage, frozen=True):
    """Have so many bytes charged to a member of this connection, in all."""

    member: Number
    charged: Number


class Close(_PoolMessage, frozen=True):
    """Empty a member of this connection, and forget it."""

    member: Number


class Ask(_PoolMessage, frozen=True):
    """Ask for the statistics."""


class PoolWelcome(_PoolMessage, frozen=True, tag="welcome"):
    """To Hello: what the pool is."""

    capacity: Number
    block: Number
    notes: tuple[str, ...]


class Created(_PoolMessage, frozen=True):
    """To Create; the descriptor of the file comes with it."""

    member: Number
    name: str
    size: Number


class PoolDone(_PoolMessage, frozen=True, tag="done"):
    """To Settle and Close."""


class StatisticsReply(_PoolMessage, frozen=True, tag="statistics"):
    """To Ask."""

    statistics: PoolStatistics


class HighWater(_PoolMessage, frozen=True):
    """The charge has come to the high-water mark."""

    statistics: PoolStatistics


class PoolRefused(_PoolMessage, frozen=True, tag="refused"):
    """To anything: why not. ``kind`` is a key of :data:`ERRORS`; after ``"protocol"`` the server closes the connection."""

    kind: str
    number: int
    message: str


Request: TypeAlias = PoolHello | Create | Settle | Close | Ask
Reply: TypeAlias = PoolWelcome | Created | PoolDone | StatisticsReply | HighWater | PoolRefused

# What travels by name, most special first: the first that fits is sent.
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
    """A message with its length before it."""
    body = messages.encode(message)
    return _LENGTH.pack(len(body)) + body


def numbered(request: Request, number: int) -> Request:
    """The same request with another ``id``."""
    return msgspec.structs.replace(request, id=number)


def take_message(received: bytearray, most: int) -> bytearray | None:
    """Take the first message off what was received; None while it is not complete.

    Raises:
        ProtocolError: it claims to be empty or longer than ``most``.
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
    """An error as a message."""
    kind = next(kind for kind, of in ERRORS.items() if isinstance(error, of))
    number = error.errno if isinstance(error, OSError) else None
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return PoolRefused(request, kind, number or 0, text)


def error_of(refused: PoolRefused) -> Exception:
    """Return the exception that a refusal names."""
    if refused.kind == "protocol":
        return PoolGoneError(errno.ECONNABORTED, f"the pool's server refuses: {refused.message}")
    return make_error(ERRORS.get(refused.kind, OSError), refused.number, refused.message)
