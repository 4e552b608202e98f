"""A client of a pool that another process serves."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from prefault._system.closing import Closing
from prefault.errors import PoolGoneError
from prefault.pool.block_charges import PoolAccount
from prefault.pool.high_water import HighWaterNotifier, OnHighWater
from prefault.pool.memory_pool import MemoryPool, NewMember
from prefault.pool.pool_statistics import PoolStatistics
from prefault.pool.service import pool_protocol
from prefault.pool.service.pool_connection import PoolConnection
from prefault.sizes import format_size


class PoolClient(Closing, MemoryPool):
    """A pool in another process; made by :func:`prefault.pool.connect`. A context manager.

    When the server ends, the memory stays: it can be used, discarded and closed, and populating it raises
    :class:`~prefault.PoolGoneError`. A request without a reply within the timeout raises :class:`~prefault.PoolGoneError`
    with ETIMEDOUT; once the server goes on (after SIGCONT, say) the client can be used as before. A fork of this process
    shares the memory and not the connection: it connects for itself.

    Attributes:
        capacity: the capacity of the pool in bytes.
        block: the size of its blocks in bytes.
        notes: its known weaknesses, each a sentence.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float, on_high_water: OnHighWater | None) -> None:
        if not timeout > 0:
            raise ValueError(f"a timeout is a positive number of seconds, not {timeout}")
        self._link = PoolConnection(path, timeout)
        try:
            welcome = self._link.greet(events=False)
            self.capacity, self.block, self.notes = welcome.capacity, welcome.block, welcome.notes
            self._listener = None if on_high_water is None else _HighWaterListener(path, timeout, on_high_water)
        except BaseException:
            self._link.close()
            raise
        self._members: set[_RemoteAccount] = set()

    def _add_member(self, size: int, reserved: int, limit: int | None, name: str | None) -> NewMember:
        request = pool_protocol.Create(0, size, reserved, limit, name)
        created, fd = self._link.call(request, pool_protocol.Created)
        if fd is None:
            raise PoolGoneError(errno.EPROTO, "the pool's server sent no descriptor with a new member")
        account = _RemoteAccount(self, created.member, fd)
        self._members.add(account)
        return NewMember(account, created.size, created.name, contextlib.nullcontext(fd))

    def statistics(self) -> PoolStatistics:
        """Return the statistics of the whole pool.

        Raises:
            PoolGoneError: the server does not answer.
        """
        return self._link.call(pool_protocol.StatisticsRequest(0), pool_protocol.StatisticsReply)[0].statistics

    def close(self) -> None:
        """End the connection. Idempotent.

        Raises:
            BufferError: memory from this pool is still open; close it first, as the server empties what a client leaves.
                Not raised while the server does not answer.
        """
        if self._members and self._link.usable and not self._link.late:
            count = len(self._members)
            raise BufferError(f"{count} sparse memor{'y is' if count == 1 else 'ies are'} still open: close them first")
        if self._listener is not None:
            self._listener.close()
        self._link.close()

    def __repr__(self) -> str:
        state = "connected" if self._link.usable else "not connected"
        return f"<PoolClient of {format_size(self.capacity)} at {self._link.path}, {state}>"


class _RemoteAccount(PoolAccount):
    """An account with a pool in another process."""

    def __init__(self, client: PoolClient, number: int, fd: int) -> None:
        self._client = client  # keeps the client alive as long as its memory
        self._number = number
        self._fd: int | None = fd
        self._charged = 0

    def settle(self, charged: int) -> None:
        link, request = self._client._link, pool_protocol.Settle(0, self._number, charged)
        if charged > self._charged:
            try:
                link.call(request, pool_protocol.PoolDone)
            except PoolGoneError:
                # The server may still execute the request when it goes on: the charge that is valid follows right behind.
                with contextlib.suppress(PoolGoneError):
                    link.post(pool_protocol.Settle(0, self._number, self._charged))
                raise
        else:
            link.post(request)
        self._charged = charged

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            # In this process, as it can take seconds: the server then finds the file empty.
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
            self._client._members.discard(self)
            with contextlib.suppress(PoolGoneError):
                self._client._link.post(pool_protocol.Close(0, self._number))


class _HighWaterListener:
    """A second connection, on which the server sends the high-water events, and the thread that receives them."""

    def __init__(self, path: str | os.PathLike[str], timeout: float, callback: OnHighWater) -> None:
        self._link = PoolConnection(path, timeout)
        try:
            self._link.greet(events=True)
        except BaseException:
            self._link.close()
            raise
        self._notifier = HighWaterNotifier(callback)
        self._thread = threading.Thread(target=self._run, name="prefault-pool-events", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(PoolGoneError):
            while True:
                message = self._link.receive(None)
                if isinstance(message, pool_protocol.HighWaterReached):
                    self._notifier.notify(message.statistics)

    def close(self) -> None:
        if self._link.usable:
            self._link.shut_down()
            if threading.current_thread() is not self._thread:
                self._thread.join()
        self._link.close()
