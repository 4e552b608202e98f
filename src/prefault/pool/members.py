"""The members of a pool and their files, from creation until they are closed or reaped; for the pool and its servers."""

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
"""The most blocks of one member, whose accounting takes a byte for each that is used."""

MAX_NAME = 100
"""The most characters in the name of a member."""


class MemberRequest(NamedTuple):
    """The checked description of a new member; sizes are bytes in whole blocks."""

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
    """The members of a pool by number, and its ledger. Thread-safe.

    Attributes:
        capacity: bytes.
        block: bytes.
        store: maker of the members' files.
        closed: True once :meth:`close` was called.
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
        """Members whose files are being emptied, by the thread that closes them afterwards."""
        self._detached: dict[int, frozenset[int]] = {}
        """Members whose process has lost its connection, by the pidfd of that process."""
        self._next = 1
        self._pid = os.getpid()
        # Reentrant: a finalizer may close a member in the thread that holds the lock.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self._members)

    def check_request(
        self, size: Size, *, reserved: Size = 0, limit: Size | None = None, name: str | None = None
    ) -> MemberRequest:
        """Check the description of a new member and round its sizes to blocks."""
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

    def open(self, request: MemberRequest, pid: int) -> int:
        """Add a member and create its file; return its number."""
        self._check_process()
        with self._lock:
            self._check_open()
            number, self._next = self._next, self._next + 1
            self._ledger.open(number, MemberAccount(request.name, 0, request.reserved, request.limit))
            try:
                with Descriptors() as descriptors:
                    self.store.backing.open(descriptors, request.size, writable=True)
                    fd = descriptors.pop()
            except BaseException:
                self._ledger.close(number)
                raise
            self._members[number] = _MemberRecord(request.name, pid, fd, request.size)
            return number

    def descriptor(self, number: int) -> int:
        """Return a new descriptor of a member's file."""
        with self._lock:
            self._check_open()
            return os.dup(self._members[number].fd)

    def settle(self, number: int, charged: int) -> None:
        """Set the bytes that are charged to a member.

        Raises:
            PoolFullError: too much; nothing has changed.
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
            self._resize_reserve()
            event = self._statistics() if crossed else None
        if event is not None:
            for listener in self._listeners:
                listener(event)

    def remove(self, number: int) -> None:
        """Empty a member's file, remove the member and refund its charge and reservation. Idempotent."""
        with self._lock:
            found = self._members.get(number)
            if found is None or number in self._leaving:
                return
            self._leaving.add(number)
        # Not under the lock: it may be many GiB. The refund follows when the memory is free.
        try:
            # Truncated, not punched: a process that still maps the file can then never allocate uncharged memory in it.
            os.ftruncate(found.fd, 0)
        finally:
            with self._lock:
                self._leaving.discard(number)
                self._members.pop(number, None)
                self._ledger.close(number)
                self._resize_reserve()
                os.close(found.fd)

    def detach(self, numbers: Iterable[int], pidfd: int) -> None:
        """Detach members whose process has lost its connection: their memory is reaped when that process ends.

        ``pidfd`` is duplicated.
        """
        with self._lock:
            left = frozenset(numbers) & self._members.keys()
            if left:
                self._detached[os.dup(pidfd)] = left

    def pop_dead(self) -> list[int]:
        """Forget the detached members whose process has ended, and return them for the caller to remove."""
        if not self._detached or os.getpid() != self._pid:
            return []
        with self._lock:
            ended = [pidfd for pidfd in self._detached if _ended(pidfd)]
            found = [number for pidfd in ended for number in self._detached.pop(pidfd)]
            for pidfd in ended:
                os.close(pidfd)
        return found

    def reap(self) -> None:
        """Remove detached members whose process has ended. Emptying their files can take seconds."""
        for number in self.pop_dead():
            self.remove(number)

    def allocated(self, number: int) -> int:
        """Return the bytes that a member's file holds, from st_blocks."""
        with self._lock:
            return os.fstat(self._members[number].fd).st_blocks * 512

    def statistics(self) -> PoolStatistics:
        """Return the charges, and beside them what the files hold."""
        self._check_process()
        with self._lock:
            self._check_open()
            return self._statistics()

    def add_listener(self, listener: OnHighWater) -> None:
        """Call ``listener`` at the high-water mark, in the thread that charges: it must not block."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener: OnHighWater) -> None:
        """Undo :meth:`add_listener`."""
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other != listener)

    def close(self) -> None:
        """Close all files. Members keep the memory that they have mapped. Idempotent."""
        if os.getpid() != self._pid:
            self._lock = threading.RLock()  # another thread may have held it at the time of the fork
        with self._lock:
            if self.closed:
                return
            self.closed = True
            files = [member.fd for number, member in self._members.items() if number not in self._leaving]
            for fd in (*files, *self._detached):
                os.close(fd)
            self._members.clear()
            self._detached.clear()
            if self._reserve is not None:
                self._reserve.close()

    def __del__(self) -> None:
        # Without references there is no member and no server. At interpreter exit the functions may be gone.
        with contextlib.suppress(TypeError, AttributeError):
            self.close()

    def _resize_reserve(self) -> None:
        """Reserve huge pages for all that is not charged; where another process took some, the next call tries again."""
        if self._reserve is not None:
            self._reserve.resize(self.capacity - self._ledger.charged)

    def _statistics(self) -> PoolStatistics:
        ledger = self._ledger
        free = ledger.capacity - ledger.charged
        return PoolStatistics(
            ledger.capacity, ledger.charged, ledger.reserved_free, ledger.available, ledger.peak,
            tuple(self._describe(number, member) for number, member in self._members.items()),
            0 if self._reserve is None else free - self._reserve.size,
        )  # fmt: skip

    def _describe(self, number: int, found: _MemberRecord) -> MemberStatistics:
        account = self._ledger[number]
        return MemberStatistics(
            found.name, found.pid, found.size, account.charged, account.reserved, account.limit,
            os.fstat(found.fd).st_blocks * 512, any(number in detached for detached in self._detached.values()),
        )  # fmt: skip

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the pool is closed")

    def _check_process(self) -> None:
        # Before the lock: another thread may have held it at the time of the fork.
        if os.getpid() != self._pid:
            raise PoolGoneError(errno.ENOTCONN, f"the pool belongs to process {self._pid}, of which this one is a fork")


def extent(size: Size, reservation: Size | None) -> tuple[int, int]:
    """Return the size of sparse memory and the size of its reservation, in bytes; both are checked."""
    wanted = parse_size(size)
    whole = wanted if reservation is None else parse_size(reservation)
    if whole < wanted:
        raise ValueError(f"a reservation of {whole} bytes is smaller than the size of {wanted} bytes")
    return wanted, whole


def check_name(name: str | None) -> None:
    """Raise ValueError unless ``name`` can be the name of a member."""
    if name is not None and (not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable()):
        raise ValueError(f"a name has 1 to {MAX_NAME} printable characters, not {str(name)[:200]!r}")


def round_up(size: int, block: int) -> int:
    """Round ``size`` up to a multiple of ``block``."""
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
