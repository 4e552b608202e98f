"""The accounting of one member of a pool, block by block."""

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
    """The account of a member with its pool, in this process or another: the sum of bytes that is charged."""

    @abc.abstractmethod
    def settle(self, charged: int) -> None:
        """Set the bytes that are charged in all. Idempotent: repeating the call completes one that was interrupted.

        Raises:
            PoolFullError: too much; nothing has changed.
            PoolGoneError: the pool does not answer.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Empty the member's file and refund everything. Raises nothing when the pool does not answer."""


class BlockCharges(Accounting):
    """The blocks of a member that are charged. The pool knows only their number.

    A forked child shares the memory and not the account: there :meth:`charge` raises, and the rest does nothing.

    Args:
        account: the member's account with the pool.
        size: length of the file, bytes.
        block: size of a block, bytes.
        name: the name in messages.
    """

    def __init__(self, account: PoolAccount, size: int, block: int, name: str) -> None:
        self._account = account
        self._block = block
        self._name = name
        self._pid = os.getpid()
        # One byte per block, 1 where it is charged. The kernel supplies zeroed pages on demand, so that others are free.
        self._blocks = bytearray(size // block)
        self._charged = 0
        self._closed = False
        # Reentrant: a finalizer may discard in the thread that holds the lock.
        self._lock = threading.RLock()

    @property
    def charged(self) -> int:
        """The bytes in the blocks that are charged."""
        return self._charged

    def charge(self, blocks: RangeSet) -> RangeSet:
        """Charge the blocks that are not charged yet, all or none; return them.

        Raises:
            PoolFullError: too much; nothing has changed.
            PoolGoneError: the pool does not answer, or this process is a fork of the member's.
        """
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
                    if not isinstance(error, Exception):  # Ctrl-C: the pool may have received the request, or not
                        with contextlib.suppress(Exception):
                            self._account.settle(self._charged)
                    raise
            return RangeSet(PageRange(start * self._block, stop * self._block) for start, stop in runs)

    def refund(self, blocks: RangeSet) -> None:
        """Refund the blocks that are charged."""
        if os.getpid() != self._pid:
            return  # they stay charged until the member's process discards them
        with self._lock:
            runs = list(self._runs(blocks, 1))
            if runs and not self._closed:
                self._mark(runs, 0)
                # The pages are gone even if the pool does not answer.
                with contextlib.suppress(PoolGoneError):
                    self._account.settle(self._charged)

    def close(self) -> None:
        """Empty the file and refund everything. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._account.close()

    def _runs(self, blocks: RangeSet, state: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of block numbers in ``blocks`` whose state is charged (1) or not (0)."""
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
