"""Requests of any number of threads, and their replies, on one connection."""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prefault.device import protocol
from prefault.errors import DeviceGoneError
from prefault.sockets.messages import ProtocolError

_R = TypeVar("_R", bound=protocol.Reply)

_DESCRIPTORS_ROOM = socket.CMSG_SPACE(protocol.MAX_DESCRIPTORS * array.array("i").itemsize)


class Exchange:
    """A request, and what has come in answer."""

    __slots__ = ("at_end", "pages", "reply", "request", "runs")

    def __init__(self, request: protocol.Request, at_end: Callable[[], None] | None = None) -> None:
        self.request = request
        self.reply: protocol.Reply | None = None
        self.pages = 0
        """Of the last Progress."""
        self.runs: list[protocol.Run] = []
        """Of a list that comes in parts."""
        self.at_end = at_end
        """Called in whichever thread reads the reply, once."""


class Channel:
    """A connection on which any number of threads have requests under way.

    Whoever waits for an answer, and finds nobody reading, reads for all. All waiting ends with the other side: either it
    says that it is gone, or the socket ends, or (see :class:`~prefault.device.client.Link`) a signal ends this process.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._pid = os.getpid()
        self.connection = connection
        self._numbers = itertools.count(1)
        self._exchanges: dict[int, Exchange] = {}
        self._packets: deque[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = deque()
        self._abandoned: set[int] = set()
        """Maps whose answers nobody waits for: there is no such area, whoever says otherwise."""
        self._inside: set[int] = set()
        """Threads in the middle of waiting."""
        self._turn = threading.Condition(threading.Lock())
        self._reader: int | None = None
        self._why: str | None = None
        """Why nothing can be asked any more. A warden may still take notice of areas that go."""
        self._silent = False
        """The other side says nothing more."""
        self._closed = False
        connection.setblocking(False)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def _descriptors_of(self, request: protocol.Request) -> list[int]:  # noqa: ARG002
        """What is sent along with a request."""
        return []

    def _take_descriptor(self, reply: protocol.Reply, fd: int) -> None:  # noqa: ARG002
        """One that came with a reply."""
        os.close(fd)

    # --- requests

    @property
    def usable(self) -> bool:
        """Whether anything can still be asked."""
        return self._why is None and not self._closed and os.getpid() == self._pid

    def check(self) -> None:
        """DeviceGoneError if nothing can be asked."""
        if os.getpid() != self._pid:
            raise DeviceGoneError(
                errno.ENOTCONN,
                f"the area was mapped by process {self._pid}, of which this one is a fork: map the device again here",
            )
        if self._why is not None:
            raise DeviceGoneError(errno.ENOTCONN, self._why)
        if self._closed:
            raise DeviceGoneError(errno.ENOTCONN, "the connection to the device is closed")

    def is_inside(self) -> bool:
        """Whether this very thread is in the middle of a request: we are a signal handler or a finalizer."""
        return threading.get_ident() in self._inside

    def _check_inside(self) -> None:
        if self.is_inside():
            raise RuntimeError(
                "a signal handler or a finalizer cannot ask the device now: the thread that it interrupted waits for an"
                " answer"
            )

    def next_id(self) -> int:
        """The id of another request."""
        return next(self._numbers)

    def ask(self, request: protocol.Request, kind: type[_R]) -> _R:
        """Send a request; its answer.

        Raises:
            DeviceGoneError: there will be no answer.
            DeviceError, ValueError: the answer is an error.
            RuntimeError: this very thread waits for an answer already.
        """
        with self.asking(request) as exchange:
            self.wait(exchange)
        return self._expect(exchange, kind)

    def ask_runs(self, request: protocol.DirtyPages | protocol.AskLog) -> list[protocol.Run]:
        """Send a request that is answered by a list; errors as of :meth:`ask`."""
        with self.asking(request) as exchange:
            self.wait(exchange)
        self._expect(exchange, protocol.Runs)
        return exchange.runs

    @contextmanager
    def asking(self, request: protocol.Request) -> Iterator[Exchange]:
        """A request under way inside the block; its answer is for :meth:`wait`. Left early, nobody waits for the answer."""
        self.check()
        self._check_inside()
        exchange = Exchange(request)
        self._exchanges[request.id] = exchange
        try:
            self._send(request)
            yield exchange
        finally:
            self._exchanges.pop(request.id, None)
            if isinstance(request, protocol.Map) and exchange.reply is None:
                self._abandoned.add(request.id)

    def cancel(self, exchange: Exchange, limit_s: float) -> None:
        """Stop a populate that is under way, and wait for its last answer, if it comes soon."""
        with contextlib.suppress(DeviceGoneError, TimeoutError):
            self._send(protocol.Cancel(exchange.request.id))
            self.wait(exchange, time.monotonic() + limit_s)

    def part(self, number: int, at_end: Callable[[], None], deadline: float | None = None) -> None:
        """Unmap an area: when the server has let go of it, ``at_end`` unmaps the memory.

        Not before: it might still map a page there, by which time other memory could lie at the address. From a finalizer in
        the middle of a request it is only sent, and whoever reads the answer does the rest.
        """
        exchange = Exchange(protocol.Unmap(self.next_id(), number), at_end)
        if self._silent or self._closed:
            self._finish(exchange)  # whoever answers our faults finds out by ENOENT
            return
        self._exchanges[exchange.request.id] = exchange
        self._send(exchange.request)
        if self.is_inside():
            return
        try:
            self.wait(exchange, deadline)
        except DeviceGoneError:
            self._finish(exchange)

    def wait(self, exchange: Exchange, deadline: float | None = None, progress: Callable[[int], None] | None = None) -> None:
        """Until the reply of an exchange is there, calling ``progress`` with the pages that are done.

        Raises:
            DeviceGoneError: there will be none.
            TimeoutError: not before the deadline (time.monotonic).
            RuntimeError: this very thread waits for an answer already.
        """
        self._check_inside()
        seen = 0
        while True:
            self._read_until(exchange, seen, deadline)
            if exchange.reply is not None:
                return
            seen = exchange.pages
            if progress is not None:
                progress(seen)

    def _read_until(self, exchange: Exchange, seen: int, deadline: float | None) -> None:
        """Until there is a reply, or progress beyond ``seen`` pages."""
        me = threading.get_ident()
        try:
            self._inside.add(me)  # inside of `try`: Ctrl-C may strike after any call
            while exchange.reply is None and exchange.pages <= seen:
                with self._turn:
                    if exchange.reply is not None or exchange.pages > seen:
                        return
                    if self._silent or (self._why is not None and not isinstance(exchange.request, protocol.Unmap)):
                        raise DeviceGoneError(errno.ECONNRESET, self._why or "the device's server is gone")
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError("the device's server did not answer in time")
                    if self._reader is not None and self._reader != me:
                        self._turn.wait(left)
                        continue
                    self._reader = me
                self._read(left)
                with self._turn:
                    self._reader = None
                    self._turn.notify_all()
        finally:
            if self._reader == me:
                self._reader = None
                with self._turn:
                    self._turn.notify_all()
            self._inside.discard(me)

    def _expect(self, exchange: Exchange, kind: type[_R]) -> _R:
        reply = exchange.reply
        if isinstance(reply, kind):
            return reply
        if isinstance(reply, protocol.Refused):
            raise refusal(reply)
        self._lost(f"the device's server answered a {type(exchange.request).__name__} with a {type(reply).__name__}")
        raise DeviceGoneError(errno.EPROTO, self._why or "")

    # --- the socket

    def _send(self, request: protocol.Request) -> None:
        data = protocol.encode(request)
        descriptors = array.array("i", self._descriptors_of(request))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
        while True:
            try:
                self.connection.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                room = select.poll()
                room.register(self.connection, select.POLLOUT)
                room.poll(1000)
            except OSError as error:
                # The end of the socket is found by reading, which may tell a reason first.
                if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
                    raise
                return

    def _read(self, timeout_s: float | None) -> None:
        """Wait for a message, and give it to whom it belongs. Only the reader calls this."""
        if not self._packets:
            if not self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000):
                return None
            try:
                # In one step of the interpreter: Ctrl-C between receiving and keeping would lose another thread's answer.
                self._packets.extend(
                    map(self.connection.recvmsg, (protocol.MAX_MESSAGE,), (_DESCRIPTORS_ROOM,), (socket.MSG_CMSG_CLOEXEC,))
                )
            except BlockingIOError:
                return None
            except OSError as error:
                return self._lost(f"the device's server is gone: {error.strerror}")
        data, ancillary, _, _ = self._packets[0]
        if not data:
            self._packets.popleft()
            return self._lost("the device's server and its warden are gone")
        try:
            reply = protocol.decode_reply(data)
        except ProtocolError as error:
            self._packets.popleft()
            return self._lost(f"what the device's server says is no answer: {error}")
        self._keep_descriptors(reply, ancillary)
        self._packets.popleft()
        self._dispatch(reply)
        return None

    def _keep_descriptors(self, reply: protocol.Reply, ancillary: list[tuple[int, int, bytes]]) -> None:
        received = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
        ancillary.clear()
        for fd in received:
            self._take_descriptor(reply, fd)

    def _dispatch(self, reply: protocol.Reply) -> None:
        if isinstance(reply, protocol.Restarted):
            self._ask_again(list(self._exchanges.values()))
            return
        if isinstance(reply, protocol.Gone):
            self._why = f"the device's server is gone: {reply.reason}"
            # Its warden answers no more than that.
            self._ask_again([left for left in self._exchanges.values() if isinstance(left.request, protocol.Unmap)])
            return
        if isinstance(reply, protocol.Refused) and (not reply.id or reply.kind == "protocol"):
            self._lost(f"the device's server ended the connection: {reply.message}")
        exchange = self._exchanges.get(reply.id)
        if exchange is None:
            if isinstance(reply, protocol.Mapped) and reply.id in self._abandoned:  # Ctrl-C came in between
                self._send(protocol.Unmap(self.next_id(), reply.area))
        elif isinstance(reply, protocol.Progress):
            exchange.pages = reply.pages
        elif isinstance(reply, protocol.Runs):
            exchange.runs += reply.runs
            if not reply.more:
                exchange.reply = reply
        else:
            self._finish(exchange)  # first: who waits for the reply relies on it
            exchange.reply = reply
        if exchange is not None and exchange.reply is not None:
            self._exchanges.pop(reply.id, None)

    def _ask_again(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            exchange.runs.clear()
            self._send(exchange.request)

    @staticmethod
    def _finish(exchange: Exchange) -> None:
        at_end, exchange.at_end = exchange.at_end, None
        if at_end is not None:
            at_end()

    def _lost(self, reason: str) -> None:
        """No more requests. Faults go on being answered: that needs no connection."""
        if self._why is None:
            self._why = reason
        self._silent = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        for exchange in list(self._exchanges.values()):
            self._finish(exchange)

    # --- fork

    def _forget_threads(self) -> None:
        """In a child of fork: nothing that is under way is ours."""
        self._turn = threading.Condition(threading.Lock())
        self._inside.clear()
        self._exchanges.clear()
        self._packets.clear()
        self._reader = None


def refusal(reply: protocol.Refused) -> Exception:
    """The exception that a Refused tells of."""
    kind = protocol.REFUSALS[reply.kind]
    return kind(reply.number, reply.message) if issubclass(kind, OSError) else kind(reply.message)
