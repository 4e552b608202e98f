"""Sizes as people write them: ``"64 MiB"``, ``"2 GiB"``, ``4096``.

Exact both ways: a text that is not a whole number of bytes is refused, not rounded.
"""

from __future__ import annotations

import operator
import os
import re
from typing import TypeAlias

Size: TypeAlias = int | str
"""A number of bytes, or a text that :func:`parse_size` reads."""

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
"""Bytes in a base page (4096 on x86-64)."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MAX_SIZE = (1 << 63) - 1
"""The largest length that a system call takes as a signed 64-bit number."""

# A letter alone is binary, as for dd, qemu and fallocate(1): 64M is 64 MiB. "MB" is the decimal unit.
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1 << (10 * _power)
    _UNITS[_letter + "b"] = 1000**_power

_SIZE = r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*"  # compiled when the first text comes, not at import


def parse_size(size: Size) -> int:
    """Return the number of bytes that ``size`` stands for.

    Args:
        size: bytes as an ``int``, or a text: a decimal number and a unit. ``K``, ``M``, ``G``, ``T``, ``P``, ``E`` and
            ``KiB`` ... ``EiB`` are powers of 1024, ``kB`` ... ``EB`` powers of 1000. Case does not matter.

    Raises:
        TypeError: neither an integer nor a text.
        ValueError: negative, larger than a 63-bit number, an unknown unit, or a fraction of a byte.
    """
    if type(size) is int and 0 <= size <= MAX_SIZE:
        return size
    if isinstance(size, str):
        if len(size) > 100:
            raise ValueError(f"a text of {len(size)} characters is not a size")
        match = re.fullmatch(_SIZE, size, re.ASCII)
        if match is None:
            raise ValueError(f"{size!r} is not a size: write a number and a unit, such as '64 MiB' or '2 GiB'")
        number, unit = match.groups()
        if unit.lower() not in _UNITS:
            raise ValueError(f"{size!r} has an unknown unit {unit!r}: use KiB, MiB, GiB, TiB (or kB, MB, GB, TB)")
        whole, _, fraction = number.partition(".")
        result, rest = divmod(int(whole + fraction) * _UNITS[unit.lower()], int(10 ** len(fraction)))
        if rest:
            raise ValueError(f"{size!r} is not a whole number of bytes")
    elif isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"a size is an int or a text such as '64 MiB', not {type(size).__name__}")
    else:
        result = int(operator.index(size))
    # Python refuses to write very large numbers in decimal.
    shown = size if result.bit_length() < 100 else f"a number of {result.bit_length()} bits"
    if result < 0:
        raise ValueError(f"a size cannot be negative: {shown}")
    if result > MAX_SIZE:
        raise ValueError(f"{shown} is beyond what the kernel can address (2**63 - 1 bytes)")
    return result


def format_count(count: int, noun: str, plural: str = "") -> str:
    """Format a number of things for people: ``"1 file"``, ``"2 files"``, ``"0 directories"``.

    Args:
        count: number of things.
        noun: word for one of them.
        plural: word for several; ``""``: the noun and an s.
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def format_size(size: int) -> str:
    """Format bytes for people, in binary units, rounded to a tenth of the unit: ``"4.0 GiB"``, ``"512 bytes"``."""
    value = float(size)
    if abs(size) < KIB:
        return f"{size} byte{'' if size == 1 else 's'}"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if abs(value) < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} EiB"
