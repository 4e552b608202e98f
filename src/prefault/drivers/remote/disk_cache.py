"""Cache on a disk of what was downloaded: a sparse file of data, and a map with a checksum for each block in it.

A block is present only if its bytes have the checksum in the map. So a crash of the process or the machine at any moment, a
truncated file, or a lost sector of the disk costs another download and never gives wrong bytes; nothing has to be synced.
The bytes are written before the checksum. Several processes may use the files at once: all of them write the same bytes,
because the directory belongs to one version of one source.
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
import zlib
from typing import Any

from prefault.drivers.remote.source import Source, SourceError, runs_of

_MAKE_TRIES = 10
BLOCK = 64 << 10
"""Bytes that share a checksum."""

_ENTRY = struct.Struct("<II")  # valid, CRC-32
_VALID = 0x7A5EB10C
_SECRET = re.compile(
    r"secret|token|passw|passphrase|credential|cookie|signature|authorization|^auth$|\bsas\b|key(_?id)?$",
    re.ASCII | re.IGNORECASE,
)
"""Found in the names of options that are credentials, and do not say where the source is."""
_SETTINGS = re.compile(r"\w+=[^;]*(;\w+=[^;]*)*;?", re.ASCII)
_PASSWORD = re.compile(r"(?<=://)(?P<user>[^/?#:@]*):[^/?#]*(?=@)")
NOT_KEPT = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG,  # the disk is full, or has no inode left
    errno.EROFS, errno.EACCES, errno.EPERM,  # read-only
    errno.EIO,
    errno.ENOENT,  # it could not be made, or another process opened another version and removed this one
)  # fmt: skip
"""Errors of a cache that cannot be written: the source is read without it."""
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_log = logging.getLogger("prefault.drivers")


class WriteWarning:
    """Warning that a cache cannot be written, logged once for a device: its recipe tells the server whether this was done.

    Attributes:
        given: True once the warning was logged.
    """

    def __init__(self) -> None:
        self.given = False

    def __call__(self, path: str, reason: str) -> None:
        """Log, at the first call, that nothing can be written to ``path``, and why."""
        if not self.given:
            self.given = True
            _log.warning("%s: nothing more is kept there: %s; what is not there is downloaded each time", path, reason)


class DiskCache:
    """The blocks of one version of a source that are on the disk.

    A cache that cannot be written is read; where there is none to read either, all blocks are missing.

    Args:
        directory: parent of a directory for each source. Made if it is not there.
        source: the source that is cached. Its other versions are removed from the disk.
        key: identifies the source: its URL and how it is unpacked.
        warning: called when the cache cannot be written.

    Raises:
        SourceError: other users could write there, or something else is in the place of a directory or file of the cache.
    """

    def __init__(self, directory: str, source: Source, key: str, warning: WriteWarning) -> None:
        self._length = source.length
        self._data = self._map = -1
        self._not_writable = ""  # the reason, of which the caller hears when there is something to write
        self._warning = warning
        self.directory = make_directory(directory, source, key, warning)
        about = {"source": source.name, "version": list(source.version), "block_bytes": BLOCK}
        try:
            self._data = self._open("data", self._length)
            self._map = self._open("blocks", -(-self._length // BLOCK) * _ENTRY.size)
            self._describe(json.dumps(about, indent=1).encode() + b"\n")
        except BaseException as error:
            if not isinstance(error, OSError) or isinstance(error, SourceError) or error.errno not in NOT_KEPT:
                self.close()
                raise
            self._not_writable = self._not_writable or str(error.strerror)

    def _open(self, name: str, length: int) -> int:
        path = os.path.join(self.directory, name)
        try:
            fd = open_regular(path, os.O_RDWR | os.O_CREAT)
        except SourceError:
            raise
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            self._not_writable = str(error.strerror)
            return open_regular(path, os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != length:  # new, or truncated: the missing bytes do not have the right checksum
                os.ftruncate(fd, length)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _describe(self, content: bytes) -> None:
        """Describe the source in a file for people to read, unless it is there already: the disk may be full."""
        path = os.path.join(self.directory, "source.json")
        with contextlib.suppress(FileNotFoundError), open(open_regular(path, os.O_RDONLY), "rb") as file:
            if file.read(len(content) + 1) == content:
                return
        if not self._not_writable:
            write_whole(path, content)

    def blocks(self, start: int, stop: int) -> range:
        """Return the blocks that bytes ``[start, stop)`` lie in."""
        return range(start // BLOCK, -(-stop // BLOCK))

    def span(self, blocks: range) -> tuple[int, int]:
        """Return the first byte of these consecutive blocks, and the byte after the last."""
        return blocks.start * BLOCK, min(blocks.stop * BLOCK, self._length)

    def load(self, blocks: range, target: memoryview) -> list[range]:
        """Read the blocks that are present into ``target``, which is as long as all of them.

        Returns:
            The runs of missing blocks. Their part of the target has undefined content.
        """
        if self._data < 0 or self._map < 0:
            return [blocks]
        try:
            entries = os.pread(self._map, len(blocks) * _ENTRY.size, blocks.start * _ENTRY.size)
        except OSError as error:  # a bad sector
            _log.warning("%s: its map cannot be read (%s): downloaded again", self.directory, error.strerror)
            return [blocks]
        start = blocks.start * BLOCK
        missing: list[int] = []
        for number, block in enumerate(blocks):
            low, high = self.span(range(block, block + 1))
            with target[low - start : high - start] as piece:
                if not self._load_one(entries, number, low, piece):
                    missing.append(block)
        return runs_of(missing)

    def _load_one(self, entries: bytes, number: int, offset: int, target: memoryview) -> bool:
        if len(entries) < (number + 1) * _ENTRY.size:  # the map was truncated
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
        """Write the bytes of these blocks; after the first that cannot be written, warn and write nothing more."""
        if not self._not_writable:
            start = blocks.start * BLOCK
            try:
                _write_all(self._data, content, start)
                entries = b"".join(
                    _ENTRY.pack(_VALID, zlib.crc32(content[low - start : high - start]))
                    for low, high in (self.span(range(block, block + 1)) for block in blocks)
                )
                _write_all(self._map, memoryview(entries), blocks.start * _ENTRY.size)
            except OSError as error:
                if error.errno not in NOT_KEPT:
                    raise
                self._not_writable = str(error.strerror)
        if self._not_writable:
            self._warning(self.directory, self._not_writable)

    def close(self) -> None:
        """Close the files. Idempotent."""
        for fd in (self._data, self._map):
            if fd >= 0:
                os.close(fd)
        self._data = self._map = -1


def cache_key(url: str, packed: str | None, options: dict[str, Any]) -> str:
    """Return the key of a source: its URL, how it is unpacked, and those storage options that may lead elsewhere.

    Credentials are left out: they are in no name on the disk, not even as a checksum that could be guessed at, and a new
    token does not make another source. Users who may read different contents at one URL are told apart by the version.
    """
    where = _PASSWORD.sub(r"\g<user>", url)
    key = f"{where}|{packed}"
    leading = _without_credentials(options)
    return f"{key}|{json.dumps(leading, sort_keys=True)}" if leading else key


def _without_credentials(value: Any) -> Any:
    """Return an option's value without credentials, as plain values that are equal in each process."""
    if isinstance(value, dict):
        return {str(name): _without_credentials(item) for name, item in value.items() if not _SECRET.search(str(name))}
    if isinstance(value, list | tuple):
        return [_without_credentials(item) for item in value]
    if isinstance(value, str) and _SETTINGS.fullmatch(value):  # "AccountName=a;AccountKey=b"
        return ";".join(part for part in value.split(";") if not _SECRET.search(part.partition("=")[0]))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def make_directory(directory: str, source: Source, key: str, warning: WriteWarning) -> str:
    """Make the directory for this version of a source, and remove those of its other versions.

    Returns:
        Its path. Where it could not be made, ``warning`` was called.

    Raises:
        SourceError: only the length tells one version from another; other users could write there; something that is no
            directory is in its place.
    """
    if source.length and not source.version.told_apart:  # an empty source has no other version
        raise SourceError(
            errno.EINVAL,
            f"{source.name}: it has neither an ETag nor a time of change, so what is kept on a disk could be of another"
            " version: leave out cache_dir",
        )
    name = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:32]
    version = hashlib.sha256(json.dumps(list(source.version)).encode()).hexdigest()[:32]
    parent = os.path.join(directory, name)
    path = os.path.join(parent, version)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        _check_owner(directory, shared=True)
        _make_own(parent)
        _remove_others(parent, version)  # first: on a full disk it makes room
        _make_own(path)
    except SourceError:
        raise
    except FileExistsError as error:
        raise _in_the_way(error.filename, "a directory") from error
    except NotADirectoryError as error:
        raise SourceError(
            errno.ENOTDIR, f"{directory}: a file is in the place of a directory of this path: give another cache_dir"
        ) from error
    except OSError as error:
        if error.errno not in NOT_KEPT:
            raise
        warning(directory, str(error.strerror))
    return path


