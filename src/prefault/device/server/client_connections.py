"""Connections of clients: who may, what comes, what goes; a client that does not read or write harms only itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable

from prefault.device import limit_messages, protocol
from prefault.device.registry import ClientRecord
from prefault.device.server.served_areas import ServedClient
from prefault.ipc.accepting import Acceptor, send_last
from prefault.ipc.transport import ProtocolError, receive_all

HELLO_S = 5.0
"""How long a connection may take to say Hello, in seconds."""
_DESCRIPTORS_EACH = 5
_MAX_CONNECTIONS = 4096
_QUEUE_MOST = 64
_DROPPED_MOST = 10_000

EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT


class ClientConnection:
    """A connection.

    Attributes:
        client: once it said Hello.
        deadline: until when it is to do so.
        waiting: packets that it did not take yet.
    """

    __slots__ = ("client", "connection", "deadline", "pid", "pidfd", "uid", "waiting")

    def __init__(self, connection: socket.socket, pid: int, uid: int, pidfd: int) -> None:
        self.connection = connection
        self.pid = pid
        self.uid = uid
        self.pidfd = pidfd
        self.client: ServedClient | None = None
        self.deadline = time.monotonic() + HELLO_S
        self.waiting: deque[bytes] = deque()


class ClientConnections:
    """All links; told of what the loop sees on them.

    Args:
        watch: ``watch(fd, mask, handler)``: have ``handler(mask)`` called; again to change the mask.
        forget: no more.
        greeted: told of Hello and its record, says Welcome.
        asked: told of requests.
        welcome: says Welcome once more, to who is a client already.
        restarted: there was another server before.
        lost: told of a client whose connection is over.
    """

    def __init__(
        self, watch: Callable[[int, int, Callable[[int], None]], None], forget: Callable[[int], None], *, restarted: bool,
        greeted: Callable[[ClientConnection, protocol.Hello, ClientRecord], None],
        welcome: Callable[[ClientConnection, protocol.Hello], None],
        asked: Callable[[ServedClient, protocol.Request], None],
        lost: Callable[[ServedClient], None],
    ) -> None:  # fmt: skip
        self._watch = watch
        self._forget = forget
        self.links: dict[int, ClientConnection] = {}
        self.strangers: set[ClientConnection] = set()
        most = min(_MAX_CONNECTIONS, max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS_EACH - 16))
        self._acceptor = Acceptor(most, _encode_refusal, limit_messages.no_descriptor)
        self.restarted = restarted
        self.greeted = greeted
        self.welcome = welcome
        self.asked = asked
        self.lost = lost

    # --- coming

    def accept(self, listener: socket.socket) -> None:
        """Somebody connects."""
        connection = self._acceptor.accept(listener, len(self.links))
        if connection is not None:
            self.admit(connection)

    def admit(self, connection: socket.socket) -> None:
        """Wait for Hello on a connection, or refuse it."""
        connection.setblocking(False)
        peer = self._acceptor.identify(connection)
        if peer is None:
            return
        link = ClientConnection(connection, *peer)
        try:
            self._listen(link)
            self.strangers.add(link)
        except OSError as error:  # fs.epoll.max_user_watches
            os.close(peer.pidfd)
            self._acceptor.refuse(connection, f"it cannot wait for one more: {error.strerror}")

    def resume(self, client: ServedClient) -> None:
        """The connection of a client that the last server had."""
        assert client.connection is not None
        record = client.record
        link = ClientConnection(client.connection, record.pid, record.uid, record.pidfd)
        link.client = client
        # It is asked again, but for what was answered meanwhile, of which this may be a copy: a discard comes once.
        with contextlib.suppress(OSError):
            for _ in range(_DROPPED_MOST):
                if not client.connection.recv(1):
                    break
        self._listen(link)

    def _listen(self, link: ClientConnection) -> None:
        self._watch(link.connection.fileno(), EPOLLIN, lambda mask: self._ready(link, mask))
        self.links[link.connection.fileno()] = link

    def patience(self) -> float | None:
        """Seconds until the next deadline; None if nobody is to say Hello."""
        if not self.strangers:
            return None
        return max(0.0, min(link.deadline for link in self.strangers) - time.monotonic())

    def expire(self) -> None:
        """Hang up on who said nothing for too long."""
        now = time.monotonic()
        for link in list(self.strangers):
            if link.deadline <= now:
                self.hang_up(link)

    # --- what comes

    def _ready(self, link: ClientConnection, mask: int) -> None:
        if link.connection.fileno() not in self.links:
            return  # an earlier event of the same round ended it
        try:
            if mask & EPOLLOUT:
                self._flush(link)
            elif mask:
                self._receive(link)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.hang_up(link)
        except ProtocolError as error:
            self.reject(link, str(error))

    def _receive(self, link: ClientConnection) -> None:
        packet, descriptors, lost = receive_all(link.connection, protocol.MAX_MESSAGE, protocol.MAX_DESCRIPTORS)
        try:
            if not packet:
                return self.hang_up(link)
            request = protocol.decode_request(packet)
            if link.client is None:
                if not isinstance(request, protocol.Hello):
                    raise ProtocolError("Hello comes first")
                if request.version != protocol.VERSION:
                    raise ProtocolError(f"version {protocol.VERSION} of the protocol is spoken here, not {request.version}")
                if lost:
                    refusal = f"the server does not take you: {limit_messages.no_descriptor()}"
                    self.send(link, protocol.Refused(request.id, "device", errno.EMFILE, refusal))
                    return self.hang_up(link)
                record = _record(link, descriptors)
                descriptors = []
                self.strangers.discard(link)
                return self.greeted(link, request, record)
            if self.restarted and isinstance(request, protocol.Hello):  # asked again; the first was read after all
                return self.welcome(link, request)
            if descriptors:
                raise ProtocolError("descriptors come with Hello only")
            return self.asked(link.client, request)
        finally:
            for fd in descriptors:
                os.close(fd)

    # --- what goes

    def say(self, client: ServedClient, reply: protocol.Reply) -> None:
        """Send a reply, or have it wait; Progress is not worth waiting for. Not to who is gone."""
        link = None if client.connection is None else self.links.get(client.connection.fileno())
        if link is not None:
            self.send(link, reply)

    def send(self, link: ClientConnection, reply: protocol.Reply, descriptors: tuple[int, ...] = ()) -> None:
        """The same for a link; with descriptors, which do not wait."""
        if link.waiting:
            if not isinstance(reply, protocol.Progress):
                link.waiting.append(protocol.encode(reply))
                self._mind(link)
            return
        packet = protocol.encode(reply)
        try:
            if descriptors:
                socket.send_fds(link.connection, [packet], list(descriptors), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                link.connection.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            if descriptors:
                self.hang_up(link)
            elif not isinstance(reply, protocol.Progress):
                link.waiting.append(packet)
                self._mind(link)
        except OSError:
            self.hang_up(link)

    def _flush(self, link: ClientConnection) -> None:
        while link.waiting:
            link.connection.send(link.waiting[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            link.waiting.popleft()
        self._mind(link)

    def _mind(self, link: ClientConnection) -> None:
        """Who does not take replies is not asked for more requests."""
        mask = EPOLLIN if len(link.waiting) < _QUEUE_MOST else 0
        if link.waiting:
            mask |= EPOLLOUT
        self._watch(link.connection.fileno(), mask, lambda mask: self._ready(link, mask))

    # --- the end

    def reject(self, link: ClientConnection, reason: str) -> None:
        """The other side does not keep to the protocol."""
        refused = protocol.Refused(0, "protocol", errno.EPROTO, reason[:1000])
        send_last(link.connection, protocol.encode(refused))
        self.hang_up(link)

    def hang_up(self, link: ClientConnection) -> None:
        """End a connection, for all who have it, the warden included. If its client lives, its faults are still answered."""
        fd = link.connection.fileno()
        if self.links.pop(fd, None) is None:
            return
        self.strangers.discard(link)
        self._forget(fd)
        with contextlib.suppress(OSError):  # the other side is gone
            link.connection.shutdown(socket.SHUT_RDWR)
        link.connection.close()
        if link.client is not None:
            link.client.connection = None
            link.client.record.connection = -1
            self.lost(link.client)
        else:
            os.close(link.pidfd)

    def close(self) -> None:
        """All of them."""
        for link in list(self.links.values()):
            self.hang_up(link)
        self._acceptor.close()


def _record(link: ClientConnection, descriptors: list[int]) -> ClientRecord:
    """What a client sent with Hello, looked at; its descriptors are the record's if this returns."""
    if len(descriptors) != protocol.MAX_DESCRIPTORS:
        raise ProtocolError(f"{protocol.MAX_DESCRIPTORS} descriptors come with Hello, not {len(descriptors)}")
    userfaultfd, lifeline_write, lifeline_read = descriptors
    try:
        if os.readlink(f"/proc/self/fd/{userfaultfd}") != "anon_inode:[userfaultfd]":
            raise ProtocolError("the first descriptor is not a userfaultfd")
        fcntl.fcntl(userfaultfd, fcntl.F_SETFL, fcntl.fcntl(userfaultfd, fcntl.F_GETFL) | os.O_NONBLOCK)
        poll = select.poll()
        poll.register(userfaultfd, select.POLLIN)
        if any(mask & select.POLLERR for _, mask in poll.poll(0)):
            raise ProtocolError("the userfaultfd is not ready: UFFDIO_API was not called")
        for fd, mode in ((lifeline_write, os.O_WRONLY), (lifeline_read, os.O_RDONLY)):
            if not stat.S_ISFIFO(os.fstat(fd).st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != mode:
                raise ProtocolError("the second and third descriptor are not the two ends of a pipe")
    except OSError as error:
        raise ProtocolError(f"the descriptors are not what they should be: {error.strerror}") from None
    return ClientRecord(
        0, link.pid, link.uid, link.connection.fileno(), link.pidfd, userfaultfd, lifeline_write, lifeline_read
    )  # fmt: skip


def _encode_refusal(reason: str) -> bytes:
    return protocol.encode(protocol.Refused(0, "device", errno.EAGAIN, f"the server does not take you: {reason}"))
