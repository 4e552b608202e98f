"""Driver whose objects are remote files: one server for many of them."""

from __future__ import annotations

import contextlib
import errno
import resource
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from prefault.device.device_pool import Access, ClientProcess, DeviceObject, DevicePool
from prefault.device.driver import Device, DeviceArea, FaultAround, Recipe
from prefault.device.recipes import make_device
from prefault.drivers.remote.file_records import (
    SLOT_BYTES,
    SLOTS,
    TABLE_BYTES,
    CloseFile,
    FileFacts,
    FileTable,
    OpenFile,
    decode,
    encode,
)
from prefault.errors import DeviceError
from prefault.ipc.messages import msgspec
from prefault.sizes import GIB

ADDRESS_SPACE = 65536 * GIB
"""Bytes of the device: the sum of all files, each in whole pieces of 2 MiB. Half of what a process can map."""
_FILES_OF_WORKERS = 8
_WORKERS_MOST = 256
_DROPPED_PAGES = 4096
"""Pages of a closed file that are dropped at a time: faults of other files wait meanwhile."""


class FileDriver(Protocol):
    """Methods of :class:`RemoteFile` by which it supplies pages of another device, in which it begins at page ``first``."""

    length: int
    page_size: int

    def open(self, area: DeviceArea) -> None:
        """Open the source."""

    def stop(self) -> None:
        """Close the source."""

    def supply(self, area: DeviceArea, pages: range, first: int) -> None:
        """Supply pages."""

    def supply_one(self, area: DeviceArea, page: int, first: int) -> None:
        """Supply one page; fail at once where a read just failed."""


class _OpenedFile:
    """A file that is an object of the device.

    Attributes:
        extent: the object.
        driver: reads the file.
        slot: of the record in the table.
        areas: number of areas of clients.
        handles: number of handles of each client, by its number: it is about to map the file.
        restored: a server before this one had it open. Its source is opened again when a page is wanted.
    """

    def __init__(self, extent: DeviceObject, driver: FileDriver, slot: int, *, restored: bool) -> None:
        self.extent = extent
        self.driver = driver
        self.slot = slot
        self.areas = 0
        self.handles: Counter[int] = Counter()
        self.restored = restored


def _drop(run: range, content: memoryview) -> None:
    """Save nothing: the source has the content."""


def _make(asked: OpenFile) -> FileDriver:
    """Make the file of a request, without a request to its source; ValueError if the arguments are invalid."""
    try:
        made: Any = make_device(asked.recipe)
    except DeviceError as error:
        raise ValueError(error.strerror) from None
    file: FileDriver = made
    return file