def _make_own(path: str) -> None:
    for left in reversed(range(_MAKE_TRIES)):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        try:
            _check_owner(path, shared=False)
        except FileNotFoundError:  # another process that opens another version has removed it
            if not left:
                raise
        else:
            return


def _check_owner(path: str, *, shared: bool) -> None:
    """Refuse a directory that another user can write to: that user could put wrong bytes there, or links.

    Args:
        path: a directory.
        shared: others may have directories of their own in it, as in /tmp.

    Raises:
        SourceError: others can write there, or it is no directory.
    """
    status = os.stat(path) if shared else os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise _in_the_way(path, "a directory")
    owners = {os.geteuid(), 0} if shared else {os.geteuid()}
    sticky = shared and status.st_mode & stat.S_ISVTX
    others = status.st_mode & (stat.S_IWOTH if shared else stat.S_IWOTH | stat.S_IWGRP) and not sticky
    if status.st_uid not in owners or others:
        raise SourceError(
            errno.EACCES,
            f"{path}: only user {os.geteuid()} may own this directory of the cache and write to it, and it belongs to user"
            f" {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}: others could put wrong bytes there; give another"
            " cache_dir",
        )


def _remove_others(parent: str, own: str) -> None:
    # A process that still reads another version has its files open.
    for name in os.listdir(parent):
        if name != own:
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file, with open(2)'s ``flags``, following no symbolic link and waiting for no FIFO.

    Raises:
        SourceError: something else is in its place.
        OSError: see open(2).
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a directory, a socket
            raise
        raise _in_the_way(path, "a file") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _in_the_way(path, "a file")
    return fd


def _in_the_way(path: str, needed: str) -> SourceError:
    mode = os.lstat(path).st_mode
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFREG: "a regular file"}
    kind = kinds.get(stat.S_IFMT(mode), "a special file")
    return SourceError(
        errno.EEXIST, f"{path}: {kind} is in the place of {needed} of prefault's cache: remove it, or name another place"
    )


def _write_all(fd: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(fd, content[done:], offset + done)


def write_whole(path: str, content: bytes) -> None:
    """Replace a file atomically: other processes read all of the old content, or all of the new."""
    unfinished = os.path.join(os.path.dirname(path), f".prefault-{os.urandom(8).hex()}")
    try:  # around the creation too: Ctrl-C leaves no file
        with open(unfinished, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
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
        """Fill ``target`` from the disk, and read missing blocks from the source: one request for each gap."""
        cache = self._cache
        blocks = cache.blocks(offset, offset + len(target))
        start, stop = cache.span(blocks)
        if (start, stop) == (offset, offset + len(target)):
            self._fill(blocks, target)
            return
        # A checksum covers a whole block, so whole blocks are read.
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
        """Close the source and the cache."""
        self._source.close()
        self._cache.close()
