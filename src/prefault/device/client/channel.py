"""Requests of any number of threads, and their replies, on one connection of a client."""

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
from prefault.ipc.transport import ProtocolError, ancillary_room, descriptors_in

_R = TypeVar("_R", bound=protocol.Reply)

_ABANDON_S = 5.0
"""Seconds to wait for the reply of a Map that Ctrl-C interrupted: a call of the driver's open() ends first."""

_RECHECK_S = 1.0
"""Seconds after which a thread checks whether the thread that reads is still there."""

_DESCRIPTORS_ROOM = ancillary_room(protocol.MAX_DESCRIPTORS)


class Exchange:
    """A request, and the replies so far."""

    __slots__ = ("at_end", "pages", "reply", "request", "runs", "sent")

    def __init__(self, request: protocol.Request, at_end: Callable[[], None] | None = None) -> None:
        self.request = request
        self.reply: protocol.Reply | None = None
        self.pages = 0
        """Pages that are done, by the last Progress."""
        self.runs: list[protocol.Run] = []
        """The list so far, of a reply in several messages."""
        self.sent: list[int] = []
        """The bytes of each send: empty until the request is sent."""
        self.at_end = at_end
        """Called by the thread that reads the reply, once; or again, if Ctrl-C interrupts the call."""


class Channel:
    """A connection on which any number of threads have requests under way.

    A thread that waits for a reply, and finds no other thread reading, reads for all. All waits end with the other side: it
    sends that it is gone, or the socket ends, or a signal ends this process (see
    :class:`~prefault.device.client.connection.DeviceConnection`).
    """

    def __init__(self, connection: socket.socket) -> None:
        self._pid = os.getpid()
        self.connection = connection
        self._numbers = itertools.count(1)
        self._exchanges: dict[int, Exchange] = {}
        self._packets: deque[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = deque()
        self._abandoned: dict[int, Callable[[], None]] = {}
        """Functions that unmap the memory of abandoned Maps, once the server has no such area; by id."""
        self._pending_unmaps: deque[protocol.Request] = deque()
        """Unmaps to be sent: a finalizer may interrupt a request, and Ctrl-C the send."""
        self._inside: set[int] = set()
        """Threads that are waiting for a reply."""
        # Plain locks, and no Condition: Ctrl-C that strikes in the methods of one, which are Python, leaves it locked.
        self._reader_lock = threading.Lock()
        self._wakeups: dict[int, threading.Lock] = {}
        """A lock for each thread that waits while another reads; released when its reply may be there."""
        self._reader: int | None = None
        self._end_reason: str | None = None
        """The reason why requests end with an error; None while there is a server. A warden still accepts Unmap."""
        self._disconnected = False
        """Whether the socket has ended: no message comes any more."""
        self._descriptors_lost = False
        """Whether descriptors were sent for which this process had no room."""
        self._closed = False
        connection.setblocking(False)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def _descriptors_of(self, request: protocol.Request) -> list[int]:  # noqa: ARG002
        """Return the descriptors that are sent with a request."""
        return []

    def _take_descriptor(self, reply: protocol.Reply, fd: int) -> None:  # noqa: ARG002
        """Take over a descriptor that came with a reply."""
        os.close(fd)

    # --- requests

    @property
    def usable(self) -> bool:
        """True if requests can be sent."""
        return self._end_reason is None and not self._closed and os.getpid() == self._pid

    def check(self) -> None:
        """Raise DeviceGoneError unless requests can be sent."""
        if os.getpid() != self._pid:
            raise DeviceGoneError(
                errno.ENOTCONN,
                f"the area was mapped by process {self._pid}, of which this one is a fork: map the device again here",
            )
        if self._end_reason is not None:
            raise DeviceGoneError(errno.ENOTCONN, self._end_reason)
        if self._closed:
            raise DeviceGoneError(errno.ENOTCONN, "the connection to the device is closed")

    def is_inside(self) -> bool:
        """Return whether a signal handler or a finalizer calls, which interrupts a request of this thread."""
        return threading.get_ident() in self._inside

    def _check_inside(self) -> None:
        if self.is_inside():
            raise RuntimeError(
                "a signal handler or a finalizer cannot ask the device now: the thread that it interrupted waits for an"
                " answer"
            )

    def next_id(self) -> int:
        """Return the id of the next request."""
        return next(self._numbers)

    def ask(self, request: protocol.Request, kind: type[_R]) -> _R:
        """Send a request and return its reply.

        Raises:
            DeviceGoneError: there will be no reply.
            DeviceError, ValueError: the server refuses.
            RuntimeError: this thread is waiting for a reply already.
        """
        with self.asking(request) as exchange:
            self.wait(exchange)
        return self._expect(exchange, kind)

    def ask_runs(self, request: protocol.DirtyPages | protocol.AskLog) -> list[protocol.Run]:
        """Send a request whose reply is a list and return the list; errors are those of :meth:`ask`."""
        with self.asking(request) as exchange:
            self.wait(exchange)
        self._expect(exchange, protocol.Runs)
        return exchange.runs

    @contextmanager
    def asking(self, request: protocol.Request) -> Iterator[Exchange]:
        """Send a request and yield its exchange, for :meth:`wait`; leaving the block early drops the reply."""
        self.check()
        self._check_inside()
        exchange = Exchange(request)
        self._exchanges[request.id] = exchange
        try:
            self._send(request)
            yield exchange
        finally:
            self._exchanges.pop(request.id, None)

    def open(self, opening: Exchange) -> protocol.Mapped:
        """Send a Map and return its reply; after an error or an interruption, :meth:`abandon` undoes what was done."""
        self.check()
        self._check_inside()
        self._exchanges[opening.request.id] = opening
        self._send(opening.request, opening.sent)
        self.wait(opening)
        return self._expect(opening, protocol.Mapped)

    def abandon(self, opening: Exchange, at_end: Callable[[], None], deadline: float | None = None) -> None:
        """End an area as :meth:`unmap_area` does, whether or not its Map has a reply.

        The memory stays mapped until the reply comes: else another area could be mapped at the same address, and undoing
        the first would unmap it.
        """
        alive = not self._disconnected and not self._closed
        if not opening.sent:
            self._exchanges.pop(opening.request.id, None)
            return at_end()
        if opening.reply is None and opening.request.id in self._exchanges and alive:
            if self.is_inside():
                return self._abandon_unanswered(opening, at_end)
            limit = time.monotonic() + _ABANDON_S
            try:
                self.wait(opening, limit if deadline is None else min(limit, deadline))
            except DeviceGoneError:
                pass
            except TimeoutError:
                return self._abandon_unanswered(opening, at_end)
            except BaseException:  # Ctrl-C once more
                self._abandon_unanswered(opening, at_end)
                raise
        if isinstance(opening.reply, protocol.Mapped):
            return self.unmap_area(opening.reply.area, at_end, deadline)
        return at_end()

    def _abandon_unanswered(self, opening: Exchange, at_end: Callable[[], None]) -> None:
        self._abandoned[opening.request.id] = at_end
        if opening.reply is not None:  # by another thread, just now
            self._finish_abandoned(opening.reply)

    def _finish_abandoned(self, reply: protocol.Reply) -> None:
        """End the area of a Map that was abandoned before its reply came."""
        at_end = self._abandoned.pop(reply.id, None)
        if at_end is None:
            return
        if isinstance(reply, protocol.Mapped):
            self.unmap_area(reply.area, at_end)
        else:
            at_end()

    def cancel(self, exchange: Exchange, limit_s: float) -> None:
        """Stop a populate that is under way and wait for its last reply, ``limit_s`` seconds at most."""
        with contextlib.suppress(DeviceGoneError, TimeoutError):
            self._send(protocol.Cancel(exchange.request.id))
            self.wait(exchange, time.monotonic() + limit_s)

    def unmap_area(self, number: int, at_end: Callable[[], None], deadline: float | None = None) -> None:
        """Unmap an area: when the server has released it, ``at_end`` unmaps the memory.

        Not before: the server might still map a page there, by which time other memory could lie at the address. In a
        finalizer that interrupts a request, Unmap is only sent, and the thread that reads the reply calls ``at_end``.
        """
        exchange = Exchange(protocol.Unmap(self.next_id(), number), at_end)
        if self._disconnected or self._closed:
            self._finish(exchange)  # the process that resolves the faults gets ENOENT
            return
        self._exchanges[exchange.request.id] = exchange
        self._pending_unmaps.append(exchange.request)
        if self.is_inside():
            if self._try_to_send(exchange.request):
                self._pending_unmaps.remove(exchange.request)
            return
        self._send_pending_unmaps()
        try:
            self.wait(exchange, deadline)
        except DeviceGoneError:
            self._finish(exchange)

    def wait(self, exchange: Exchange, deadline: float | None = None, progress: Callable[[int], None] | None = None) -> None:
        """Wait until the reply of an exchange is there, calling ``progress`` with the pages that are done.

        Raises:
            DeviceGoneError: there will be no reply.
            TimeoutError: no reply by the deadline (time.monotonic).
            RuntimeError: this thread is waiting for a reply already.
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
        """Wait until there is a reply, or progress beyond ``seen`` pages."""
        me = threading.get_ident()
        wakeup = threading.Lock()
        try:
            self._inside.add(me)  # inside of `try`: Ctrl-C may strike after any call
            while exchange.reply is None and exchange.pages <= seen:
                if self._disconnected or (self._end_reason is not None and not isinstance(exchange.request, protocol.Unmap)):
                    raise DeviceGoneError(errno.ECONNRESET, self._end_reason or "the device's server is gone")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the device's server did not answer in time")
                wakeup.acquire(blocking=False)
                self._wakeups[me] = wakeup  # before the check: a later wake-up is not lost
                with self._reader_lock:
                    if self._reader is None:
                        self._reader = me
                if self._reader == me:
                    self._send_pending_unmaps()
                    self._read(left)
                    self._reader = None
                    self._wake_all()
                elif exchange.reply is None and exchange.pages <= seen:
                    # With a limit: Ctrl-C may strike before the last reader wakes the others.
                    wakeup.acquire(timeout=_RECHECK_S if left is None else min(left, _RECHECK_S))
        finally:
            if self._reader == me:
                self._reader = None
            self._inside.discard(me)
            self._wakeups.pop(me, None)
            self._wake_all()
            self._send_pending_unmaps()

    def _wake_all(self) -> None:
        """Wake all waiting threads, which check their replies."""
        for wakeup in list(self._wakeups.values()):
            with contextlib.suppress(RuntimeError):  # released already
                wakeup.release()

    def _expect(self, exchange: Exchange, kind: type[_R]) -> _R:
        reply = exchange.reply
        if isinstance(reply, kind):
            return reply
        if isinstance(reply, protocol.Refused):
            raise protocol.error_of(reply)
        self._disconnect(f"the device's server answered a {type(exchange.request).__name__} with a {type(reply).__name__}")
        raise DeviceGoneError(errno.EPROTO, self._end_reason or "")

    # --- the socket

    def _send_pending_unmaps(self) -> None:
        while self._pending_unmaps:
            with contextlib.suppress(IndexError, ValueError):  # another thread sends it; Unmap is idempotent
                request = self._pending_unmaps[0]
                self._send(request)
                self._pending_unmaps.remove(request)

    def _send(self, request: protocol.Request, sent: list[int] | None = None) -> None:
        while not self._try_to_send(request, sent):
            self._make_room()

    def _try_to_send(self, request: protocol.Request, sent: list[int] | None = None) -> bool:
        """Send a request; return False if the socket has no room. A socket that has ended counts as sent."""
        data = protocol.encode(request)
        descriptors = array.array("i", self._descriptors_of(request))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
        try:
            # In one step of the interpreter, as in _receive: Ctrl-C cannot strike between sending and recording that.
            (sent if sent is not None else []).extend(
                map(self.connection.sendmsg, ([data],), (ancillary,), (socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,))
            )
        except BlockingIOError:
            return False
        except OSError as error:
            # The end of the socket is found by reading, which may tell a reason first.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
                raise
        return True

    def _make_room(self) -> None:
        """Wait until there may be room for a request; read replies meanwhile, as a server with full queues reads nothing."""
        me = threading.get_ident()
        was_inside = me in self._inside
        became_reader = False
        try:
            self._inside.add(me)
            with self._reader_lock:
                if self._reader is None:
                    self._reader = me
                    became_reader = True
            reads = self._reader == me
            room = select.poll()
            room.register(self.connection, select.POLLOUT | (select.POLLIN if reads else 0))
            if reads and any(mask & select.POLLIN for _, mask in room.poll(1000)):
                with contextlib.suppress(OSError):  # the next read raises it again
                    self._receive()
            elif not reads:
                room.poll(1000)
        finally:
            if became_reader:
                self._reader = None
            if not was_inside:
                self._inside.discard(me)
            if became_reader:
                self._wake_all()

    def _receive(self) -> None:
        # In one step of the interpreter: Ctrl-C between receiving and keeping would lose another thread's answer.
        self._packets.extend(
            map(self.connection.recvmsg, (protocol.MAX_MESSAGE,), (_DESCRIPTORS_ROOM,), (socket.MSG_CMSG_CLOEXEC,))
        )

    def _read(self, timeout_s: float | None) -> None:
        """Wait for a message and dispatch it to its exchange. Only the reader calls this."""
        if not self._packets:
            if not self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000):
                return None
            try:
                self._receive()
            except BlockingIOError:
                return None
            except OSError as error:
                return self._disconnect(f"the device's server is gone: {error.strerror}")
        data, ancillary, flags, _ = self._packets[0]
        if not data:
            self._packets.popleft()
            return self._disconnect("the device's server and its warden are gone")
        try:
            reply = protocol.decode_reply(data)
        except ProtocolError as error:
            self._packets.popleft()
            return self._disconnect(f"the message of the device's server is no answer: {error}")
        self._descriptors_lost |= bool(flags & socket.MSG_CTRUNC)
        self._take_descriptors(reply, ancillary)
        self._dispatch(reply)
        self._packets.popleft()  # last: after Ctrl-C in between, the next reader dispatches it once more
        return None

    def _take_descriptors(self, reply: protocol.Reply, ancillary: list[tuple[int, int, bytes]]) -> None:
        received = descriptors_in(ancillary)
        ancillary.clear()
        for fd in received:
            self._take_descriptor(reply, fd)

    def _dispatch(self, reply: protocol.Reply) -> None:
        if isinstance(reply, protocol.Restarted):
            self._ask_again(list(self._exchanges.values()))
            return
        if isinstance(reply, protocol.Gone):
            self._end_reason = f"the device's server is gone: {reply.reason}"
            # The warden replies to Unmap only.
            self._ask_again([left for left in self._exchanges.values() if isinstance(left.request, protocol.Unmap)])
            return
        if isinstance(reply, protocol.Refused) and (not reply.id or reply.kind == "protocol"):
            self._disconnect(f"the device's server ended the connection: {reply.message}")
        exchange = self._exchanges.get(reply.id)
        if exchange is None:
            return  # abandoned
        if isinstance(reply, protocol.Progress):
            exchange.pages = reply.pages
        elif isinstance(reply, protocol.Runs):
            exchange.runs += reply.runs
            if not reply.more:
                exchange.reply = reply
        else:
            self._finish(exchange)  # first: the thread that waits for the reply relies on it
            exchange.reply = reply
        if exchange.reply is not None:
            self._exchanges.pop(reply.id, None)
            self._finish_abandoned(reply)

    def _ask_again(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            exchange.runs.clear()
            self._send(exchange.request)

    @staticmethod
    def _finish(exchange: Exchange) -> None:
        if exchange.at_end is not None:
            exchange.at_end()  # which may be called twice
            exchange.at_end = None

    def _disconnect(self, reason: str) -> None:
        """End the connection. Faults are still resolved, for which no connection is needed."""
        if self._end_reason is None:
            self._end_reason = reason
        self._disconnected = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        for exchange in list(self._exchanges.values()):
            self._finish(exchange)
        while self._abandoned:
            self._abandoned.popitem()[1]()

    # --- fork

    def _forget_threads(self) -> None:
        """Forget all exchanges in a forked child: they are those of the parent's threads."""
        self._reader_lock = threading.Lock()
        self._wakeups.clear()
        self._inside.clear()
        self._exchanges.clear()
        self._packets.clear()
        self._abandoned.clear()
        self._pending_unmaps.clear()
        self._reader = None
