"""How many CPUs this process may keep busy."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def usable_cpus() -> int:
    """CPUs by affinity (sched_getaffinity(2)) and by the CPU quota of every cgroup above us (cpu.max, cpu.cfs_quota_us)."""
    from prefault._system import cgroups

    quotas = (_quota(directory) for directory in cgroups.directories("cpu"))
    return max(1, min([len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas if quota is not None)]))


def _quota(directory: Path) -> float | None:
    """CPUs' worth of time that a cgroup may use; None without a limit."""
    from prefault._system import cgroups

    both = cgroups.read_text(directory / "cpu.max")  # v2: "max 100000" or "150000 100000"
    if both is not None:
        quota, period = both.split()
        return None if quota == "max" else int(quota) / int(period)
    v1_quota = cgroups.read_text(directory / "cpu.cfs_quota_us")
    v1_period = cgroups.read_text(directory / "cpu.cfs_period_us")
    if v1_quota is None or v1_period is None or int(v1_quota) < 0:
        return None
    return int(v1_quota) / int(v1_period)
