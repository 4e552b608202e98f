"""Memory that a driver keeps for the next server: named pieces of the file that the warden and all servers share."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import Final

from prefault.device import limit_messages
from prefault.device.encoded_names import encode_name
from prefault.errors import DeviceError
from prefault.sizes import PAGE_SIZE, format_size

NAME_MOST: Final = 100
"""Bytes of a name, in UTF-8."""
NAMES_MOST: Final = 100
TOTAL_MOST: Final = 16 << 40
"""Bytes of all pieces of a device, in whole pages of 4 KiB each; memory is taken only where they are written to."""

_ROW = 128
_ROW_WORDS = _ROW // 8
KEPT_TABLE_BYTES: Final = -(-NAMES_MOST * _ROW // PAGE_SIZE) * PAGE_SIZE


class KeptMemory:
    """Named pieces of memory behind the tables in a shared file, and the table of their names, lengths and places.

    The table has a row for each piece: its length in bytes, its offset in the file, and its name. A row is published by one
    aligned store of the length, after all else and after the file has grown: killed at any instruction, a server leaves a
    piece in the table in whole or not at all. No message is sent, so that the death of a warden loses nothing either.

    Args:
        fd: of the file, which may grow and not shrink; not owned.
        table: :data:`KEPT_TABLE_BYTES` of it, zeros at first.
        base: offset of the first piece in the file.
    """

    def __init__(self, fd: int, table: memoryview, base: int) -> None:
        self._fd = fd
        self._table = table
        self._words = table.cast("Q")
        self._base = base
        self._lock = threading.Lock()
        self._maps: dict[bytes, mmap.mmap] = {}

    def keep(self, name: str, length: int) -> memoryview:
        """Return the piece of a name, as :meth:`DevicePool.keep` says; names of the framework are allowed here."""
        key = encode_name(name, "kept memory", NAME_MOST)
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"the length of kept memory is an int, not {type(length).__name__}")
        if length <= 0:
            raise ValueError(f"kept memory has at least one byte, not {length}: {name!r}")
        with self._lock:
            end = self._base
            for row in range(NAMES_MOST):
                kept, offset, known = self._read(row)
                if not kept:
                    return self._add(row, key, length, end)
                if known == key:
                    if kept != length:
                        raise ValueError(f"{name!r} is kept with {kept} bytes, not {length}")
                    return self._view(key, length, offset)
                end = offset + _whole_pages(kept)
        raise ValueError(f"the device keeps {NAMES_MOST} names, the maximum: {name!r} is one more")

    def __contains__(self, name: str) -> bool:
        """Return whether there is a piece of that name."""
        return any(length and known == name.encode() for length, _, known in map(self._read, range(NAMES_MOST)))

    def release(self) -> None:
        """Release the table, before its memory is unmapped; pieces stay as long as there are views of them."""
        self._maps.clear()
        self._words.release()
        self._table.release()

    def _read(self, row: int) -> tuple[int, int, bytes]:
        length, offset = self._words[row * _ROW_WORDS : row * _ROW_WORDS + 2]
        start = row * _ROW + 16
        return length, offset, bytes(self._table[start : start + NAME_MOST]).rstrip(b"\0") if length else b""

    def _add(self, row: int, key: bytes, length: int, offset: int) -> memoryview:
        total = offset - self._base
        if total + _whole_pages(length) > TOTAL_MOST:
            raise ValueError(
                f"a device keeps at most {format_size(TOTAL_MOST)}: {format_size(total)} are kept, and"
                f" {key.decode()!r} would add {format_size(length)}"
            )
        try:
            # A server that died before it published a piece has grown the file: what is there was never written to.
            if os.fstat(self._fd).st_size < offset + _whole_pages(length):
                os.ftruncate(self._fd, offset + _whole_pages(length))
            view = self._view(key, length, offset)
        except OSError as error:
            why = limit_messages.reason(error.errno or 0) or error.strerror
            raise DeviceError(
                error.errno or errno.ENOMEM, f"{format_size(length)} cannot be kept for {key.decode()!r}: {why}"
            ) from error
        start = row * _ROW + 16
        self._table[start : start + NAME_MOST] = key.ljust(NAME_MOST, b"\0")
        self._words[row * _ROW_WORDS + 1] = offset
        self._words[row * _ROW_WORDS] = length
        return view

    def _view(self, key: bytes, length: int, offset: int) -> memoryview:
        if key not in self._maps:
            self._maps[key] = mmap.mmap(self._fd, length, mmap.MAP_SHARED, offset=offset)
        return memoryview(self._maps[key])


def _whole_pages(length: int) -> int:
    return length + -length % PAGE_SIZE
