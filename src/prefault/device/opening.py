"""Open a device: start a server for a device object and map it, or connect to a device that another process serves."""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import socket
import threading
import weakref
from typing import Any

from prefault._system import fork_hooks
from prefault._system.closing import Closing
from prefault.device import limit_messages, protocol, this_server
from prefault.device.access_log import Content
from prefault.device.client import area_logs, mapped_area
from prefault.device.client.area import Area, AreaStatistics
from prefault.device.client.area_mapping import MapOptions, PopulateChoice, checked_access, checked_extent, map_area
from prefault.device.client.connection import DeviceConnection
from prefault.device.client.fault_descriptor import open_userfaultfd
from prefault.device.device_pool import Access
from prefault.device.driver import Device, SharedObject
from prefault.device.recipes import check_device_attributes
from prefault.errors import DeviceError, DeviceGoneError
from prefault.ipc.connecting import check_server, connect_to_server
from prefault.sizes import Size, format_size
from prefault.sparse.device_blocks import DeviceRange, DeviceSource

_starting = threading.RLock()
_tokens = itertools.count()
_OPEN_TRIES = 5
"""Requests to open a shared object, of which a server that dies and its successor may lose one each."""
_running: weakref.WeakValueDictionary[int, DeviceConnection] = weakref.WeakValueDictionary()
"""Connections to private servers, by the id of the device object, which the connection keeps alive."""


def map(  # noqa: A001  mmap(2) for devices; used as prefault.device.map
    device: Device,
    length: Size | None = None,
    offset: Size = 0,
    *,
    populate: PopulateChoice = False,
    access: Access | None = None,
    track_dirty: bool = False,
    colocate: bool = False,
    object: str | None = None,  # noqa: A002  the word for it
) -> Area:
    """Map a part of a device into this process; its driver runs in a server process of its own.

    ::

        with prefault.device.map(MyDevice(...), populate=True) as area:
            array = area.ndarray("float32")

    The first area of a device object starts its server, and a warden that supervises the server. Further areas of the
    same object share both processes; closing the last area ends them.

    Args:
        device: the driver. With a :meth:`Device.recipe`, the server creates the device anew in a fresh process; without
            one, the server is a fork of this process as it is now.
        length: bytes; None: to the end of the device.
        offset: first byte of the device to map: a multiple of its page size.
        populate: False: pages are supplied when they are touched. "read" or "write": populate all of them now, in few
            calls. True: populate for the access that the area is mapped with.
        access: "read" or "write"; None: what the device allows.
        track_dirty: record writes for :meth:`Area.dirty_pages`. It costs page-table memory, 1/512 of the length, or one
            fault per page.
        colocate: pin this thread and the server to one CPU until the area is closed: the lowest fault latency, at the
            price that they never run at the same time.
        object: name of the object to map; ``offset`` and ``length`` count from its start, and None is all of it. See
            :meth:`DevicePool.create_object`.

    Raises:
        DeviceError: this process may not open a userfaultfd, or the server cannot be started; the message says what to
            change. ENOENT: the device has no object of that name.
        PopulateError: ``populate`` failed, as :func:`prefault.populate` describes. Nothing stays mapped.
        ValueError, TypeError: not a device; a length of 0 or beyond the device; an offset inside of a page; writing to a
            device that is read-only.
    """
    _check_device(device)  # before anything is started
    if object is None:
        checked_extent(type(device).__name__, device.length, device.page_size, length, offset)
    checked_access(type(device).__name__, device.writable, access)
    options = MapOptions(length, offset, populate, access, track_dirty, colocate, object)
    shared = device.shared_server() if object is None else None
    if shared is not None:
        area = _map_shared(device, shared, options)
    else:
        connection = _acquire_private(device)
        area = map_area(connection, options, connection.release)
    area_logs.add(area, device.content_identity())
    return area


def _map_shared(device: Device, shared: SharedObject, options: MapOptions) -> Area:
    """Map a device that is an object of another one."""
    connection = _acquire_private(shared.device)
    try:
        for left in reversed(range(_OPEN_TRIES)):
            try:
                connection.control(shared.open_request, None)
                break
            except DeviceGoneError:  # the server died, before or after it made the object: ask the next one
                if not left or not connection.usable:
                    raise
    except BaseException:
        connection.release()
        raise
    connection.acquire()  # for the last request
    try:
        return map_area(
            connection, options._replace(object=shared.name, stands_for=type(device).__name__), connection.release
        )
    finally:
        with contextlib.suppress(DeviceError):  # the server died: so did what the request is about
            connection.control(shared.close_request, None)
        connection.release()


