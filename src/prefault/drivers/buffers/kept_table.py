"""A table of records in memory that outlives the process: a log in one of two halves, compacted into the other when full.

Killed between any two stores, it holds all records that were put before, and the last one in whole or not at all.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterator
from struct import Struct

from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.sizes import format_size

_HEAD = Struct("<Q")
_HEAD_BYTES = 64
_ENTRY = Struct("<IIII")
"""Length of key and value plus 1, checksum, length of the key, 1 for a removal."""
_LENGTH = Struct("<I")


class KeptTable:
    """Records by key, kept in shared memory.

    Args:
        memory: zeros at first, and what the last process left there later.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._half = (len(memory) - _HEAD_BYTES) // 2
        self._records: dict[bytes, bytes] = {}
        self._at = self._start()
        for key, value, end in self._entries():
            self._at = end
            if value is None:
                self._records.pop(key, None)
            else:
                self._records[key] = value

    def records(self) -> dict[bytes, bytes]:
        """Return all records."""
        return dict(self._records)

    def put(self, key: bytes, value: bytes) -> None:
        """Enter or replace a record; BufferObjectError (ENOSPC): the table is full, and as it was."""
        if self._records.get(key) != value:
            self._change(key, value)

    def remove(self, key: bytes) -> None:
        """Remove a record, if there is one."""
        if key in self._records:
            self._change(key, None)

    # --- the log

    def _start(self) -> int:
        number: int = _HEAD.unpack_from(self._memory)[0]
        return _HEAD_BYTES + self._half * (number % 2)

    def _entries(self) -> Iterator[tuple[bytes, bytes | None, int]]:
        at = start = self._start()
        while at + _ENTRY.size <= start + self._half:
            length, checksum, key_length, removed = _ENTRY.unpack_from(self._memory, at)
            end = at + _ENTRY.size + length - 1
            if not length or end > start + self._half or key_length >= length:
                return
            body = bytes(self._memory[at + _ENTRY.size : end])
            if zlib.crc32(body) != checksum:
                return
            yield body[:key_length], None if removed else body[key_length:], end
            at = end

    def _change(self, key: bytes, value: bytes | None) -> None:
        after = {**self._records, key: value} if value is not None else {k: v for k, v in self._records.items() if k != key}
        if not self._append(self._at, self._start() + self._half, key, value):
            self._compact({k: v for k, v in after.items() if v is not None})
        if value is None:
            del self._records[key]
        else:
            self._records[key] = value

    def _append(self, at: int, stop: int, key: bytes, value: bytes | None) -> bool:
        body = key + (value or b"")
        end = at + _ENTRY.size + len(body)
        if end + _LENGTH.size > stop:
            return False
        _LENGTH.pack_into(self._memory, end, 0)
        self._memory[at + _ENTRY.size : end] = body
        _ENTRY.pack_into(self._memory, at, 0, zlib.crc32(body), len(key), value is None)
        _LENGTH.pack_into(self._memory, at, len(body) + 1)  # the store that counts
        self._at = end
        return True

    def _compact(self, records: dict[bytes, bytes]) -> None:
        number = _HEAD.unpack_from(self._memory)[0] + 1
        at = _HEAD_BYTES + self._half * (number % 2)
        stop, before = at + self._half, self._at
        _LENGTH.pack_into(self._memory, at, 0)
        for key, value in records.items():
            if not self._append(at, stop, key, value):
                self._at = before
                raise BufferObjectError(
                    errno.ENOSPC,
                    f"the table of buffer objects is full ({len(records)} records, {format_size(self._half)}): delete some",
                )
            at = self._at
        _HEAD.pack_into(self._memory, 0, number)
