"""Requests of any number of threads, and their replies, on one connection of a client."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from prefault.device import protocol
from prefault.device.client.exchange import Exchange
from prefault.device.client.packets import PacketSocket
from prefault.errors import DeviceGoneError
from prefault.ipc.transport import ProtocolError, descriptors_in

_R = TypeVar("_R", bound=protocol.Reply)

_ABANDON_S = 5.0
"""Seconds to wait for the reply of a Map that Ctrl-C interrupted: a call of the driver's open() ends first."""

_RECHECK_S = 1.0
"""Seconds after which a waiting thread checks for signals, and whether the thread that reads is still there."""


class Channel:
    """A connection on which any number of threads have requests under way.

    One of the threads that wait for replies is the *reader*: it receives all messages, and wakes the thread that a message
    is for. When it has its own reply, it wakes the others, of which the first becomes the reader.

    All waits end with the other side: it sends that it is gone, or the socket ends, or a signal ends this process (see
    :class:`~prefault.device.client.connection.DeviceConnection`).
    """

    def __init__(self, connection: socket.socket) -> None:
        self._pid = os.getpid()
        self.connection = connection
        self._packets = PacketSocket(connection)
        self._numbers = itertools.count(1)
        self._exchanges: dict[int, Exchange] = {}
        """Exchanges that are sent and have no reply, by the id of the request."""
        self._outbox: deque[Exchange] = deque()
        """Exchanges that any thread may send, since their own may be interrupted: Unmaps, abandoned Maps, Cancels."""
        self._inside: set[int] = set()
        """Threads that are waiting for a reply."""
        self._reader_lock = threading.Lock()
        self._reader: int | None = None
        """The thread that receives; another takes its place when it has left :attr:`_inside`."""
        self._end_reason: str | None = None
        """The reason why requests end with an error; None while there is a server. A warden still accepts Unmap."""
        self._disconnected = False
        """True once the socket has ended: no message comes any more."""
        self._descriptors_lost = False
        """True once descriptors were sent for which this process had no room."""
        self._closed = False

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
        """Send a request and return its reply; the Runs of one in several messages are put together.

        Raises:
            DeviceGoneError: there will be no reply.
            DeviceError, ValueError: the server refuses.
            RuntimeError: this thread is waiting for a reply already.
        """
        with self.asking(request) as exchange:
            self.wait(exchange)
        return self._expect(exchange, kind)

    @contextmanager
    def asking(self, request: protocol.Request, descriptors: Sequence[int] = ()) -> Iterator[Exchange]:
        """Yield the exchange of a request, for :meth:`wait`; leaving the block early drops the reply."""
        self.check()
        try:
            yield Exchange(request, descriptors=descriptors)
        finally:
            self._exchanges.pop(request.id, None)

    def cancel(self, exchange: Exchange, limit_s: float) -> None:
        """Stop a populate that is under way and wait for its last reply, ``limit_s`` seconds at most."""
        if exchange.due:  # a new server has not heard of it
            return
        self._outbox.append(Exchange(protocol.Cancel(exchange.request.id)))
        with contextlib.suppress(DeviceGoneError, TimeoutError):
            self.wait(exchange, time.monotonic() + limit_s)

    def _expect(self, exchange: Exchange, kind: type[_R]) -> _R:
        reply = exchange.reply
        if isinstance(reply, kind):
            return reply
        if isinstance(reply, protocol.Refused):
            raise protocol.error_of(reply)
        self._disconnect(f"the device's server answered a {type(exchange.request).__name__} with a {type(reply).__name__}")
        raise DeviceGoneError(errno.EPROTO, self._end_reason or "")

    # --- areas

    def open(self, opening: Exchange) -> protocol.Mapped:
        """Send a Map and return its reply; after an error or an interruption, :meth:`abandon` undoes what was done."""
        self.check()
        self.wait(opening)
        return self._expect(opening, protocol.Mapped)

    def abandon(self, opening: Exchange, at_end: Callable[[], None], deadline: float | None = None) -> None:
        """End an area as :meth:`unmap_area` does, whether or not its Map has a reply.

        The memory stays mapped until the reply comes: else another area could be mapped at the same address, and undoing
        the first would unmap it.
        """
        if opening.sent and opening.reply is None and self._connected:
            limit = time.monotonic() + _ABANDON_S
            try:
                self.wait(opening, limit if deadline is None else min(limit, deadline))
            except DeviceGoneError:
                pass
            except (TimeoutError, RuntimeError):  # RuntimeError: inside of another request
                return self._leave_to_reader(opening, at_end)
            except BaseException:  # Ctrl-C once more
                self._leave_to_reader(opening, at_end)
                raise
        self._exchanges.pop(opening.request.id, None)
        if isinstance(opening.reply, protocol.Mapped):
            return self.unmap_area(opening.reply.area, at_end, deadline)
        return at_end()

    def _leave_to_reader(self, opening: Exchange, at_end: Callable[[], None]) -> None:
        """Have the thread that reads the reply of a Map end the area."""
        opening.at_end = at_end
        if opening.reply is not None:  # another thread has read it just now
            self._finish(opening)

    def unmap_area(self, number: int, at_end: Callable[[], None], deadline: float | None = None) -> None:
        """Unmap an area: when the server has released it, ``at_end`` unmaps the memory.

        Not before: the server might still map a page there, by which time other memory could lie at the address. In a
        finalizer that interrupts a request, Unmap is only sent, and the thread that reads the reply calls ``at_end``.
        """
        exchange = Exchange(protocol.Unmap(self.next_id(), number), at_end)
        if not self._connected:
            return exchange.finish()  # the process that resolves the faults gets ENOENT
        self._outbox.append(exchange)
        if self.is_inside():
            self._send_outbox()
            return None
        try:
            return self.wait(exchange, deadline)
        except DeviceGoneError:
            return exchange.finish()

    def _finish(self, exchange: Exchange) -> None:
        """Call the function that unmaps an area; if a Map was abandoned before its reply came, unmap its area first."""
        if isinstance(exchange.reply, protocol.Mapped) and exchange.at_end is not None:
            self.unmap_area(exchange.reply.area, exchange.at_end)
            exchange.at_end = None
        else:
            exchange.finish()

    # --- waiting

    def wait(self, exchange: Exchange, deadline: float | None = None, progress: Callable[[int], None] | None = None) -> None:
        """Send a request, if it is due, and wait for the reply, calling ``progress`` with the pages that are done.

        Raises:
            DeviceGoneError: there will be no reply.
            TimeoutError: no reply by the deadline (time.monotonic).
            RuntimeError: this thread is waiting for a reply already.
        """
        self._check_inside()
        seen = 0
        while True:
            self._wait_beyond(seen, exchange, deadline)
            if exchange.reply is not None:
                return
            seen = exchange.pages
            if progress is not None:
                progress(seen)

    def _wait_beyond(self, seen: int, exchange: Exchange, deadline: float | None) -> None:
        """Wait until there is a reply, or progress beyond ``seen`` pages."""
        me = threading.get_ident()
        try:
            self._inside.add(me)  # inside of `try`: Ctrl-C may strike after any call
            while exchange.reply is None and exchange.pages <= seen:
                if self._disconnected or (self._end_reason is not None and not isinstance(exchange.request, protocol.Unmap)):
                    raise DeviceGoneError(errno.ECONNRESET, self._end_reason or "the device's server is gone")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the device's server did not answer in time")
                self._step(exchange, left)
            while self._outbox:
                self._step(None, _RECHECK_S)
        finally:
            self._inside.discard(me)  # first: a reader that is not inside is none
            self._send_outbox()
            if self._reader == me:
                for other in list(self._exchanges.values()):
                    other.wake()

    def _step(self, exchange: Exchange | None, timeout_s: float | None) -> None:
        """Send what is due, then wait until a message comes or there is room to send more; dispatch the message."""
        me = threading.get_ident()
        sent = self._send_outbox() and (exchange is None or self._send_due(exchange))
        if sent and exchange is None:
            return
        with self._reader_lock:
            if self._reader not in self._inside:
                self._reader = me
        if exchange is not None and exchange.reply is not None:
            return  # the former reader dispatched it before it left: no further message may come
        # With a limit: Ctrl-C may strike just before the system call, which is not interrupted then, or before the last
        # reader wakes the others.
        recheck_s = _RECHECK_S if timeout_s is None else min(timeout_s, _RECHECK_S)
        if self._reader == me:
            self._read(recheck_s, select.POLLIN if sent else select.POLLIN | select.POLLOUT)
        elif not sent:
            self._packets.wait(select.POLLOUT, recheck_s)
        elif exchange is not None:
            exchange.wakeup.acquire(timeout=recheck_s)

    # --- messages

    @property
    def _connected(self) -> bool:
        return not self._disconnected and not self._closed

    def _send_due(self, exchange: Exchange) -> bool:
        """Send a request if it is due; return False if the socket has no room."""
        if not exchange.due:
            return True
        data = protocol.encode(exchange.request)
        if not isinstance(exchange.request, protocol.Cancel):  # which has the id of its Populate, and no reply
            self._exchanges[exchange.request.id] = exchange
        count = len(exchange.sent)
        try:
            exchange.due = False  # first: if a new server asks for it meanwhile, it is due again
            return self._packets.send(data, exchange.descriptors, exchange.sent)
        finally:
            if len(exchange.sent) == count:
                exchange.due = True

    def _send_outbox(self) -> bool:
        """Send the outbox; return False if the socket has no room."""
        while self._outbox:
            with contextlib.suppress(IndexError, ValueError):  # another thread sends it; these requests are idempotent
                exchange = self._outbox[0]
                if not self._send_due(exchange):
                    return False
                self._outbox.remove(exchange)
        return True

    def _read(self, timeout_s: float, events: int) -> None:
        """Wait for a message, or other ``events`` of poll(2), and dispatch the message. Only the reader calls this."""
        received = self._packets.received
        if not received:
            if not self._packets.wait(events, timeout_s) & ~select.POLLOUT:
                return None
            try:
                self._packets.receive()
            except BlockingIOError:
                return None
            except OSError as error:
                return self._disconnect(f"the device's server is gone: {error.strerror}")
        data, ancillary, flags, _ = received[0]
        if not data:
            received.popleft()
            return self._disconnect("the device's server and its warden are gone")
        try:
            reply = protocol.decode_reply(data)
        except ProtocolError as error:
            received.popleft()
            return self._disconnect(f"the message of the device's server is no answer: {error}")
        self._descriptors_lost |= bool(flags & socket.MSG_CTRUNC)
        descriptors = descriptors_in(ancillary)
        ancillary.clear()
        for fd in descriptors:
            self._take_descriptor(reply, fd)
        self._dispatch(reply)
        received.popleft()  # last: after Ctrl-C in between, the next reader dispatches it once more
        return None

    def _dispatch(self, reply: protocol.Reply) -> None:
        if isinstance(reply, protocol.Restarted):
            return self._ask_again(only_unmaps=False)
        if isinstance(reply, protocol.Gone):
            self._end_reason = f"the device's server is gone: {reply.reason}"
            return self._ask_again(only_unmaps=True)  # the warden replies to no other request
        if isinstance(reply, protocol.Refused) and (not reply.id or reply.kind == "protocol"):
            self._disconnect(f"the device's server ended the connection: {reply.message}")
        exchange = self._exchanges.get(reply.id)
        if exchange is None:
            return None  # its request was dropped
        if isinstance(reply, protocol.Progress):
            exchange.pages = reply.pages
        elif isinstance(reply, protocol.Runs) and reply.more:
            exchange.runs += reply.runs
        else:
            if isinstance(reply, protocol.Runs):
                reply = protocol.Runs(reply.id, (*exchange.runs, *reply.runs), False)
            if isinstance(exchange.request, protocol.Unmap):
                exchange.finish()  # first: the thread that waits for the reply relies on it
            exchange.reply = reply
            self._finish(exchange)
            self._exchanges.pop(reply.id, None)
        return exchange.wake()

    def _ask_again(self, *, only_unmaps: bool) -> None:
        """Have open requests sent to a new server, or open Unmaps to the warden; wake their threads."""
        for exchange in list(self._exchanges.values()):
            if isinstance(exchange.request, protocol.Control) and exchange.sent and not only_unmaps:
                # At most once: the driver may have carried it out.
                message = "the device's server was replaced: the control request may have been carried out"
                exchange.reply = protocol.Refused(exchange.request.id, "gone", errno.ECONNRESET, message)
            elif not only_unmaps or isinstance(exchange.request, protocol.Unmap):
                exchange.runs.clear()
                exchange.due = True
                if exchange.at_end is not None:
                    self._outbox.append(exchange)
            exchange.wake()

    def _disconnect(self, reason: str) -> None:
        """End the connection. Faults are still resolved, for which no connection is needed."""
        if self._end_reason is None:
            self._end_reason = reason
        self._disconnected = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        for exchange in list(self._exchanges.values()):
            self._finish(exchange)
            exchange.wake()

    # --- fork

    def _forget_threads(self) -> None:
        """Forget all exchanges in a forked child: they are those of the parent's threads."""
        self._reader_lock = threading.Lock()
        self._inside.clear()
        self._exchanges.clear()
        self._packets.received.clear()
        self._outbox.clear()
