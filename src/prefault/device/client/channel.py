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
from prefault.ipc.transport import ProtocolError, ancillary_room, descriptors_in

_R = TypeVar("_R", bound=protocol.Reply)

_ABANDON_S = 5.0
"""How long the answer to a Map is waited for that Ctrl-C interrupted: a call of the driver's open() ends first."""

_LOOK_S = 1.0
"""How long a thread relies on another that reads, in seconds."""

_DESCRIPTORS_ROOM = ancillary_room(protocol.MAX_DESCRIPTORS)


class Exchange:
    """A request, and what has come in answer."""

    __slots__ = ("at_end", "pages", "reply", "request", "runs", "sent")

    def __init__(self, request: protocol.Request, at_end: Callable[[], None] | None = None) -> None:
        self.request = request
        self.reply: protocol.Reply | None = None
        self.pages = 0
        """Of the last Progress."""
        self.runs: list[protocol.Run] = []
        """Of a list that comes in parts."""
        self.sent: list[int] = []
        """Bytes, of each time."""
        self.at_end = at_end
        """Called in whichever thread reads the reply, once; or again, if Ctrl-C interrupts that."""


class Channel:
    """A connection on which any number of threads have requests under way.

    Whoever waits for an answer, and finds nobody reading, reads for all. All waiting ends with the other side: either it
    says that it is gone, or the socket ends, or a signal ends this process (see
    :class:`~prefault.device.client.connection.DeviceConnection`).
    """

    def __init__(self, connection: socket.socket) -> None:
        self._pid = os.getpid()
        self.connection = connection
        self._numbers = itertools.count(1)
        self._exchanges: dict[int, Exchange] = {}
        self._packets: deque[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = deque()
        self._given_up: dict[int, Callable[[], None]] = {}
        """Maps that nobody waits for any more, by id: what unmaps the memory, once there is no such area."""
        self._later: deque[protocol.Request] = deque()
        """Unmaps to be sent: finalizers may come in the middle of a request, and Ctrl-C before it is sent."""
        self._inside: set[int] = set()
        """Threads in the middle of waiting."""
        # Plain locks, and no Condition: Ctrl-C that strikes in the methods of one, which are Python, leaves it locked.
        self._gate = threading.Lock()
        self._bells: dict[int, threading.Lock] = {}
        """Of threads that wait for another to read; unlocked when there is something to look at."""
        self._reader: int | None = None
        self._why: str | None = None
        """Why nothing can be asked any more. A warden may still take notice of areas that go."""
        self._silent = False
        """The other side says nothing more."""
        self._descriptors_lost = False
        """Descriptors were sent that this process had no room for."""
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

    def open(self, opening: Exchange) -> protocol.Mapped:
        """Send a Map; its answer. If this fails or is interrupted, :meth:`give_up` finds out what there is to be undone."""
        self.check()
        self._check_inside()
        self._exchanges[opening.request.id] = opening
        self._send(opening.request, opening.sent)
        self.wait(opening)
        return self._expect(opening, protocol.Mapped)

    def give_up(self, opening: Exchange, at_end: Callable[[], None], deadline: float | None = None) -> None:
        """The end of an area: as :meth:`part`, whether its Map was answered or not.

        While there is no answer the memory stays where it is: the next area would come to lie at the same address, and what
        undoes the first would take it away.
        """
        alive = not self._silent and not self._closed
        if not opening.sent:
            self._exchanges.pop(opening.request.id, None)
            return at_end()
        if opening.reply is None and opening.request.id in self._exchanges and alive:
            if self.is_inside():
                return self._abandon(opening, at_end)
            limit = time.monotonic() + _ABANDON_S
            try:
                self.wait(opening, limit if deadline is None else min(limit, deadline))
            except DeviceGoneError:
                pass
            except TimeoutError:
                return self._abandon(opening, at_end)
            except BaseException:  # Ctrl-C once more
                self._abandon(opening, at_end)
                raise
        if isinstance(opening.reply, protocol.Mapped):
            return self.part(opening.reply.area, at_end, deadline)
        return at_end()

    def _abandon(self, opening: Exchange, at_end: Callable[[], None]) -> None:
        self._given_up[opening.request.id] = at_end
        if opening.reply is not None:  # by another thread, just now
            self._undo(opening.reply)

    def _undo(self, reply: protocol.Reply) -> None:
        """The answer to a Map; it may be one that was given up."""
        at_end = self._given_up.pop(reply.id, None)
        if at_end is None:
            return
        if isinstance(reply, protocol.Mapped):
            self.part(reply.area, at_end)
        else:
            at_end()

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
        self._later.append(exchange.request)
        if self.is_inside():
            if self._try_to_send(exchange.request):
                self._later.remove(exchange.request)
            return
        self._send_later()
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
        bell = threading.Lock()
        try:
            self._inside.add(me)  # inside of `try`: Ctrl-C may strike after any call
            while exchange.reply is None and exchange.pages <= seen:
                if self._silent or (self._why is not None and not isinstance(exchange.request, protocol.Unmap)):
                    raise DeviceGoneError(errno.ECONNRESET, self._why or "the device's server is gone")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the device's server did not answer in time")
                bell.acquire(blocking=False)
                self._bells[me] = bell  # before looking: whoever rings later is heard
                with self._gate:
                    if self._reader is None:
                        self._reader = me
                if self._reader == me:
                    self._send_later()
                    self._read(left)
                    self._reader = None
                    self._ring()
                elif exchange.reply is None and exchange.pages <= seen:
                    # Not for ever: Ctrl-C may strike before the last reader rings.
                    bell.acquire(timeout=_LOOK_S if left is None else min(left, _LOOK_S))
        finally:
            if self._reader == me:
                self._reader = None
            self._inside.discard(me)
            self._bells.pop(me, None)
            self._ring()
            self._send_later()

    def _ring(self) -> None:
        """Have all waiting threads look."""
        for bell in list(self._bells.values()):
            with contextlib.suppress(RuntimeError):  # it has rung already
                bell.release()

    def _expect(self, exchange: Exchange, kind: type[_R]) -> _R:
        reply = exchange.reply
        if isinstance(reply, kind):
            return reply
        if isinstance(reply, protocol.Refused):
            raise protocol.error_of(reply)
        self._lost(f"the device's server answered a {type(exchange.request).__name__} with a {type(reply).__name__}")
        raise DeviceGoneError(errno.EPROTO, self._why or "")

    # --- the socket

    def _send_later(self) -> None:
        while self._later:
            with contextlib.suppress(IndexError, ValueError):  # another thread is at it; twice does no harm
                request = self._later[0]
                self._send(request)
                self._later.remove(request)

    def _send(self, request: protocol.Request, sent: list[int] | None = None) -> None:
        while not self._try_to_send(request, sent):
            self._make_room()

    def _try_to_send(self, request: protocol.Request, sent: list[int] | None = None) -> bool:
        """Whether there was room for it, or nobody is there to take it."""
        data = protocol.encode(request)
        descriptors = array.array("i", self._descriptors_of(request))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)] if descriptors else []
        try:
            # In one step of the interpreter, as in _receive: it is known to be sent if it was.
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
        """Wait until there may be room for a request. If nobody reads answers, the other side takes no requests."""
        me = threading.get_ident()
        was_inside = me in self._inside
        became_reader = False
        try:
            self._inside.add(me)
            with self._gate:
                if self._reader is None:
                    self._reader = me
                    became_reader = True
            reads = self._reader == me
            room = select.poll()
            room.register(self.connection, select.POLLOUT | (select.POLLIN if reads else 0))
            if reads and any(mask & select.POLLIN for _, mask in room.poll(1000)):
                with contextlib.suppress(OSError):  # what it is, the next to read finds out
                    self._receive()
            elif not reads:
                room.poll(1000)
        finally:
            if became_reader:
                self._reader = None
            if not was_inside:
                self._inside.discard(me)
            if became_reader:
                self._ring()

    def _receive(self) -> None:
        # In one step of the interpreter: Ctrl-C between receiving and keeping would lose another thread's answer.
        self._packets.extend(
            map(self.connection.recvmsg, (protocol.MAX_MESSAGE,), (_DESCRIPTORS_ROOM,), (socket.MSG_CMSG_CLOEXEC,))
        )

    def _read(self, timeout_s: float | None) -> None:
        """Wait for a message, and give it to whom it belongs. Only the reader calls this."""
        if not self._packets:
            if not self._poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000):
                return None
            try:
                self._receive()
            except BlockingIOError:
                return None
            except OSError as error:
                return self._lost(f"the device's server is gone: {error.strerror}")
        data, ancillary, flags, _ = self._packets[0]
        if not data:
            self._packets.popleft()
            return self._lost("the device's server and its warden are gone")
        try:
            reply = protocol.decode_reply(data)
        except ProtocolError as error:
            self._packets.popleft()
            return self._lost(f"what the device's server says is no answer: {error}")
        self._descriptors_lost |= bool(flags & socket.MSG_CTRUNC)
        self._keep_descriptors(reply, ancillary)
        self._dispatch(reply)
        self._packets.popleft()  # last: where Ctrl-C comes in between, the next to read dispatches it once more
        return None

    def _keep_descriptors(self, reply: protocol.Reply, ancillary: list[tuple[int, int, bytes]]) -> None:
        received = descriptors_in(ancillary)
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
            return  # nobody waits for it any more
        if isinstance(reply, protocol.Progress):
            exchange.pages = reply.pages
        elif isinstance(reply, protocol.Runs):
            exchange.runs += reply.runs
            if not reply.more:
                exchange.reply = reply
        else:
            self._finish(exchange)  # first: who waits for the reply relies on it
            exchange.reply = reply
        if exchange.reply is not None:
            self._exchanges.pop(reply.id, None)
            self._undo(reply)

    def _ask_again(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            exchange.runs.clear()
            self._send(exchange.request)

    @staticmethod
    def _finish(exchange: Exchange) -> None:
        if exchange.at_end is not None:
            exchange.at_end()  # which may be called twice
            exchange.at_end = None

    def _lost(self, reason: str) -> None:
        """No more requests. Faults go on being answered: that needs no connection."""
        if self._why is None:
            self._why = reason
        self._silent = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        for exchange in list(self._exchanges.values()):
            self._finish(exchange)
        while self._given_up:
            self._given_up.popitem()[1]()

    # --- fork

    def _forget_threads(self) -> None:
        """In a child of fork: nothing that is under way is ours."""
        self._gate = threading.Lock()
        self._bells.clear()
        self._inside.clear()
        self._exchanges.clear()
        self._packets.clear()
        self._given_up.clear()
        self._later.clear()
        self._reader = None
