"""Header of a GGUF file (llama.cpp): names, types and places of its tensors."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

from prefault.drivers.remote.safetensors_header import TensorPlace
from prefault.sizes import MIB

MAGIC = b"GGUF"

_MOST_BYTES = 64 * MIB
"""Bytes of a header: tokenizers of 250 000 words take 10 MiB."""

_BLOCK = MIB
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by the number of its type; strings and arrays have lengths of their own."""

_MOST_DIMENSIONS = 8
_ALIGNMENT_KEY = b"general.alignment"
_UINT32 = 4


def read_gguf_header(read: Callable[[int, int], bytes], length: int) -> dict[str, TensorPlace]:
    """Read the header of a GGUF file, version 2 or 3.

    The format does not say how many bytes a tensor has: it goes up to the next one, so that up to an alignment of padding
    is counted to it.

    Args:
        read: ``read(offset, length)`` returns bytes of the file, fewer at its end.
        length: bytes of the file.

    Raises:
        ValueError: it is not a GGUF file, or its header is damaged. No more is read or kept than 64 MiB.

    Source: docs/gguf.md of ggml-org/ggml.
    """
    header = _Reader(read, length)
    if header.take(4) != MAGIC:
        raise ValueError("not a GGUF file: it does not begin with GGUF")
    raw = header.take(4)
    # Version 3 may be big-endian: the smaller reading is right.
    order = "<" if int.from_bytes(raw, "little") <= int.from_bytes(raw, "big") else ">"
    header.order = order
    version = int.from_bytes(raw, "little" if order == "<" else "big")
    if version not in (2, 3):
        raise ValueError(f"version {version} of GGUF is not known: convert the file with a current llama.cpp")
    tensors, pairs = header.number("Q"), header.number("Q")
    alignment = 32
    for _ in range(header.checked(pairs, 13)):
        key, kind = header.string(), header.number("I")
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = header.number("I")
        else:
            header.skip_value(kind)
    if not 1 <= alignment <= _MOST_BYTES or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment} bytes")
    found: list[tuple[int, str, str, tuple[int, ...]]] = []
    for _ in range(header.checked(tensors, 24)):
        name = header.string().decode(errors="surrogateescape")
        dimensions = header.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(header.number("Q") for _ in range(dimensions))
        found.append((header.number("I"), name, str(header.number("Q")), shape))
    base = header.at + -header.at % alignment
    starts = sorted({base + int(offset) for _, _, offset, _ in found} | {max(length, base)})
    after = dict(itertools.pairwise(starts))
    return {
        name: TensorPlace(f"ggml type {kind}", shape, base + int(offset), after.get(base + int(offset), base + int(offset)))
        for kind, name, offset, shape in found
    }


class _Reader:
    """A header that is read in blocks, up to a limit.

    Attributes:
        at: offset of the next byte.
        order: byte order, as the struct module writes it.
    """

    def __init__(self, read: Callable[[int, int], bytes], length: int) -> None:
        self.at = 0
        self.order = "<"
        self._read = read
        self._end = min(length, _MOST_BYTES)
        self._block = b""
        self._block_at = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self._check(count)
        start = self.at - self._block_at
        if start < 0 or start + count > len(self._block):
            self._block, self._block_at, start = (
                self._read(self.at, max(count, min(_BLOCK, self._end - self.at))),
                self.at,
                0,
            )
            if len(self._block) < count:
                raise ValueError("the file ends inside of its header: it was cut short")
        self.at += count
        return self._block[start : start + count]

    def skip(self, count: int) -> None:
        """Leave out bytes, which are not read."""
        self._check(count)
        self.at += count

    def checked(self, count: int, least_bytes: int) -> int:
        """Return a number of elements of at least so many bytes, if the header has room for them."""
        self._check(count * least_bytes)
        return count

    def number(self, form: str) -> int:
        """Return an unsigned number of the struct module's ``form``."""
        found: int = struct.unpack(self.order + form, self.take(struct.calcsize(f"={form}")))[0]
        return found

    def string(self) -> bytes:
        """Return a string."""
        return self.take(self.number("Q"))

    def skip_value(self, kind: int) -> None:
        """Leave out a value of a type."""
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
            elif inner == _STRING:
                for _ in range(self.checked(count, 8)):
                    self.skip(self.number("Q"))
            else:
                raise ValueError(f"an array of values of the type {inner}")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"a value of the type {kind}")

    def _check(self, count: int) -> None:
        if self.at + count > self._end:
            limit = "the 64 MiB that a header may have" if self._end == _MOST_BYTES else "the file"
            raise ValueError(f"{count} bytes at offset {self.at} reach beyond {limit}")
