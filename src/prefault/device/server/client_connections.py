"""Connections of clients: accepting, receiving requests, sending replies. A client that stalls harms only itself."""

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
from prefault.device.pages.served_areas import ServedClient
from prefault.device.registry import ClientRecord
from prefault.ipc.accepting import Acceptor, send_last
from prefault.ipc.transport import ProtocolError, receive_all

HELLO_S = 5.0
"""Seconds that a client has to send Hello."""
_DESCRIPTORS_EACH = 5
_MAX_CONNECTIONS = 4096
_QUEUE_MOST = 64
_DROPPED_MOST = 10_000

EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT


class ClientConnection:
    """A connection, of a client as soon as it has sent Hello.

    Attributes:
        client: the client; None before Hello.
        deadline: the time (time.monotonic) by which Hello must come.
        waiting: packets for which the socket had no room yet.
    """

    __slots__ = ("client", "deadline", "pid", "pidfd", "socket", "uid", "waiting")

    def __init__(self, connected: socket.socket, pid: int, uid: int, pidfd: int) -> None:
        self.socket = connected
        self.pid = pid
        self.uid = uid
        self.pidfd = pidfd
        self.client: ServedClient | None = None
        self.deadline = time.monotonic() + HELLO_S
        self.waiting: deque[bytes] = deque()


