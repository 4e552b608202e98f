"""The client process's end of a device: one connection, one userfaultfd and one lifeline, shared by all of its areas."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import threading
import time
from typing import Any, Protocol

from prefault._kernel.userfaultfd import UffdFeature
from prefault._system import fork_hooks
from prefault.device import limit_messages, protocol
from prefault.device.client.channel import Channel
from prefault.device.client.fault_descriptor import OpenedUserfaultfd
from prefault.errors import DeviceError, DeviceGoneError

_GREET_S = 60.0
"""Seconds for the first answer: a driver that works in the server's own thread may be busy with another client."""

_REAP_S = 5.0
"""Seconds to wait for the end of a private server."""


class Process(Protocol):
    """Handle of a private server's warden, which is a child of this process."""

    def reap(self, timeout: float) -> Any:
        """Wait for the end of the process, at most ``timeout`` seconds."""


class DeviceConnection(Channel):
    """Connection, userfaultfd and lifeline that the areas of one device share; counts its users and closes with the last.

    The server answers page faults through the userfaultfd, without any thread of this process.

    Attributes:
        device_info: the server's description of its device.
        frames: descriptor of the memory file that holds the device's frames.
        userfaultfd: the userfaultfd that areas are registered with.
        device: the object that a private server was started for; None on a connection to another process's device.
    """

    def __init__(
        self,
        connection: socket.socket,
        userfaultfd: OpenedUserfaultfd,
        process: Process | None = None,
        device: object = None,
        main: DeviceConnection | None = None,
    ) -> None:
        """Take over the connection and the userfaultfd, and close them on failure.

        ``device`` is referenced for as long as the connection is open, so that no other object gets its id. ``main``:
        another connection of this process to the same server, which carries the control requests, as the driver knows a
        client by its connection; it stays open as long as this one.
        """
        super().__init__(connection)
        self.userfaultfd = userfaultfd
        self.device = device
        self._process = process
        self._users = 0
        self._lock = threading.RLock()
        self.frames = -1
        self._lifeline = -1
        self._lifeline_write = -1
        self._main = main if main is not None and main.acquire() else None
        _connections.add(self)
        try:
            self.device_info = self._greet()
        except BaseException:
            self.close()
            raise

    # --- the start

    def _greet(self) -> protocol.Welcome:
        self._lifeline, self._lifeline_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        hello = protocol.Hello(self.next_id(), protocol.VERSION)
        try:
            with self.asking(hello, (self.userfaultfd.fd, self._lifeline_write, self._lifeline)) as exchange:
                self.wait(exchange, time.monotonic() + _GREET_S)
        except TimeoutError:
            raise DeviceGoneError(errno.ETIMEDOUT, f"the device's server did not answer within {_GREET_S:g} s") from None
        welcome = self._expect(exchange, protocol.Welcome)
        if self.frames < 0:
            if self._descriptors_lost:
                raise DeviceError(
                    errno.EMFILE, f"the frames of {welcome.name} cannot be mapped: {limit_messages.no_descriptor()}"
                )
            raise DeviceError(errno.EPROTO, f"the server of {welcome.name} sent no descriptor of its frames")
        self._tie_lifeline()
        return welcome

    def _tie_lifeline(self) -> None:
        os.close(self._lifeline_write)
        self._lifeline_write = -1
        # Once all processes that could still answer our faults are gone, the other end closes, and the kernel ends this
        # process: a thread that waits for a page would wait for ever. SIGBUS is the signal of memory that is unavailable.
        fcntl.fcntl(self._lifeline, fcntl.F_SETOWN, self._pid)
        fcntl.fcntl(self._lifeline, fcntl.F_SETSIG, signal.SIGBUS)
        fcntl.fcntl(self._lifeline, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        if self._lifeline_ended():  # before F_SETSIG took effect
            raise DeviceGoneError(errno.ECONNRESET, "the device's server and its warden are gone")

    @property
    def lost_but_served(self) -> bool:
        """True if the connection is lost while a server or warden, which still holds the lifeline, may act on areas."""
        return self._disconnected and self._lifeline >= 0 and not self._lifeline_ended()

    def _lifeline_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def kernel_tracks_writes(self) -> bool:
        """True if the kernel records writes to tracked areas of this connection without a fault (WP_ASYNC)."""
        return bool(self.userfaultfd.features & UffdFeature.WP_ASYNC)

    def _take_descriptor(self, reply: protocol.Reply, fd: int) -> None:
        if isinstance(reply, protocol.Welcome) and self.frames < 0:
            self.frames = fd
        else:
            os.close(fd)

    # --- control requests

    def control(self, request: bytes | bytearray | memoryview, timeout: float | None) -> bytes:
        """Implement :meth:`DeviceClient.control`."""
        if self._main is not None:
            return self._main.control(request, timeout)
        given: Any = request
        if not isinstance(given, bytes | bytearray | memoryview):
            raise TypeError(f"a control request is bytes, not {type(given).__name__}")
        content = bytes(given)
        if len(content) > protocol.MAX_CONTROL:
            raise ValueError(
                f"a control request has at most {protocol.MAX_CONTROL} bytes, not {len(content)}: write more into memory of"
                " the device, which both sides see"
            )
        if timeout is not None and not timeout > 0:
            raise ValueError(f"a timeout is a positive number of seconds, not {timeout}")
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.asking(protocol.Control(self.next_id(), content)) as exchange:
            try:
                self.wait(exchange, deadline)
            except TimeoutError:
                what = f"{self.device_info.name} did not answer a control request within {timeout:g} s"
                raise TimeoutError(errno.ETIMEDOUT, f"{what}: it may still carry it out") from None
            except DeviceGoneError as gone:
                if not exchange.sent:
                    raise
                message = f"{gone.strerror}; the control request may have been carried out"
                raise DeviceGoneError(gone.errno or errno.ECONNRESET, message) from None
        return self._expect(exchange, protocol.ControlReply).content

    # --- the end

    def acquire(self) -> bool:
        """Count one more user, an area or a client object; return False if the connection is closed or lost."""
        with self._lock:
            if not self.usable:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Count one user less; close the connection after the last."""
        with self._lock:
            self._users -= 1
            last = self._users <= 0
        if last:
            self.close()

    @property
    def users(self) -> int:
        """Number of areas and client objects that acquired the connection."""
        return self._users

    def close(self) -> None:
        """Close in an orderly way, so that neither the server nor this process takes the other for dead. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _connections.discard(self)
        if os.getpid() == self._pid:
            if self._lifeline >= 0:
                # The server has a duplicate, which would keep the signal alive after our own descriptor is closed.
                fcntl.fcntl(self._lifeline, fcntl.F_SETFL, os.O_NONBLOCK)
            # shutdown(2) acts on every copy of the socket: a process forked without Python's knowledge keeps one open.
            with contextlib.suppress(OSError):  # the server has ended it
                self.connection.shutdown(socket.SHUT_RDWR)
            self._close_descriptors()
            if self._process is not None:
                self._process.reap(_REAP_S)
            if self._main is not None:
                self._main.release()
        self.device = None

    def __del__(self) -> None:
        # Its user may have been stopped by Ctrl-C before release(). The lifeline would end this process with the server.
        if not getattr(self, "_closed", True):
            self._process = None  # a finalizer does not wait
            self.close()

    def detach(self) -> None:
        """Leave the descriptors to the kernel, which closes them at exit: mapped areas may be touched until then."""
        self._closed = True
        self.connection.detach()  # the descriptor stays open, without a ResourceWarning

    def _close_descriptors(self) -> None:
        self.connection.close()
        for name in ("_lifeline", "_lifeline_write", "frames"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)
        fd, self.userfaultfd = self.userfaultfd.fd, self.userfaultfd._replace(fd=-1)
        if fd >= 0:
            os.close(fd)

    def after_fork(self) -> None:
        """Forget the parent's threads and close the child's copies of the descriptors; called in a child of fork."""
        self._forget_threads()
        self._lock = threading.RLock()
        self._process = None
        self._close_descriptors()


_connections = fork_hooks.instances(DeviceConnection.after_fork)
