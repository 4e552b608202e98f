"""Names in tables of fixed rows: checked, and encoded in UTF-8."""

from __future__ import annotations


def encode_name(name: str, of: str, most: int) -> bytes:
    """Return a name in UTF-8.

    Args:
        name: of one to ``most`` bytes, without NUL, which pads a row.
        of: the thing that is named, for the message.
        most: bytes of a name in the table.

    Raises:
        TypeError, ValueError: it cannot be a name.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of {of} is a str, not {type(name).__name__}")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name of {of} is text that UTF-8 can encode, not {name!a}") from None
    if not 1 <= len(encoded) <= most or b"\0" in encoded:
        raise ValueError(f"the name of {of} has 1 to {most} bytes in UTF-8 and no NUL, not {len(encoded)}: {name[:most]!r}")
    return encoded
