"""Pool: a bounded store of memory from which sparse memories draw."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefault.memory.backings import BackingSource
from prefault.pool.block_charges import PoolAccount
from prefault.pool.high_water import HighWaterNotifier, OnHighWater
from prefault.pool.members import MemberTable
from prefault.pool.memory_pool import MemoryPool, NewMember
from prefault.pool.pool_statistics import PoolStatistics
from prefault.sizes import Size, format_size

if TYPE_CHECKING:
    from prefault.pool.service.pool_server import PoolServer


class Pool(MemoryPool):
    """A bounded store of memory: any number of :class:`~prefault.SparseMemory` draw from it, never more than ``capacity``.

    ::

        with prefault.Pool("8 GiB", backing="memfd-hugetlb") as pool:
            guest = pool.sparse("1 TiB", reserved="2 GiB", limit="6 GiB")
            guest.populate(0, "1 GiB")        # or PoolFullError, before any page is touched
            guest.discard(0, "512 MiB")       # at once there for others

    Memory is accounted in blocks. A block is charged to a member just before it is populated, and refunded when it is
    discarded. What a member reserved is kept free for it: no *other member* can take it. Against the rest of the machine
    a reservation is as good as the backing. Huge pages are reserved by the kernel for this pool; a tmpfs mount of its own
    has no other users, and still competes for memory; a memfd competes with all processes. :attr:`notes` lists the
    weaknesses that are known beforehand.

    Closing a member empties its file: another process that still maps it gets SIGBUS, and cannot allocate uncharged memory.

    Args:
        capacity: bytes, a multiple of ``block``.
        backing: ``"memfd"``, ``"tmpfs"``, ``"memfd-hugetlb"``, a :class:`~prefault.Memfd`, or a
            :class:`~prefault.TemporaryFile` in a directory on tmpfs or hugetlbfs. Each member gets a file of its own.
        block: the unit of accounting; a multiple of the page size of the backing.
        high_water: a fraction of the capacity (``0.9``) or a size (``"7 GiB"``).
        on_high_water: called with the :class:`PoolStatistics` when the charge rises from below the mark to it or above;
            again after it was below. It runs in a thread of its own, one call at a time, with no lock held, so that it may
            discard and populate. Its exceptions go to ``threading.excepthook``.

    Attributes:
        capacity: bytes.
        block: bytes.

    Raises:
        MappingError: the tmpfs is smaller than that, or the hugetlb pool has fewer pages.
        ValueError, TypeError: a wrong size, backing or option.
    """

    def __init__(
        self,
        capacity: Size,
        *,
        backing: BackingSource | str = "memfd",
        block: Size = "2 MiB",
        high_water: float | Size | None = None,
        on_high_water: OnHighWater | None = None,
    ) -> None:
        if on_high_water is not None and high_water is None:
            raise ValueError("on_high_water needs a mark: high_water=0.9, or a size")
        self._table = MemberTable(capacity, backing, block, high_water)
        self.capacity, self.block = self._table.capacity, self._table.block
        if on_high_water is not None:
            self._table.add_listener(HighWaterNotifier(on_high_water).notify)
        self._servers: list[PoolServer] = []
        self._pid = os.getpid()

    @property
    def notes(self) -> tuple[str, ...]:
        """Weaknesses of this pool that are known beforehand, each a sentence."""
        return self._table.store.notes

    def _add_member(self, size: int, reserved: int, limit: int | None, name: str | None) -> NewMember:
        request = self._table.check_request(size, reserved=reserved, limit=limit, name=name)
        self._table.reap()
        number = self._table.open(request, os.getpid())
        return NewMember(_LocalAccount(self._table, number), request.size, request.name, self._file(number))

    @contextlib.contextmanager
    def _file(self, number: int) -> Iterator[int]:
        fd = self._table.descriptor(number)
        try:
            yield fd
        finally:
            os.close(fd)

    def statistics(self) -> PoolStatistics:
        """Return the charges and reservations, in all and of each member, and what the files hold.

        Raises:
            ValueError: the pool is closed.
            PoolGoneError: this is a fork of its process.
        """
        self._table.reap()
        return self._table.statistics()

    def serve(
        self, path: str | os.PathLike[str], *, max_connections: int = 64, max_members: int = 256, timeout: float = 10.0
    ) -> PoolServer:
        """Share the pool with other processes of this user, which :func:`prefault.pool.connect` to ``path``.

        Args:
            path: path of a socket, made for this user alone. One that a dead server left is replaced.
            max_connections: the most connections at once; further ones are told so and closed.
            max_members: the most members of all clients together.
            timeout: seconds that a client has for the rest of a message, and to read a reply.

        Raises:
            FileExistsError: a server is alive there, or the path is no socket.
            ImportError: msgspec is not installed (``pip install msgspec``).
        """
        from prefault.pool.service.pool_server import PoolServer

        server = PoolServer(self._table, path, max_connections=max_connections, max_members=max_members, timeout=timeout)
        self._servers.append(server)
        return server

    def close(self) -> None:
        """Close the pool and its servers. Open members keep their memory, and cannot be populated any more. Idempotent."""
        if os.getpid() == self._pid:
            for server in self._servers:
                server.close()
        self._table.close()

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self._table.closed

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._table)} members"
        return f"<Pool of {format_size(self.capacity)}, {self._table.store.backing!r}, {state}>"


class _LocalAccount(PoolAccount):
    """An account with a pool in this process."""

    def __init__(self, table: MemberTable, number: int) -> None:
        self._table = table
        self._number = number

    def settle(self, charged: int) -> None:
        self._table.reap()
        self._table.settle(self._number, charged)

    def close(self) -> None:
        self._table.remove(self._number)
