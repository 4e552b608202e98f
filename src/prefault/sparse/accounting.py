"""What a pool is to sparse memory: the books of which blocks are charged to it."""

from __future__ import annotations

import abc

from prefault.ranges import RangeSet


class Accounting(abc.ABC):
    """The account of one :class:`~prefault.SparseMemory` with whoever its memory is drawn from.

    Offsets are bytes from the start of the memory, in whole blocks. Calls for different blocks may come from several threads
    at once; two calls for the same block never overlap.
    """

    @abc.abstractmethod
    def charge(self, blocks: RangeSet) -> RangeSet:
        """Book blocks that are about to be populated, all or none; those that were not booked before.

        Called before a page is touched and before a fence is opened.

        Raises:
            PoolFullError: there is no room for them. Nothing is booked then.
        """

    @abc.abstractmethod
    def refund(self, blocks: RangeSet) -> None:
        """Blocks that were discarded, or whose population failed: no page of them is left. Some may not be booked at all."""

    @abc.abstractmethod
    def close(self) -> None:
        """The memory is gone. Called once."""
