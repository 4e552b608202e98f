"""Open a device: start a server for a device object and map it, or connect to a device that another process serves."""

from __future__ import annotations

import atexit
import errno
import os
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from prefault._system import fork_hooks
from prefault._system.closing import Closing
from prefault.device import limit_messages, this_server
from prefault.device.client import mapped_area
from prefault.device.client.area import Area
from prefault.device.client.connection import DeviceConnection
from prefault.device.client.fault_descriptor import open_userfaultfd
from prefault.device.client.page_provider import AreaPageProvider
from prefault.device.driver import Access, Device
from prefault.device.recipes import check_device_attributes
from prefault.errors import DeviceError, DeviceGoneError
from prefault.ipc.connecting import check_server, connect_to_server
from prefault.sizes import Size, format_size, parse_size

PopulateChoice: TypeAlias = bool | Access

_starting = threading.RLock()
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

    Raises:
        DeviceError: this process may not open a userfaultfd, or the server cannot be started; the message says what to
            change.
        PopulateError: ``populate`` failed, as :func:`prefault.populate` describes. Nothing stays mapped.
        ValueError, TypeError: not a device; a length of 0 or beyond the device; an offset inside of a page; writing to a
            device that is read-only.
    """
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
    check_device_attributes(device)  # before anything is started
    _extent(type(device).__name__, device.length, device.page_size, length, offset)
    _access(type(device).__name__, device.writable, access)
    connection = _acquire_private(device)
    return _map(connection, length, offset, populate, access, track_dirty, colocate)


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
    return DeviceClient(path, timeout)


class DeviceClient(Closing):
    """A device that another process serves; made by :func:`prefault.device.connect`. A context manager.

    Attributes:
        path: path of the socket.
        name, length, page_size, writable, notes: facts of the device.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float) -> None:
        """Not for users: see :func:`connect`."""
        if not timeout > 0:
            raise ValueError(f"a timeout is a positive number of seconds, not {timeout}")
        self.path = os.path.abspath(os.fsdecode(path))
        self._timeout = timeout
        self._lock = threading.RLock()
        self._connection = self._connected(tracking=False)
        self._connections = [self._connection]
        """The connection, and one for areas whose writes the kernel tracks once there is such an area."""
        self._ends = weakref.finalize(self, _release_all, self._connections)
        self._ends.atexit = False
        info = self._connection.device_info
        self.name, self.length, self.page_size = info.name, info.length, info.page_size
        self.writable, self.notes = info.writable, info.notes

    def _connected(self, *, tracking: bool) -> DeviceConnection:
        try:
            with limit_messages.explained(f"the device at {self.path} cannot be connected to"):
                connected = _connect_socket(self.path, self._timeout)
                try:
                    opened = open_userfaultfd(tracking=tracking)
                except BaseException:
                    connected.close()
                    raise
                connection = DeviceConnection(connected, opened)
        except DeviceGoneError as gone:  # the server refused, and says why, or is ending
            raise DeviceGoneError(gone.errno or 0, f"no device at {self.path}: {gone.strerror}") from gone
        connection.acquire()
        return connection

    def map(
        self,
        length: Size | None = None,
        offset: Size = 0,
        *,
        populate: PopulateChoice = False,
        access: Access | None = None,
        track_dirty: bool = False,
        colocate: bool = False,
    ) -> Area:
        """Map a part of the device; the arguments and errors are those of :func:`prefault.device.map`."""
        if self.closed:
            raise ValueError("the connection to the device is closed")
        connection = self._connection
        connection.check()
        if track_dirty and not connection.device_info.evicts:
            # A device that does not evict needs no write-protection of its own, so that the kernel can record writes
            # without the server: through a userfaultfd that was opened for that.
            with self._lock:
                if len(self._connections) == 1:
                    self._connections.append(self._connected(tracking=True))
                connection = self._connections[-1]
        if not connection.acquire():
            connection.check()
        return _map(connection, length, offset, populate, access, track_dirty, colocate)

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
        areas = sum(connection.users - 1 for connection in self._connections if connection.usable)
        if areas:
            raise BufferError(f"{areas} area{' is' if areas == 1 else 's are'} still open: close them first")
        self._ends()

    def __repr__(self) -> str:
        state = "connected" if not self.closed and self._connection.usable else "not connected"
        return f"<DeviceClient of {self.name}, {format_size(self.length)}, at {self.path}, {state}>"


