"""Memory whose cold pages are compressed, as those of zram are: a whole driver, which docs/device-memory.md explains."""

from __future__ import annotations

import errno
import json

from prefault.device.device_pool import Access, ClientProcess, DevicePool
from prefault.device.driver import ZERO, Device, DeviceArea, Recipe, Supplied
from prefault.drivers.zstd_library import zstd_library
from prefault.sizes import PAGE_SIZE, Size, format_size, parse_size

_STEP = 64  # a packed page takes a multiple of so many bytes
_SOME = 64  # pages that are packed at once, at least: the next faults find room
_ZEROS = bytes(PAGE_SIZE)


class CompressedMemory(Device):
    """Memory that is zeros at first, with some pages as they are and the others packed by zstd.

    Args:
        length: of the memory, in bytes.
        frames: most bytes of pages that are not packed.
        store: most bytes of packed pages. When it is full, a touch that needs a frame is SIGBUS, and populate raises.
        level: of zstd: higher ones pack more, and take longer.

    Raises:
        TypeError, ValueError: ``level`` is not an int, or none of zstd's.
        ImportError: the package ``backports.zstd`` is not installed, before Python 3.14.
    """

    evicts = True
    tracks_writes = True  # a page that was not written to since it was unpacked is in the store as it is
    restartable = True  # frames, table and store survive the server

    def __init__(self, length: Size, frames: Size = "64 MiB", store: Size = "256 MiB", level: int = 1) -> None:
        self._arguments = {"length": length, "frames": frames, "store": store, "level": level}
        self.length, self.capacity = parse_size(length), parse_size(frames)
        self._zstd = zstd_library("compressed memory needs")
        if not isinstance(level, int):
            raise TypeError(f"the level of zstd is an int, not {level!r}")
        lowest, highest = self._zstd.CompressionParameter.compression_level.bounds()
        if not lowest <= level <= highest:
            raise ValueError(f"the level of zstd is {lowest} to {highest}, not {level}")
        self._store_bytes, self._level = parse_size(store), level

    def recipe(self) -> Recipe:
        """Return how another process makes this device."""
        return Recipe(f"{__name__}:CompressedMemory", self._arguments)

    def start(self, pool: DevicePool) -> None:
        """Take the table and the store of the server before, or empty ones."""
        self._pool, self._hand = pool, 0
        # By page: place << 16 | bytes; 0: zeros. One word more says whether there is anything in the store.
        self._table = pool.keep("table", 8 * (len(pool.pages) + 1)).cast("Q")
        self._store = pool.keep("store", self._store_bytes)
        self._sweep()

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:  # noqa: ARG002
        """Unpack a page."""
        start, size = self._table[page] >> 16, self._table[page] & 0xFFFF
        if not size:
            return ZERO
        packed = self._store[start : start + size]
        area.frame(page)[:] = packed if size == PAGE_SIZE else self._zstd.decompress(packed)
        return None

    def reclaim(self, area: DeviceArea, pages: int) -> None:  # noqa: ARG002
        """Pack pages to make room for others, from a hand on that goes round."""
        wanted = max(pages, _SOME)
        for part in (range(self._hand, len(self._pool.pages)), range(self._hand)):
            for run in self._pool.ready(part):
                some = run[:wanted]
                self._pool.evict(some, self._save)  # no client can write to it; saved if it was written to; gone
                self._hand, wanted = some.stop, wanted - len(some)
                if not wanted:
                    return

    def _save(self, run: range, content: memoryview) -> None:
        for page, at in zip(run, range(0, len(content), PAGE_SIZE), strict=True):
            clear = bytes(content[at : at + PAGE_SIZE])
            packed = b"" if clear == _ZEROS else self._zstd.compress(clear, self._level)
            self._put(page, packed if len(packed) < PAGE_SIZE else clear)

    def discard(self, area: DeviceArea, pages: range) -> None:  # noqa: ARG002
        """Forget pages: they are zeros."""
        for page in pages:
            if self._table[page]:
                self._table[page] = 0

    def control(self, client: ClientProcess, request: bytes) -> bytes:  # noqa: ARG002
        """Answer ``b"statistics"`` in JSON: the number of packed pages, and the bytes that they take."""
        if request != b"statistics":
            raise OSError(errno.EINVAL, f"compressed memory answers b'statistics', not {request[:40]!r}")
        sizes = [word & 0xFFFF for word in self._table[:-1] if word]
        return json.dumps({"pages": len(sizes), "bytes": sum(map(_room, sizes))}).encode()

    def _put(self, page: int, packed: bytes) -> None:
        """Store a page's bytes, none for zeros. A crash leaves the old ones or these: the table is changed by one store."""
        word = 0
        if packed:
            start = self._allocate(_room(len(packed)))
            self._store[start : start + len(packed)] = packed
            word = start << 16 | len(packed)
            self._table[-1] = 1
        self._table[page] = word

    def _allocate(self, size: int) -> int:
        """Return the offset of free bytes in the store: the next ones; those freed since are found when it ends."""
        for _ in range(2):
            while self._gaps:
                start, stop = self._gaps[-1]
                if start + size <= stop:
                    self._gaps[-1] = start + size, stop
                    return start
                self._gaps.pop()
            self._sweep()
        raise OSError(errno.ENOSPC, f"the store of {format_size(self._store_bytes)} for packed pages is full: give it more")

    def _sweep(self) -> None:
        """Find the gaps between the packed pages that the table names."""
        words = sorted(word for word in self._table[:-1] if word) if self._table[-1] else []
        starts = [word >> 16 for word in words] + [self._store_bytes]
        stops = [0] + [(word >> 16) + _room(word & 0xFFFF) for word in words]
        self._gaps = [(stop, start) for stop, start in zip(stops, starts, strict=True) if stop < start]


def _room(size: int) -> int:
    return size + -size % _STEP
