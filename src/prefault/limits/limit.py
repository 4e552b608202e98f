"""A limit, and all that were found: plain values."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from prefault.sizes import format_size

Bounds: TypeAlias = Literal[
    "memory",
    "tmpfs space",
    "huge pages",
    "huge page reservations",
    "disk space",
    "commit",
    "locked memory",
    "address space",
    "data",
]


class Limit(NamedTuple):
    """One limit, as it stood when it was read. All numbers are bytes.

    Attributes:
        name: such as ``"memory.max of /sys/fs/cgroup/a"``, ``"MemAvailable"``, ``"hugetlb pool of 2.0 MiB pages"``.
        bounds: what it bounds.
        limit_bytes, used_bytes: the limit, and what counts against it now.
        reclaimable_bytes: what the kernel takes back by itself before the limit bites: clean page cache, free swap.
        reserve_bytes: what is left alone, for the interpreter's own allocations and for what others take meanwhile.
        consequence: what happens at the limit.
        source: the file or the call that it was read from.
        remedy: what to change.
        applies: whether it bears on populating the target; others are listed because they bear on other memory.
    """

    name: str
    bounds: Bounds
    limit_bytes: int
    used_bytes: int
    reclaimable_bytes: int
    reserve_bytes: int
    consequence: str
    source: str
    remedy: str
    applies: bool = True

    @property
    def available_bytes(self) -> int:
        """What may still be taken: limit minus usage, plus what is reclaimable, less the reserve; never below 0."""
        return max(0, self.limit_bytes - self.used_bytes + self.reclaimable_bytes - self.reserve_bytes)

    def __str__(self) -> str:
        numbers = f"{format_size(self.used_bytes)} of {format_size(self.limit_bytes)} used"
        if self.reclaimable_bytes:
            numbers += f", {format_size(self.reclaimable_bytes)} reclaimable"
        if self.reserve_bytes:
            numbers += f", {format_size(self.reserve_bytes)} kept in reserve"
        return f"{format_size(self.available_bytes)} left by {self.name} ({numbers}); at the limit: {self.consequence}"


class Headroom(NamedTuple):
    """Every limit that was found. A limit that is not set, or cannot be read, is not among them."""

    limits: tuple[Limit, ...]

    @property
    def tightest(self) -> Limit | None:
        """The limit that bears on the target and leaves least; None where nothing limits it."""
        return min((limit for limit in self.limits if limit.applies), key=lambda limit: limit.available_bytes, default=None)

    @property
    def available_bytes(self) -> int | None:
        """What the tightest one leaves; None where nothing limits it."""
        tightest = self.tightest
        return None if tightest is None else tightest.available_bytes

    def __str__(self) -> str:
        if not self.limits:
            return "no limit is known"
        rows: list[tuple[str, ...]] = [
            ("left", "limit", "used", "reclaimable", "reserve", "what", "at the limit", "read from")
        ]
        for limit in sorted(self.limits, key=lambda limit: (not limit.applies, limit.available_bytes)):
            what = limit.name if limit.applies else f"{limit.name} (of other memory)"
            sizes = limit.available_bytes, limit.limit_bytes, limit.used_bytes, limit.reclaimable_bytes, limit.reserve_bytes
            rows.append((*(format_size(size) for size in sizes), what, limit.consequence, limit.source))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column < 5 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