def _release_all(connections: list[DeviceConnection]) -> None:
    for connection in connections:
        connection.release()


# --- connections


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


# --- areas


def _map(
    connection: DeviceConnection,
    length: Size | None,
    offset: Size,
    populate: PopulateChoice,
    access: Access | None,
    track_dirty: bool,
    colocate: bool,
) -> Area:
    """Map an area on a connection that was acquired for it; release the connection if that fails."""
    memory: AreaPageProvider | None = None
    at_end: Callable[[], None] = connection.release
    try:
        info = connection.device_info
        if populate not in (False, True, "read", "write"):
            raise ValueError(f"populate is False, True, 'read' or 'write', not {populate!r}")
        start, count = _extent(info.name, info.length, info.page_size, length, offset)
        chosen = _access(info.name, info.writable, access)
        if populate == "write" and chosen == "read":
            raise ValueError("an area that is mapped for reading cannot be populated writable")
        if track_dirty and chosen == "read":
            raise ValueError("an area that is mapped for reading has no dirty pages to track")
        cpu = None
        if colocate:
            cpu, undo = _pin_thread()

            def at_end() -> None:
                undo()
                connection.release()

        memory = AreaPageProvider(connection, start, chosen, track_dirty=track_dirty, at_end=at_end)
        memory.attach(count, cpu)
        area = Area(memory, count)
        if populate is not False:
            area.populated = area.populate(chosen if populate is True else populate)
        return area
    except BaseException:
        if memory is None:
            at_end()
        else:
            memory.unmap()
        raise


def _extent(name: str, device_length: int, page_size: int, length: Size | None, offset: Size) -> tuple[int, int]:
    """Return the offset and the length in bytes, checked against the device."""
    start = parse_size(offset)
    if start % page_size:
        raise ValueError(f"an offset in {name} is a multiple of its page size, {page_size} bytes, not {start}")
    if start >= device_length:
        raise ValueError(f"offset {start} lies beyond {name}, which has {device_length} bytes")
    count = device_length - start if length is None else parse_size(length)
    if count == 0:
        raise ValueError("an area of 0 bytes is not possible: mmap(2) refuses it")
    if count > device_length - start:
        raise ValueError(
            f"offset {start} and length {count} end at {start + count}, beyond {name}, which has {device_length} bytes"
        )
    return start, count


def _access(name: str, writable: bool, access: Access | None) -> Access:
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read' or 'write', not {access!r}")
    if access == "write" and not writable:
        raise ValueError(f"{name} is read-only: map it with access='read'")
    return access or ("write" if writable else "read")


_pinning = threading.RLock()  # reentrant: a finalizer undoes it
_pinned: dict[int, tuple[set[int], int]] = {}
"""CPUs of a thread before it was pinned, and the number of areas that it is pinned for; by thread id."""


def _pin_thread() -> tuple[int, Callable[[], None]]:
    """Pin the calling thread to the CPU that it runs on; return the CPU and a function that undoes it."""
    thread = threading.get_native_id()
    with _pinning:
        before, count = _pinned.get(thread) or (os.sched_getaffinity(thread), 0)
        _pinned[thread] = before, count + 1
    with open("/proc/thread-self/stat") as file:
        cpu = int(file.read().rpartition(")")[2].split()[36])  # field 39, processor: proc_pid_stat(5)
    now = os.sched_getaffinity(thread)
    if cpu not in now:
        cpu = min(now)
    os.sched_setaffinity(thread, {cpu})

    def undo() -> None:
        with _pinning:
            _, count = _pinned[thread]
            if count > 1:  # still pinned for another area; areas close in any order
                _pinned[thread] = before, count - 1
                return
            del _pinned[thread]
        try:
            os.sched_setaffinity(thread, before)
        except ProcessLookupError:
            return  # the thread has ended
        except OSError as error:
            if error.errno != errno.EINVAL:  # a cpuset took all of these CPUs away
                raise

    return cpu, undo


# --- fork and exit


def _after_fork() -> None:
    global _starting, _pinning
    _starting = threading.RLock()
    _pinning = threading.RLock()
    _pinned.clear()
    _running.clear()


def _at_exit() -> None:
    mapped_area.close_areas_at_exit()


fork_hooks.register(in_child=_after_fork)
atexit.register(_at_exit)
