"""How much may still be populated before some limit stops or kills the process.

What is read here is a moment's answer. What counts as reclaimable, and why, is in ``docs/design/headroom.md``.
"""

from prefault.limits.limit import Bounds, Headroom, Limit
from prefault.limits.memory_limits import MemoryAnswer, ask_for_memory, counts_hugetlb, memory_limits
from prefault.limits.refusing_limits import (
    ALLOCATED_WHEN_TOUCHED,
    commit_limits,
    hugetlb_limits,
    locked_memory_limit,
    space_limit,
)
from prefault.limits.target import headroom

__all__ = [
    "ALLOCATED_WHEN_TOUCHED",
    "Bounds",
    "Headroom",
    "Limit",
    "MemoryAnswer",
    "ask_for_memory",
    "commit_limits",
    "counts_hugetlb",
    "headroom",
    "hugetlb_limits",
    "locked_memory_limit",
    "memory_limits",
    "space_limit",
]
