"""Messages between processes: typed structures in MessagePack, each with a tag that names its class."""

from __future__ import annotations

import errno
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

try:
    import msgspec as msgspec
except ImportError:
    raise ImportError(
        "device memory, and a pool that processes share, need msgspec, which is not installed: pip install msgspec",
        name="msgspec",
    ) from None

from prefault.ipc.transport import ProtocolError

Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class TaggedMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower, array_like=True):
    """Base of all messages: a list of the tag and the fields."""


class NumberedMessage(TaggedMessage, frozen=True):
    """Base of requests and replies: a reply has the ``id`` of its request, or 0 when it comes unasked."""

    id: Number


_Message = TypeVar("_Message")


class Decoder(Generic[_Message]):
    """Decodes the messages of a union of classes; a callable.

    Args:
        kinds: the union.
    """

    __slots__ = ("_decoder",)

    def __init__(self, kinds: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(kinds)

    def __call__(self, data: bytes | bytearray) -> _Message:
        """Decode a message.

        Raises:
            ProtocolError: ``data`` is no message of these classes.
        """
        try:
            return self._decoder.decode(data)
        # The tag of a union is decoded outside of what msgspec makes a DecodeError of.
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message: {error}") from None


_encoder = msgspec.msgpack.Encoder()


def encode(message: TaggedMessage) -> bytes:
    """Encode a message; text that UTF-8 cannot express is escaped, as Python does on the standard error.

    The name of a file that is not UTF-8 is a str with lone surrogates (PEP 383), and an exception may quote it. No message
    is refused for that: the process that sends it might end of the error. Paths that the receiver opens travel as bytes.
    """
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError:
        return _encoder.encode(_escaped(msgspec.to_builtins(message, builtin_types=(bytes,))))


def _escaped(value: Any) -> Any:
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case list() | tuple():
            return [_escaped(item) for item in value]
        case dict():
            return {_escaped(key): _escaped(item) for key, item in value.items()}
        case _:
            return value


def make_error(kind: type[Exception], number: int, message: str) -> Exception:
    """Make the exception that a refusal names; ``number`` is the errno of an OSError, or 0 where the sender had none."""
    return kind(number or errno.EIO, message) if issubclass(kind, OSError) else kind(message)
