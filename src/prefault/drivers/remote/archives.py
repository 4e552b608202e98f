"""Sources inside other sources: members of zip archives, and streams that a library unpacks."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import zipfile
from collections.abc import Callable
from typing import Any

from prefault.drivers.remote.source import (
    Attempts,
    DerivedSource,
    Slice,
    Source,
    SourceChangedError,
    SourceError,
    SourceFile,
    SourceMissingError,
    StreamPool,
    Version,
    fill_from,
)
from prefault.sizes import MIB

_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x1
_UTF8 = 0x800
_SMALL_READ = 64
"""Packed bytes for one call of an unpacker that has no limit on its output: at most some 70 MB of bzip2."""


def open_member(inner: Source, member: str, name: str, version: Version | None) -> Source:
    """Open a member of a zip archive: a stored one is read in ranges, a compressed one from its start on.

    The returned source owns the archive.
    """
    with SourceFile(inner) as file:
        try:
            archive = zipfile.ZipFile(file)
            info = archive.getinfo(member.lstrip("/"))
        except KeyError:
            raise SourceMissingError(errno.ENOENT, f"{name}: the archive has no member {member!r}") from None
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise file.failure or SourceError(errno.EIO, f"{name}: {error}") from error
    if info.flag_bits & _ENCRYPTED:
        raise SourceError(errno.EACCES, f"{name}: the member is encrypted")
    now = inner.version.derived(info.file_size, f"crc={info.CRC:08x} in")
    if version is not None and version != now:
        raise SourceChangedError(errno.ESTALE, f"{name} changed while it was mapped: {version.change(now)}; open it again")
    if info.compress_type != zipfile.ZIP_STORED:
        return StreamSource(inner, name, now, lambda file: _unpacked(file, info))
    start = info.header_offset + _LOCAL_HEADER_BYTES
    raw_name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    inside = info.header_offset >= 0 and start + len(raw_name) <= inner.length
    header = inner.read(info.header_offset, _LOCAL_HEADER_BYTES + len(raw_name)) if inside else b""
    if header[:4] != b"PK\3\4":
        raise SourceError(errno.EIO, f"{name}: the archive is broken: no member at byte {info.header_offset}")
    if header[8:10] != b"\0\0" or header[_LOCAL_HEADER_BYTES:] != raw_name or info.compress_size != info.file_size:
        raise SourceError(
            errno.EIO, f"{name}: the archive is broken: its directory and byte {info.header_offset} do not agree"
        )
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return Slice(inner, name, start, now)


def _unpacked(file: SourceFile, info: zipfile.ZipInfo) -> Any:
    stream: Any = zipfile.ZipFile(io.BufferedReader(file, MIB)).open(info)  # noqa: SIM115  the caller closes it
    return stream if info.compress_type == zipfile.ZIP_DEFLATED else _SmallReads(stream)


class _SmallReads:
    """A member packed with bzip2 or lzma, read in small steps: zipfile unpacks as many packed bytes as it is asked for."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        stream.MAX_SEEK_READ = stream.MIN_READ_SIZE = _SMALL_READ
        self.seek, self.close = stream.seek, stream.close

    def readinto(self, target: memoryview) -> int:
        """Read some bytes into ``target``; return how many, 0 at the end."""
        with target[:_SMALL_READ] as piece:
            count: int = self._stream.readinto(piece)
        return count


class StreamSource(DerivedSource):
    """Unpacked content of another source: a library reads it, with one stream for each thread.

    Args:
        inner: the source of the packed bytes.
        name: the name in messages.
        version: the version of the content.
        opener: makes a seekable stream from a file object.
    """

    def __init__(self, inner: Source, name: str, version: Version, opener: Callable[[Any], Any]) -> None:
        super().__init__(inner, name)
        self.version = version
        self._streams = StreamPool(lambda: _UnpackedStream(SourceFile(inner), opener))

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:  # noqa: ARG002
        # Seeking backwards may restart at the front: take the idle stream with the shortest way forward.
        with self._streams.use(lambda stream: offset - stream.position if stream.position <= offset else math.inf) as stream:
            try:
                done = stream.fill(offset, target)
            except Exception as error:
                # Libraries replace the error of a source by one of their own.
                if stream.file.failure is not None:
                    raise stream.file.failure from error
                raise SourceError(errno.EIO, f"{self.name}: it cannot be unpacked: {error}") from error
        if done < len(target):
            raise self.cut_short(offset + done)

    def close(self) -> None:
        """Close the idle streams and the packed source."""
        self._streams.close()
        super().close()


class _UnpackedStream:
    """A stream, opened by the first read, and the file object of its packed bytes."""

    def __init__(self, file: SourceFile, opener: Callable[[Any], Any]) -> None:
        self.file = file
        self.position = 0
        self._opener = opener
        self._content: Any = None

    def fill(self, offset: int, target: memoryview) -> int:
        """Seek and read until ``target`` is full or the stream ends; return the number of bytes."""
        self.file.failure = None
        if self._content is None:
            self._content = self._opener(self.file)
        done = fill_from(self._content, offset, target)
        self.position = offset + done
        return done

    def close(self) -> None:
        """Close the stream and its file object."""
        if self._content is not None:
            with contextlib.suppress(Exception):  # it is closed because it failed
                self._content.close()
        self.file.close()
