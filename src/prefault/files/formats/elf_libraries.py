"""Shared libraries that a program needs, as its ELF file names them; the program is not run."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator

_MOST_BYTES = 1 << 20
"""Bytes of a table that is read; a damaged file could claim any number."""

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 1, 5, 10

_SYSTEM = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", *(f"/usr/lib/{os.uname().machine}-linux-gnu",))


def needed_libraries(path: str, directories: Iterable[str]) -> Iterator[str]:
    """Yield the files of the libraries that a program needs, and those that they need, each once.

    Args:
        path: the program.
        directories: where to look, before the system's directories. A library that is in none of them is left out.
    """
    places = [*dict.fromkeys(directories), *_SYSTEM]
    seen: set[str] = set()
    pending = [path]
    while pending:
        for name in _needed(pending.pop()):
            if name in seen:
                continue
            seen.add(name)
            found = next((there for place in places if os.path.isfile(there := os.path.join(place, name))), None)
            if found is not None:
                yield found
                pending.append(found)


def _needed(path: str) -> list[str]:
    """Return the DT_NEEDED names of an ELF file of 64 bits; none for any other, or a damaged one. elf(5)."""
    try:
        with open(path, "rb") as file:
            return list(_names(file.fileno()))
    except (OSError, struct.error, ValueError, OverflowError):
        return []


def _names(fd: int) -> Iterator[str]:
    head = os.pread(fd, 64, 0)
    if head[:5] != b"\x7fELF\x02":
        return
    order = "<" if head[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", head, 32)
    size, count = struct.unpack_from(f"{order}HH", head, 54)
    loaded: list[tuple[int, int, int]] = []
    dynamic = (0, 0)
    entries = os.pread(fd, size * count, table)
    for at in range(0, len(entries) - 55, size or 56):
        kind, _, offset, address, _, length = struct.unpack_from(f"{order}IIQQQQ", entries, at)
        if kind == _PT_LOAD:
            loaded.append((address, offset, length))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, min(length, _MOST_BYTES))
    raw = os.pread(fd, dynamic[1], dynamic[0])
    tags = list(struct.iter_unpack(f"{order}QQ", raw[: len(raw) // 16 * 16]))
    values = dict(tags)
    address = values.get(_DT_STRTAB, 0)
    offset = next((offset + address - start for start, offset, length in loaded if start <= address < start + length), None)
    if offset is None:
        return
    strings = os.pread(fd, min(values.get(_DT_STRSZ, 0), _MOST_BYTES), offset)
    for tag, value in tags:
        if tag == _DT_NEEDED and value < len(strings):
            yield os.fsdecode(strings[value : strings.find(b"\0", value)])
