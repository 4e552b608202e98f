"""Sources that are local files, files of fsspec's file systems, and file objects that a callable opens."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from prefault.drivers.remote.http_source import redacted_url
from prefault.drivers.remote.source import (
    CHUNK,
    TRANSIENT_STATUSES,
    Attempts,
    Patience,
    Source,
    SourceError,
    SourceMissingError,
    StreamPool,
    TransientError,
    Version,
    fill_from,
    missing_package,
)

_URL = re.compile(r"[a-zA-Z][\w+.-]*://[^\s'\"<>)]+")
_QUERY = re.compile(r"\?[\w%.+-]+=[^\s'\"<>)]*")
"""Matches the query of a URL without scheme and host: urllib3 reports URLs so."""


def _redacted(error: object) -> str:
    """Return the text of a library's error without the secrets in its URLs: passwords, and signatures in queries."""

    def harmless(match: re.Match[str]) -> str:
        try:
            return redacted_url(match[0])
        except ValueError:
            return match[0].partition("://")[0] + "://..."

    return _QUERY.sub("?...", _URL.sub(harmless, str(error)))


def _refuse(name: str, error: OSError) -> NoReturn:
    number = error.errno or errno.EIO
    if isinstance(error, FileNotFoundError):
        raise SourceMissingError(errno.ENOENT, f"{name}: there is no such file, or no longer") from error
    raise SourceError(number, f"{name}: {_redacted(error.strerror or error)}") from error


class LocalSource(Source):
    """A local file. A read raises if the file was written, replaced, truncated or removed."""

    def __init__(self, path: str, patience: Patience, version: Version | None = None) -> None:
        super().__init__(path, patience)
        self._path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for its writer
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise IsADirectoryError(errno.EINVAL, "it is not a regular file")
            now = self._version_of(os.fstat(self._fd))
        except OSError as error:
            self.close()
            _refuse(path, error)
        self.version = version or now

    @staticmethod
    def _version_of(status: os.stat_result) -> Version:
        return Version(status.st_size, f"{status.st_dev}-{status.st_ino}", str(status.st_mtime_ns))

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:
        done = 0
        try:
            while done < len(target):
                _ = attempts.timeout_s  # raises when the time is over
                with target[done : done + CHUNK] as piece:
                    count = os.preadv(self._fd, [piece], offset + done)
                if not count:
                    break
                done += count
            # Afterwards: what was read is of this version only if the file is still of it now.
            now = self._version_of(os.stat(self._path))
        except OSError as error:
            _refuse(self.name, error)
        self.check_version(now)
        if done < len(target):
            raise self.cut_short(offset + done)

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class CallableSource(Source):
    """Binary file objects with ``read`` and ``seek`` that a callable opens: one for each thread that reads.

    Each read checks the length afterwards, and for a local file also inode and time of change. The caller must not change
    the content of anything else.
    """

    def __init__(self, opener: Callable[[], BinaryIO], patience: Patience, version: Version | None = None) -> None:
        super().__init__(f"the file that {getattr(opener, '__qualname__', opener)!s} opens", patience)
        self._streams = StreamPool(opener)
        with self._stream() as stream:
            now = self._version_of(stream)
        self.version = version or now

    @contextlib.contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        try:
            with self._streams.use() as stream:
                yield stream
        except (ConnectionError, TimeoutError) as error:
            raise TransientError(f"{type(error).__name__}: {_redacted(error)}") from error
        except OSError as error:
            if isinstance(error, SourceError):
                raise
            _refuse(self.name, error)

    def _version_of(self, stream: BinaryIO) -> Version:
        length = stream.seek(0, os.SEEK_END)
        length = stream.tell() if length is None else length  # older file objects return nothing
        try:
            status = os.fstat(stream.fileno())
        except (OSError, AttributeError):
            return Version(length)
        return Version(length, f"{status.st_dev}-{status.st_ino}", str(status.st_mtime_ns))

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:  # noqa: ARG002
        with self._stream() as stream:
            done = fill_from(stream, offset, target)
            now = self._version_of(stream)
        self.check_version(now)
        if done < len(target):
            raise self.cut_short(offset + done)

    def close(self) -> None:
        """Close the idle file objects."""
        self._streams.close()


