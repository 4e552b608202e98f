"""Objects of a device: named extents of its address space, in a table that outlives the server."""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from typing import Final

from prefault.device.device_pool import DeviceObject
from prefault.device.encoded_names import encode_name
from prefault.device.free_extents import FreeExtents
from prefault.sizes import MIB, format_size

NAME_MOST: Final = 200
"""Bytes of a name, in UTF-8."""
OBJECTS_MOST: Final = (1 << 18) - 1
ALIGNMENT: Final = 2 * MIB
"""Bytes to which the offset of each object is aligned, so that huge pages can map it."""

_offset = attrgetter("offset")
_ROW = struct.Struct(f"=QQ{NAME_MOST}s40x")
_ROW_WORDS: Final = _ROW.size // 8
TABLE_BYTES: Final = _ROW.size * (OBJECTS_MOST + 1)
"""Bytes of the table; only the parts that are written to take memory."""


class ObjectTable:
    """Table of the objects of a device; all methods are called under the server's lock.

    A row has the length and the offset of an object in bytes, and its name. It is valid while its length is not 0. The
    server publishes it by one aligned store of the length, after all else, and removes it by a store of 0: killed at any
    instruction, it leaves each object in the table in whole or not at all. The first word of row 0 counts the rows that were
    ever used.

    Args:
        keep: returns the memory of the table, :data:`TABLE_BYTES` that the servers of the device share, zeros at first. It
            is called for the first object, so that a device without objects has no table.
        there: an earlier server has made the table.
        length: of the device, in bytes.
        page_size: of the device, in bytes.
    """

    def __init__(self, keep: Callable[[], memoryview], there: bool, length: int, page_size: int) -> None:
        self._keep = keep
        self._length = length
        self._page_size = page_size
        self._by_name: dict[str, tuple[DeviceObject, int]] = {}
        """Objects, each with its row."""
        self._free_rows: list[int] = []
        if there:
            self._load_rows()
        self._objects = sorted((found for found, _ in self._by_name.values()), key=_offset)
        self._offsets = [found.offset for found in self._objects]
        self._free = FreeExtents(length, ALIGNMENT, ((found.offset, found.length) for found in self._objects))
        self._users: dict[str, int] = {}

    @cached_property
    def _memory(self) -> memoryview:
        return self._keep()

    @cached_property
    def _words(self) -> memoryview[int]:
        return self._memory.cast("Q")

    def _load_rows(self) -> None:
        rows = self._memory[_ROW.size : _ROW.size * (self._words[0] + 1)]
        for row, (length, offset, name) in enumerate(_ROW.iter_unpack(rows), 1):
            if length:
                found = DeviceObject(name.rstrip(b"\0").decode(), offset, length)
                self._by_name[found.name] = found, row
            else:
                self._free_rows.append(row)

    # --- finding

    def __len__(self) -> int:
        return len(self._by_name)

    def all(self) -> list[DeviceObject]:
        """Return all objects, in order of their offsets."""
        return list(self._objects)

    def find(self, name: str) -> DeviceObject:
        """Return the object of a name; FileNotFoundError if there is none."""
        found = self._by_name.get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"the device has no object {name[:NAME_MOST]!r}")
        return found[0]

    def at(self, page: int) -> DeviceObject | None:
        """Return the object that a page belongs to; None for a page of none."""
        index = bisect_right(self._offsets, page * self._page_size) - 1
        found = self._objects[index] if index >= 0 else None
        return found if found is not None and page in found.pages(self._page_size) else None

    # --- creating and removing

    def place(self, name: str, length: int) -> DeviceObject:
        """Return an object of this name and length at the first free offset; :meth:`add` is next.

        Raises:
            ValueError, TypeError: the name or the length cannot be one.
            FileExistsError: there is an object of that name.
            OSError: ENOSPC: no free extent has that length, or the table is full.
        """
        encode_object_name(name)
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"the length of an object is an int, not {type(length).__name__}")
        if length <= 0:
            raise ValueError(f"an object has at least one byte, not {length}: {name!r}")
        if name in self._by_name:
            raise FileExistsError(errno.EEXIST, f"the device has an object {name!r} already")
        if len(self._by_name) >= OBJECTS_MOST:
            raise OSError(errno.ENOSPC, f"the device has {OBJECTS_MOST} objects, the maximum")
        offset = self._free.find(length)
        if offset is None:
            raise OSError(
                errno.ENOSPC,
                f"no free extent of the device's {format_size(self._length)} has {length} bytes, for {name!r}: the largest"
                f" has {self._free.largest}",
            )
        return DeviceObject(name, offset, length)

    def add(self, placed: DeviceObject) -> None:
        """Add an object that :meth:`place` returned."""
        self._free.take(placed.offset, placed.length)
        if self._free_rows:
            row = self._free_rows.pop()
        else:
            row = self._words[0] + 1
            self._words[0] = row
        start = row * _ROW.size
        self._memory[start + 16 : start + 16 + NAME_MOST] = encode_object_name(placed.name).ljust(NAME_MOST, b"\0")
        self._words[row * _ROW_WORDS + 1] = placed.offset
        self._words[row * _ROW_WORDS] = placed.length
        self._by_name[placed.name] = placed, row
        index = bisect_right(self._offsets, placed.offset)
        self._offsets.insert(index, placed.offset)
        self._objects.insert(index, placed)

    def remove(self, found: DeviceObject) -> None:
        """Remove an object; OSError EBUSY while areas of clients map it."""
        users = self._users.get(found.name, 0)
        if users:
            some = "an area maps" if users == 1 else f"{users} areas map"
            raise OSError(errno.EBUSY, f"object {found.name!r} cannot be deleted: {some} it")
        _, row = self._by_name.pop(found.name)
        self._words[row * _ROW_WORDS] = 0
        self._free_rows.append(row)
        index = bisect_right(self._offsets, found.offset) - 1
        del self._offsets[index], self._objects[index]
        self._free.give(found.offset, found.length)

    # --- users

    def acquire(self, used: DeviceObject) -> None:
        """Count an area that the driver has, or is about to get, of an object: it is not removed meanwhile."""
        self._users[used.name] = self._users.get(used.name, 0) + 1

    def release(self, used: DeviceObject) -> None:
        """Drop the reference of an area."""
        self._users[used.name] -= 1
        if not self._users[used.name]:
            del self._users[used.name]


def encode_object_name(name: str) -> bytes:
    """Return the name of an object in UTF-8; TypeError or ValueError if it cannot be one."""
    return encode_name(name, "an object", NAME_MOST)