class RemoteFiles(Device):
    """Device whose objects are remote files, each opened by a control request with options and credentials of its own.

    A file is closed with its last area. A source that does not answer takes at most :attr:`object_workers` of the workers;
    its reads give up before the time of a call is over, so that the server goes on. After a crash the next server has all
    files open, by a table in kept memory.

    Args:
        workers: maximum of concurrent requests for one file.
        batch: see :class:`RemoteFile`.
        fault_around: see :class:`RemoteFile`, in bytes.
        timeout_s: seconds that one call may take: longer than the patience of each file.
        capacity: maximum of bytes kept in memory of all files together; the pages that came first are evicted first.
    """

    writable = False
    restartable = True
    length = ADDRESS_SPACE

    def __init__(
        self, workers: int, batch: int, fault_around: Sequence[int] | None, timeout_s: float, capacity: int | None
    ) -> None:
        self.workers = min(_FILES_OF_WORKERS * workers, _WORKERS_MOST)
        self.object_workers = workers
        self.batch = batch
        self.fault_around = None if fault_around is None else FaultAround(*fault_around)
        self.timeout_s = timeout_s
        self.capacity = capacity
        self._lock = threading.Lock()
        self._files: dict[str, _OpenedFile] = {}

    def recipe(self) -> Recipe:
        """Return the recipe: the server is a fresh process, in which no file is open yet."""
        around = None if self.fault_around is None else list(self.fault_around)
        return Recipe(
            "prefault.drivers.remote.remote_files:RemoteFiles",
            {
                "workers": self.object_workers, "batch": self.batch, "fault_around": around,
                "timeout_s": self.timeout_s, "capacity": self.capacity,
            },
        )  # fmt: skip

    # --- in the server

    def start(self, pool: DevicePool) -> None:
        """Read the table of files: after a crash it has those that are open."""
        self._pool = pool
        # Local files and disk caches take descriptors for each file, and the usual soft limit is 1024.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._table = FileTable(pool.keep("files", TABLE_BYTES))
        extents = {extent.name: extent for extent in pool.objects()}
        for slot, record in self._table.records():
            opened = decode(record)
            extent = extents.pop(opened.name, None)
            if extent is None or not isinstance(opened, OpenFile):  # killed between the record and the object
                self._table.remove(slot)
            else:
                self._files[opened.name] = _OpenedFile(extent, _make(opened), slot, restored=True)
        for name in extents:  # killed between the object and the record
            pool.delete_object(name)

    def stop(self) -> None:
        """Close all sources."""
        for file in self._files.values():
            file.driver.stop()

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        """Open or close a file, without a request to its source; see :class:`OpenFile` and :class:`CloseFile`."""
        try:
            asked = decode(request)
            with self._lock:
                if isinstance(asked, CloseFile):
                    return self._close_handle(client, asked)
                return self._open(client, asked, request)
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise OSError(errno.EINVAL, f"not a request to open or close a remote file: {error}") from None

    def _open(self, client: ClientProcess, asked: OpenFile, request: bytes) -> bytes:
        file = self._files.get(asked.name)
        if file is None:
            file = self._files[asked.name] = self._add(asked, request)
        file.handles[client.number] += 1
        return encode(FileFacts(file.extent.name, file.extent.length))

    def _add(self, asked: OpenFile, request: bytes) -> _OpenedFile:
        driver = _make(asked)
        if driver.page_size != self.page_size:
            raise ValueError(f"pages of {driver.page_size} bytes, on a server with pages of {self.page_size}")
        if len(request) > SLOT_BYTES - 8:
            raise OSError(errno.E2BIG, f"the options of {driver} have {len(request)} bytes, and at most {SLOT_BYTES - 8}")
        slot = self._table.add(request)
        if not slot:
            raise OSError(errno.ENFILE, f"{driver} cannot be opened: the server has {SLOTS} files open, the maximum")
        try:
            return _OpenedFile(self._pool.create_object(asked.name, driver.length), driver, slot, restored=False)
        except BaseException:
            self._table.remove(slot)
            raise

    def _close_handle(self, client: ClientProcess, asked: CloseFile) -> bytes:
        file = self._files.get(asked.name)
        if file is not None:
            if file.handles[client.number] > 1:
                file.handles[client.number] -= 1
            else:  # none, if a server before this one opened it
                del file.handles[client.number]
            self._close_if_unused(file)
        return b""

    def open(self, area: DeviceArea) -> None:
        """Open the source of the area's file; it must still have the mapped version."""
        file = self._file_at(area.pages.start)
        if not file.restored:
            file.driver.open(area)
        with self._lock:
            file.areas += 1

    def close(self, area: DeviceArea) -> None:
        """Close the file with its last area."""
        file = self._file_at(area.pages.start)
        with self._lock:
            file.areas -= 1
            self._close_if_unused(file)

    def disconnect(self, client: ClientProcess) -> None:
        """Close the handles of the client."""
        with self._lock:
            for file in list(self._files.values()):
                if file.handles.pop(client.number, 0):
                    self._close_if_unused(file)

    def _close_if_unused(self, file: _OpenedFile) -> None:
        if file.areas or file.handles:
            return
        for run in self._pool.ready(file.extent.pages(self.page_size)):
            for start in range(run.start, run.stop, _DROPPED_PAGES):
                self._pool.evict(range(start, min(start + _DROPPED_PAGES, run.stop)), _drop)
        self._pool.delete_object(file.extent.name)  # first: the record is of no use without it
        del self._files[file.extent.name]
        self._table.remove(file.slot)
        file.driver.stop()

    def _file_at(self, page: int) -> _OpenedFile:
        found = self._pool.object_at(page)
        if found is None:
            raise OSError(errno.ENXIO, f"page {page} belongs to no file")
        return self._files[found.name]

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:  # noqa: ARG002  it is read-only
        """Supply one page, after :meth:`populate` of the window around it has failed."""
        file = self._file_at(page)
        file.driver.supply_one(area, page, file.extent.offset // self.page_size)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:  # noqa: ARG002  it is read-only
        """Supply all of the pages, which are of one file, with one request."""
        file = self._file_at(pages.start)
        file.driver.supply(area, pages, file.extent.offset // self.page_size)
