"""The server of a shared pool: one thread, many clients, none of which can harm another."""

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
from prefault.pool.high_water import report
from prefault.pool.pool_statistics import PoolStatistics
from prefault.pool.service import pool_protocol

if TYPE_CHECKING:
    from prefault.pool.members import MemberTable

_READ = pool_protocol.MAX_REQUEST + 4


class _PoolClientConnection:
    """A connection, and what it may speak of."""

    def __init__(self, connection: socket.socket, pid: int, pidfd: int) -> None:
        self.connection = connection
        self.pid = pid
        self.pidfd = pidfd
        self.members: set[int] = set()
        self.greeted = False
        self.events = False
        self.received = bytearray()
        self.answer: memoryview | None = None
        self.descriptor: int | None = None  # goes with the first byte of the answer
        self.last = False  # hang up after the answer
        self.deadline: float | None = None
        """Until when the rest of a message, or the taking of an answer, is waited for."""

    def wait_until(self, deadline: float) -> None:
        """Keep the first deadline while something is outstanding: a byte now and then does not extend it."""
        if self.greeted and not self.received and self.answer is None:
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

    A client is a process of the same user, or of root. When it ends, however it ends, its members are emptied and closed. A
    client that breaks the protocol is disconnected; its members stay charged, as its process still has the memory, until it
    ends.

    Attributes:
        path: of the socket.
    """

    def __init__(
        self, pool: MemberTable, path: str | os.PathLike[str], *, max_connections: int, max_members: int, timeout: float
    ) -> None:
        if max_connections < 1 or max_members < 1 or not timeout > 0:
            raise ValueError("a server has at least one connection, one member, and a positive timeout")
        self._pool = pool
        self._max_members = max_members
        self._timeout = timeout
        self._clients: set[_PoolClientConnection] = set()
        self._disconnected: set[_PoolClientConnection] = set()
        """Those that live and have members."""
        self._events: deque[PoolStatistics] = deque(maxlen=16)
        self._pid = os.getpid()
        self._stop = False
        self._lock = threading.RLock()  # around the waker
        self._listener, self._place = socket_path.listen_at(path)
        self.path = self._place.path
        self._selector = selectors.DefaultSelector()
        self._waker: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._acceptor = Acceptor(max_connections, _encode_refusal, lambda: "it has no descriptors left (RLIMIT_NOFILE)")
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._waker, selectors.EVENT_READ, self._woken)
        # Emptying a dead client's file can take a while, for which the others do not wait.
        self._reaper = ThreadPoolExecutor(1, "prefault-pool-reaper")
        self._thread = threading.Thread(target=self._run, name="prefault-pool-server", daemon=True)
        pool.listen(self._notice)
        _servers.add(self)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket. Clients keep their memory and can populate no more. Idempotent."""
        if os.getpid() != self._pid:
            return
        self._pool.unlisten(self._notice)
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
                for key, _ in self._selector.select(self._patience()):
                    _guarded(key.data)
                now = time.monotonic()
                for client in list(self._clients):
                    if client.deadline is not None and client.deadline <= now:
                        _guarded(self._drop, client)
        finally:
            self._end()

    def _patience(self) -> float | None:
        deadlines = [client.deadline for client in self._clients if client.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _end(self) -> None:
        _guarded(socket_path.leave, self._place)
        self._listener.close()
        for client in list(self._clients):
            _guarded(self._drop, client)
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

    def _woken(self) -> None:
        assert self._waker is not None
        os.eventfd_read(self._waker)
        while self._events:
            event = self._events.popleft()
            for client in list(self._clients):
                if client.events and client.answer is None:  # who has not taken the last one has no use for the next
                    self._answer(client, pool_protocol.HighWater(0, event))

    def _notice(self, statistics: PoolStatistics) -> None:
        """The high-water mark was reached, in some thread."""
        self._events.append(statistics)
        self._wake()

    # --- connections

    def _accept(self) -> None:
        connection = self._acceptor.accept(self._listener, len(self._clients))
        peer = None if connection is None else self._acceptor.identify(connection)
        if connection is None or peer is None:
            return
        client = _PoolClientConnection(connection, peer.pid, peer.pidfd)
        client.deadline = time.monotonic() + self._timeout
        try:
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(client))
            self._selector.register(peer.pidfd, selectors.EVENT_READ, lambda: self._ended(client))
        except OSError as error:  # fs.epoll.max_user_watches
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            os.close(peer.pidfd)
            self._acceptor.refuse(connection, f"it cannot wait for one more: {error.strerror}")
        else:
            self._clients.add(client)

    def _drop(self, client: _PoolClientConnection) -> None:
        """End a connection. Its members go when its process does, which may be this very moment."""
        if client not in self._clients:
            return None
        self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.close()
        if not client.members:
            return self._forget(client)
        self._disconnected.add(client)
        return self._pool.orphan(client.members, client.pidfd)

    def _ended(self, client: _PoolClientConnection) -> None:
        """The process is gone. A fork of it may still hold the connection open."""
        if client not in self._clients and client not in self._disconnected:
            return  # an earlier event of the same round has closed the descriptor
        _guarded(self._drop, client)
        if client.members:
            self._dismiss([*client.members, *self._pool.dead()])
            self._forget(client)

    def _dismiss(self, members: Iterable[int]) -> None:
        """In a thread of its own: what is still in their files can be many GiB."""
        for member in members:
            self._reaper.submit(_guarded, self._pool.dismiss, member)

    def _forget(self, client: _PoolClientConnection) -> None:
        self._disconnected.discard(client)
        self._selector.unregister(client.pidfd)
        os.close(client.pidfd)

    def _serve(self, client: _PoolClientConnection) -> None:
        """Something has come, or an answer can go on."""
        if client not in self._clients:
            return None  # dropped by an earlier event of the same round
        try:
            if client.answer is not None:
                self._send(client)
            else:
                data = receive_without_descriptors(client.connection, _READ)
                if not data:
                    return self._drop(client)
                client.received += data
            while client.answer is None and not client.last:
                body = pool_protocol.take_message(client.received, pool_protocol.MAX_REQUEST)
                if body is None:
                    break
                client.deadline = None
                self._handle(client, pool_protocol.decode_request(body))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # it is gone
            return self._drop(client)
        except ProtocolError as error:
            client.last = True
            client.received.clear()
            self._answer(client, pool_protocol.PoolRefused(0, "protocol", errno.EPROTO, str(error)))
        except Exception:
            self._drop(client)
            raise
        client.wait_until(time.monotonic() + self._timeout)
        return None

    def _answer(self, client: _PoolClientConnection, reply: pool_protocol.Reply) -> None:
        client.answer = memoryview(pool_protocol.encode(reply))
        try:
            self._send(client)
        except BlockingIOError:
            pass
        except OSError:
            return self._drop(client)
        client.wait_until(time.monotonic() + self._timeout)
        return None

    def _send(self, client: _PoolClientConnection) -> None:
        assert client.answer is not None
        connection = client.connection
        self._selector.modify(connection, selectors.EVENT_WRITE, self._selector.get_key(connection).data)
        if client.descriptor is not None:
            sent = socket.send_fds(connection, [client.answer], [client.descriptor])
            os.close(client.descriptor)
            client.descriptor = None
        else:
            sent = connection.send(client.answer)
        client.answer = client.answer[sent:] or None
        if client.answer is None:
            if client.last:
                raise ConnectionAbortedError(errno.ECONNABORTED, "all is said")
            self._selector.modify(connection, selectors.EVENT_READ, self._selector.get_key(connection).data)

    # --- requests

    def _handle(self, client: _PoolClientConnection, request: pool_protocol.Request) -> None:
        if isinstance(request, pool_protocol.PoolHello) is client.greeted or client.events:
            raise ProtocolError("Hello comes first, and once; and a connection for events asks for nothing")
        reply: pool_protocol.Reply
        try:
            reply = self._do(client, request)
        except (OSError, ValueError) as error:
            reply = pool_protocol.refusal(request.id, error)
        self._answer(client, reply)

    def _do(self, client: _PoolClientConnection, request: pool_protocol.Request) -> pool_protocol.Reply:
        pool = self._pool
        self._dismiss(pool.dead())  # a server that was closed meanwhile may have left some
        match request:
            case pool_protocol.PoolHello():
                if request.version != pool_protocol.VERSION:
                    raise ProtocolError(
                        f"version {pool_protocol.VERSION} of the protocol is spoken here, not {request.version}"
                    )
                client.greeted, client.events = True, request.events
                return pool_protocol.PoolWelcome(request.id, pool.capacity, pool.block, pool.store.notes)
            case pool_protocol.Create():
                return self._create(client, request)
            case pool_protocol.Settle():
                pool.settle(_own(client, request.member), request.charged)
                return pool_protocol.PoolDone(request.id)
            case pool_protocol.Close():
                number = _own(client, request.member)
                client.members.remove(number)
                # Who closes a member has emptied its file, so this is done at once; if not, nobody is to wait for it.
                if pool.allocated(number):
                    self._dismiss([number])
                else:
                    pool.dismiss(number)
                return pool_protocol.PoolDone(request.id)
            case pool_protocol.Ask():
                return pool_protocol.StatisticsReply(request.id, pool.statistics())

    def _create(self, client: _PoolClientConnection, request: pool_protocol.Create) -> pool_protocol.Reply:
        taken = sum(len(other.members) for other in (*self._clients, *self._disconnected))
        if taken >= self._max_members:
            raise PoolFullError(
                errno.ENOSPC, f"the server has given out {taken} members, the most that it gives (max_members)"
            )
        wish = self._pool.wish(request.size, reserved=request.reserved, limit=request.limit, name=request.name)
        member = self._pool.open(wish, client.pid)
        client.members.add(member)
        try:
            client.descriptor = self._pool.descriptor(member)
        except OSError:  # no descriptors left
            client.members.remove(member)
            self._pool.dismiss(member)
            raise
        return pool_protocol.Created(request.id, member, wish.name, wish.size)

    # --- a fork of this process

    def _after_fork(self) -> None:
        """In the child: let go of the sockets, so that clients see it when the parent dies.

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
    """Whatever goes wrong with one client, the others are served."""
    try:
        work(*arguments)
    except Exception as error:  # noqa: BLE001
        report(error)


def _own(client: _PoolClientConnection, member: int) -> int:
    if member not in client.members:
        raise ValueError(f"member {member} is none of this connection")
    return member


def _encode_refusal(reason: str) -> bytes:
    return pool_protocol.encode(pool_protocol.PoolRefused(0, "protocol", errno.EPERM, reason))
