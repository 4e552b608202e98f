"""Plain values: a limit as it was read, the limits that were found, and a limit that leaves too little."""

import errno
from typing import Literal, NamedTuple, TypeAlias

from prefault.errors import HeadroomError
from prefault.ranges import RangeSet
from prefault.sizes import format_size

Bounds: TypeAlias = Literal[
    "memory",
    "page cache",
    "tmpfs space",
    "huge pages",
    "huge page reservations",
    "disk space",
    "commit",
    "locked memory",
    "address space",
    "data",
]

FILE_BOUNDS: tuple[Bounds, ...] = ("huge pages", "tmpfs space", "disk space")
"""Resources that the pages of a file come from. Where one is used up, touching a page is a SIGBUS."""


class Limit(NamedTuple):
    """One limit, as it stood when it was read. All numbers are bytes.

    Attributes:
        name: such as ``"memory.max of /sys/fs/cgroup/a"``, ``"MemAvailable"``, ``"hugetlb pool of 2.0 MiB pages"``.
        bounds: the resource that it bounds.
        limit_bytes, used_bytes: the limit, and the usage that counts against it now.
        reclaimable_bytes: memory that the kernel reclaims by itself before the limit bites: clean page cache, free swap.
        reserve_bytes: room that is left alone, for the interpreter's own allocations and for other processes meanwhile.
        consequence: the kernel's action at the limit.
        source: the file or the call that it was read from.
        remedy: the setting to change.
        applies: True if it bears on populating the target, False if only on other memory.
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
        """Bytes that may still be taken: limit minus usage, plus reclaimable memory, less the reserve; never below 0."""
        return max(0, self.limit_bytes - self.used_bytes + self.reclaimable_bytes - self.reserve_bytes)

    @property
    def advice(self) -> str:
        """Room that is left, and the remedy: ``"RLIMIT_AS leaves 1.0 MiB of 2.0 MiB: raise it (ulimit -v)"``."""
        room = f"{format_size(self.available_bytes)} of {format_size(self.limit_bytes)}"
        return f"{self.name} leaves {room}: {self.remedy}"

    @property
    def usage(self) -> str:
        """The numbers for people: ``"1.0 GiB of 4.0 GiB used, 32.0 MiB kept in reserve"``."""
        numbers = f"{format_size(self.used_bytes)} of {format_size(self.limit_bytes)} used"
        if self.reclaimable_bytes:
            numbers += f", {format_size(self.reclaimable_bytes)} reclaimable"
        if self.reserve_bytes:
            numbers += f", {format_size(self.reserve_bytes)} kept in reserve"
        return numbers

    def __str__(self) -> str:
        return f"{format_size(self.available_bytes)} left by {self.name} ({self.usage}); at the limit: {self.consequence}"


class Headroom(NamedTuple):
    """All limits that were found. A limit that is not set, or cannot be read, is not among them."""

    limits: tuple[Limit, ...]

    @property
    def tightest(self) -> Limit | None:
        """The limit that bears on the target and leaves least; None if nothing limits it."""
        return min((limit for limit in self.limits if limit.applies), key=lambda limit: limit.available_bytes, default=None)

    @property
    def available_bytes(self) -> int | None:
        """Bytes that the tightest limit leaves; None if nothing limits the target."""
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


class Shortfall(NamedTuple):
    """A limit that leaves less than is needed, both in bytes."""

    limit: Limit
    needed_bytes: int
    available_bytes: int

    @property
    def sentence(self) -> str:
        """The limit, both numbers, and the remedy, for people."""
        limit = self.limit
        return (
            f"{format_size(self.needed_bytes)} of {limit.bounds} are needed, and {limit.name} leaves"
            f" {format_size(self.available_bytes)} ({limit.usage}; at the limit: {limit.consequence}):"
            f" {limit.remedy}, populate less, or go on regardless with headroom='ignore'"
        )

    def error(self, message: str, *, address: int = 0, offset: int = 0, populated: RangeSet | None = None) -> HeadroomError:
        """Make the exception with this message."""
        return HeadroomError(
            errno.ENOMEM, message, address=address, offset=offset, populated=populated,
            limit=self.limit.name, needed_bytes=self.needed_bytes, available_bytes=self.available_bytes,
        )  # fmt: skip
