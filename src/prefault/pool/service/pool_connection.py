"""A client's connection to the server of a pool: requests one at a time, each with a deadline for its reply."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from typing import NoReturn, TypeVar

from prefault.errors import PoolGoneError
from prefault.ipc import transport
from prefault.ipc.connecting import check_server, connect_to_server
from prefault.ipc.transport import ProtocolError
from prefault.pool.service import pool_protocol

_READ = 1 << 16
_UNANSWERED_MOST = 64
"""The most requests without a reply at a time: more could fill the socket in both directions."""

_R = TypeVar("_R", pool_protocol.PoolWelcome, pool_protocol.Created, pool_protocol.PoolDone, pool_protocol.StatisticsReply)


class PoolConnection:
    """A connection to the server: one request at a time, each with a deadline for its reply."""

    def __init__(self, path: str | os.PathLike[str], timeout: float) -> None:
        self.path = os.fspath(path)
        self._timeout = timeout
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._received = bytearray()
        self._descriptors: list[int] = []
        self._postponed: dict[int, pool_protocol.Settle | pool_protocol.Close] = {}
        """The last unsent request on each member: from a finalizer during a request, or while the server is late."""
        self._requests = 0
        self._answered = 0
        """The id of the last reply: replies come in the order of requests."""
        self.late = False
        """True while a reply that did not come in time is still missing."""
        self._reading = False
        self._end_reason: str | None = None
        """The reason why the connection has ended; None while it is usable."""
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
        except BaseException:
            self.connection.close()
            raise

    def _connect(self) -> None:
        try:
            connect_to_server(self.connection, self.path, self._timeout, "pool")
        except TimeoutError as error:
            raise PoolGoneError(errno.ETIMEDOUT, str(error.strerror)) from None
        check_server(self.connection, self.path)

    @property
    def usable(self) -> bool:
        """True if this process can send requests."""
        return self._end_reason is None and os.getpid() == self._pid

    def greet(self, *, events: bool) -> pool_protocol.PoolWelcome:
        """Send Hello and return the facts of the pool; ``events`` subscribes to the high-water mark."""
        return self.call(pool_protocol.PoolHello(0, pool_protocol.VERSION, events), pool_protocol.PoolWelcome)[0]

    def call(self, request: pool_protocol.Request, kind: type[_R]) -> tuple[_R, int | None]:
        """Send a request; return its reply and the descriptor that came with it.

        Raises:
            PoolGoneError: there will be no reply.
            PoolFullError, MappingError, ValueError, OSError: the server refuses.
            RuntimeError: this thread is waiting for a reply already.
        """
        self._check_process()
        if self._is_calling():
            raise RuntimeError(
                "a signal handler or a finalizer cannot ask the pool now: the thread that it interrupted waits for an answer"
            )
        with self._lock:
            if self._end_reason is not None:
                raise PoolGoneError(errno.ENOTCONN, self._end_reason)
            deadline = time.monotonic() + self._timeout
            self._drain(deadline)
            number = self._send(request)
            while True:
                reply, fd = self._next_reply(deadline)
                if reply.id == number or (not reply.id and isinstance(reply, pool_protocol.PoolRefused)):
                    break
                self._drop_reply(reply, fd)
            self._send_postponed()
        if isinstance(reply, kind):
            return reply, fd
        if fd is not None:
            os.close(fd)
        if not isinstance(reply, pool_protocol.PoolRefused):
            self._fail(f"the pool's server at {self.path} answered a {type(request).__name__} with a {type(reply).__name__}")
        error = pool_protocol.error_of(reply)
        if not reply.id or reply.kind == "protocol":
            self._end(str(error))
        raise error

    def post(self, request: pool_protocol.Settle | pool_protocol.Close) -> None:
        """Send a request that is never refused; postpone it in a finalizer that interrupts a request of its thread.

        The reply of a server that is late is not waited for.

        Raises:
            PoolGoneError: there will be no reply.
        """
        self._check_process()
        if self._is_calling():
            self._postponed[request.member] = request
            return
        with self._lock:
            if self.late and self._end_reason is None:
                self._postponed[request.member] = request
                with contextlib.suppress(PoolGoneError):  # it is still late
                    self._drain(time.monotonic())
                return
        self.call(request, pool_protocol.PoolDone)

    def _is_calling(self) -> bool:
        """Return whether a signal handler or a finalizer calls, which interrupts a request of this thread."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def _check_process(self) -> None:
        # Before the lock: another thread may have held it at the time of the fork.
        if os.getpid() != self._pid:
            raise PoolGoneError(
                errno.ENOTCONN, f"the pool at {self.path} is connected to process {self._pid}, of which this one is a fork:"
                " connect again here",
            )  # fmt: skip

    def _send_postponed(self) -> None:
        while self._postponed and self._requests - self._answered < _UNANSWERED_MOST:
            self._send(self._postponed.popitem()[1])

    def _drain(self, deadline: float) -> None:
        """Send the postponed requests and receive the replies of all earlier ones; PoolGoneError if they do not come."""
        self._send_postponed()
        while self._answered < self._requests:
            self._drop_reply(*self._next_reply(deadline))
            self._send_postponed()
        self.late = False

    def _next_reply(self, deadline: float) -> tuple[pool_protocol.Reply, int | None]:
        """Return the next reply, received before the deadline, and the descriptor that came with it."""
        reply = self.receive(deadline)
        self._answered = max(self._answered, reply.id)
        descriptors, self._descriptors = self._descriptors, []
        fd = descriptors.pop(0) if descriptors and isinstance(reply, pool_protocol.Created) else None
        for unexpected in descriptors:
            os.close(unexpected)
        return reply, fd

    def _drop_reply(self, reply: pool_protocol.Reply, fd: int | None) -> None:
        """Drop the reply of a request whose sender no longer waits; undo what the request did."""
        if fd is not None:
            os.close(fd)
        if isinstance(reply, pool_protocol.Created):
            self._postponed[reply.member] = pool_protocol.Close(0, reply.member)
        if isinstance(reply, pool_protocol.PoolRefused) and (not reply.id or reply.kind == "protocol"):
            self._fail(str(pool_protocol.error_of(reply)))

    def _send(self, request: pool_protocol.Request) -> int:
        self._requests += 1
        data = pool_protocol.encode(pool_protocol.numbered(request, self._requests))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reason may be waiting to be received
            # Never partly: it is short, and few replies are outstanding.
            if self.connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(data):
                self._fail(f"the pool's server at {self.path} takes no requests")
        return self._requests

    def receive(self, deadline: float | None) -> pool_protocol.Reply:
        """Return the next message, received before the deadline."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            while (body := pool_protocol.take_message(self._received, pool_protocol.MAX_REPLY)) is None:
                if self._reading:
                    self._fail(f"an answer of the pool's server at {self.path} was interrupted half way")
                left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
                # Waiting apart from receiving: Ctrl-C while waiting loses nothing.
                if not poll.poll(left):
                    self.late = True
                    raise PoolGoneError(
                        errno.ETIMEDOUT, f"the pool's server at {self.path} did not answer within {self._timeout} s"
                    )
                self._reading = True
                data, descriptors = transport.receive(self.connection, _READ)
                self._received += data
                self._descriptors += descriptors
                self._reading = False
                if not data:
                    self._fail(f"the pool's server at {self.path} is gone")
            return pool_protocol.decode_reply(body)
        except ProtocolError as error:
            self._fail(f"the message of the server at {self.path} is no answer of a pool: {error}")
        except PoolGoneError:
            raise
        except OSError as error:
            self._fail(f"the pool's server at {self.path} is gone: {error.strerror}")

    def _fail(self, reason: str, number: int = errno.ECONNRESET) -> NoReturn:
        self._end(reason)
        raise PoolGoneError(number, reason)

    def _end(self, reason: str) -> None:
        self._end_reason = reason
        self.connection.close()
        descriptors, self._descriptors = self._descriptors, []
        for fd in descriptors:
            os.close(fd)

    def shut_down(self) -> None:
        """Shut the socket down, which ends :meth:`receive` in other threads."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; in the process that made it, for its forks as well."""
        if os.getpid() != self._pid:
            self.connection.close()
            return
        with self._lock:
            if self._end_reason is None:
                self.shut_down()
                self._end("the pool's client is closed")
