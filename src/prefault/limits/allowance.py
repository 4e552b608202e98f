"""Memory that small populate calls may take without reading the limits again."""

from __future__ import annotations

from prefault.sizes import MIB

_LONGEST_NS = 20_000_000
_BYTES_A_NS = 64
"""Bytes a nanosecond that neighbours may take meanwhile: about as fast as the CPUs of one socket clear pages."""
_LEAST = 16 * MIB


class _Allowance:
    """Bytes that the last reading of the limits left over, spent by small calls.

    It is a quarter of the bytes that were left, and none if little was left. It expires when all CPUs together could have
    cleared half of them, after 20 ms at most. Two threads that spend at the same moment may spend the same bytes twice, for
    which there is room in the last quarter.
    """

    __slots__ = ("_bytes", "_until_ns")

    def __init__(self) -> None:
        self._bytes = self._until_ns = 0

    def spend(self, wanted: int, now_ns: int) -> bool:
        """Take ``wanted`` bytes; return False, and take nothing, if they are not there."""
        if now_ns >= self._until_ns or wanted > self._bytes:
            return False
        self._bytes -= wanted
        return True

    def fill(self, left: int, now_ns: int) -> None:
        """Set the allowance after a reading that left ``left`` bytes."""
        self._bytes = left // 4 if left >= _LEAST else 0
        self._until_ns = now_ns + min(_LONGEST_NS, left // (2 * _BYTES_A_NS))

    def empty(self) -> None:
        """Withdraw the allowance: the next call reads the limits."""
        self._bytes = 0


allowance = _Allowance()
"""The allowance of this process."""