def open(device: Device) -> DeviceClient:  # noqa: A001  open(2) for devices; used as prefault.device.open
    """Start the server of a device object without mapping anything: for control requests, and for maps later.

    The server is private to this process, and shared with all areas of the same object. It ends when they and the client
    object are closed.

    Args:
        device: the driver, as for :func:`prefault.device.map`.

    Raises:
        DeviceError: this process may not open a userfaultfd, or the server cannot be started.
        TypeError: not a device.
    """
    _check_device(device)
    return DeviceClient(_acquire_private(device), None)


def connect(path: str | os.PathLike[str], *, timeout: float = 5.0) -> DeviceClient:
    """Connect to a device that another process serves: ``prefault device serve``, or :func:`prefault.device.serve`.

    Args:
        path: path of the server's socket.
        timeout: seconds to wait until the server accepts the connection.

    Raises:
        DeviceError: there is no server, or this process may not open a userfaultfd.
        DeviceGoneError: the server refused the connection, and says why (it serves another user, say), or is ending.
        PermissionError: the server runs as another user (not root), whose memory is not to be trusted.
    """
    if not timeout > 0:
        raise ValueError(f"a timeout is a positive number of seconds, not {timeout}")
    where = os.path.abspath(os.fsdecode(path))
    return DeviceClient(_connected(where, timeout, tracking=False), where, timeout)


class DeviceClient(Closing, DeviceSource):
    """A connection to a device's server, from which areas are mapped; a context manager.

    Made by :func:`prefault.device.connect`, for a device that another process serves, and by :func:`prefault.device.open`.

    Attributes:
        path: path of the server's socket; None for a private server.
        name, length, page_size, writable, notes: facts of the device.
    """

    def __init__(self, connection: DeviceConnection, path: str | None, timeout: float = 0.0) -> None:
        """Not for users: see :func:`connect` and :func:`open`. Takes over a connection that was acquired for it."""
        self.path = path
        self._timeout = timeout
        self._lock = threading.RLock()
        self._connection = connection
        self._connections = [connection]
        """The connection, and one for areas whose writes the kernel tracks once there is such an area."""
        self._areas: set[int] = set()
        """A token for each area that is open."""
        self._ends = weakref.finalize(self, _release_all, self._connections)
        self._ends.atexit = False
        info = self._connection.device_info
        self.name, self.length, self.page_size = info.name, info.length, info.page_size
        self.writable, self.notes = info.writable, info.notes

    def map(
        self,
        length: Size | None = None,
        offset: Size = 0,
        *,
        populate: PopulateChoice = False,
        access: Access | None = None,
        track_dirty: bool = False,
        colocate: bool = False,
        object: str | None = None,  # noqa: A002
    ) -> Area:
        """Map a part of the device, or an object; the arguments and errors are those of :func:`prefault.device.map`."""
        if self.closed:
            raise ValueError("the connection to the device is closed")
        connection = self._connection
        connection.check()
        if track_dirty and self.path is not None and not connection.device_info.evicts:
            # A device that does not evict needs no write-protection of its own, so that the kernel can record writes
            # without the server: through a userfaultfd that was opened for that.
            with self._lock:
                if len(self._connections) == 1:
                    self._connections.append(_connected(self.path, self._timeout, tracking=True, main=self._connection))
                connection = self._connections[-1]
        if not connection.acquire():
            connection.check()
        token, areas = next(_tokens), self._areas
        areas.add(token)

        def release() -> None:
            areas.discard(token)
            connection.release()

        area = map_area(connection, MapOptions(length, offset, populate, access, track_dirty, colocate, object), release)
        area_logs.add(area, Content(self.path or ""))
        return area

    def control(self, request: bytes | bytearray | memoryview, *, timeout: float | None = None) -> bytes:
        """Send the driver a request that is not about memory, as ioctl(2) does, and return its reply.

        The driver alone knows what the bytes mean: see :meth:`Device.control`. A request is carried out at most once. Ctrl-C
        ends the waiting, not the request.

        Args:
            request: at most 64 512 bytes.
            timeout: seconds to wait for the reply; None: as long as the driver takes, which its ``timeout_s`` limits.

        Raises:
            DeviceError: the driver refused the request, with the errno and the text that it chose; or raised another
                exception (EIO), takes no control requests (ENOTTY), or replied with too many bytes (EMSGSIZE).
            DeviceGoneError: the server died. A request that it had may have been carried out, and the message says so. Where
                another server goes on, the next request is possible.
            TimeoutError: no reply in time. The driver may still carry out the request.
            ValueError, TypeError: the request is too long, or not bytes.
        """
        if self.closed:
            raise ValueError("the connection to the device is closed")
        return self._connection.control(request, timeout)

    def stats(self, object: str) -> AreaStatistics:  # noqa: A002
        """Ask the server for the counters of its work for an object: all its areas, of all clients, also the closed ones.

        Raises:
            DeviceError: ENOENT: the device has no object of that name.
        """
        if self.closed:
            raise ValueError("the connection to the device is closed")
        request = protocol.AskObjectStatistics(self._connection.next_id(), object)
        return AreaStatistics.of(self._connection.ask(request, protocol.Statistics))

    def map_range(self, length: int | None, offset: int, name: str | None) -> DeviceRange:
        """Map a part of the device for :class:`~prefault.SparseMemory`, which takes care of access to it."""
        area = self.map(length, offset, access="write", object=name)
        memory = area.release_memory()
        return DeviceRange(memory, len(area), memory.connection.device_info.huge, memory.require_here)

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return not self._ends.alive

    def close(self) -> None:
        """End the connection. Idempotent.

        Raises:
            BufferError: an area is still open. Close that first.
        """
        if self.closed:
            return
        areas = len(self._areas) if any(connection.usable for connection in self._connections) else 0
        if areas:
            raise BufferError(f"{areas} area{' is' if areas == 1 else 's are'} still open: close them first")
        self._ends()

    def __repr__(self) -> str:
        state = "connected" if not self.closed and self._connection.usable else "not connected"
        where = "private" if self.path is None else f"at {self.path}"
        return f"<DeviceClient of {self.name}, {format_size(self.length)}, {where}, {state}>"


