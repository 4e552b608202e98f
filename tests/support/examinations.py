"""Examinations by prefault doctor: records of machines that were made up, and reports of child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefault._system import capabilities
from prefault._system.hugetlb import HugetlbPool
from prefault.doctor import Advice, CapabilityAnswer, MachineFacts, Reading, Record
from prefault.doctor.words import MEANINGS, WITHOUT
from support import needs

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
THP = Path("/sys/kernel/mm/transparent_hugepage")


def machine(**changes: Any) -> MachineFacts:
    known = MachineFacts("6.18.0", "x86_64", "a CPU", False, 4096, "3.11.7", "0.1.0", "2026-01-01T00:00:00+00:00", 1000, 0)
    return replace(known, **changes)


HEALTHY_WORDS = {
    "enabled": "madvise",
    "enabled_pmd": "inherit",
    "shmem_enabled": "within_size",
    "shmem_enabled_pmd": "inherit",
    "defrag": "madvise",
    "dev_shm_huge": "within_size",
}
HEALTHY_NUMBERS = {
    "pmd_size": 2 * MIB,
    "process": 1,
    "mem_total": 32 * GIB,
    "mem_available": 30 * GIB,
    "swap_total": 0,
    "swap_free": 0,
    "overcommit_mode": 0,
    "rlimit_memlock": None,
    "rlimit_memlock_hard": None,
    "rlimit_as": None,
    "rlimit_as_hard": None,
    "rlimit_data": None,
    "rlimit_data_hard": None,
    "dev_shm_size": 16 * GIB,
    "dev_shm_free": 16 * GIB,
    "max_map_count": 65530,
    "mappings": 200,
    "cpus_online": 8,
    "cpus_affinity": 8,
    "cpus_usable": 8,
}
POOL = HugetlbPool(2 * MIB, total=64, free=64, reserved=0, surplus=0, overcommit=0)


def record(
    *,
    missing: dict[str, str] | None = None,
    pools: tuple[HugetlbPool, ...] = (POOL,),
    cgroups: tuple[Reading, ...] = (),
    unknown: tuple[Reading, ...] = (),
    on: MachineFacts | None = None,
    **values: float | str | None,
) -> Record:
    """A machine with nothing to say of, but for the changes. ``missing``: capabilities with their refusal."""
    hidden = {reading.name for reading in unknown}
    readings = [
        Reading(name, value, "word" if isinstance(value, str) else "count", "made up")
        for name, value in {**HEALTHY_WORDS, **HEALTHY_NUMBERS, **values}.items()
        if name not in hidden
    ]
    answers = tuple(
        CapabilityAnswer(each.name, each.name not in (missing or {}), each.question, each.since,
                         (missing or {}).get(each.name), WITHOUT[each.name])
        for each in capabilities.ALL
    )  # fmt: skip
    settings = tuple(reading for reading in readings if reading.name in MEANINGS or reading.name == "pmd_size")
    limits = tuple(reading for reading in readings if reading not in settings)
    return Record(on or machine(), answers, settings, pools, (*limits, *cgroups, *unknown))


def memory_cgroup(directory: str, limit: int | None, usage: int, file: str = "memory.max") -> tuple[Reading, ...]:
    name = "memory_cgroup_high" if file == "memory.high" else "memory_cgroup_limit"
    return (
        Reading(name, limit, "bytes", f"{directory}/{file}"),
        Reading("memory_cgroup_usage", usage, "bytes", f"{directory}/memory.current"),
    )


def rules(found: tuple[Advice, ...]) -> set[str]:
    assert len({advice.rule for advice in found}) == len(found), "a rule spoke twice"
    return {advice.rule for advice in found}


def only(found: tuple[Advice, ...], rule: str) -> Advice:
    assert rules(found) == {rule}
    return found[0]


_REPORT = """
import json, sys
from prefault.doctor import examine, to_json
json.dump(to_json(examine()), sys.stdout)
"""


def child(*prefix: str, before: str = "", **environment: str) -> dict[str, Any]:
    """The JSON of an examination in another process."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", before + _REPORT], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def limit(found: dict[str, Any], name: str) -> Any:
    return next(item for item in found["limits"] if item["name"] == name)


def advised(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {item["rule"]: item for item in found["advice"]}


def unshared(command: str) -> tuple[str, ...]:
    """The prefix of a command that runs in a mount namespace of its own, where ``command`` was run first."""
    needs.root("change what a process sees of /sys and /proc")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        needs.missing("no mount namespace can be made")
    return "unshare", "--mount", "sh", "-ec", f'{command}\nexec "$@"', "sh"
