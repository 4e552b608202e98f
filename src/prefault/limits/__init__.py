"""Every limit that may stop or kill a populate call, what a call demands from it, and admission control between the two.

The limits are the rows of ``prefault.limits.table``. A reading holds for a moment only. Which memory counts as reclaimable,
and why, is in ``docs/design/headroom.md``.
"""

from prefault.limits.limit import Bounds, Headroom, Limit, Shortfall
from prefault.limits.memory_limits import MemoryAnswer, ask_for_memory, counts_hugetlb, memory_limits
from prefault.limits.memory_use import MemoryUse, use_of_vma
from prefault.limits.refusing_limits import commit_limits, space_limit
from prefault.limits.table import limits_on, read_limit, refusal_ahead, shortfall_of
from prefault.limits.target import headroom

__all__ = [
    "Bounds",
    "Headroom",
    "Limit",
    "MemoryAnswer",
    "MemoryUse",
    "Shortfall",
    "ask_for_memory",
    "commit_limits",
    "counts_hugetlb",
    "headroom",
    "limits_on",
    "memory_limits",
    "read_limit",
    "refusal_ahead",
    "shortfall_of",
    "space_limit",
    "use_of_vma",
]
