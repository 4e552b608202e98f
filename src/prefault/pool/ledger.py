"""The accounting of a pool: plain arithmetic, no memory, no locks."""

from __future__ import annotations

import errno
from typing import NamedTuple

from prefault.errors import PoolFullError
from prefault.sizes import format_size


class MemberAccount(NamedTuple):
    """The charge, reservation and limit of a member, in bytes.

    Attributes:
        name: the name in messages.
        charged: bytes taken from the capacity.
        reserved: guaranteed bytes; those that are not charged are kept free for this member.
        limit: the most that may be charged; None: the capacity is the only limit.
    """

    name: str
    charged: int
    reserved: int
    limit: int | None

    @property
    def reserved_free(self) -> int:
        """The bytes that are reserved and not charged."""
        return max(0, self.reserved - self.charged)


class Ledger:
    """The division of a capacity among members. All numbers are bytes.

    Invariants: all charges and uncharged reservations together are at most the capacity, so that every reservation can be
    charged at any time; no charge exceeds its limit.

    Attributes:
        capacity: the bytes to divide.
        charged: the sum over all members.
        reserved_free: reserved by members and not charged.
        peak: the highest ``charged`` so far.
        high_water: the mark, or None.
    """

    def __init__(self, capacity: int, high_water: int | None = None) -> None:
        self.capacity = capacity
        self.charged = 0
        self.reserved_free = 0
        self.peak = 0
        self.high_water = high_water
        self._above = False
        self._accounts: dict[int, MemberAccount] = {}

    @property
    def available(self) -> int:
        """The bytes neither charged nor reserved, which any member may charge beyond its own reservation."""
        return self.capacity - self.charged - self.reserved_free

    def __getitem__(self, member: int) -> MemberAccount:
        return self._accounts[member]

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self._accounts)

    def open(self, member: int, account: MemberAccount) -> None:
        """Add a member, with nothing charged.

        Raises:
            PoolFullError: fewer bytes are available than are to be reserved.
        """
        if account.reserved > self.available:
            raise PoolFullError(
                errno.ENOSPC,
                f"the pool cannot reserve {format_size(account.reserved)} for {account.name}: {self._describe_use()};"
                " reserve less, discard, close members or make the pool larger",
            )
        self._accounts[member] = account
        self.reserved_free += account.reserved

    def settle(self, member: int, charged: int) -> bool:
        """Set the charge of a member; return whether the sum of all charges rose to the high-water mark by that.

        Idempotent: the amount is absolute.

        Raises:
            PoolFullError: more than the limit or the pool allows; nothing has changed.
        """
        account = self._accounts[member]
        if charged > account.charged:
            self._check(account, charged)
        self._replace(member, account._replace(charged=charged))
        return self._crossed()

    def close(self, member: int) -> None:
        """Remove a member and refund its charge and its reservation."""
        self._replace(member, self._accounts[member]._replace(charged=0, reserved=0))
        del self._accounts[member]
        self._crossed()

    def _replace(self, member: int, account: MemberAccount) -> None:
        before = self._accounts[member]
        self.charged += account.charged - before.charged
        self.reserved_free += account.reserved_free - before.reserved_free
        self.peak = max(self.peak, self.charged)
        self._accounts[member] = account

    def _crossed(self) -> bool:
        was_above, self._above = self._above, self.high_water is not None and self.charged >= self.high_water
        return self._above and not was_above

    def _check(self, account: MemberAccount, charged: int) -> None:
        more = charged - account.charged
        if account.limit is not None and charged > account.limit:
            raise PoolFullError(
                errno.ENOSPC,
                f"{account.name} needs {format_size(more)} more, beyond its limit of {format_size(account.limit)}, of which"
                f" {format_size(account.charged)} are charged to it; discard some of it, or give it a larger limit",
            )
        if more > account.reserved_free + self.available:
            own = f", {format_size(account.reserved_free)} for itself" if account.reserved_free else ""
            limit = "no limit of its own" if account.limit is None else f"a limit of {format_size(account.limit)}"
            raise PoolFullError(
                errno.ENOSPC,
                f"{account.name} (with {limit}) needs {format_size(more)} more: {self._describe_use(account)}{own};"
                " discard, close members or make the pool larger",
            )

    def _describe_use(self, account: MemberAccount | None = None) -> str:
        others = self.reserved_free - (account.reserved_free if account is not None else 0)
        mine = "" if account is None else f" ({format_size(account.charged)} to {account.name})"
        reserved = f" and {format_size(others)} are reserved for others" if others else ""
        left = format_size(self.available)
        return (
            f"of a capacity of {format_size(self.capacity)}, {format_size(self.charged)} are charged{mine}{reserved},"
            f" which leaves {left}"
        )
