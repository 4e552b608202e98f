"""Sparse memory of a pool, whether the pool is in this process or another."""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager
from typing import NamedTuple

from prefault.mapping.mapping import HugeAdvice
from prefault.memory.backings import Descriptor
from prefault.pool.block_charges import BlockCharges, PoolAccount
from prefault.pool.members import check_name, extent, round_up
from prefault.sizes import Size, parse_size
from prefault.sparse import SparseMemory
from prefault.sparse.sparse_memory import Unpopulated


class NewMember(NamedTuple):
    """A member that was added to a pool.

    Attributes:
        account: its account with the pool.
        size: length of its file, bytes.
        name: the name in messages.
        file: context manager of a descriptor of its file.
    """

    account: PoolAccount
    size: int
    name: str
    file: AbstractContextManager[int]


class MemoryPool(abc.ABC):
    """Base of :class:`Pool` and :class:`PoolClient`.

    Attributes:
        capacity: the capacity of the pool in bytes.
        block: the size of its blocks in bytes.
    """

    capacity: int
    block: int

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
        """Make sparse memory of this process that draws from the pool; closing it refunds everything.

        Args:
            size: bytes, rounded up to blocks. It may be far more than the capacity.
            reserved: bytes that no other member can take, rounded up to blocks.
            limit: the most bytes that it may have, rounded down to blocks; None: the capacity.
            unpopulated: ``"fault"``: touching what is not populated is a SIGSEGV. ``"zeros"``: it allocates memory that is
                not charged; statistics show it as allocated beyond what is charged.
            reservation: the most bytes that it can be resized to; None: its size.
            huge: advice on huge pages, see :class:`~prefault.SparseMemory`.
            name: the name in statistics and messages.

        Raises:
            PoolFullError: fewer bytes are available than are to be reserved.
            PoolGoneError: the server of a shared pool does not answer.
            MappingError: the file cannot be made or mapped.
            ValueError: the pool is closed; a wrong size or option.
        """
        wanted, whole = extent(size, reservation)
        check_name(name)  # a wrong name would make an invalid message, which ends the connection to a shared pool
        most = None if limit is None else parse_size(limit)
        member = self._add_member(whole, parse_size(reserved), most, name)
        try:
            accounting = BlockCharges(member.account, member.size, self.block, member.name)
            with member.file as fd:
                return SparseMemory(
                    round_up(wanted, self.block), reservation=member.size, backing=Descriptor(fd), block=self.block,
                    unpopulated=unpopulated, huge=huge, accounting=accounting,
                )  # fmt: skip
        except BaseException:
            member.account.close()
            raise

    @abc.abstractmethod
    def _add_member(self, size: int, reserved: int, limit: int | None, name: str | None) -> NewMember:
        """Add a member to the pool; sizes are bytes."""
