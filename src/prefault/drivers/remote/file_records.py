"""Files of a shared server: the messages that open and close them, and a table of them that outlives the server."""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal, TypeAlias

from prefault.device.driver import Recipe
from prefault.ipc.messages import msgspec

SLOT_BYTES = 16 << 10
"""Bytes of a record in the table, with its length."""
SLOTS = 1 << 15
"""Most files of a server; the table has one slot more."""
TABLE_BYTES = SLOT_BYTES * (SLOTS + 1)
"""Bytes of the table; only the parts that are written to take memory."""

_WORD = struct.Struct("=Q")
ObjectName: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]


class OpenFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="open"):
    """Request to open a handle of the object of this name, which is a file; the file is opened if it is not.

    The other fields are arguments of :class:`RemoteFile`, with names of files as the file system has them: as bytes. They
    may be credentials, which the name must not contain.
    """

    name: ObjectName
    source: bytes
    compression: Literal["infer", "gzip", "zstd"] | None
    headers: dict[str, str]
    storage_options: dict[str, Any]
    capacity: Number | None
    cache_dir: bytes | None
    cache_warned: bool
    index: bytes | None
    workers: Number
    batch: Number
    fault_around: tuple[Number, Number]
    page_size: Number
    version: tuple[Number, str, str]
    patience: tuple[Number, Seconds, Seconds, Seconds, Seconds]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the file: that of :meth:`RemoteFile.recipe`."""
        arguments = {name: getattr(self, name) for name in self.__struct_fields__ if name != "name"}
        return Recipe("prefault.drivers.remote.remote_file:make_remote_file", arguments)


class CloseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="close"):
    """Request to close a handle of an object. A file without handles and areas is closed."""

    name: ObjectName


class FileFacts(msgspec.Struct, frozen=True):
    """Reply: the name and the length of the object to map, in bytes."""

    name: str
    length: int


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(OpenFile | CloseFile).decode
"""Decode a request; msgspec.MsgspecError, without any value of it, if it is none."""


class FileTable:
    """Table of records in memory that outlives the server: a slot for each, with its length in bytes before it.

    The length is stored last, and cleared first: a server that is killed leaves each record in the table in whole or not at
    all. Slot 0 has the number of slots that were ever used.

    Args:
        memory: :data:`TABLE_BYTES`, zeros at first.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._words = memory.cast("Q")
        used = self._words[0]
        self._free = [slot for slot in range(1, used + 1) if not self._words[slot * SLOT_BYTES // 8]]

    def records(self) -> list[tuple[int, bytes]]:
        """Return all records, each with its slot."""
        found = []
        for slot in range(1, self._words[0] + 1):
            start, length = slot * SLOT_BYTES, self._words[slot * SLOT_BYTES // 8]
            if length:
                found.append((slot, bytes(self._memory[start + _WORD.size : start + _WORD.size + length])))
        return found

    def add(self, record: bytes) -> int:
        """Add a record of at most :data:`SLOT_BYTES` less 8; return its slot, or 0 if the table is full."""
        if self._free:
            slot = self._free.pop()
        elif self._words[0] < SLOTS:
            slot = self._words[0] + 1
            self._words[0] = slot
        else:
            return 0
        start = slot * SLOT_BYTES + _WORD.size
        self._memory[start : start + len(record)] = record
        self._words[slot * SLOT_BYTES // 8] = len(record)
        return slot

    def remove(self, slot: int) -> None:
        """Remove the record in a slot, and overwrite it, as it may hold credentials."""
        start, length = slot * SLOT_BYTES, self._words[slot * SLOT_BYTES // 8]
        self._words[slot * SLOT_BYTES // 8] = 0
        self._memory[start + _WORD.size : start + _WORD.size + length] = bytes(length)
        self._free.append(slot)
