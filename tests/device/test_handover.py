"""Arguments of recipes as they cross to another process: every value arrives as it was, and no file crashes the reader."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefault.device import handover, recipes, spawning
from prefault.ipc.transport import ProtocolError

_text = st.text(st.characters(codec=None))  # with lone surrogates, as in names of files that are not UTF-8
_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | _text | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=12,
)
_arguments = st.dictionaries(_text, _plain, max_size=4)


def _written(arguments: dict[str, Any]) -> bytes:
    fd = handover.arguments_file(arguments)
    try:
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def _read(content: bytes) -> dict[str, Any]:
    fd = os.memfd_create("arguments")
    try:
        os.write(fd, content)
        recipe = handover.make_recipe("package:name", fd)
    finally:
        os.close(fd)
    assert recipe is not None
    return recipe.arguments


def _exact(value: object) -> object:
    """Return a value that is equal for equal types, orders of keys and bits of floats only."""
    match value:
        case float():
            return struct.pack("d", value)
        case list():
            return [list, *map(_exact, value)]
        case dict():
            return [dict, *((key, _exact(item)) for key, item in value.items())]
        case _:
            return type(value), value


def _arrive_as_they_were(arguments: dict[str, Any]) -> None:
    assert _exact(_read(_written(arguments))) == _exact(arguments)


test_arguments_arrive_as_they_were = settings(max_examples=50)(given(_arguments)(_arrive_as_they_were))
test_many_arguments_arrive_as_they_were = pytest.mark.stress(
    settings(max_examples=3000)(given(_arguments)(_arrive_as_they_were))
)


@pytest.mark.parametrize(
    "text", ["\udce9", "\ud83d\ude00", "\U0001f600", "\0", ""], ids=["not UTF-8", "two halves", "one", "NUL", "empty"]
)
def test_text_and_keys_arrive_unchanged(text: str) -> None:
    assert _read(_written({text: [text, {text: text.encode(errors="surrogatepass")}]})) == {
        text: [text, {text: text.encode(errors="surrogatepass")}]
    }


def _accepts_or_refuses(content: bytes) -> None:
    try:
        arguments = _read(content)
    except ProtocolError:
        return
    recipes.check_arguments(arguments)


@given(st.binary())
def test_a_file_of_any_bytes_is_arguments_or_a_protocol_error(content: bytes) -> None:
    _accepts_or_refuses(content)
    _accepts_or_refuses(b"\x81\xa1x" + content)


@given(_arguments, st.data())
def test_a_damaged_file_is_arguments_or_a_protocol_error(arguments: dict[str, Any], data: st.DataObject) -> None:
    content = bytearray(_written(arguments))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    _accepts_or_refuses(bytes(content[: data.draw(st.integers(0, len(content)))]))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x90", b"\xc0", b"\x81\x01\x01", b"\x81\xc0\x01", b"\x81\x90\x01", b"\x81\x80\x01", b"\x80\x80",
        b"\xdf\xff\xff\xff\xff", b"\x81\xa1x" + b"\x91" * 100_000, b"\x81\xa1x" + b"\x91" * 300 + b"\xc0",
        b"\x81\xa1x\xd6\xff\0\0\0\0", b"\x81\xa1x\xd4\x02x", b"\x81\xa1x\xd4\x01\xff", b"\x81\xa1x\xdd\xff\xff\xff\xff",
        b"\x81\xa1x\xa1\xff",
    ],
    ids=[
        "nothing", "a list", "None", "a number as key", "None as key", "a list as key", "a dict as key", "more behind it",
        "fewer entries than announced", "nested without end", "nested too deep", "a time", "an unknown extension",
        "text that is none", "fewer items than announced", "a str that is none",
    ],
)  # fmt: skip
def test_a_malformed_file_is_a_protocol_error(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="not the arguments of a recipe"):
        _read(content)


def test_a_program_on_disk_that_speaks_another_version_is_refused() -> None:
    ours, theirs = handover.pair()
    fd = handover.arguments_file({})
    with ours:
        with theirs:
            pid = spawning.spawn(theirs.fileno())
        owner = os.pidfd_open(os.getpid())
        handover.send(ours, handover.Start(handover.VERSION + 1, "support.devices:Remade", None), [fd, owner])
        os.close(fd)
        os.close(owner)
        ours.settimeout(60)
        received = handover.receive(ours)
    assert received is not None
    assert isinstance(received[0], handover.ServerNotStarted), received[0]
    assert "prefault was replaced by another version" in received[0].message
    assert handover.reap(pid, 20) == 1
