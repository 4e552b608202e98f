"""What was read once, kept on a disk: a sparse file with the bytes, and a checksum for each block that is there.

A block counts as there only if its bytes have the checksum that stands in the map. So a crash at any moment, of the process
or of the machine, a file that was cut short, or a disk that lost a sector costs another download and never gives wrong
bytes; nothing has to be synced. The bytes are written before the checksum. Several processes use the files at once: what
they write is the same, as the directory is that of one version of one source.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import struct
import tempfile
import zlib
from typing import Any

from prefault.drivers.source import Source, SourceError

_TRIES = 10
BLOCK = 64 << 10
"""Bytes that have a checksum in common."""

_ENTRY = struct.Struct("<II")  # valid, CRC-32
_VALID = 0x7A5EB10C
_SECRET = re.compile(
    r"secret|token|passw|passphrase|credential|cookie|signature|authorization|^auth$|\bsas\b|key(_?id)?$",
    re.ASCII | re.IGNORECASE,
)
"""In the names of options that say who we are, not where it is."""
_SETTINGS = re.compile(r"\w+=[^;]*(;\w+=[^;]*)*;?", re.ASCII)
_PASSWORD = re.compile(r"(?<=://)(?P<user>[^/?#:@]*):[^/?#]*(?=@)")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger("prefault.drivers")


class DiskCache:
    """The blocks of one version of a source that are on the disk.

    Args:
        directory: under which each source gets a directory of its own. Made if it is not there.
        source: what is cached. Its other versions are removed from the disk.
        key: what names the source: its URL and how it is unpacked.
    """

    def __init__(self, directory: str, source: Source, key: str) -> None:
        self._length = source.length
        self._data = self._map = -1
        self._full = False
        self.directory = place(directory, source, key)
        try:
            _remove_others(self.directory)
            self._data = self._open("data", self._length)
            self._map = self._open("blocks", -(-self._length // BLOCK) * _ENTRY.size)
            about = {"source": source.name, "version": list(source.version), "block_bytes": BLOCK}
            _write_whole(os.path.join(self.directory, "source.json"), json.dumps(about, indent=1).encode() + b"\n")
        except OSError as error:
            # ENOENT: who opens another version just now has removed this one.
            if error.errno not in (*_NO_ROOM, errno.ENOENT):
                self.close()
                raise
            self._give_up(error)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, length: int) -> int:
        fd = os.open(os.path.join(self.directory, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(fd).st_size != length:  # new, or cut short: what is missing has no right checksum
            os.ftruncate(fd, length)
        return fd

    def blocks(self, start: int, stop: int) -> range:
        """The blocks that bytes ``[start, stop)`` lie in."""
        return range(start // BLOCK, -(-stop // BLOCK))

    def span(self, blocks: range) -> tuple[int, int]:
        """The bytes of blocks that follow each other: start and stop."""
        return blocks.start * BLOCK, min(blocks.stop * BLOCK, self._length)

    def load(self, blocks: range, target: memoryview) -> list[range]:
        """Put what is there into ``target``, which is as long as these blocks; the runs of blocks that are not.

        Where a block is not there, the target is left in any state.
        """
        if self._data < 0 or self._map < 0:
            return [blocks]
        try:
            entries = os.pread(self._map, len(blocks) * _ENTRY.size, blocks.start * _ENTRY.size)
        except OSError as error:  # a bad sector
            _log.warning("%s: its map cannot be read (%s): downloaded again", self.directory, error.strerror)
            return [blocks]
        start = blocks.start * BLOCK
        missing: list[range] = []
        for number, block in enumerate(blocks):
            low, high = self.span(range(block, block + 1))
            with target[low - start : high - start] as piece:
                found = self._load_one(entries, number, low, piece)
            if not found:
                if missing and missing[-1].stop == block:
                    missing[-1] = range(missing[-1].start, block + 1)
                else:
                    missing.append(range(block, block + 1))
        return missing

    def _load_one(self, entries: bytes, number: int, offset: int, target: memoryview) -> bool:
        if len(entries) < (number + 1) * _ENTRY.size:  # the map was cut short
            return False
        valid, checksum = _ENTRY.unpack_from(entries, number * _ENTRY.size)
        try:
            return (
                valid == _VALID and os.preadv(self._data, [target], offset) == len(target) and zlib.crc32(target) == checksum
            )
        except OSError as error:  # a bad sector
            _log.warning("%s: byte %d cannot be read (%s): downloaded again", self.directory, offset, error.strerror)
            return False

    def store(self, blocks: range, content: memoryview) -> None:
        """Keep the bytes of these blocks. A disk that is full ends the storing, with a warning."""
        if self._full:
            return
        start = blocks.start * BLOCK
        try:
            _write_all(self._data, content, start)
            entries = b"".join(
                _ENTRY.pack(_VALID, zlib.crc32(content[low - start : high - start]))
                for low, high in (self.span(range(block, block + 1)) for block in blocks)
            )
            _write_all(self._map, memoryview(entries), blocks.start * _ENTRY.size)
        except OSError as error:
            if error.errno not in (*_NO_ROOM, errno.EIO):
                raise
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._full = True
        _log.warning("%s: nothing more is kept there: %s", self.directory, error.strerror)

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        for fd in (self._data, self._map):
            if fd >= 0:
                os.close(fd)
        self._data = self._map = -1


def named(url: str, packed: str | None, options: dict[str, Any]) -> str:
    """What names a source, as a key: its URL, how it is unpacked, and those storage options that may lead elsewhere.

    Without what proves who we are: it is in no name on the disk, not even as a checksum that could be guessed at, and a
    new token does not make another source. Two who may read different things of one name are told apart by its version.
    """
    where = _PASSWORD.sub(r"\g<user>", url)
    key = f"{where}|{packed}"
    leading = _leading(options)
    return f"{key}|{json.dumps(leading, sort_keys=True)}" if leading else key


def _leading(value: Any) -> Any:
    """What may lead to another place, as plain values that are the same in each process."""
    if isinstance(value, dict):
        return {str(name): _leading(item) for name, item in value.items() if not _SECRET.search(str(name))}
    if isinstance(value, list | tuple):
        return [_leading(item) for item in value]
    if isinstance(value, str) and _SETTINGS.fullmatch(value):  # "AccountName=a;AccountKey=b"
        return ";".join(part for part in value.split(";") if not _SECRET.search(part.partition("=")[0]))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def place(directory: str, source: Source, key: str) -> str:
    """The directory for this version of a source, made if it is not there.

    Raises:
        SourceError: nothing but the length tells one version from another.
    """
    if source.length and not source.version.told_apart:  # of nothing there is no other version
        raise SourceError(
            errno.EINVAL,
            f"{source.name}: it has neither an ETag nor a time of change, so what is kept on a disk could be of another"
            " version: leave out cache_dir",
        )
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    version = hashlib.sha256(json.dumps(list(source.version)).encode()).hexdigest()[:32]
    os.makedirs(directory, mode=0o700, exist_ok=True)
    _check_owner(directory, shared=True)
    for path in (os.path.join(directory, name), os.path.join(directory, name, version)):
        _make_own(path)
    return path


def _make_own(path: str) -> None:
    for left in reversed(range(_TRIES)):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        try:
            _check_owner(path, shared=False)
        except FileNotFoundError:  # who opens another version just now has removed it
            if not left:
                raise
        else:
            return


def _check_owner(path: str, *, shared: bool) -> None:
    """Whoever may write there could have what we read, or let us write where it wants.

    Args:
        path: a directory.
        shared: others may have directories of their own in it, as in /tmp.

    Raises:
        SourceError: others can write there.
    """
    status = os.stat(path) if shared else os.lstat(path)
    owners = {os.geteuid(), 0} if shared else {os.geteuid()}
    sticky = shared and status.st_mode & stat.S_ISVTX
    others = status.st_mode & (stat.S_IWOTH if shared else stat.S_IWOTH | stat.S_IWGRP) and not sticky
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in owners or others:
        raise SourceError(
            errno.EACCES,
            f"{path}: it is to be a directory that user {os.geteuid()} owns and nobody else can write to, and it belongs to"
            f" user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}: others could put wrong bytes there; give"
            " another cache_dir",
        )


def _remove_others(directory: str) -> None:
    # Who still reads another version has its files open.
    parent, own = os.path.split(directory)
    for name in os.listdir(parent):
        if name != own:
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _write_all(fd: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(fd, content[done:], offset + done)


def _write_whole(path: str, content: bytes) -> None:
    fd, unfinished = tempfile.mkstemp(prefix=".prefault-", dir=os.path.dirname(path))
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise


class CachedSource:
    """A source behind a cache on the disk; it owns both."""

    def __init__(self, source: Source, cache: DiskCache) -> None:
        self._source = source
        self._cache = cache

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` from the disk, and what is not there from the source: one request for each gap."""
        cache = self._cache
        blocks = cache.blocks(offset, offset + len(target))
        start, stop = cache.span(blocks)
        if (start, stop) == (offset, offset + len(target)):
            self._fill(blocks, target)
            return
        # A checksum is of a whole block, so whole blocks are read.
        content = memoryview(bytearray(stop - start))
        self._fill(blocks, content)
        target[:] = content[offset - start : offset - start + len(target)]

    def _fill(self, blocks: range, target: memoryview) -> None:
        start = self._cache.span(blocks)[0]
        for run in self._cache.load(blocks, target):
            low, high = self._cache.span(run)
            with target[low - start : high - start] as piece:
                self._source.read_into(low, piece)
                self._cache.store(run, piece)

    def close(self) -> None:
        """Close both."""
        self._source.close()
        self._cache.close()
