"""Mapping devices: one's own, for which a server is started, and those that another process serves."""

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
from prefault.device import limit_messages, this_server
from prefault.device.client import mapped_area
from prefault.device.client.area import Area
from prefault.device.client.connection import DeviceConnection
from prefault.device.client.fault_descriptor import open_userfaultfd
from prefault.device.client.page_provider import AreaPageProvider
from prefault.device.driver import Access, Device
from prefault.device.recipes import check_device_facts
from prefault.errors import DeviceError, DeviceGoneError
from prefault.ipc.connecting import check_server, connect_to_server
from prefault.sizes import Size, format_size, parse_size

PopulateChoice: TypeAlias = bool | Access

_starting = threading.RLock()
_running: weakref.WeakValueDictionary[int, DeviceConnection] = weakref.WeakValueDictionary()
"""The links to private servers, by the id of the device object, which the link keeps alive."""


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
    """Map a part of a device, whose driver runs in a server process of its own.

    ::

        with prefault.device.map(MyDevice(...), populate=True) as area:
            array = area.ndarray("float32")

    The first area of a device object starts its server, and a warden that watches it; further areas of the same object
    share them, and the last to be closed ends them.

    Args:
        device: the driver. With a :meth:`Device.recipe` the server makes it anew in a fresh process; without, the server is
            a fork of this process as it is now.
        length: bytes; None: to the end of the device.
        offset: where in the device to start: a multiple of its page size.
        populate: False: pages come when they are touched. True, "read" or "write": all of them come now, in few calls.
            True is for what the area is mapped for.
        access: "read" or "write"; None: what the device allows.
        track_dirty: have :meth:`Area.dirty_pages` work. It costs page-table memory, 1/512 of the length, or a fault a page.
        colocate: pin this thread and the server to one CPU, until the area is closed: the shortest way to answer a fault,
            at the price that they never run at the same time.

    Raises:
        DeviceError: no userfaultfd is to be had, or the server cannot be started; the message says what to change.
        PopulateError: as :func:`prefault.populate`, for ``populate``. Nothing stays mapped.
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
    check_device_facts(device)  # before anything is started
    _extent(type(device).__name__, device.length, device.page_size, length, offset)
    _access(type(device).__name__, device.writable, access)
    link = _private_link(device)
    return _map(link, length, offset, populate, access, track_dirty, colocate)


def connect(path: str | os.PathLike[str], *, timeout: float = 5.0) -> DeviceClient:
    """Connect to a device that another process serves: ``prefault device serve``, or :func:`prefault.device.serve`.

    Args:
        path: of the server's socket.
        timeout: how long to wait for the server to take the connection, in seconds.

    Raises:
        DeviceError: there is no server, or no userfaultfd is to be had.
        DeviceGoneError: the server does not take us, and says why (it serves another user, say), or it ends just now.
        PermissionError: the server runs as another user (not root): its memory is not to be trusted.
    """
    return DeviceClient(path, timeout)


class DeviceClient:
    """A device in another process; made by :func:`prefault.device.connect`. A context manager.

    Attributes:
        path: of the socket.
        name, length, page_size, writable, notes: of the device.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float) -> None:
        """Not for users: see :func:`connect`."""
        if not timeout > 0:
            raise ValueError(f"a timeout is a positive number of seconds, not {timeout}")
        self.path = os.path.abspath(os.fsdecode(path))
        self._timeout = timeout
        self._tracking: DeviceConnection | None = None
        self._lock = threading.RLock()
        self._link = self._connected(tracking=False)
        self._ends = weakref.finalize(self, _release_all, [self._link])
        self._ends.atexit = False
        facts = self._link.facts
        self.name, self.length, self.page_size = facts.name, facts.length, facts.page_size
        self.writable, self.notes = facts.writable, facts.notes

    def _connected(self, *, tracking: bool) -> DeviceConnection:
        try:
            with limit_messages.explained(f"the device at {self.path} cannot be connected to"):
                connection = _connection(self.path, self._timeout)
                try:
                    opened = open_userfaultfd(tracking=tracking)
                except BaseException:
                    connection.close()
                    raise
                link = DeviceConnection(connection, opened)
        except DeviceGoneError as gone:  # it does not take us, and says why, or ends just now
            raise DeviceGoneError(gone.errno or 0, f"no device at {self.path}: {gone.strerror}") from gone
        link.hold()
        return link

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
        """Map a part of it: as :func:`prefault.device.map`."""
        if self.closed:
            raise ValueError("the connection to the device is closed")
        link = self._link
        link.check()
        if track_dirty and not link.facts.evicts:
            # Such a device needs no write-protection of its own, so that the kernel can note writes alone: by a userfaultfd
            # that was opened for that.
            with self._lock:
                if self._tracking is None:
                    self._tracking = self._connected(tracking=True)
                    self._ends.detach()
                    self._ends = weakref.finalize(self, _release_all, [self._link, self._tracking])
                    self._ends.atexit = False
                link = self._tracking
        if not link.hold():
            link.check()
        return _map(link, length, offset, populate, access, track_dirty, colocate)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._ends.alive

    def close(self) -> None:
        """End the connection. A second call does nothing.

        Raises:
            BufferError: an area is still open. Close that first.
        """
        if self.closed:
            return
        own = [link for link in (self._link, self._tracking) if link is not None and link.usable]
        areas = sum(link.holders - 1 for link in own)
        if areas:
            raise BufferError(f"{areas} area{' is' if areas == 1 else 's are'} still open: close them first")
        self._ends()

    def __enter__(self) -> DeviceClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except BufferError:
            if kind is None:
                raise

    def __repr__(self) -> str:
        state = "connected" if not self.closed and self._link.usable else "not connected"
        return f"<DeviceClient of {self.name}, {format_size(self.length)}, at {self.path}, {state}>"


