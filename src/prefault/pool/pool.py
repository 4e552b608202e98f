"""Pool: a bounded store of memory from which sparse memories draw."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prefault.mapping.mapping import HugeAdvice
from prefault.memory.backings import BackingSource, Descriptor
from prefault.pool.block_charges import BlockCharges, PoolAccount
from prefault.pool.high_water import Notifier, OnHighWater
from prefault.pool.members import MemberTable, extent, round_up
from prefault.pool.pool_statistics import PoolStatistics
from prefault.sizes import Size, format_size
from prefault.sparse import SparseMemory
from prefault.sparse.sparse_memory import Unpopulated

if TYPE_CHECKING:
    from prefault.pool.service.pool_server import PoolServer


class Pool:
    """A bounded store of memory: any number of :class:`~prefault.SparseMemory` draw from it, never more than ``capacity``.

    ::

        with prefault.Pool("8 GiB", backing="memfd-hugetlb") as pool:
            guest = pool.sparse("1 TiB", reserved="2 GiB", limit="6 GiB")
            guest.populate(0, "1 GiB")        # or PoolFullError, before any page is touched
            guest.discard(0, "512 MiB")       # at once there for others

    The pool keeps books of blocks. A block is charged to a member from the moment that it is about to be populated until it
    is discarded. What a member reserved is kept free for it: no *other member* can take it. Against the rest of the machine
    a promise is as good as the backing. Huge pages are set aside by the kernel for this pool; a tmpfs mount of its own has
    no other users, and still competes for memory; a memfd competes with everybody. :attr:`notes` tells what can be seen
    beforehand.

    Closing a member empties its file: whoever else still maps it gets SIGBUS, and cannot take memory behind the books.

    Args:
        capacity: bytes, a multiple of ``block``.
        backing: ``"memfd"``, ``"tmpfs"``, ``"memfd-hugetlb"``, a :class:`~prefault.Memfd`, or a
            :class:`~prefault.TemporaryFile` in a directory on tmpfs or hugetlbfs. Each member gets a file of its own.
        block: the unit of all books; a multiple of the page size of the backing.
        high_water: a fraction of the capacity (``0.9``) or a size (``"7 GiB"``).
        on_high_water: called with the :class:`PoolStatistics` when the charge comes from below the mark to it or above;
            again after it was below. It runs in a thread of its own, one call at a time, with no lock held, so that it may
            discard and populate. What it raises goes to ``threading.excepthook``.

    Raises:
        MappingError: the tmpfs is smaller than that, or the hugetlb pool has not so many pages.
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
        self._register = MemberTable(capacity, backing, block, high_water)
        if on_high_water is not None:
            self._register.listen(Notifier(on_high_water).notify)
        self._servers: list[PoolServer] = []
        self._pid = os.getpid()

    @property
    def capacity(self) -> int:
        """Bytes."""
        return self._register.capacity

    @property
    def block(self) -> int:
        """Bytes in a block."""
        return self._register.block

    @property
    def notes(self) -> tuple[str, ...]:
        """What is weaker than it looks, each a sentence."""
        return self._register.store.notes

    def sparse(
        self,
        size: Size,
        *,
        reserved: Size = 0,
        limit: Size | None = None,
        unpopulated: Unpopulated = "fault",
        reservation: Size | None = None,
        huge: HugeAdvice = "auto",
        name: str | None = None,
    ) -> SparseMemory:
        """Sparse memory that draws from this pool; it is closed like any other, and gives everything back then.

        Args:
            size: bytes, rounded up to blocks. It may be far more than the capacity.
            reserved: bytes that no other member can take, rounded up to blocks.
            limit: bytes that it may have at most, rounded down to blocks; None: what the pool has.
            unpopulated: ``"fault"``: touching what is not populated is a SIGSEGV. ``"zeros"``: it takes memory that no
                book sees; statistics show it as allocated beyond what is charged.
            reservation: how far it can be resized; None: its size.
            huge: as for :class:`~prefault.SparseMemory`.
            name: for statistics and messages.

        Raises:
            PoolFullError: what is to be reserved is not there.
            MappingError: the file cannot be made or mapped.
            ValueError: the pool is closed; a wrong size or option.
        """
        wanted, whole = extent(size, reservation)
        wish = self._register.wish(whole, reserved=reserved, limit=limit, name=name)
        self._register.bury()
        number = self._register.open(wish, os.getpid())
        account = _LocalAccount(self._register, number)
        try:
            books = BlockCharges(account, wish.size, self.block, wish.name)
            fd = self._register.descriptor(number)
            try:
                return SparseMemory(
                    round_up(wanted, self.block), reservation=wish.size, backing=Descriptor(fd), block=self.block,
                    unpopulated=unpopulated, huge=huge, books=books,
                )  # fmt: skip
            finally:
                os.close(fd)
        except BaseException:
            account.close()
            raise

    def statistics(self) -> PoolStatistics:
        """What is charged, promised, available, and to whom; and what the kernel says of it.

        Raises:
            ValueError: the pool is closed.
            PoolGoneError: this is a fork of its process.
        """
        self._register.bury()
        return self._register.statistics()

    def serve(
        self, path: str | os.PathLike[str], *, max_connections: int = 64, max_members: int = 256, timeout: float = 10.0
    ) -> PoolServer:
        """Share the pool with other processes of this user, which :func:`prefault.pool.connect` to ``path``.

        Args:
            path: of a socket, made for this user alone. One that a dead server left is replaced.
            max_connections: at once; further ones are told so and closed.
            max_members: that clients may have, all together.
            timeout: seconds that a client has for the rest of a message, and to take an answer.

        Raises:
            FileExistsError: a server is alive there, or it is no socket.
            ImportError: msgspec is not installed (``pip install msgspec``).
        """
        from prefault.pool.service.pool_server import PoolServer

        server = PoolServer(self._register, path, max_connections=max_connections, max_members=max_members, timeout=timeout)
        self._servers.append(server)
        return server

    def close(self) -> None:
        """End the pool and its servers. Open members keep their memory, and can be populated no more. Idempotent."""
        if os.getpid() == self._pid:
            for server in self._servers:
                server.close()
        self._register.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._register.closed

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._register)} members"
        return f"<Pool of {format_size(self.capacity)}, {self._register.store.backing!r}, {state}>"


class _LocalAccount(PoolAccount):
    """An account with a pool in this process."""

    def __init__(self, register: MemberTable, number: int) -> None:
        self._register = register
        self._number = number

    def settle(self, charged: int) -> None:
        self._register.bury()
        self._register.settle(self._number, charged)

    def close(self) -> None:
        self._register.dismiss(self._number)