_TAGS = ("ETag", "etag", "md5", "md5Hash", "sha256", "oid", "generation", "VersionId", "version_id", "ino", "sha", "hex")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "modify", "modificationTime", "created")

# Errors of botocore, google.auth, azure and paramiko, by name, because these libraries need not be installed. A retry does
# not help. It may help after CredentialRetrievalError, which is not matched.
_WITHOUT_KEYS = re.compile(r"Credentials(Error|$)|ProfileNotFound|Authentication|BadHostKey")
_KEYS = "credentials are given by storage_options, or in the way that its package finds them"


class FsspecSource(Source):
    """A file of any file system that fsspec knows, read by ``cat_file``.

    fsspec does not tell which version the bytes belong to, so each read asks for the file's entry again afterwards.
    """

    def __init__(self, url: str, options: dict[str, Any], name: str, patience: Patience, version: Version | None) -> None:
        super().__init__(name, patience)
        self._url, self._options = url, options
        self._fs: Any = None
        self._path = ""
        self._broken = False
        self._opening = threading.Lock()
        attempts = Attempts(patience, name)
        now = attempts.retry(lambda: self._ask_version(attempts))
        self.version = version or now

    def _connect(self) -> None:
        """Open the file system, again if it failed: some have one connection, which they never renew."""
        with self._opening:
            if self._fs is not None and not self._broken:
                return
            if self._fs is not None:
                self._fs.clear_instance_cache()  # else fsspec returns the broken instance
            try:
                self._fs, self._path = _file_system(self._url, self._options)
            except (ImportError, ValueError):
                raise
            except Exception:
                with self._translated():
                    raise
            self._broken = False

    @contextlib.contextmanager
    def _serialized(self, attempts: Attempts) -> Iterator[None]:
        """Serialize the threads on a file system that has one file object (archives) or one connection (ftp, sftp).

        Threads that share a paramiko client take each other's answers, and wait forever.
        """
        if not any(getattr(self._fs, name, None) is not None for name in ("fo", "ftp")):
            yield
            return
        # fsspec shares one file system between several sources.
        lock = vars(self._fs).setdefault("_prefault_turn", threading.Lock())
        while not lock.acquire(timeout=attempts.timeout_s):
            pass
        try:
            yield
        finally:
            lock.release()

    def _ask_version(self, attempts: Attempts) -> Version:
        self._connect()
        with self._translated(), self._serialized(attempts):
            self._fs.invalidate_cache()
            info = self._call("info", attempts.timeout_s)
            if info.get("type", "file") != "file" or info.get("size") is None:
                raise SourceError(
                    errno.EINVAL, f"{self.name}: it is not a file, or its file system does not tell its length"
                )
            tag = [f"{key}={info[key]}" for key in _TAGS if info.get(key)]
            modified = [f"{key}={info[key]}" for key in _TIMES if info.get(key)]
            # An archive's entry is in memory: the file system that holds the archive knows whether it changed.
            outer = getattr(self._fs, "fo", None)
            if outer is not None and hasattr(outer, "fs") and hasattr(outer, "path"):
                outer.fs.invalidate_cache()
                about = outer.fs.info(outer.path)
                tag += [f"in {key}={about[key]}" for key in ("size", *_TAGS) if about.get(key)]
                modified += [f"in {key}={about[key]}" for key in _TIMES if about.get(key)]
            return Version(int(info["size"]), " ".join(tag), " ".join(modified))

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate the errors of a file system's library: TransientError for a retry, SourceError for the others."""
        try:
            yield
        except (SourceError, TransientError):
            raise
        except FileNotFoundError as error:
            # Some file systems raise this for any failure on the way.
            cause = error.__cause__
            if getattr(cause, "status", None) in TRANSIENT_STATUSES or isinstance(cause, ConnectionError | TimeoutError):
                raise TransientError(f"{type(cause).__name__}: {_redacted(cause)}") from error
            _refuse(self.name, error)
        except PermissionError as error:
            raise SourceError(errno.EACCES, f"{self.name}: access is denied: {_redacted(error)}; {_KEYS}") from error
        except (IsADirectoryError, NotADirectoryError) as error:
            _refuse(self.name, error)
        except Exception as error:
            status = getattr(error, "status", None)
            status = getattr(error, "code", None) if status is None else status
            text = ": ".join(filter(None, (type(error).__name__, _redacted(error))))
            if _WITHOUT_KEYS.search(type(error).__name__):
                raise SourceError(errno.EACCES, f"{self.name}: {text}; {_KEYS}") from error
            if isinstance(status, int) and 400 <= status < 500 and status not in TRANSIENT_STATUSES:
                raise SourceError(errno.EIO, f"{self.name}: {text}") from error
            if isinstance(error, NotImplementedError | ValueError | TypeError | KeyError | AttributeError | ImportError):
                raise SourceError(errno.EIO, f"{self.name}: {text}") from error
            self._broken = getattr(self._fs, "ftp", None) is not None
            raise TransientError(text) from error

    def _attempt(self, offset: int, target: memoryview, attempts: Attempts) -> None:
        self._connect()
        done = 0
        try:
            with self._translated(), self._serialized(attempts):
                for piece in self._pieces(offset, len(target), attempts):
                    if len(piece) > len(target) - done:
                        got = f"asked for {len(target)} bytes at {offset}, got {done + len(piece)}"
                        raise SourceError(errno.EIO, f"{self.name}: {got}: it ignores ranges")
                    target[done : done + len(piece)] = piece
                    done += len(piece)
        except TransientError as failure:
            raise TransientError(str(failure), done=done) from failure
        # Checked after the read: if the source still has this version now, so had all bytes that arrived.
        self.check_version(self._ask_version(attempts))
        if done < len(target):
            raise TransientError(f"asked for {len(target)} bytes at {offset}, got {done}", done=done)

    def _pieces(self, offset: int, length: int, attempts: Attempts) -> Iterator[bytes]:
        """Yield the bytes in pieces, so that a slow connection is not taken for a dead one."""
        from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped]

        if getattr(self._fs.cat_file, "__func__", None) is AbstractFileSystem.cat_file:  # it opens the file for each call
            with self._fs.open(self._path, "rb") as file:
                file.seek(offset)
                if hasattr(file, "prefetch"):  # without, paramiko requests 32 KiB at a time and waits for each
                    file.prefetch(offset + length)
                while length and attempts.left_s and (piece := file.read(min(length, CHUNK))):
                    yield piece
                    length -= len(piece)
            return
        yield self._call("cat_file", attempts.long_timeout_s, start=offset, end=offset + length)

    def _call(self, name: str, timeout_s: float, **arguments: Any) -> Any:
        """Call a method of the file system with the path; an asynchronous one with a timeout."""
        if _is_async(self._fs):
            from fsspec.asyn import sync  # type: ignore[import-untyped]

            return sync(self._fs.loop, getattr(self._fs, f"_{name}"), self._path, timeout=timeout_s, **arguments)
        return getattr(self._fs, name)(self._path, **arguments)

    def close(self) -> None:
        """Do nothing: fsspec keeps its file systems, and shares them between sources."""
        return


def _is_async(file_system: Any) -> bool:
    """Return whether a file system is asynchronous; ``dir://`` claims to be, also in front of one that is not."""
    inner = getattr(file_system, "fs", None)
    return getattr(file_system, "async_impl", False) and (inner is None or _is_async(inner))


def _file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        ImportError: a package is missing; its name is in the message.
        ValueError: the protocol is unknown.
    """
    try:
        import fsspec.core  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_package(f"{url.partition('://')[0]}:// needs", "fsspec", "'prefault[remote]'") from error
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name
        if not package:
            raise ImportError(f"{url.partition('://')[0]}://: {error}") from error
        raise missing_package(f"{url.partition('://')[0]}:// needs the package", package, package) from error
    except ValueError as error:
        raise ValueError(f"{url.partition('://')[0]}://: {error}") from error
    return fs, path