def _release_all(connections: list[DeviceConnection]) -> None:
    for connection in connections:
        connection.release()


# --- connections


def _check_device(device: Device) -> None:
    given: Any = device
    if not isinstance(given, Device):
        hint = "; make one of the class first" if isinstance(given, type) and issubclass(given, Device) else ""
        raise TypeError(f"a device is an object of a class made from prefault.device.Device, not {given!r}{hint}")
    if this_server.device is device:
        raise DeviceError(
            errno.EDEADLK,
            f"the server of {type(device).__name__} cannot map its own device: it would wait for itself. A driver reads and"
            " writes its pages by area.frame() and area.frames()",
        )
    check_device_attributes(device)


def _acquire_private(device: Device) -> DeviceConnection:
    """Return a connection to the server of a device object, acquired for the caller; start the server if needed."""
    from prefault.device.process.launching import launch

    with _starting:
        connection = _running.get(id(device))
        if connection is not None and connection.device is device and connection.acquire():
            return connection
        with limit_messages.explained(f"{type(device).__name__} cannot be mapped"):
            # First, because it is refused more often than all that follows. Where the driver never evicts, the kernel tracks
            # writes without the server.
            opened = open_userfaultfd(tracking=device.writable and not device.evicts)
            try:
                launched = launch(device)
            except BaseException:
                os.close(opened.fd)
                raise
            connection = DeviceConnection(launched.connection, opened, launched, device)
        connection.acquire()
        _running[id(device)] = connection
        return connection


def _connected(path: str, timeout: float, *, tracking: bool, main: DeviceConnection | None = None) -> DeviceConnection:
    """Return a connection to a server that listens at ``path``, acquired for the caller."""
    try:
        with limit_messages.explained(f"the device at {path} cannot be connected to"):
            connected = _connect_socket(path, timeout)
            try:
                opened = open_userfaultfd(tracking=tracking)
            except BaseException:
                connected.close()
                raise
            connection = DeviceConnection(connected, opened, main=main)
    except DeviceGoneError as gone:  # the server refused, and says why, or is ending
        raise DeviceGoneError(gone.errno or 0, f"no device at {path}: {gone.strerror}") from gone
    connection.acquire()
    return connection


def _connect_socket(path: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            connect_to_server(connection, path, timeout, "device")
        except OSError as error:
            raise DeviceError(error.errno, error.strerror) from error
        peer = check_server(connection, path)
        if this_server.device is not None and peer.pid in (os.getpid(), os.getppid()):
            raise DeviceError(errno.EDEADLK, f"the server at {path} cannot map its own device: it would wait for itself")
    except BaseException:
        connection.close()
        raise
    return connection


# --- fork and exit


def _after_fork() -> None:
    global _starting
    _starting = threading.RLock()
    _running.clear()


def _at_exit() -> None:
    mapped_area.close_areas_at_exit()


fork_hooks.register(in_child=_after_fork)
atexit.register(_at_exit)
