"""Messages as bytes, whatever text is in them."""

from __future__ import annotations

from typing import Any

import msgspec

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message in MessagePack. What UTF-8 cannot say of its text is escaped, as Python does on the standard error.

    A name of a file that is not UTF-8 is a str with lone surrogates (PEP 383), and an exception may quote it. A message is
    never refused for that: the process that has it to say might end of it. Paths that the other side is to open travel as
    bytes.
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
