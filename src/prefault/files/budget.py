"""Memory that the pages of files may take: what was asked for, and what memory cgroups and the machine leave."""

from __future__ import annotations

from time import monotonic

from prefault._system.meminfo import read_meminfo
from prefault.limits.memory_limits import NO_LIMIT, cgroup_limits
from prefault.sizes import MIB, Size, format_size, parse_size

_HOLDS_SECONDS = 0.05
"""Time for which a reading of the limits is believed, as long as little was taken."""

_HOLDS_BYTES = 16 * MIB


class MemoryBudget:
    """Bytes of page cache that may still be brought in without evicting pages that were brought in before.

    A page cache that is full evicts its own pages: to bring in more than fits undoes the beginning of the work. What memory
    cgroups and the machine leave are free memory and the clean page cache of others; pages counted by :meth:`take` and
    :meth:`keep` are not among them, but that a cgroup leaves kept pages out which may be charged to another one.

    Args:
        asked: bytes that may be brought in altogether; None: as many as fit.
        check_headroom: False leaves it to the kernel which pages it evicts.

    Attributes:
        taken_bytes: bytes brought in so far.
        tightest: name of the limit that left least when it was last asked, and its remedy.
        limit: name of that limit alone.
    """

    def __init__(self, asked: Size | None = None, *, check_headroom: bool = True) -> None:
        self.asked_bytes = None if asked is None else parse_size(asked)
        self.taken_bytes = 0
        self._check_headroom = check_headroom
        self._kept_bytes = 0
        self._memory_left = 0
        self._taken_at_reading = 0
        self._valid_until = 0.0
        self.tightest = self.limit = ""

    def take(self, count: int) -> None:
        """Count bytes that were brought in; negative: that were evicted again."""
        self.taken_bytes += count

    def keep(self, count: int) -> None:
        """Count bytes that were in the page cache before, are wanted there, and could be evicted."""
        self._kept_bytes += count
        self._valid_until = 0.0

    def left_bytes(self) -> int:
        """Return the bytes that may still be brought in; never below 0."""
        since = self.taken_bytes - self._taken_at_reading
        if monotonic() >= self._valid_until or abs(since) > _HOLDS_BYTES:
            self._read()
            since = 0
        left = self._memory_left - since
        if self.asked_bytes is not None and self.asked_bytes - self.taken_bytes < left:
            left = self.asked_bytes - self.taken_bytes
            self.tightest = f"the budget is {format_size(self.asked_bytes)}: raise it (budget=, --budget)"
        return max(0, left)

    def _read(self) -> None:
        left = NO_LIMIT
        for limit in cgroup_limits(swap=False) if self._check_headroom else ():
            free = limit.limit_bytes - limit.used_bytes - limit.reserve_bytes
            room = free + max(0, limit.reclaimable_bytes - self._ours_in(limit.used_bytes))
            if room < left:
                left, self.tightest = room, f"{limit.name} is {format_size(limit.limit_bytes)}: {limit.remedy}"
                self.limit = limit.name
        machine = self._machine(self.taken_bytes + self._kept_bytes) if self._check_headroom else NO_LIMIT
        if machine < left:
            self.limit = "MemAvailable"
            left, self.tightest = machine, f"the machine has {format_size(max(0, machine))} of memory left: free some"
        self._memory_left = left
        self._taken_at_reading = self.taken_bytes
        self._valid_until = monotonic() + _HOLDS_SECONDS

    def _ours_in(self, used_bytes: int) -> int:
        """Return how much of what a cgroup is charged for counts as ours.

        The kernel does not tell which cgroup a cached page is charged to. Where not all kept pages can be charged to this
        one, as it uses less, others had them brought in, and none counts: to subtract them would refuse what fits.
        """
        ours = self.taken_bytes + self._kept_bytes
        return ours if ours <= used_bytes else self.taken_bytes

    def _machine(self, ours: int) -> int:
        try:
            free, available, total = read_meminfo("MemFree", "MemAvailable", "MemTotal")
        except (OSError, KeyError):  # no /proc
            return NO_LIMIT
        reserve = min(64 * MIB, total // 32)
        return min(free, available) - reserve + max(0, available - free - ours)
