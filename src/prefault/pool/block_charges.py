"""One member of a pool, as its memory sees it: which blocks are charged."""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator

from prefault.errors import PoolGoneError
from prefault.ranges import PageRange, RangeSet
from prefault.sparse.accounting import Accounting


class PoolAccount(abc.ABC):
    """What a pool, here or in another process, keeps of a member: how much is charged."""

    @abc.abstractmethod
    def settle(self, charged: int) -> None:
        """Have ``charged`` bytes charged in all. Absolute: to repeat it does no harm, and it heals what was left half done.

        Raises:
            PoolFullError: too much; nothing has changed.
            PoolGoneError: the pool cannot be asked.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Empty the member's file and give everything back. Raises nothing when the pool cannot be asked."""


class BlockCharges(Accounting):
    """Which blocks of a member are charged. The pool knows how many; which ones is the member's own affair.

    A forked child shares the memory and not the account: there :meth:`charge` raises, and the rest does nothing.

    Args:
        account: with the pool.
        size: of the file, bytes.
        block: bytes.
        name: for messages.
    """

    def __init__(self, account: PoolAccount, size: int, block: int, name: str) -> None:
        self._account = account
        self._block = block
        self._name = name
        self._pid = os.getpid()
        # A byte a block, 1 where it is charged. It is zeroed memory of the system: what is never charged costs nothing.
        self._blocks = bytearray(size // block)
        self._charged = 0
        self._closed = False
        # Reentrant: a finalizer that discards may come by in this very thread.
        self._lock = threading.RLock()

    @property
    def charged(self) -> int:
        """Bytes in the blocks that are charged."""
        return self._charged

    def charge(self, blocks: RangeSet) -> RangeSet:
        """Charge those blocks that are not, all or none; those that were not."""
        if os.getpid() != self._pid:  # before the lock: another thread may have held it at the time of the fork
            raise PoolGoneError(
                errno.ENOTCONN,
                f"{self._name} is drawn from the pool by process {self._pid}, of which this one is a fork: it may use the"
                " memory, and only that process can populate it",
            )
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._name} is closed")
            runs = list(self._runs(blocks, 0))
            if runs:
                self._mark(runs, 1)
                try:
                    self._account.settle(self._charged)
                except BaseException as error:
                    self._mark(runs, 0)
                    if not isinstance(error, Exception):  # Ctrl-C, and nobody knows whether the pool has heard
                        with contextlib.suppress(Exception):
                            self._account.settle(self._charged)
                    raise
            return RangeSet(PageRange(start * self._block, stop * self._block) for start, stop in runs)

    def refund(self, blocks: RangeSet) -> None:
        """Give up those blocks that are charged."""
        if os.getpid() != self._pid:
            return  # they stay charged until their owner discards them
        with self._lock:
            runs = list(self._runs(blocks, 1))
            if runs and not self._closed:
                self._mark(runs, 0)
                # The pages are gone whether the pool hears of it or not.
                with contextlib.suppress(PoolGoneError):
                    self._account.settle(self._charged)

    def close(self) -> None:
        """Give everything back, and empty the file. A second call does nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._account.close()

    def _runs(self, blocks: RangeSet, state: int) -> Iterator[tuple[int, int]]:
        """The runs of block numbers in ``blocks`` that are charged (1) or not (0)."""
        wanted, other = (b"\1", b"\0") if state else (b"\0", b"\1")
        for item in blocks:
            at, stop = item.start // self._block, item.stop // self._block
            while (at := self._blocks.find(wanted, at, stop)) >= 0:
                end = self._blocks.find(other, at, stop)
                end = stop if end < 0 else end
                yield at, end
                at = end

    def _mark(self, runs: Iterable[tuple[int, int]], state: int) -> None:
        for start, stop in runs:
            self._blocks[start:stop] = bytes((state,)) * (stop - start)
            self._charged += (stop - start) * (self._block if state else -self._block)