class ClientConnections:
    """All connections of clients; the event loop calls their handlers.

    Args:
        watch: ``watch(fd, mask, handler)`` has ``handler(mask)`` called on events; another call changes the mask.
        forget: ends the calls for a descriptor.
        greeted: called with Hello and the record of the new client; replies with Welcome.
        asked: called with each request.
        welcome: called with a repeated Hello of a client that is known; replies with Welcome.
        restarted: whether another server ran before.
        lost: called with a client whose connection has ended.
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
        self.connections: dict[int, ClientConnection] = {}
        self.unidentified: set[ClientConnection] = set()
        most = min(_MAX_CONNECTIONS, max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS_EACH - 16))
        self._acceptor = Acceptor(most, _encode_refusal, limit_messages.no_descriptor)
        self.restarted = restarted
        self.greeted = greeted
        self.welcome = welcome
        self.asked = asked
        self.lost = lost

    # --- connecting

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection, or refuse it."""
        accepted = self._acceptor.accept(listener, len(self.connections))
        if accepted is not None:
            self.admit(accepted)

    def admit(self, accepted: socket.socket) -> None:
        """Wait for Hello on a socket, or refuse it."""
        accepted.setblocking(False)
        peer = self._acceptor.identify(accepted)
        if peer is None:
            return
        connection = ClientConnection(accepted, *peer)
        try:
            self._watch_connection(connection)
            self.unidentified.add(connection)
        except OSError as error:  # fs.epoll.max_user_watches
            os.close(peer.pidfd)
            self._acceptor.refuse(accepted, f"it cannot wait for one more: {error.strerror}")

    def resume(self, client: ServedClient) -> None:
        """Go on with the connection of a client of the last server."""
        assert client.connection is not None
        record = client.record
        connection = ClientConnection(client.connection, record.pid, record.uid, record.pidfd)
        connection.client = client
        # Drop requests to the last server: the client repeats each without a reply, and no discard may be executed twice.
        with contextlib.suppress(OSError):
            for _ in range(_DROPPED_MOST):
                if not client.connection.recv(1):
                    break
        self._watch_connection(connection)

    def _watch_connection(self, connection: ClientConnection) -> None:
        self._watch(connection.socket.fileno(), EPOLLIN, lambda mask: self._ready(connection, mask))
        self.connections[connection.socket.fileno()] = connection

    def hello_timeout(self) -> float | None:
        """Return the seconds until the next deadline of a Hello; None without one."""
        if not self.unidentified:
            return None
        return max(0.0, min(connection.deadline for connection in self.unidentified) - time.monotonic())

    def expire(self) -> None:
        """End the connections that sent no Hello in time."""
        now = time.monotonic()
        for connection in list(self.unidentified):
            if connection.deadline <= now:
                self.hang_up(connection)

    # --- requests

    def _ready(self, connection: ClientConnection, mask: int) -> None:
        if connection.socket.fileno() not in self.connections:
            return  # an earlier event of the same round ended it
        try:
            if mask & EPOLLOUT:
                self._flush(connection)
            elif mask:
                self._receive(connection)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.hang_up(connection)
        except ProtocolError as error:
            self.reject(connection, str(error))

    def _receive(self, connection: ClientConnection) -> None:
        packet, descriptors, lost = receive_all(connection.socket, protocol.MAX_MESSAGE, protocol.MAX_DESCRIPTORS)
        try:
            if not packet:
                return self.hang_up(connection)
            request = protocol.decode_request(packet)
            if connection.client is None:
                if not isinstance(request, protocol.Hello):
                    raise ProtocolError("Hello comes first")
                if request.version != protocol.VERSION:
                    raise ProtocolError(f"version {protocol.VERSION} of the protocol is spoken here, not {request.version}")
                if lost:
                    refusal = f"the server does not take you: {limit_messages.no_descriptor()}"
                    self.send(connection, protocol.Refused(request.id, "device", errno.EMFILE, refusal))
                    return self.hang_up(connection)
                record = _record(connection, descriptors)
                descriptors = []
                self.unidentified.discard(connection)
                return self.greeted(connection, request, record)
            if self.restarted and isinstance(request, protocol.Hello):  # repeated, though the first was read
                return self.welcome(connection, request)
            if descriptors:
                raise ProtocolError("descriptors come with Hello only")
            return self.asked(connection.client, request)
        finally:
            for fd in descriptors:
                os.close(fd)

    # --- replies

    def reply(self, client: ServedClient, reply: protocol.Reply) -> None:
        """Send a reply to a client, or queue it; drop it if the client is gone."""
        connection = None if client.connection is None else self.connections.get(client.connection.fileno())
        if connection is not None:
            self.send(connection, reply)

    def send(self, connection: ClientConnection, reply: protocol.Reply, descriptors: tuple[int, ...] = ()) -> None:
        """Send a reply on a connection, or queue it.

        Progress is dropped where it would be queued, and a reply with descriptors ends the connection.
        """
        if connection.waiting:
            if not isinstance(reply, protocol.Progress):
                connection.waiting.append(protocol.encode(reply))
                self._update_events(connection)
            return
        packet = protocol.encode(reply)
        try:
            if descriptors:
                socket.send_fds(connection.socket, [packet], list(descriptors), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                connection.socket.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            if descriptors:
                self.hang_up(connection)
            elif not isinstance(reply, protocol.Progress):
                connection.waiting.append(packet)
                self._update_events(connection)
        except OSError:
            self.hang_up(connection)

    def _flush(self, connection: ClientConnection) -> None:
        while connection.waiting:
            connection.socket.send(connection.waiting[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            connection.waiting.popleft()
        self._update_events(connection)

    def _update_events(self, connection: ClientConnection) -> None:
        """Apply backpressure: stop reading requests from a client that does not drain its replies."""
        mask = EPOLLIN if len(connection.waiting) < _QUEUE_MOST else 0
        if connection.waiting:
            mask |= EPOLLOUT
        self._watch(connection.socket.fileno(), mask, lambda mask: self._ready(connection, mask))

    # --- the end

    def reject(self, connection: ClientConnection, reason: str) -> None:
        """End a connection whose client violates the protocol, with the reason."""
        refused = protocol.Refused(0, "protocol", errno.EPROTO, reason[:1000])
        send_last(connection.socket, protocol.encode(refused))
        self.hang_up(connection)

    def hang_up(self, connection: ClientConnection) -> None:
        """Shut a connection down, which ends the warden's copy as well. Faults of a living client are still resolved."""
        fd = connection.socket.fileno()
        if self.connections.pop(fd, None) is None:
            return
        self.unidentified.discard(connection)
        self._forget(fd)
        with contextlib.suppress(OSError):  # the other side is gone
            connection.socket.shutdown(socket.SHUT_RDWR)
        connection.socket.close()
        if connection.client is not None:
            connection.client.connection = None
            connection.client.record.connection = -1
            self.lost(connection.client)
        else:
            os.close(connection.pidfd)

    def close(self) -> None:
        """End all connections."""
        for connection in list(self.connections.values()):
            self.hang_up(connection)
        self._acceptor.close()


def _record(connection: ClientConnection, descriptors: list[int]) -> ClientRecord:
    """Check the descriptors that came with Hello and make the client's record, which owns them from then on."""
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
        0, connection.pid, connection.uid, connection.socket.fileno(), connection.pidfd, userfaultfd, lifeline_write,
        lifeline_read,
    )  # fmt: skip


def _encode_refusal(reason: str) -> bytes:
    return protocol.encode(protocol.Refused(0, "device", errno.EAGAIN, f"the server does not take you: {reason}"))
