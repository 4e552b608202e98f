"""The members of a pool: their files, what they have, and what becomes of it when they go. For the pool and its servers."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import threading
from collections.abc import Iterable
from typing import NamedTuple

from prefault._system.descriptors import Descriptors
from prefault.errors import PoolGoneError
from prefault.memory.backings import BackingSource
from prefault.pool.high_water import OnHighWater
from prefault.pool.huge_page_reserve import HugePageReserve
from prefault.pool.ledger import Ledger, MemberAccount
from prefault.pool.pool_statistics import MemberStatistics, PoolStatistics
from prefault.pool.store import open_store
from prefault.sizes import MAX_SIZE, PAGE_SIZE, Size, format_size, parse_size

MAX_BLOCKS = 1 << 32
"""The most blocks that one member may have: its book takes a byte for each that is used."""

MAX_NAME = 100
"""Characters in the name of a member."""


class MemberRequest(NamedTuple):
    """What a member is to be: bytes, checked and in whole blocks."""

    name: str
    size: int
    reserved: int
    limit: int | None


class _MemberRecord(NamedTuple):
    name: str
    pid: int
    fd: int
    size: int


class MemberTable:
    """The members by number, and the ledger. All calls may come from any thread.

    Attributes:
        capacity: bytes.
        block: bytes.
        store: where the files are made.
        closed: whether it is.
    """

    def __init__(self, capacity: Size, backing: BackingSource | str, block: Size, high_water: float | Size | None) -> None:
        self.capacity, self.block = parse_size(capacity), parse_size(block)
        if not self.block:
            raise ValueError("a block of 0 bytes is not possible")
        if not self.capacity or self.capacity % self.block:
            raise ValueError(
                f"the capacity is a positive multiple of the block of {self.block} bytes ({format_size(self.block)}),"
                f" not {self.capacity}"
            )
        mark = _high_water(high_water, self.capacity)
        self.store = open_store(backing, self.capacity)
        if self.block % self.store.page_size:
            raise ValueError(f"a block is a multiple of the page of {self.store.page_size} bytes, not {self.block}")
        self._reserve = HugePageReserve(self.store, self.capacity) if self.store.page_size > PAGE_SIZE else None
        self.closed = False
        self._ledger = Ledger(self.capacity, mark)
        self._listeners: tuple[OnHighWater, ...] = ()
        self._members: dict[int, _MemberRecord] = {}
        self._leaving: set[int] = set()
        """Members whose files are being emptied; who does that closes them."""
        self._orphans: dict[int, frozenset[int]] = {}
        """Members whose process has lost its connection, by the descriptor (pidfd) that tells when it ends."""
        self._next = 1
        self._pid = os.getpid()
        # Reentrant: a finalizer that closes a member may come by in this very thread.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """How many members there are."""
        return len(self._members)

    def wish(self, size: Size, *, reserved: Size = 0, limit: Size | None = None, name: str | None = None) -> MemberRequest:
        """Check what a member is to be, and round it to blocks."""
        length = round_up(parse_size(size), self.block)
        promise = round_up(parse_size(reserved), self.block)
        most = None if limit is None else parse_size(limit)
        if not 0 < length <= min(MAX_SIZE - self.block, MAX_BLOCKS * self.block):
            raise ValueError(
                f"a member has between 1 and {MAX_BLOCKS} blocks of {format_size(self.block)}, and at most 2**63 - 1 bytes:"
                f" {length} bytes do not fit (larger blocks may help)"
            )
        if promise > length:
            raise ValueError(f"{promise} bytes are to be reserved for a member of {length} bytes")
        if most is not None:
            most -= most % self.block
            if not most:
                raise ValueError(f"a limit is at least one block of {format_size(self.block)}, not {limit!r}")
            if promise > most:
                raise ValueError(f"{promise} bytes are to be reserved for a member whose limit is {most} bytes")
        check_name(name)
        with self._lock:
            return MemberRequest(name or f"member {self._next}", length, promise, most)

    def open(self, wish: MemberRequest, pid: int) -> int:
        """Enter a member into the books and make its file; its number."""
        self._check_process()
        with self._lock:
            self._check_open()
            number, self._next = self._next, self._next + 1
            self._ledger.open(number, MemberAccount(wish.name, 0, wish.reserved, wish.limit))
            try:
                with Descriptors() as descriptors:
                    self.store.backing.open(descriptors, wish.size, writable=True)
                    fd = descriptors.pop()
            except BaseException:
                self._ledger.close(number)
                raise
            self._members[number] = _MemberRecord(wish.name, pid, fd, wish.size)
            return number

    def descriptor(self, number: int) -> int:
        """A new descriptor of a member's file."""
        with self._lock:
            self._check_open()
            return os.dup(self._members[number].fd)

    def settle(self, number: int, charged: int) -> None:
        """Set what is charged to a member, in bytes.

        Raises:
            PoolFullError: that is too much; nothing has changed.
            PoolGoneError: the pool is closed, or this is a fork of its process.
        """
        self._check_process()
        with self._lock:
            if self.closed:
                raise PoolGoneError(errno.ENOTCONN, "the pool is closed: its members can be used, not populated further")
            account, size = self._ledger[number], self._members[number].size
            if not 0 <= charged <= size or charged % self.block:
                raise ValueError(f"{account.name} of {size} bytes cannot have {charged} bytes charged")
            crossed = self._ledger.settle(number, charged)
            self._hold()
            event = self._statistics() if crossed else None
        if event is not None:
            for listener in self._listeners:
                listener(event)

    def dismiss(self, number: int) -> None:
        """Empty a member's file, and give everything that it has back to the others."""
        with self._lock:
            found = self._members.get(number)
            if found is None or number in self._leaving:
                return
            self._leaving.add(number)
        # Not under the lock: it may be many GiB. The blocks are free when the memory is.
        try:
            # Cut off, not punched: what somebody else still maps can then never take memory again behind the books.
            os.ftruncate(found.fd, 0)
        finally:
            with self._lock:
                self._leaving.discard(number)
                self._members.pop(number, None)
                self._ledger.close(number)
                self._hold()
                os.close(found.fd)

    def orphan(self, numbers: Iterable[int], pidfd: int) -> None:
        """The process of these members has lost its connection: its memory is taken back when it ends, not before.

        ``pidfd`` is duplicated.
        """
        with self._lock:
            left = frozenset(numbers) & self._members.keys()
            if left:
                self._orphans[os.dup(pidfd)] = left

    def dead(self) -> list[int]:
        """Orphans whose process has ended; they are the caller's to dismiss."""
        if not self._orphans or os.getpid() != self._pid:
            return []
        with self._lock:
            ended = [pidfd for pidfd in self._orphans if _ended(pidfd)]
            found = [number for pidfd in ended for number in self._orphans.pop(pidfd)]
            for pidfd in ended:
                os.close(pidfd)
        return found

    def bury(self) -> None:
        """Take back what orphans left whose process has ended. Emptying their files can take a while."""
        for number in self.dead():
            self.dismiss(number)

    def allocated(self, number: int) -> int:
        """Bytes that a member's file holds, as the kernel says."""
        with self._lock:
            return os.fstat(self._members[number].fd).st_blocks * 512

    def statistics(self) -> PoolStatistics:
        """The books, and what the kernel says of the files."""
        self._check_process()
        with self._lock:
            self._check_open()
            return self._statistics()

    def listen(self, listener: OnHighWater) -> None:
        """Call ``listener`` at the high-water mark, in the thread that charges: it must only take note."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def unlisten(self, listener: OnHighWater) -> None:
        """The reverse of :meth:`listen`."""
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other != listener)

    def close(self) -> None:
        """Let go of all files. What members have mapped stays theirs."""
        if os.getpid() != self._pid:
            self._lock = threading.RLock()  # another thread may have held it at the time of the fork
        with self._lock:
            if self.closed:
                return
            self.closed = True
            files = [member.fd for number, member in self._members.items() if number not in self._leaving]
            for fd in (*files, *self._orphans):
                os.close(fd)
            self._members.clear()
            self._orphans.clear()
            if self._reserve is not None:
                self._reserve.close()

    def __del__(self) -> None:
        # Nobody refers to it any more, so no member and no server is left. At interpreter exit the functions may be gone.
        with contextlib.suppress(TypeError, AttributeError):
            self.close()

    def _hold(self) -> None:
        """Have the kernel keep what is not charged. Another process may have been faster: the next call tries again."""
        if self._reserve is not None:
            self._reserve.hold(self.capacity - self._ledger.charged)

    def _statistics(self) -> PoolStatistics:
        books = self._ledger
        free = books.capacity - books.charged
        return PoolStatistics(
            books.capacity, books.charged, books.kept_free, books.available, books.peak,
            tuple(self._describe(number, member) for number, member in self._members.items()),
            0 if self._reserve is None else free - self._reserve.held,
        )  # fmt: skip

    def _describe(self, number: int, found: _MemberRecord) -> MemberStatistics:
        account = self._ledger[number]
        return MemberStatistics(
            found.name, found.pid, found.size, account.charged, account.reserved, account.limit,
            os.fstat(found.fd).st_blocks * 512, any(number in orphans for orphans in self._orphans.values()),
        )  # fmt: skip

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the pool is closed")

    def _check_process(self) -> None:
        # Before the lock: another thread may have held it at the time of the fork.
        if os.getpid() != self._pid:
            raise PoolGoneError(errno.ENOTCONN, f"the pool belongs to process {self._pid}, of which this one is a fork")


def extent(size: Size, reservation: Size | None) -> tuple[int, int]:
    """The size of sparse memory, and how far it can be resized, in bytes."""
    wanted = parse_size(size)
    whole = wanted if reservation is None else parse_size(reservation)
    if whole < wanted:
        raise ValueError(f"a reservation of {whole} bytes is smaller than the size of {wanted} bytes")
    return wanted, whole


def check_name(name: str | None) -> None:
    """ValueError unless a member can be called that."""
    if name is not None and (not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable()):
        raise ValueError(f"a name has 1 to {MAX_NAME} printable characters, not {str(name)[:200]!r}")


def round_up(size: int, block: int) -> int:
    """``size``, or the next multiple of ``block``."""
    return size + -size % block


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _high_water(mark: float | Size | None, capacity: int) -> int | None:
    if mark is None:
        return None
    if isinstance(mark, float):
        if not 0 < mark <= 1:
            raise ValueError(f"high_water is a fraction above 0 and up to 1.0, or a size: not {mark}")
        return math.ceil(mark * capacity)
    size = parse_size(mark)
    if not 0 < size <= capacity:
        raise ValueError(f"high_water is a size above 0 and up to the capacity of {format_size(capacity)}, not {mark!r}")
    return size