def _release_all(links: list[DeviceConnection]) -> None:
    for link in links:
        link.release()


# --- links


def _private_link(device: Device) -> DeviceConnection:
    """A link to the server of this device object, held; started if there is none."""
    from prefault.device.process.launching import launch

    with _starting:
        link = _running.get(id(device))
        if link is not None and link.device is device and link.hold():
            return link
        with limit_messages.explained(f"{type(device).__name__} cannot be mapped"):
            # First, as it is refused more often than all that follows. Where the driver never takes pages back, the kernel
            # needs no help in tracking writes.
            opened = open_userfaultfd(tracking=device.writable and not device.evicts)
            try:
                launched = launch(device)
            except BaseException:
                os.close(opened.fd)
                raise
            link = DeviceConnection(launched.connection, opened, launched, device)
        link.hold()
        _running[id(device)] = link
        return link


def _connection(path: str, timeout: float) -> socket.socket:
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
    link: DeviceConnection,
    length: Size | None,
    offset: Size,
    populate: PopulateChoice,
    access: Access | None,
    track_dirty: bool,
    colocate: bool,
) -> Area:
    """An area of a link that is held for it."""
    memory: AreaPageProvider | None = None
    at_end: Callable[[], None] = link.release
    try:
        facts = link.facts
        if populate not in (False, True, "read", "write"):
            raise ValueError(f"populate is False, True, 'read' or 'write', not {populate!r}")
        start, count = _extent(facts.name, facts.length, facts.page_size, length, offset)
        chosen = _access(facts.name, facts.writable, access)
        if populate == "write" and chosen == "read":
            raise ValueError("an area that is mapped for reading cannot be populated writable")
        if track_dirty and chosen == "read":
            raise ValueError("an area that is mapped for reading has no dirty pages to track")
        cpu = None
        if colocate:
            cpu, undo = _pin_thread()

            def at_end() -> None:
                undo()
                link.release()

        memory = AreaPageProvider(link, start, chosen, track_dirty=track_dirty, at_end=at_end)
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
    """The first byte and the number of bytes, checked."""
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
"""The CPUs of a thread before it was pinned, and for how many areas it is."""


def _pin_thread() -> tuple[int, Callable[[], None]]:
    """Pin the calling thread to the CPU that it runs on; which, and how to undo that."""
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
            if count > 1:  # for another area, in whatever order they are closed
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
    mapped_area.leave()


fork_hooks.register(in_child=_after_fork)
atexit.register(_at_exit)
