"""Random access to gzip files through an index of points to start from: built once, by unpacking the whole file, then kept.

The index is that of indexed_gzip (zran): 32 KiB for each 4 MiB of content. Its file names the version that it belongs to.
"""

from __future__ import annotations

import errno
import io
import json
import os
import zlib
from typing import Any

from prefault.drivers.remote.archives import StreamSource
from prefault.drivers.remote.disk_cache import NOT_KEPT, WriteWarning, open_regular, write_whole
from prefault.drivers.remote.source import CHUNK, Source, SourceError, SourceFile, missing_package

_MAGIC = b"prefault gzip index 1\n"
_FOREIGN = b"GZIDX"
_SPACING = 4 << 20


def _library(name: str) -> Any:
    try:
        import indexed_gzip  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package(f"{name} is compressed with gzip, which needs", "indexed_gzip", "'prefault[gzip]'") from error
    return indexed_gzip


def open_gzip(inner: Source, index: str | None, warning: WriteWarning, *, afresh: bool = False) -> Source:
    """Open what a gzip file unpacks to.

    Args:
        inner: the packed bytes; the returned source owns it.
        index: the file of the index, which is built if it is missing or belongs to another version.
        warning: called if the index cannot be written; it is in memory only then.
        afresh: the version is not pinned yet: an index is of no use if the source does not tell its versions apart.
    """
    library = _library(inner.name)
    if index is None:
        raise SourceError(
            errno.EOPNOTSUPP,
            f"{inner.name}: gzip has no random access without an index: give index=, the name of a file for it (it is built"
            " once, by reading the whole file), or cache_dir=; compression=None maps the packed bytes",
        )
    # The index of another content of the same length would give wrong bytes, and no error.
    made = None if afresh and not inner.version.told_apart else _load(index, inner)
    if made is None:
        made = _build(library, inner, index, warning)
    length, content = made

    def opener(file: SourceFile) -> Any:
        # The CRC covers the whole content, and was checked when the index was built.
        stream = library.IndexedGzipFile(
            fileobj=file, spacing=_SPACING, readbuf_size=CHUNK, buffer_size=CHUNK, skip_crc_check=True
        )
        stream.import_index(fileobj=io.BytesIO(content))
        return stream

    return StreamSource(inner, inner.name, inner.version.derived(length, "gzip of"), opener)


class _CheckedFile(SourceFile):
    """File object that checks with zlib what indexed_gzip reads: indexed_gzip raises no error for a truncated file."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._checked = 0
        self._length = 0
        self._member: Any = zlib.decompressobj(wbits=31)
        self._begun = False

    def readinto(self, buffer: Any) -> int:
        """Read as :meth:`SourceFile.readinto` does, and check the bytes that are read for the first time."""
        start = self.tell()
        count = super().readinto(buffer)
        # The library reads some places again.
        if start <= self._checked < start + count:
            with memoryview(buffer) as whole, whole.cast("B") as view:
                self._check(bytes(view[self._checked - start : count]))
            self._checked = start + count
        return count

    def _check(self, packed: bytes) -> None:
        while packed:
            if not self._begun:
                packed = packed.lstrip(b"\0")  # padding between members
                self._begun = bool(packed)
                continue
            content = self._member.decompress(packed, CHUNK)
            self._length += len(content)
            packed = self._member.unconsumed_tail
            while not packed and len(content) == CHUNK:  # zlib may hold more output
                content = self._member.decompress(b"", CHUNK)
                self._length += len(content)
            if self._member.eof:
                packed = self._member.unused_data
                self._member, self._begun = zlib.decompressobj(wbits=31), False

    def finish(self, length: int) -> None:
        """Check the rest of the file; raise if it ends inside a member, or does not unpack to ``length`` bytes."""
        self.seek(self._checked)
        while self.readinto(bytearray(CHUNK)):
            self.seek(self._checked)
        if self._begun:
            raise EOFError(f"it ends inside a member, after {self._length} unpacked bytes: it was cut short")
        if length != self._length:
            raise ValueError(f"indexed_gzip finds {length} bytes in it, zlib {self._length}")


def _load(index: str, inner: Source) -> tuple[int, bytes] | None:
    """Return the length of the content and the index proper; None if the file has none of this version."""
    try:
        with open(open_regular(index, os.O_RDONLY), "rb") as file:
            magic = file.read(len(_MAGIC))
            if magic != _MAGIC:
                if magic.startswith(_FOREIGN):
                    raise SourceError(
                        errno.EINVAL,
                        f"{index} is an index of indexed_gzip, which does not tell the version of {inner.name} that it"
                        " belongs to: name another file, and the index is built there",
                    )
                return None
            head = json.loads(file.readline())
            content = file.read()
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(head, dict) or head.get("version") != list(inner.version):
        return None
    length = head.get("length")
    # The index holds content: a bit that a disk lost would give wrong bytes, and nothing else would notice.
    if not isinstance(length, int) or length < 0 or head.get("checksum") != _checksum(length, content):
        return None
    return length, content


def _checksum(length: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(str(length).encode()))


def _build(library: Any, inner: Source, index: str, warning: WriteWarning) -> tuple[int, bytes]:
    kept = io.BytesIO()
    with _CheckedFile(inner) as file:
        try:
            with library.IndexedGzipFile(
                fileobj=file, spacing=_SPACING, readbuf_size=CHUNK, buffer_size=CHUNK, skip_crc_check=True
            ) as stream:
                stream.build_full_index()
                length = stream.seek(0, io.SEEK_END)
                stream.export_index(fileobj=kept)
            file.finish(length)
        except Exception as error:
            if file.failure is not None:
                raise file.failure from error
            raise SourceError(errno.EIO, f"{inner.name}: it cannot be unpacked: {error}") from error
    content = kept.getvalue()
    head = {"version": list(inner.version), "length": length, "checksum": _checksum(length, content)}
    try:
        write_whole(index, _MAGIC + json.dumps(head).encode() + b"\n" + content)
    except OSError as error:
        if error.errno not in NOT_KEPT:
            raise
        warning(index, str(error.strerror))
    return length, content
