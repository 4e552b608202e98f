"""Header of a safetensors file: names, dtypes and places of its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

_MOST_BYTES = 100_000_000
"""Bytes: the limit of the safetensors library."""


class TensorPlace(NamedTuple):
    """Place of a tensor in its file.

    Attributes:
        kind: the dtype, as the format names it.
        shape: number of items in each dimension.
        start, stop: offsets in the file, in bytes.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_safetensors_header(
    read: Callable[[int, int], bytes], length: int
) -> tuple[dict[str, TensorPlace], dict[str, Any]]:  # fmt: skip
    """Read the header of a safetensors file; the tensors may lie beyond its end.

    Args:
        read: ``read(offset, length)`` returns bytes of the file.
        length: bytes of the file.

    Returns:
        The places of the tensors by name, and the texts of ``__metadata__``.

    Raises:
        ValueError: it is not a safetensors file.
    """
    size = int.from_bytes(read(0, 8), "little") if length >= 8 else length
    if size + 8 > length or size > _MOST_BYTES:
        raise ValueError(f"not a safetensors file: its header would have {size} of {length} bytes")
    try:
        header = json.loads(read(8, size))
        metadata: dict[str, Any] = header.pop("__metadata__", {})
        return {name: _place(entry, 8 + size) for name, entry in header.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: its header cannot be read: {error}") from error


def _place(entry: dict[str, Any], base: int) -> TensorPlace:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop - start, *shape)):
        raise ValueError(f"an entry with the shape {shape} at {start} to {stop}")
    return TensorPlace(str(entry["dtype"]), shape, base + start, base + stop)
