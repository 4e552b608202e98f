"""A client process's side of a device: one connection, one userfaultfd and one lifeline, shared by all of its areas."""

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
from typing import Any, NamedTuple, Protocol

from prefault._kernel.userfaultfd import UffdFeature
from prefault._system import fork_hooks
from prefault.device import limit_messages, protocol
from prefault.device.client.channel import Channel, Exchange
from prefault.device.client.fault_descriptor import OpenedUserfaultfd
from prefault.errors import DeviceError, DeviceGoneError

_GREET_S = 60.0
"""How long the first answer may take: a driver that works in the server's own thread may be busy with another client."""

_REAP_S = 5.0
"""How long the end of a private server is waited for."""


class Process(Protocol):
    """The handle of a private server's warden, which is a child of this process."""

    def reap(self, timeout: float) -> Any:
        """Wait for its end."""


class Facts(NamedTuple):
    """What the server says of its device: see :class:`~prefault.device.protocol.Welcome`."""

    name: str
    length: int
    page_size: int
    writable: bool
    populates: bool
    evicts: bool
    huge: bool
    notes: tuple[str, ...]


class DeviceConnection(Channel):
    """What the areas of one device share.

    No thread of this process is needed for a page fault to be answered: the server does that through the userfaultfd.
    """

    def __init__(
        self,
        connection: socket.socket,
        userfaultfd: OpenedUserfaultfd,
        process: Process | None = None,
        device: object = None,
    ) -> None:
        """Takes over the connection and the userfaultfd, and closes them if it fails.

        ``device``: the object that a private server was started for, kept so that its id stays its own.
        """
        super().__init__(connection)
        self.userfaultfd = userfaultfd
        self.device = device
        self._process = process
        self._holders = 0
        self._lock = threading.RLock()
        self.frames = -1
        self._lifeline = -1
        self._lifeline_write = -1
        _links.add(self)
        try:
            self.facts = self._greet()
        except BaseException:
            self.close()
            raise

    # --- the start

    def _greet(self) -> Facts:
        self._lifeline, self._lifeline_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        exchange = Exchange(protocol.Hello(self.next_id(), protocol.VERSION))
        self._exchanges[exchange.request.id] = exchange
        self._send(exchange.request)
        try:
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
        return Facts(
            welcome.name, welcome.length, welcome.page_size, welcome.writable, welcome.populates, welcome.evicts,
            welcome.huge, welcome.notes,
        )  # fmt: skip

    def _tie_lifeline(self) -> None:
        os.close(self._lifeline_write)
        self._lifeline_write = -1
        # Once all processes that could still answer our faults are gone, the other end closes, and the kernel ends this
        # process: a thread that waits for a page would wait for ever. The signal is that of memory that cannot be had.
        fcntl.fcntl(self._lifeline, fcntl.F_SETOWN, self._pid)
        fcntl.fcntl(self._lifeline, fcntl.F_SETSIG, signal.SIGBUS)
        fcntl.fcntl(self._lifeline, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        if poll.poll(0):  # closed before anybody listened
            raise DeviceGoneError(errno.ECONNRESET, "the device's server and its warden are gone")

    @property
    def answered_for(self) -> bool:
        """Whether the connection is lost, and somebody may still act upon the memory of areas: the lifeline is held."""
        if not self._silent or self._lifeline < 0:
            return False
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        return not poll.poll(0)

    @property
    def tracks_by_itself(self) -> bool:
        """Whether the kernel notes writes to tracked areas of this link, without a fault (WP_ASYNC)."""
        return bool(self.userfaultfd.features & UffdFeature.WP_ASYNC)

    def _descriptors_of(self, request: protocol.Request) -> list[int]:
        if isinstance(request, protocol.Hello):
            return [self.userfaultfd.fd, self._lifeline_write, self._lifeline]
        return []

    def _take_descriptor(self, reply: protocol.Reply, fd: int) -> None:
        if isinstance(reply, protocol.Welcome) and self.frames < 0:
            self.frames = fd
        else:
            os.close(fd)

    # --- the end

    def hold(self) -> bool:
        """One more area or client object that needs the link; False if it is too late."""
        with self._lock:
            if not self.usable:
                return False
            self._holders += 1
            return True

    def release(self) -> None:
        """One less; the last closes it."""
        with self._lock:
            self._holders -= 1
            last = self._holders <= 0
        if last:
            self.close()

    @property
    def holders(self) -> int:
        """How many hold it."""
        return self._holders

    def close(self) -> None:
        """Close in an orderly way: the server then does not take us for dead, nor the other way round."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _links.discard(self)
        if os.getpid() == self._pid:
            if self._lifeline >= 0:
                # The server has a duplicate, which would keep the signal alive after our own descriptor is closed.
                fcntl.fcntl(self._lifeline, fcntl.F_SETFL, os.O_NONBLOCK)
            # For all who have the socket: a process that was forked without Python's knowing would keep it open.
            with contextlib.suppress(OSError):  # the other side has ended it
                self.connection.shutdown(socket.SHUT_RDWR)
            self._close_descriptors()
            if self._process is not None:
                self._process.reap(_REAP_S)
        self.device = None

    def __del__(self) -> None:
        # Whoever held it was stopped by Ctrl-C, perhaps. Left alone, the lifeline would end us with the server.
        if not getattr(self, "_closed", True):
            self._process = None  # nobody waits in a finalizer
            self.close()

    def leave(self) -> None:
        """This process ends, with memory mapped: let the kernel close everything, after the last touch."""
        self._closed = True
        self.connection.detach()  # the descriptor stays: closed before, it would be said to have been forgotten

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
        """In the child: nothing of the connection is ours; what waits for the parent's threads is forgotten."""
        self._forget_threads()
        self._lock = threading.RLock()
        self._process = None
        self._close_descriptors()


_links = fork_hooks.instances(DeviceConnection.after_fork)
