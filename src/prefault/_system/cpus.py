"""Number of CPUs that this process may keep busy."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def usable_cpus() -> int:
    """Return the CPUs that affinity (sched_getaffinity(2)) and every CPU quota allow, at least 1."""
    counts = [len(os.sched_getaffinity(0))]
    for file in quota_files():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            quota = read_quota(file)
            if quota is not None:
                counts.append(math.ceil(quota))
    return max(1, min(counts))


def why_not_more_cpus() -> str:
    """Return what limits :func:`usable_cpus`, in words: the tightest quota, the affinity, or the machine itself."""
    online, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    tightest, source = float(allowed), None
    for file in quota_files():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            quota = read_quota(file)
            if quota is not None and quota < tightest:
                tightest, source = quota, file
    if source is not None:
        return f"{source} allows {tightest:g} of {online} CPUs"
    if allowed < online:
        return f"its affinity (taskset, cpuset) leaves this process {allowed} of {online} CPUs"
    return f"the machine has {online} CPU{'s' if online > 1 else ''}"


def quota_files() -> list[Path]:
    """List the files of the CPU quotas that govern this process: ``cpu.max`` of v2 and ``cpu.cfs_quota_us`` of v1."""
    from prefault._system import cgroups

    candidates = (directory / name for directory in cgroups.directories("cpu") for name in ("cpu.max", "cpu.cfs_quota_us"))
    return [file for file in candidates if file.exists()]


def read_quota(file: Path) -> float | None:
    """Read how many CPUs' worth of time a quota file allows; None: no limit."""
    fields = file.read_text().split()  # v2: "max 100000" or "150000 100000"
    if file.name == "cpu.cfs_quota_us":
        fields += file.with_name("cpu.cfs_period_us").read_text().split()
    quota, period = fields
    return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
