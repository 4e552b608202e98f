"""prefault doctor in circumstances made for the test: limits, users, hidden files, and cgroups."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefault._system import capabilities, cgroups
from prefault.doctor.words import WITHOUT
from support import needs
from support.examinations import GIB, MIB, advised, child, limit, unshared


def test_limits_of_a_process() -> None:
    before = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({4 * GIB}, resource.getrlimit(resource.RLIMIT_AS)[1]))\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({3 * GIB}, resource.getrlimit(resource.RLIMIT_DATA)[1]))\n"
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    )
    found = child(before=before)
    assert limit(found, "rlimit_as")["value"] == 4 * GIB
    assert limit(found, "rlimit_data")["value"] == 3 * GIB
    assert limit(found, "cpus_usable")["value"] == limit(found, "cpus_affinity")["value"] == 1
    assert {"rlimit-as", "rlimit-data"} <= set(advised(found))
    assert set(advised(found)) & {"cpu-affinity", "one-cpu"}


def test_an_unprivileged_user() -> None:
    needs.root("become another user")
    # Imported before: the package may lie where only root can read.
    before = (
        "import json, os, resource, sys, prefault.doctor\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"  # PR_SET_DUMPABLE: /proc/self is ours again
    )
    found = child(before=before)
    assert found["machine"]["user_id"] == 65534
    answers = {item["name"]: item for item in found["capabilities"]}
    assert not answers["map_files"]["available"]
    assert "lacks the privilege" in answers["map_files"]["refusal"]
    assert answers["madv_populate"]["available"] == capabilities.MADV_POPULATE.available
    assert limit(found, "memlock_enforced")["value"] == 1
    assert "user 65534" in advised(found)["privileges"]["sentence"]
    assert "RLIMIT_MEMLOCK is 64.0 KiB" in advised(found)["rlimit-memlock"]["sentence"]


def test_thp_disabled_for_a_process() -> None:
    before = "import ctypes; assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0\n"  # PR_SET_THP_DISABLE
    assert "thp-process" in advised(child(before=before))
    assert "thp-process" not in advised(child())


@pytest.mark.parametrize(
    ("name", "lost"),
    [("process_madvise", "populate_many and discard_many"), ("guard_regions", r"unpopulated='fault' .*OutOfMemoryError")],
)
def test_what_sparse_memory_loses(name: str, lost: str) -> None:
    assert re.search(lost, WITHOUT[name])
    assert "nothing is lost" not in WITHOUT[name]


def test_sys_hidden_meminfo_empty_and_a_small_dev_shm() -> None:
    found = child(*unshared(
        "mount -t tmpfs none /sys; mount --bind /dev/null /proc/meminfo; mount -t tmpfs -o size=64m none /dev/shm"
    ))  # fmt: skip
    settings = {item["name"]: item for item in found["transparent_huge_pages"]}
    assert settings["enabled"]["value"] is None
    assert settings["enabled"]["unknown"] == "/sys/kernel/mm is not visible here"
    assert limit(found, "mem_available")["unknown"] == "no 'MemAvailable'"
    assert limit(found, "dev_shm_size")["value"] == 64 * MIB
    assert found["hugetlb_pools"] == []
    refusal = next(item["refusal"] for item in found["capabilities"] if item["name"] == "hugetlb_pages")
    assert "/sys is hidden" in refusal
    assert not set(advised(found)) & {"thp-never", "shmem-never", "hugetlb-empty", "memory-cgroup"}


def test_no_proc_at_all() -> None:
    found = child(*unshared("mount -t tmpfs none /proc"))
    answers = {item["name"]: item for item in found["capabilities"]}
    # Population needs no /proc; residency does.
    assert answers["madv_populate"]["available"] == capabilities.MADV_POPULATE.available
    assert not answers["pagemap"]["available"]
    unknown = {item["name"] for item in found["limits"] if item["unknown"]}
    assert {"mem_total", "overcommit_mode", "mappings", "max_map_count", "memory_cgroup_limit", "cpu_quota"} <= unknown
    assert all(item["unknown"] != "" for item in found["limits"])
    assert "residency-mincore" in advised(found)


def test_a_small_dev_shm_brings_its_advice() -> None:
    found = child(*unshared("mount -t tmpfs -o size=64m none /dev/shm"))
    assert "/dev/shm holds 64.0 MiB, 64.0 MiB free" in advised(found)["dev-shm-small"]["sentence"]
    # The remedy, as it is printed: afterwards the advice is gone.
    again = child(*unshared(f"mount -t tmpfs -o size=64m none /dev/shm\n{advised(found)['dev-shm-small']['remedy']}"))
    assert not set(advised(again)) & {"dev-shm-small", "dev-shm-full"}
    assert limit(again, "dev_shm_size")["value"] > 64 * MIB


def test_switched_off() -> None:
    found = child(PREFAULT_WITHOUT="madv_populate")
    assert advised(found)["populate-missing"]["remedy"] == "unset PREFAULT_WITHOUT"


@pytest.fixture
def cgroup_v1() -> Iterator[Callable[[str], Path]]:
    """A function that makes a cgroup of a v1 controller; removed afterwards."""
    needs.root("make a cgroup")
    made: list[Path] = []

    def make(controller: str) -> Path:
        top = Path("/sys/fs/cgroup", controller)
        if not (top / "cgroup.procs").exists() or (top / "cgroup.controllers").exists():
            needs.missing(f"no cgroup v1 hierarchy of {controller} is mounted at {top}")
        directory = top / f"prefault-test-{os.getpid()}"
        directory.mkdir()
        made.append(directory)
        return directory

    yield make
    for directory in made:
        directory.rmdir()


def joining(directory: Path) -> str:
    return f"import os; open({str(directory / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"


def test_a_memory_cgroup(cgroup_v1: Callable[[str], Path]) -> None:
    directory = cgroup_v1("memory")
    (directory / "memory.limit_in_bytes").write_text(str(512 * MIB))
    found = child(before=joining(directory))
    own = limit(found, "memory_cgroup_limit")
    assert (own["value"], own["source"]) == (512 * MIB, str(directory / "memory.limit_in_bytes"))
    assert 0 < limit(found, "memory_cgroup_usage")["value"] < 512 * MIB
    advice = advised(found)["memory-cgroup"]
    assert "may use 512.0 MiB" in advice["sentence"]
    # The remedy, as it is printed: afterwards the advice is gone.
    subprocess.run(["sh", "-c", advice["remedy"]], check=True)
    assert "memory-cgroup" not in advised(child(before=joining(directory)))


def test_the_limit_of_a_parent_cgroup(cgroup_v1: Callable[[str], Path]) -> None:
    directory = cgroup_v1("memory")
    (directory / "memory.limit_in_bytes").write_text(str(512 * MIB))
    inner = directory / "inner"
    inner.mkdir()
    try:
        found = child(before=joining(inner))
    finally:
        inner.rmdir()
    limits = [item for item in found["limits"] if item["name"] == "memory_cgroup_limit"]
    assert [item["value"] for item in limits[:2]] == [None, 512 * MIB]
    assert str(directory / "memory.limit_in_bytes") in advised(found)["memory-cgroup"]["remedy"]


def test_cgroups_outside_of_our_namespace_are_not_ours() -> None:
    assert cgroups._below("/", "/../elsewhere") is None
    assert cgroups._below("/..", "/../elsewhere") == "elsewhere"
    assert cgroups._below("/docker/a", "/docker/a") == "."


def test_a_cpu_quota(cgroup_v1: Callable[[str], Path]) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        needs.missing("a quota below the CPUs needs two CPUs")
    directory = cgroup_v1("cpu")
    (directory / "cpu.cfs_quota_us").write_text("90000")
    found = child(before=joining(directory))
    assert limit(found, "cpu_quota")["value"] == 0.9
    assert limit(found, "cpus_usable")["value"] == 1
    advice = advised(found)["cpu-quota"]
    subprocess.run(["sh", "-c", advice["remedy"]], check=True)
    assert "cpu-quota" not in advised(child(before=joining(directory)))
