"""The accounting of populated blocks: the interface between sparse memory and a pool."""

from __future__ import annotations

import abc

from prefault.ranges import RangeSet


class Accounting(abc.ABC):
    """The account of one :class:`~prefault.SparseMemory` with the pool that its memory is drawn from.

    Offsets are bytes from the start of the memory, in whole blocks. Calls for different blocks may come from several threads
    at once; two calls for the same block never overlap.
    """

    @abc.abstractmethod
    def charge(self, blocks: RangeSet) -> RangeSet:
        """Charge blocks that are about to be populated, all or none; return those that were not charged before.

        Called before a page is touched and before a block is unprotected.

        Raises:
            PoolFullError: there is no room for them. Nothing is charged then.
        """

    @abc.abstractmethod
    def refund(self, blocks: RangeSet) -> None:
        """Refund blocks without a page: discarded, or their population failed. Some may not be charged at all."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the account: the memory is gone. Called once."""
