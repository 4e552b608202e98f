"""Seekable zstd: frames that are compressed independently, and a table of them at the end of the file.

The format is ``contrib/seekable_format/zstd_seekable_compression_format.md`` of zstd. It is read here directly, so that one
request reads adjacent frames, and several threads unpack them; the libraries for the format offer a file object with one
position.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import struct
import threading
from collections import OrderedDict
from typing import NamedTuple

from prefault.drivers.remote.source import Attempts, DerivedSource, Source, SourceError, runs_of
from prefault.drivers.zstd_library import zstd_library

_FOOTER = struct.Struct("<IBI")  # frames, descriptor, magic
_SEEKABLE = 0x8F92EAB1
_SKIPPABLE = struct.Struct("<II")  # magic, bytes that follow
_SKIPPABLE_MAGIC = 0x184D2A5E
_HAS_CHECKSUMS = 0x80
_RESERVED = 0x7C
_MOST_FRAMES = 0x8000000
"""The limit of the format."""

_MOST_FRAME = 1 << 30
"""Bytes that a frame unpacks to: the limit of zstd's own library. The whole frame is in memory for any byte of it."""

_KEPT_BYTES = 64 << 20
"""Bytes of unpacked frames that are kept, because the next read is likely to need the rest of them."""


class _Frame(NamedTuple):
    packed: int
    packed_stop: int
    content: int
    content_stop: int


class ZstdSource(DerivedSource):
    """Unpacked content of a seekable zstd file."""

    def __init__(self, inner: Source) -> None:
        super().__init__(inner, inner.name)
        self._zstd = zstd_library(f"{inner.name} is compressed with zstd, which needs")
        self._frames = self._table()
        self._starts = [frame.content for frame in self._frames]
        length = self._frames[-1].content_stop if self._frames else 0
        # The packed source pins the content: it checks its version with each read.
        self.version = inner.version.derived(length, "zstd of")
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def _table(self) -> list[_Frame]:
        inner = self._inner
        footer = inner.read(inner.length - _FOOTER.size, _FOOTER.size) if inner.length > _FOOTER.size else b""
        count, descriptor, magic = _FOOTER.unpack(footer) if footer else (0, 0, 0)
        if magic != _SEEKABLE:
            raise SourceError(
                errno.EOPNOTSUPP,
                f"{self.name}: a zstd file without a seek table has no random access: pack it in the seekable format (t2sz,"
                " zeekstd, pyzstd.SeekableZstdFile), or unpack it first; compression=None maps the packed bytes",
            )
        entry_bytes = 12 if descriptor & _HAS_CHECKSUMS else 8
        table_bytes = _SKIPPABLE.size + count * entry_bytes + _FOOTER.size
        if descriptor & _RESERVED or count > _MOST_FRAMES or table_bytes > inner.length:
            raise self._broken("its footer makes no sense")
        table = inner.read(inner.length - table_bytes, table_bytes)
        if _SKIPPABLE.unpack_from(table) != (_SKIPPABLE_MAGIC, table_bytes - _SKIPPABLE.size):
            raise self._broken("it has no header")
        sizes = [struct.unpack_from("<II", table, _SKIPPABLE.size + index * entry_bytes) for index in range(count)]
        if any(size > _MOST_FRAME for _, size in sizes):
            raise SourceError(
                errno.EOPNOTSUPP,
                f"{self.name}: a frame of {max(size for _, size in sizes)} bytes, and {_MOST_FRAME} at most can be unpacked"
                " at once: pack it in smaller frames",
            )
        packed = list(itertools.accumulate((size for size, _ in sizes), initial=0))
        content = list(itertools.accumulate((size for _, size in sizes), initial=0))
        if packed[-1] != inner.length - table_bytes:
            raise self._broken(
                f"its frames have {packed[-1]} bytes, and the file has {inner.length - table_bytes} before the table"
            )
        return [
            _Frame(packed[index], packed[index + 1], content[index], content[index + 1])
            for index in range(count)
            if content[index + 1] > content[index]
        ]

    def _broken(self, what: str) -> SourceError:
        return SourceError(errno.EIO, f"{self.name}: the seek table is broken: {what}")

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:  # noqa: ARG002
        stop = offset + len(target)
        first = bisect.bisect_right(self._starts, offset) - 1
        after = bisect.bisect_left(self._starts, stop)
        with self._lock:
            content = {index: self._kept[index] for index in range(first, after) if index in self._kept}
        for run in runs_of(index for index in range(first, after) if index not in content):
            begin = self._frames[run[0]].packed
            packed = memoryview(self._inner.read(begin, self._frames[run[-1]].packed_stop - begin))
            for index in run:
                frame = self._frames[index]
                content[index] = self._unpack(frame, packed[frame.packed - begin : frame.packed_stop - begin])
        for index in range(first, after):
            frame = self._frames[index]
            low, high = max(frame.content, offset), min(frame.content_stop, stop)
            target[low - offset : high - offset] = memoryview(content[index])[low - frame.content : high - frame.content]
        # The next read is likely to need the rest of the frames at the ends of this one.
        self._keep({index: content[index] for index in {first, after - 1}})

    def _unpack(self, frame: _Frame, packed: memoryview) -> bytes:
        length = frame.content_stop - frame.content
        unpacker = self._zstd.ZstdDecompressor()
        try:
            # One byte more than announced: a larger frame is noticed without unpacking all of it.
            content: bytes = unpacker.decompress(packed, max_length=length + 1)
            if len(content) == length and not unpacker.eof:
                content += unpacker.decompress(b"", max_length=1)
        except (self._zstd.ZstdError, EOFError) as error:
            raise SourceError(
                errno.EIO, f"{self.name}: the frame at byte {frame.packed} cannot be unpacked: {error}"
            ) from error
        if len(content) != length or not unpacker.eof or unpacker.unused_data:
            raise self._broken(f"the frame at byte {frame.packed} does not unpack to the {length} bytes of its entry")
        return content

    def _keep(self, frames: dict[int, bytes]) -> None:
        with self._lock:
            for index, content in frames.items():
                if index not in self._kept:
                    self._kept[index] = content
                    self._kept_bytes += len(content)
                self._kept.move_to_end(index)
            while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])
