"""What a pool says of itself: plain values."""

from __future__ import annotations

from typing import NamedTuple

from prefault.sizes import format_size


class MemberStatistics(NamedTuple):
    """One member of a pool. Sizes are bytes.

    Attributes:
        name: as it was given, or ``"member 3"``.
        pid: of the process that uses it.
        size: of its file: the most that it could ever hold.
        charged: blocks that it has, in the pool's books.
        reserved: is promised to it.
        limit: the most that it may have; None: no limit of its own.
        allocated_bytes: what its file really holds, as the kernel says (st_blocks). More than ``charged`` is an overdraft:
            memory touched without being populated, which no book sees. Less is normal: blocks are booked before they are
            filled.
        orphaned: its process has lost the connection and still lives, so that its memory cannot be taken back yet.
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
    """A pool at one moment. Sizes are bytes; ``charged + reserved_free + available == capacity``.

    Attributes:
        capacity: of the pool.
        charged: to all members.
        reserved_free: promised to members that have not taken it yet.
        available: to any member, on top of its own reservation.
        peak: the highest ``charged`` so far.
        members: one each, in the order of their creation.
        unbacked: of what is not charged, what the kernel no longer sets aside for the pool (huge pages only): another
            process was faster when a member gave it back.
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
        """What the files of all members hold together, as the kernel says."""
        return sum(member.allocated_bytes for member in self.members)

    def __str__(self) -> str:
        count = len(self.members)
        return (
            f"{format_size(self.charged)} of {format_size(self.capacity)} charged (peak {format_size(self.peak)}),"
            f" {format_size(self.reserved_free)} kept for reservations, {format_size(self.available)} available;"
            f" {count} member{'' if count == 1 else 's'}, {format_size(self.allocated_bytes)} allocated"
        )
