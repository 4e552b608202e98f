"""Messages: what cannot be decoded is a ProtocolError, text of any kind can be encoded, refusals become exceptions."""

from __future__ import annotations

import errno

import pytest

from prefault.errors import PoolFullError
from prefault.ipc.messages import Decoder, NumberedMessage, encode, make_error
from prefault.ipc.transport import ProtocolError


class Spoken(NumberedMessage, frozen=True):
    text: str
    path: bytes


class Other(NumberedMessage, frozen=True, tag="another"):
    pass


_decode: Decoder[Spoken | Other] = Decoder(Spoken | Other)


@pytest.mark.parametrize("message", [Spoken(1, "text", b"\xff"), Other(2)])
def test_a_message_is_decoded_as_it_was_encoded(message: Spoken | Other) -> None:
    assert _decode(encode(message)) == message


def test_the_tag_is_the_name_of_the_class_or_what_the_class_says() -> None:
    assert b"spoken" in encode(Spoken(1, "", b""))
    assert b"another" in encode(Other(1))


def test_text_that_utf_8_cannot_express_is_escaped_and_bytes_are_not() -> None:
    assert _decode(encode(Spoken(1, "a\udcffb", b"\xff"))) == Spoken(1, r"a\udcffb", b"\xff")


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x92\xa5other\x01", b"\x92\xa7another\xff", b"\x91\xa1\xff", b"\x91" * 5000]
)
def test_what_is_no_message_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        _decode(data)


def test_a_refusal_becomes_the_exception_that_it_names() -> None:
    full = make_error(PoolFullError, errno.ENOSPC, "full")
    assert isinstance(full, PoolFullError)
    assert full.errno == errno.ENOSPC
    unnumbered = make_error(OSError, 0, "no number")
    assert isinstance(unnumbered, OSError)
    assert unnumbered.errno == errno.EIO
    assert str(make_error(ValueError, 0, "wrong")) == "wrong"
