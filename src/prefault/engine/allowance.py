"""What small calls may take without asking again."""

from __future__ import annotations

from prefault.sizes import MIB

_LONGEST_NS = 20_000_000
_BYTES_A_NS = 64
"""What neighbours may take meanwhile, 64 GB/s: about what the CPUs of one socket can clear."""
_LEAST = 16 * MIB


class _Allowance:
    """What the last answer left over: spent by small calls, instead of asking for each of them.

    It holds for as long as all CPUs together need to clear half of what was left, at most 20 ms, and is a quarter of it.
    Where little is left there is none. Two threads that spend at the same moment may spend the same bytes twice, for which
    there is room in the last quarter.
    """

    __slots__ = ("_bytes", "_until_ns")

    def __init__(self) -> None:
        self._bytes = self._until_ns = 0

    def spend(self, wanted: int, now_ns: int) -> bool:
        """Whether so many bytes are there; they are gone then."""
        if now_ns >= self._until_ns or wanted > self._bytes:
            return False
        self._bytes -= wanted
        return True

    def fill(self, left: int, now_ns: int) -> None:
        """After an answer that leaves so many bytes."""
        self._bytes = left // 4 if left >= _LEAST else 0
        self._until_ns = now_ns + min(_LONGEST_NS, left // (2 * _BYTES_A_NS))

    def empty(self) -> None:
        """Ask the next time."""
        self._bytes = 0


allowance = _Allowance()
"""Of this process."""
