"""Driver that maps a remote file as memory: touched pages are downloaded, in few large requests, and checked."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Literal, TypeAlias

from prefault.device.access_log import Content
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, FaultAround, Recipe, SharedObject
from prefault.drivers.remote.disk_cache import CachedSource, DiskCache, WriteWarning, cache_key, make_directory
from prefault.drivers.remote.file_sources import CallableSource
from prefault.drivers.remote.gzip_source import open_gzip
from prefault.drivers.remote.locations import closed_on_failure, name_of, open_plain, redacted_chain
from prefault.drivers.remote.source import GivenUpError, Patience, Source, SourceMissingError, Version, printable, time_limit
from prefault.drivers.remote.zstd_source import ZstdSource
from prefault.sizes import MIB, PAGE_SIZE, Size, parse_size

Compression: TypeAlias = Literal["infer", "gzip", "zstd"] | None
Location: TypeAlias = str | os.PathLike[str] | Callable[[], BinaryIO]

_SUFFIXES = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_NO_RANDOM_ACCESS = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".z")
_GIVEN_UP_S = 1.0
"""Seconds for which a read that was given up is not tried again."""
_MARGIN_S = 15.0
"""Seconds between the limit at which a read gives up and the limit at which the framework ends its process."""


class RemoteFile(Device):
    """Device that maps a remote file read-only: ``prefault.device.map(RemoteFile(url))``.

    The bytes are those of the version that the source had when the object was made. If the source changes, or fails for
    good, touching a missing page raises SIGBUS, and populating it an exception that tells why; never stale bytes or zeros.

    Args:
        source: a URL of any kind that fsspec knows (http, s3, gs, ssh, zip, memory, ...; chained by ``::``), a path, or a
            callable that opens a binary file object with ``read`` and ``seek``. http, https, local files and zip archives
            of these are read without fsspec. ``file://`` URLs are percent-decoded; paths and ``local://`` are not.
        compression: ``"infer"`` goes by the name: ``.zst`` must be seekable zstd; ``.gz`` needs ``index`` or
            ``cache_dir`` for its index. None: map the packed bytes.
        headers: HTTP headers that are sent with each request of http and https.
        storage_options: options of fsspec's file system.
        capacity: maximum of bytes kept in memory; the pages that came first are evicted first. None: no page is evicted.
        cache_dir: a directory on a disk where downloaded blocks are kept for the next run, named by URL, version, and those
            storage_options that are not credentials. The source must tell versions apart (ETag, time of change). A
            directory that others can write to is refused, unless it is one like /tmp. One that cannot be written is read,
            and a warning is logged when a block cannot be kept.
        index: the file with the index of a gzip file; built, by reading the whole file once, if it is missing.
        workers: maximum of concurrent requests.
        batch: maximum of bytes that one request of a populate asks for.
        fault_around: read-ahead of a fault: the aligned window of the first size around it, growing to the second while
            faults go forward. For random access to small pieces give less, down to a page.
        page_size: see :class:`prefault.device.Device`.
        patience: limits of retries and time.
        version: the version to map; None: the current one.

    Raises:
        SourceError: the source cannot be read (SourceMissingError, a FileNotFoundError, if it does not exist).
        ImportError: a package is missing, with its name.
        ValueError: an unknown kind of URL, an empty file, arguments that do not go together.
    """

    writable = False

    def __init__(
        self, source: Location, *, compression: Compression = "infer", headers: dict[str, str] | None = None,
        storage_options: dict[str, Any] | None = None, capacity: Size | None = None,
        cache_dir: str | os.PathLike[str] | None = None, index: str | os.PathLike[str] | None = None, workers: int = 16,
        batch: Size = 16 * MIB, fault_around: tuple[Size, Size] = (MIB, 8 * MIB), page_size: int = PAGE_SIZE,
        patience: Patience = Patience(), version: tuple[int, str, str] | None = None,  # noqa: B008  it is frozen
    ) -> None:  # fmt: skip
        if not callable(source):
            source = os.fsdecode(source)
        if isinstance(source, str) and "://" not in source:
            source = os.path.abspath(source)  # the server has its own working directory
        if callable(source) and cache_dir is not None:
            raise ValueError("cache_dir needs a source with a name: a URL or a path, not a callable")
        if workers < 1:
            raise ValueError(f"workers is the number of concurrent requests, at least 1, not {workers}")
        self.source = source
        self.workers = workers
        self.batch = parse_size(batch)
        self.page_size = page_size
        self.capacity = None if capacity is None else parse_size(capacity)
        first, most = (max(page_size, parse_size(size)) for size in fault_around)
        self.fault_around = FaultAround(first, max(first, most)) if most > page_size else None
        self.timeout_s = patience.total_s + _MARGIN_S
        # After a crash a new process goes on with the same version, or raises that it is gone. A callable exists in this
        # process only.
        self.restartable = not callable(source)
        self._compression = compression
        self._headers = dict(headers or {})
        self._options = dict(storage_options or {})
        self._cache_dir = None if cache_dir is None else os.path.abspath(os.fsdecode(cache_dir))
        self._cache_warning = WriteWarning()
        self._index = None if index is None else os.path.realpath(os.fsdecode(index))
        self._patience = patience
        self._version = None if version is None else Version(*version)
        self._opened: Source | CachedSource | None = None
        self._given_up: deque[tuple[range, float, GivenUpError]] = deque(maxlen=self.workers)
        self._lock = threading.Lock()
        self._token = os.urandom(8).hex()
        self._capacity_group: int | None = None
        if self._version is None:
            if self._index is not None and not os.path.isdir(os.path.dirname(self._index)):
                raise SourceMissingError(errno.ENOENT, f"{self._index}: there is no directory to keep the index in")
            with contextlib.closing(self._open_source()) as opened:
                self._version = opened.version
                if self._cache_dir is not None and opened.length:
                    self._open_cache(self._cache_dir, opened).close()  # so that its errors are raised here
        self.length = self._version.length
        if not self.length:
            raise ValueError(f"{self}: it is empty: there is nothing to map")

    def __str__(self) -> str:
        return f"RemoteFile({_shown(self.source)})"

    @property
    def version(self) -> Version:
        """Length, tag and time of change of the mapped version of the source."""
        assert self._version is not None
        return self._version

    def recipe(self) -> Recipe | None:
        """Return a recipe with the version, so that making the device again sends no request.

        None for a source that exists in this process only.
        """
        if callable(self.source) or not _exists_outside(self.source) or not _is_plain(self._options):
            return None
        around = self.fault_around or FaultAround(self.page_size, self.page_size)
        patience = self._patience
        return Recipe(
            "prefault.drivers.remote.remote_file:make_remote_file",
            {
                "source": _sendable(self.source), "compression": self._compression, "headers": self._headers,
                "storage_options": self._options, "capacity": self.capacity,
                "cache_dir": _sendable(self._cache_dir), "cache_warned": self._cache_warning.given,
                "index": _sendable(self._index), "workers": self.workers, "batch": self.batch, "fault_around": list(around),
                "page_size": self.page_size, "version": list(self.version),
                "patience": [patience.retries, patience.timeout_s, patience.total_s, patience.first_pause_s,
                             patience.longest_pause_s],
            },
        )  # fmt: skip

    def content_identity(self) -> Content:
        """Return URL, without user, password and query, and version; empty for a callable."""
        if callable(self.source):
            return Content()
        return Content(_shown(self.source), f"{self.version.tag} {self.version.modified}".strip())

    def shared_server(self) -> SharedObject | None:
        """Return the server that this process shares among its remote files; None if this file needs one of its own."""
        from prefault.drivers.remote.sharing import share

        return share(self, self._token, self._capacity_group)

    def share_capacity(self, group: int) -> None:
        """Count the capacity for all files of a group together, on one server; before the file is mapped."""
        self._capacity_group = group

    # --- in the server

    def open(self, area: DeviceArea) -> None:  # noqa: ARG002
        """Open the source; it must still have the mapped version."""
        self._source()

    def _source(self) -> Source | CachedSource:
        # Not in open() alone: a new server calls open() once for each area, and goes on if it raises.
        with time_limit(self._patience.total_s), self._lock:  # includes the wait for another thread that opens it
            if self._opened is None:
                self._opened = self._open_all()
            return self._opened

    def stop(self) -> None:
        """Close the source. Idempotent."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:  # noqa: ARG002  it is read-only
        """Supply one page, after :meth:`populate` of the window around it has failed."""
        self.supply_one(area, page, 0)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:  # noqa: ARG002  it is read-only
        """Supply all of the pages with one request, straight into their frames."""
        self.supply(area, pages, 0)

    def supply_one(self, area: DeviceArea, page: int, first: int) -> None:
        """Supply one page of a device in which this file begins at page ``first``; fail at once where a read just failed."""
        for pages, when, error in list(self._given_up):
            if page in pages and time.monotonic() - when < _GIVEN_UP_S:
                # The thread that touches it has waited for all of the patience already.
                raise GivenUpError(error.errno, error.strerror)
        self.supply(area, range(page, page + 1), first)

    def supply(self, area: DeviceArea, pages: range, first: int) -> None:
        """Supply pages of a device in which this file begins at page ``first``."""
        start = (pages.start - first) * self.page_size
        stop = min((pages.stop - first) * self.page_size, self.length)
        if start < stop:
            try:
                with time_limit(self._patience.total_s), area.frames(pages)[: stop - start] as target:
                    self._source().read_into(start, target)
            except GivenUpError as error:
                # A copy: the traceback of the original holds views of the frames.
                self._given_up.append((pages, time.monotonic(), GivenUpError(error.errno, error.strerror)))
                raise

    # --- sources

    def _open_all(self) -> Source | CachedSource:
        source = self._open_source()
        if self._cache_dir is None:
            return source
        with closed_on_failure(source):
            return CachedSource(source, self._open_cache(self._cache_dir, source))

    def _open_cache(self, directory: str, source: Source) -> DiskCache:
        return DiskCache(directory, source, self._cache_key(self._packing()), self._cache_warning)

    def _cache_key(self, packed: str | None) -> str:
        return cache_key(str(self.source), packed, self._options)

    def _packing(self) -> str | None:
        """Return how the source is compressed; ValueError for a format without random access."""
        if self._compression != "infer":
            if self._compression not in (None, "gzip", "zstd"):
                raise ValueError(f"compression is 'infer', 'gzip', 'zstd' or None, not {self._compression!r}")
            return self._compression
        if callable(self.source):
            return None
        suffix = os.path.splitext(name_of(self.source))[1].lower()
        if suffix in _NO_RANDOM_ACCESS:
            raise ValueError(
                f"{_shown(self.source)}: {suffix} files have no random access: unpack the file, or pack it as seekable zstd;"
                " compression=None maps the packed bytes"
            )
        return _SUFFIXES.get(suffix)

    def _open_source(self) -> Source:
        packing = self._packing()
        # The version of the content contains that of the packed file.
        plain = self._open_plain(None if packing else self._version)
        if self._version is None and not plain.length:
            return plain  # it is empty: __init__ raises
        if packing is None:
            return plain
        with closed_on_failure(plain):
            opened = ZstdSource(plain) if packing == "zstd" else self._open_gzip(plain)
            if self._version is not None and opened.version != self._version:
                raise opened.changed(self._version.change(opened.version))
            return opened

    def _open_gzip(self, packed: Source) -> Source:
        index = self._index
        if index is None and self._cache_dir is not None:
            directory = make_directory(self._cache_dir, packed, self._cache_key("index"), self._cache_warning)
            index = os.path.join(directory, "gzip.index")
        return open_gzip(packed, index, self._cache_warning, afresh=self._version is None)

    def _open_plain(self, version: Version | None) -> Source:
        if callable(self.source):
            return CallableSource(self.source, self._patience, version)
        return open_plain(self.source, self._headers, self._options, self._patience, version)


def _shown(source: str | Callable[[], BinaryIO]) -> str:
    return printable(getattr(source, "__qualname__", str(source)) if callable(source) else redacted_chain(source))


def _sendable(text: str | None) -> str | bytes | None:
    """Return a name as a recipe can carry it: as the bytes of the file system where UTF-8 has no text for them."""
    return text if text is None or text == printable(text) else os.fsencode(text)


def _exists_outside(url: str) -> bool:
    """Return whether another process can open a URL: fsspec's file system ``memory`` is a dict of this process."""
    return not any(part.startswith("memory:") for part in url.split("::"))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | bytes)


def make_remote_file(
    patience: Sequence[Any], fault_around: Sequence[int], version: Sequence[Any], cache_warned: bool, **arguments: Any
) -> RemoteFile:
    """Make a RemoteFile from the arguments of its recipe."""
    first, most = fault_around
    length, tag, modified = version
    device = RemoteFile(
        patience=Patience(*patience), fault_around=(first, most), version=(length, tag, modified), **arguments
    )
    device._cache_warning.given = cache_warned
    return device
