"""Sources inside of others: members of zip archives, and what a library unpacks."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import zipfile
from collections.abc import Callable
from typing import Any

from prefault.drivers.source import (
    Attempts,
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
_SIP = 64
"""Packed bytes that zipfile unpacks at once, in full, where it knows no limit: some 70 MB of bzip2 at most."""


def open_member(inner: Source, member: str, name: str, version: Version | None) -> Source:
    """A member of a zip archive, which it owns. Stored ones are read in ranges; others from their start on."""
    try:
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
        tag = f"crc={info.CRC:08x} in {inner.version.length} {inner.version.tag}".strip()
        now = Version(info.file_size, tag, inner.version.modified)
        if version is not None and version != now:
            raise SourceChangedError(
                errno.ESTALE, f"{name} changed while it was mapped: {version.change(now)}; open it again"
            )
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
    except BaseException:
        inner.close()
        raise


def _unpacked(file: SourceFile, info: zipfile.ZipInfo) -> Any:
    stream: Any = zipfile.ZipFile(io.BufferedReader(file, MIB)).open(info)  # noqa: SIM115  the caller closes it
    return stream if info.compress_type == zipfile.ZIP_DEFLATED else _Sips(stream)


class _Sips:
    """A member packed with bzip2 or lzma, in small steps: of any amount that is asked for, zipfile reads as much, packed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        stream.MAX_SEEK_READ = stream.MIN_READ_SIZE = _SIP
        self.seek, self.close = stream.seek, stream.close

    def readinto(self, target: memoryview) -> int:
        """Some bytes."""
        with target[:_SIP] as piece:
            count: int = self._stream.readinto(piece)
        return count


class StreamSource(Source):
    """What a library reads out of another source, which it owns: one stream for each thread that reads.

    Args:
        inner: the source of the packed bytes.
        name: for messages.
        version: of the content.
        opener: makes a stream, which can seek, from a file object.
    """

    def __init__(self, inner: Source, name: str, version: Version, opener: Callable[[Any], Any]) -> None:
        super().__init__(name, inner.patience)
        self.version = version
        self._inner = inner
        self._streams = StreamPool(lambda: _Stream(SourceFile(inner), opener))

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:  # noqa: ARG002
        # Going back may mean to start again from the front: of the idle streams, that which has the shortest way to go.
        stream = self._streams.take(lambda stream: offset - stream.position if stream.position <= offset else math.inf)
        try:
            done = stream.fill(offset, target)
        except Exception as error:
            stream.close()
            # Libraries replace what a source says by an error of theirs.
            if stream.file.failure is not None:
                raise stream.file.failure from error
            raise SourceError(errno.EIO, f"{self.name}: it cannot be unpacked: {error}") from error
        except BaseException:
            stream.close()
            raise
        self._streams.give(stream)
        if done < len(target):
            raise SourceError(errno.EIO, f"{self.name}: it ends at byte {offset + done} of {self.length}")

    def close(self) -> None:
        """Give up what is open."""
        self._streams.close()
        self._inner.close()


class _Stream:
    """One stream, opened by the first read, and what its reads of the packed bytes raised."""

    def __init__(self, file: SourceFile, opener: Callable[[Any], Any]) -> None:
        self.file = file
        self.position = 0
        self._opener = opener
        self._content: Any = None

    def fill(self, offset: int, target: memoryview) -> int:
        """See :func:`fill_from`."""
        self.file.failure = None
        if self._content is None:
            self._content = self._opener(self.file)
        done = fill_from(self._content, offset, target)
        self.position = offset + done
        return done

    def close(self) -> None:
        """Give up what is open."""
        if self._content is not None:
            with contextlib.suppress(Exception):  # it is given up because it failed
                self._content.close()
        self.file.close()
