"""The books of a pool: plain arithmetic, no memory, no locks."""

from __future__ import annotations

import errno
from typing import NamedTuple

from prefault.errors import PoolFullError
from prefault.sizes import format_size


class MemberAccount(NamedTuple):
    """What a member has, may have, and is promised; bytes.

    Attributes:
        name: for messages.
        charged: taken from the capacity.
        reserved: promised: the part of it that is not charged is kept free for this member.
        limit: the most that may be charged; None: the capacity is the only limit.
    """

    name: str
    charged: int
    reserved: int
    limit: int | None

    @property
    def kept_free(self) -> int:
        """What is promised and not taken yet."""
        return max(0, self.reserved - self.charged)


class Ledger:
    """Who has how much of a capacity. All numbers are bytes.

    What always holds: the charges and what is still promised are together at most the capacity, and so every promise can be
    kept; no charge is beyond its limit.

    Attributes:
        capacity: that is divided.
        charged: to all members together.
        kept_free: promised to members and not charged yet.
        peak: the highest ``charged`` so far.
        high_water: the mark, or None.
    """

    def __init__(self, capacity: int, high_water: int | None = None) -> None:
        self.capacity = capacity
        self.charged = 0
        self.kept_free = 0
        self.peak = 0
        self.high_water = high_water
        self._above = False
        self._accounts: dict[int, MemberAccount] = {}

    @property
    def available(self) -> int:
        """Neither charged nor promised: what any member may take on top of its own promise."""
        return self.capacity - self.charged - self.kept_free

    def __getitem__(self, member: int) -> MemberAccount:
        return self._accounts[member]

    def __len__(self) -> int:
        """How many members there are."""
        return len(self._accounts)

    def open(self, member: int, account: MemberAccount) -> None:
        """Add a member, with nothing charged.

        Raises:
            PoolFullError: what is to be reserved is not there.
        """
        if account.reserved > self.available:
            raise PoolFullError(
                errno.ENOSPC,
                f"the pool cannot reserve {format_size(account.reserved)} for {account.name}: {self._situation()};"
                " reserve less, discard, close members or make the pool larger",
            )
        self._accounts[member] = account
        self.kept_free += account.reserved

    def settle(self, member: int, charged: int) -> bool:
        """Set what is charged to a member; whether that took the charge of all from below the high-water mark to above.

        The amount is absolute, so that saying it twice does no harm.

        Raises:
            PoolFullError: it is more than the limit or the pool allows. Nothing has changed then.
        """
        account = self._accounts[member]
        if charged > account.charged:
            self._check(account, charged)
        self._replace(member, account._replace(charged=charged))
        return self._crossed()

    def close(self, member: int) -> None:
        """Remove a member; all of its charge and its promise are free."""
        self._replace(member, self._accounts[member]._replace(charged=0, reserved=0))
        del self._accounts[member]
        self._crossed()

    def _replace(self, member: int, account: MemberAccount) -> None:
        before = self._accounts[member]
        self.charged += account.charged - before.charged
        self.kept_free += account.kept_free - before.kept_free
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
        if more > account.kept_free + self.available:
            own = f", {format_size(account.kept_free)} for itself" if account.kept_free else ""
            limit = "no limit of its own" if account.limit is None else f"a limit of {format_size(account.limit)}"
            raise PoolFullError(
                errno.ENOSPC,
                f"{account.name} (with {limit}) needs {format_size(more)} more: {self._situation(account)}{own};"
                " discard, close members or make the pool larger",
            )

    def _situation(self, account: MemberAccount | None = None) -> str:
        others = self.kept_free - (account.kept_free if account is not None else 0)
        mine = "" if account is None else f" ({format_size(account.charged)} to {account.name})"
        reserved = f" and {format_size(others)} are reserved for others" if others else ""
        left = format_size(self.available)
        return (
            f"of a capacity of {format_size(self.capacity)}, {format_size(self.charged)} are charged{mine}{reserved},"
            f" which leaves {left}"
        )
