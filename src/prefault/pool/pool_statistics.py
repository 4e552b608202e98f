"""Statistics of a pool: plain values."""

from __future__ import annotations

from typing import NamedTuple

from prefault.sizes import format_size


class MemberStatistics(NamedTuple):
    """Statistics of one member of a pool. Sizes are bytes.

    Attributes:
        name: the name that was given, or ``"member 3"``.
        pid: process that uses it.
        size: length of its file: the most that it could ever hold.
        charged: bytes of its blocks that are charged.
        reserved: bytes that are reserved for it.
        limit: the most that may be charged; None: no limit of its own.
        allocated_bytes: bytes that its file holds (st_blocks). More than ``charged``: memory was touched without being
            populated, and is not charged. Less is normal: blocks are charged before they are filled.
        orphaned: its process has lost the connection and still lives, so that its memory cannot be reaped yet.
    """

    name: str
    pid: int
    size: int
    charged: int
    reserved: int
    limit: int | None
    allocated_bytes: int
    orphaned: bool = False


class PoolStatistics(NamedTuple):
    """Statistics of a pool at one moment. Sizes are bytes; ``charged + reserved_free + available == capacity``.

    Attributes:
        capacity: capacity of the pool.
        charged: bytes charged to all members.
        reserved_free: bytes reserved by members and not charged yet.
        available: bytes that any member may charge beyond its own reservation.
        peak: the highest ``charged`` so far.
        members: statistics of each member, in the order of their creation.
        unbacked: uncharged bytes for which the kernel has no huge pages reserved any more (huge pages only): another process
            took them after a member discarded them.
    """

    capacity: int
    charged: int
    reserved_free: int
    available: int
    peak: int
    members: tuple[MemberStatistics, ...]
    unbacked: int = 0

    @property
    def allocated_bytes(self) -> int:
        """The bytes that the files of all members hold together (st_blocks)."""
        return sum(member.allocated_bytes for member in self.members)

    def __str__(self) -> str:
        count = len(self.members)
        return (
            f"{format_size(self.charged)} of {format_size(self.capacity)} charged (peak {format_size(self.peak)}),"
            f" {format_size(self.reserved_free)} kept for reservations, {format_size(self.available)} available;"
            f" {count} member{'' if count == 1 else 's'}, {format_size(self.allocated_bytes)} allocated"
        )
