"""The server of a shared pool: one thread, many clients; no client can harm another."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from prefault._system import fork_hooks
from prefault.errors import PoolFullError
from prefault.ipc import socket_path
from prefault.ipc.accepting import Acceptor
from prefault.ipc.transport import ProtocolError, receive_without_descriptors
from prefault.pool.high_water import report_error
from prefault.pool.pool_statistics import PoolStatistics
from prefault.pool.service import pool_protocol

if TYPE_CHECKING:
    from prefault.pool.members import MemberTable

_READ = pool_protocol.MAX_REQUEST + 4


class _PoolClientConnection:
    """A connection of a client, and the members that belong to it."""

    def __init__(self, connection: socket.socket, pid: int, pidfd: int) -> None:
        self.connection = connection
        self.pid = pid
        self.pidfd = pidfd
        self.members: set[int] = set()
        self.greeted = False
        self.wants_events = False
        self.received = bytearray()
        self.reply: memoryview | None = None
        self.descriptor: int | None = None  # sent with the first byte of the reply
        self.closing = False  # hang up after the reply
        self.deadline: float | None = None
        """The time (time.monotonic) at which the client is disconnected unless it completes a message or reads a reply."""

    def update_deadline(self, deadline: float) -> None:
        """Set the deadline, or keep an earlier one while something is outstanding: single bytes do not extend it."""
        if self.greeted and not self.received and self.reply is None:
            self.deadline = None
        elif self.deadline is None:
            self.deadline = deadline

    def close(self) -> None:
        self.connection.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class PoolServer:
    """Shares a pool at a path, until :meth:`close`; made by :meth:`Pool.serve`. A context manager.

    A client is a process of the same user, or of root. When it ends, in whatever way, its members are emptied and closed. A
    client that violates the protocol is disconnected; its members stay charged until its process ends, which still has the
    memory mapped.

    Attributes:
        path: path of the socket.
    """

    def __init__(
        self, pool: MemberTable, path: str | os.PathLike[str], *, max_connections: int, max_members: int, timeout: float
    ) -> None:
        if max_connections < 1 or max_members < 1 or not timeout > 0:
            raise ValueError("a server has at least one connection, one member, and a positive timeout")
        self._table = pool
        self._max_members = max_members
        self._timeout = timeout
        self._clients: set[_PoolClientConnection] = set()
        self._disconnected: set[_PoolClientConnection] = set()
        """Clients without a connection whose process lives and has members."""
        self._high_water_events: deque[PoolStatistics] = deque(maxlen=16)
        self._pid = os.getpid()
        self._stop = False
        self._lock = threading.RLock()  # around the waker
        self._listener, self._place = socket_path.listen_at(path)
        self.path = self._place.path
        self._selector = selectors.DefaultSelector()
        self._waker: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._acceptor = Acceptor(max_connections, _encode_refusal, lambda: "it has no descriptors left (RLIMIT_NOFILE)")
        self._selector.register(self._listener, selectors.EVENT_READ, self._on_connect)
        self._selector.register(self._waker, selectors.EVENT_READ, self._on_wake)
        # A thread of its own: emptying the files of a dead client can take seconds, during which others are served.
        self._reaper = ThreadPoolExecutor(1, "prefault-pool-reaper")
        self._thread = threading.Thread(target=self._run, name="prefault-pool-server", daemon=True)
        pool.add_listener(self._on_high_water)
        _servers.add(self)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket. Clients keep their memory, and cannot populate any more. Idempotent."""
        if os.getpid() != self._pid:
            return
        self._table.remove_listener(self._on_high_water)
        self._stop = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> PoolServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PoolServer at {self.path}, {'closed' if self._stop else f'{len(self._clients)} connections'}>"

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._stop:
                for key, _ in self._selector.select(self._select_timeout()):
                    _guarded(key.data)
                now = time.monotonic()
                for client in list(self._clients):
                    if client.deadline is not None and client.deadline <= now:
                        _guarded(self._disconnect, client)
        finally:
            self._tear_down()

    def _select_timeout(self) -> float | None:
        deadlines = [client.deadline for client in self._clients if client.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _tear_down(self) -> None:
        _guarded(socket_path.leave, self._place)
        self._listener.close()
        for client in list(self._clients):
            _guarded(self._disconnect, client)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, int) and key.fileobj != self._waker:
                os.close(key.fileobj)  # pidfds
        self._selector.close()
        self._reaper.shutdown()
        with self._lock:
            waker, self._waker = self._waker, None
        if waker is not None:
            os.close(waker)
        self._acceptor.close()

    def _wake(self) -> None:
        with self._lock:
            if self._waker is not None:
                os.eventfd_write(self._waker, 1)

    def _on_wake(self) -> None:
        assert self._waker is not None
        os.eventfd_read(self._waker)
        while self._high_water_events:
            event = self._high_water_events.popleft()
            for client in list(self._clients):
                if client.wants_events and client.reply is None:  # a client that has not read the last event gets no other
                    self._reply(client, pool_protocol.HighWaterReached(0, event))

    def _on_high_water(self, statistics: PoolStatistics) -> None:
        """Queue an event for the clients; called in the thread that reached the mark."""
        self._high_water_events.append(statistics)
        self._wake()

    # --- connections

    def _on_connect(self) -> None:
        connection = self._acceptor.accept(self._listener, len(self._clients))
        peer = None if connection is None else self._acceptor.identify(connection)
        if connection is None or peer is None:
            return
        client = _PoolClientConnection(connection, peer.pid, peer.pidfd)
        client.deadline = time.monotonic() + self._timeout
        try:
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._on_ready(client))
            self._selector.register(peer.pidfd, selectors.EVENT_READ, lambda: self._on_process_end(client))
        except OSError as error:  # fs.epoll.max_user_watches
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            os.close(peer.pidfd)
            self._acceptor.refuse(connection, f"it cannot wait for one more: {error.strerror}")
        else:
            self._clients.add(client)

    def _disconnect(self, client: _PoolClientConnection) -> None:
        """End a connection. Its members are detached until its process ends, which may be at this moment."""
        if client not in self._clients:
            return None
        self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.close()
        if not client.members:
            return self._close_pidfd(client)
        self._disconnected.add(client)
        return self._table.detach(client.members, client.pidfd)

    def _on_process_end(self, client: _PoolClientConnection) -> None:
        """Remove the members of a process that has ended. A fork of it may still hold the connection open."""
        if client not in self._clients and client not in self._disconnected:
            return  # an earlier event of the same round has closed the descriptor
        _guarded(self._disconnect, client)
        if client.members:
            self._remove_later([*client.members, *self._table.pop_dead()])
            self._close_pidfd(client)

    def _remove_later(self, members: Iterable[int]) -> None:
        """Remove members in the reaper's thread: their files can hold many GiB."""
        for member in members:
            self._reaper.submit(_guarded, self._table.remove, member)

    def _close_pidfd(self, client: _PoolClientConnection) -> None:
        self._disconnected.discard(client)
        self._selector.unregister(client.pidfd)
        os.close(client.pidfd)

    def _on_ready(self, client: _PoolClientConnection) -> None:
        """Receive requests, or go on sending a reply."""
        if client not in self._clients:
            return None  # disconnected by an earlier event of the same round
        try:
            if client.reply is not None:
                self._send(client)
            else:
                data = receive_without_descriptors(client.connection, _READ)
                if not data:
                    return self._disconnect(client)
                client.received += data
            while client.reply is None and not client.closing:
                body = pool_protocol.take_message(client.received, pool_protocol.MAX_REQUEST)
                if body is None:
                    break
                client.deadline = None
                self._handle(client, pool_protocol.decode_request(body))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # the client is gone
            return self._disconnect(client)
        except ProtocolError as error:
            client.closing = True
            client.received.clear()
            self._reply(client, pool_protocol.PoolRefused(0, "protocol", errno.EPROTO, str(error)))
        except Exception:
            self._disconnect(client)
            raise
        client.update_deadline(time.monotonic() + self._timeout)
        return None

    def _reply(self, client: _PoolClientConnection, reply: pool_protocol.Reply) -> None:
        client.reply = memoryview(pool_protocol.encode(reply))
        try:
            self._send(client)
        except BlockingIOError:
            pass
        except OSError:
            return self._disconnect(client)
        client.update_deadline(time.monotonic() + self._timeout)
        return None

    def _send(self, client: _PoolClientConnection) -> None:
        assert client.reply is not None
        connection = client.connection
        self._selector.modify(connection, selectors.EVENT_WRITE, self._selector.get_key(connection).data)
        if client.descriptor is not None:
            sent = socket.send_fds(connection, [client.reply], [client.descriptor])
            os.close(client.descriptor)
            client.descriptor = None
        else:
            sent = connection.send(client.reply)
        client.reply = client.reply[sent:] or None
        if client.reply is None:
            if client.closing:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the last reply is sent")
            self._selector.modify(connection, selectors.EVENT_READ, self._selector.get_key(connection).data)

    # --- requests

    def _handle(self, client: _PoolClientConnection, request: pool_protocol.Request) -> None:
        if isinstance(request, pool_protocol.PoolHello) is client.greeted or client.wants_events:
            raise ProtocolError("Hello comes first, and once; and a connection for events asks for nothing")
        reply: pool_protocol.Reply
        try:
            reply = self._execute(client, request)
        except (OSError, ValueError) as error:
            reply = pool_protocol.refusal(request.id, error)
        self._reply(client, reply)

    def _execute(self, client: _PoolClientConnection, request: pool_protocol.Request) -> pool_protocol.Reply:
        pool = self._table
        self._remove_later(pool.pop_dead())  # of an earlier server, which was closed
        match request:
            case pool_protocol.PoolHello():
                if request.version != pool_protocol.VERSION:
                    raise ProtocolError(
                        f"version {pool_protocol.VERSION} of the protocol is spoken here, not {request.version}"
                    )
                client.greeted, client.wants_events = True, request.events
                return pool_protocol.PoolWelcome(request.id, pool.capacity, pool.block, pool.store.notes)
            case pool_protocol.Create():
                return self._create(client, request)
            case pool_protocol.Settle():
                pool.settle(_check_owned(client, request.member), request.charged)
                return pool_protocol.PoolDone(request.id)
            case pool_protocol.Close():
                number = _check_owned(client, request.member)
                client.members.remove(number)
                # A client empties the file before it sends Close, so this is quick; if it did not, others must not wait.
                if pool.allocated(number):
                    self._remove_later([number])
                else:
                    pool.remove(number)
                return pool_protocol.PoolDone(request.id)
            case pool_protocol.StatisticsRequest():
                return pool_protocol.StatisticsReply(request.id, pool.statistics())

    def _create(self, client: _PoolClientConnection, request: pool_protocol.Create) -> pool_protocol.Reply:
        taken = sum(len(other.members) for other in (*self._clients, *self._disconnected))
        if taken >= self._max_members:
            raise PoolFullError(
                errno.ENOSPC, f"the server has given out {taken} members, the most that it gives (max_members)"
            )
        checked = self._table.check_request(request.size, reserved=request.reserved, limit=request.limit, name=request.name)
        member = self._table.open(checked, client.pid)
        client.members.add(member)
        try:
            client.descriptor = self._table.descriptor(member)
        except OSError:  # no descriptors left
            client.members.remove(member)
            self._table.remove(member)
            raise
        return pool_protocol.Created(request.id, member, checked.name, checked.size)

    # --- a fork of this process

    def _after_fork(self) -> None:
        """Close the sockets in a forked child, so that clients notice when the parent dies.

        Nothing is unregistered: the child shares the parent's epoll instance.
        """
        self._stop = True
        with contextlib.suppress(OSError):
            self._listener.close()
            for client in self._clients:
                client.connection.close()
            self._selector.close()


_servers = fork_hooks.instances(PoolServer._after_fork)


def _guarded(work: Callable[..., object], *arguments: object) -> None:
    """Call ``work`` and report its errors: a failure of one client does not stop the server."""
    try:
        work(*arguments)
    except Exception as error:  # noqa: BLE001
        report_error(error)


def _check_owned(client: _PoolClientConnection, member: int) -> int:
    if member not in client.members:
        raise ValueError(f"member {member} is none of this connection")
    return member


def _encode_refusal(reason: str) -> bytes:
    return pool_protocol.encode(pool_protocol.PoolRefused(0, "protocol", errno.EPERM, reason))
