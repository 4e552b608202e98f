"""prefault doctor: the record against independent readings, and the advice over machines that were made up."""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import doctor
from prefault._system import capabilities, cgroups
from prefault._system.hugetlb import HugetlbPool
from prefault.doctor import (
    Advice,
    CapabilityAnswer,
    MachineFacts,
    Reading,
    Record,
    advise,
    collect,
    examine,
    to_json,
)
from prefault.doctor.record import NOT_MOUNTED
from prefault.doctor.words import MEANINGS, WITHOUT
from prefault.testing import without
from support import needs, oracle
from support.children import Child

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
THP = Path("/sys/kernel/mm/transparent_hugepage")
DOCUMENT = Path(__file__).parents[2] / "docs" / "doctor-json.md"


# --- machines that were made up


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


def test_a_machine_without_faults_gets_no_advice() -> None:
    assert advise(record()) == ()


NO_SWAP = {"swap_total": 0, "swap_free": 0}
CASES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    # what: changes, rule, severity, a part of the sentence, the remedy from its start
    "THP off": (
        {"enabled": "never"}, "thp-never", "warning", "enabled = never",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    ),
    "THP off for the size only": (
        {"enabled": "always", "enabled_pmd": "never"}, "thp-never", "warning", "hugepages-2048kB/enabled = never",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled",
    ),
    "THP off for the process": (
        {"process": 0}, "thp-process", "warning", "PR_SET_THP_DISABLE", "prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)",
    ),
    "no compaction": (
        {"defrag": "never"}, "thp-defrag", "tip", "defrag = never",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/defrag",
    ),
    "shmem never": (
        {"shmem_enabled": "never"}, "shmem-never", "warning", "shmem_enabled = never",
        "echo within_size > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    ),
    "shmem deny": (
        {"shmem_enabled": "deny", "dev_shm_huge": "never"}, "shmem-never", "warning", "shmem_enabled = deny",
        "echo within_size > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    ),
    "shmem off for the size only": (
        {"shmem_enabled": "within_size", "shmem_enabled_pmd": "never"}, "shmem-never", "warning",
        "hugepages-2048kB/shmem_enabled = never",
        "echo within_size > /sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled",
    ),
    "/dev/shm in base pages": (
        {"dev_shm_huge": "never"}, "dev-shm-huge", "tip", "without huge=", "mount -o remount,huge=within_size /dev/shm",
    ),
    "hugetlb pools empty": (
        {"pools": (HugetlbPool(2 * MIB, 0, 0, 0, 0, 0), HugetlbPool(GIB, 0, 0, 0, 0, 0))},
        "hugetlb-empty", "tip", "pools are empty",
        "echo 512 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages  # sets 1.0 GiB aside",
    ),
    "hugetlb pool used up": (
        {"pools": (POOL._replace(free=10, reserved=10),)}, "hugetlb-used-up", "warning", "all 64 hugetlb pages of 2.0 MiB",
        "echo 576 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
    ),
    "no MADV_POPULATE": (
        {"missing": {"madv_populate": "madvise: Invalid argument (this kernel does not know it)"}},
        "populate-missing", "warning", "process_vm_readv and futex_add", "Linux 5.14 or newer",
    ),
    "MADV_POPULATE filtered": (
        {"missing": {"madv_populate": "madvise: Operation not permitted"}, "on": machine(seccomp=2)},
        "populate-missing", "warning", "Operation not permitted", "Linux 5.14 or newer; in a container let the seccomp",
    ),
    "MADV_POPULATE switched off": (
        {"missing": {"madv_populate": "switched off by PREFAULT_WITHOUT or a test"}}, "populate-missing", "warning",
        "switched off", "unset PREFAULT_WITHOUT",
    ),
    "no way to populate": (
        {"missing": {"madv_populate": "no", "process_vm_readv": "filtered"}}, "populate-impossible", "problem",
        "fails for reading", "Linux 5.14",
    ),
    "no pagemap": (
        {"missing": {"pagemap": "/proc/self/pagemap: Permission denied", "pagemap_scan": "the same"}},
        "residency-mincore", "warning", "Permission denied", "mount -t proc",
    ),
    "no PAGEMAP_SCAN": (
        {"missing": {"pagemap_scan": "this kernel does not know it"}}, "residency-pagemap", "tip", "zero page",
        "Linux 6.7 or newer",
    ),
    "an ordinary user": (
        {"missing": {"map_files": "no"}}, "privileges", "tip", "user 1000",
        "sudo setpriv --reuid=$(id -u) --regid=$(id -g) --init-groups --inh-caps=+checkpoint_restore",
    ),
    "root of a container": (
        {"missing": {"map_files": "no"}, "on": machine(user_id=0)}, "privileges", "tip", "root of this container",
        "docker run --cap-add CHECKPOINT_RESTORE",
    ),
    "userfaultfd behind a seccomp filter": (
        {"missing": {"userfaultfd": "userfaultfd: Operation not permitted", "uffd_poison": "the same"},
         "on": machine(seccomp=2)},
        "userfaultfd-missing", "warning", "Operation not permitted", "docker run --device /dev/userfaultfd",
    ),
    "userfaultfd for root only": (
        {"missing": {"userfaultfd": "Operation not permitted"}, "unprivileged_userfaultfd": 0}, "userfaultfd-missing",
        "warning", "is refused with DeviceError", "sysctl vm.unprivileged_userfaultfd=1",
    ),
    "no CONFIG_USERFAULTFD": (
        {"missing": {"userfaultfd": "Function not implemented"}}, "userfaultfd-missing", "warning", "not implemented",
        "Linux 4.3 or newer, built with CONFIG_USERFAULTFD",
    ),
    "userfaultfd switched off": (
        {"missing": {"userfaultfd": "switched off by PREFAULT_WITHOUT or a test"}}, "userfaultfd-missing", "warning",
        "switched off", "unset PREFAULT_WITHOUT",
    ),
    "userfaultfd without poison": (
        {"missing": {"uffd_poison": "this kernel does not know it"}}, "userfaultfd-old", "warning", "lacks uffd_poison",
        "Linux 6.6 or newer",
    ),
    "userfaultfd for user mode only": (
        {"missing": {"uffd_kernel_faults": "Operation not permitted"}, "userfaultfd_device": 0}, "userfaultfd-user-mode",
        "tip", "write(2) from it, fails with EFAULT", "sudo setfacl -m u:1000:rw /dev/userfaultfd",
    ),
    "userfaultfd for user mode only, no device": (
        {"missing": {"uffd_kernel_faults": "Operation not permitted"}}, "userfaultfd-user-mode", "tip", "EFAULT",
        "sysctl vm.unprivileged_userfaultfd=1; or populate before",
    ),
    "a small memory cgroup": (
        {"cgroups": memory_cgroup("/sys/fs/cgroup/a", GIB, 256 * MIB)}, "memory-cgroup", "warning",
        "may use 1.0 GiB, less than the 30.0 GiB that the machine has available, and uses 256.0 MiB",
        "echo max > /sys/fs/cgroup/a/memory.max",
    ),
    "a full memory cgroup, v1": (
        {"cgroups": memory_cgroup("/m/a", GIB, 1000 * MIB, "memory.limit_in_bytes")}, "memory-cgroup", "problem",
        "more than some 24.0 MiB brings the OOM killer", "echo -1 > /m/a/memory.limit_in_bytes",
    ),
    "a parent's limit": (
        {"cgroups": (*memory_cgroup("/c/a/b", 4 * GIB, MIB), *memory_cgroup("/c/a", 2 * GIB, GIB))}, "memory-cgroup",
        "warning", "may use 2.0 GiB", "echo max > /c/a/memory.max",
    ),
    "memory.high": (
        {"cgroups": memory_cgroup("/c/a", 2 * GIB, MIB, "memory.high")}, "memory-high", "warning",
        "memory.high = 2.0 GiB (1.0 MiB in use)", "echo max > /c/a/memory.high",
    ),
    "strict overcommit": (
        {"overcommit_mode": 2, "commit_limit": 16 * GIB, "committed": 12 * GIB}, "overcommit", "warning",
        "4.0 GiB of 16.0 GiB are left", "sysctl vm.overcommit_memory=0",
    ),
    "RLIMIT_AS": (
        {"rlimit_as": 8 * GIB}, "rlimit-as", "warning", "RLIMIT_AS is 8.0 GiB", "ulimit -v unlimited",
    ),
    "RLIMIT_AS, hard": (
        {"rlimit_as": 8 * GIB, "rlimit_as_hard": 8 * GIB}, "rlimit-as", "warning", "RLIMIT_AS is 8.0 GiB",
        "sudo prlimit --pid $$ --as=unlimited:unlimited",
    ),
    "RLIMIT_DATA": (
        {"rlimit_data": 8 * GIB}, "rlimit-data", "warning", "RLIMIT_DATA is 8.0 GiB", "ulimit -d unlimited",
    ),
    "RLIMIT_MEMLOCK": (
        {"rlimit_memlock": 8 * MIB, "rlimit_memlock_hard": 8 * MIB, "memlock_enforced": 1}, "rlimit-memlock", "tip",
        "RLIMIT_MEMLOCK is 8.0 MiB", "sudo prlimit --pid $$ --memlock=unlimited:unlimited",
    ),
    "a container's /dev/shm": (
        {"dev_shm_size": 64 * MIB, "dev_shm_free": 60 * MIB}, "dev-shm-small", "warning",
        "/dev/shm holds 64.0 MiB, 60.0 MiB free, of 32.0 GiB",
        "mount -o remount,size=16384m /dev/shm  # in a container: docker run --shm-size=16384m",
    ),
    "a full /dev/shm": (
        {"dev_shm_free": MIB}, "dev-shm-full", "warning", "/dev/shm has 1.0 MiB of 16.0 GiB left", "ls -lS /dev/shm",
    ),
    "no /dev/shm": (
        {"unknown": tuple(Reading(name, None, "bytes", "/dev/shm", NOT_MOUNTED)
                          for name in ("dev_shm_size", "dev_shm_free", "dev_shm_huge"))},
        "dev-shm-missing", "warning", "nothing is mounted at /dev/shm", "mkdir -p /dev/shm && mount -t tmpfs",
    ),
    "many mappings": (
        {"mappings": 60000}, "max-map-count", "warning", "60000 of at most 65530", "sysctl vm.max_map_count=262120",
    ),
    "a CPU quota": (
        {"cpus_usable": 2, "cgroups": (Reading("cpu_quota", 1.5, "cpus", "/c/a/cpu.max"),)}, "cpu-quota", "tip",
        "1.5 of 8 CPUs: populate uses at most 2 threads", "echo max > /c/a/cpu.max  # in a container: docker run --cpus=8",
    ),
    "one CPU by affinity": (
        {"cpus_usable": 1, "cpus_affinity": 1}, "cpu-affinity", "tip", "one of 8 CPUs: populate uses one thread",
        "taskset -cp 0-7 $$",
    ),
    "one CPU": (
        {"cpus_usable": 1, "cpus_affinity": 1, "cpus_online": 1}, "one-cpu", "tip", "one CPU: populate uses one thread",
        "more CPUs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_each_fault_brings_its_advice_and_no_other(what: str) -> None:
    changes, rule, severity, sentence, remedy = CASES[what]
    advice = only(advise(record(**changes)), rule)
    assert advice.severity == severity
    assert sentence in advice.sentence
    assert advice.remedy.startswith(remedy)


QUIET: dict[str, dict[str, Any]] = {
    "the size's own setting overrides enabled": {"enabled": "never", "enabled_pmd": "always"},
    "the size's own setting overrides shmem_enabled": {"shmem_enabled": "never", "shmem_enabled_pmd": "advise"},
    "an old kernel has no setting for the size": {"enabled_pmd": None, "shmem_enabled_pmd": None},
    "hugetlb pages come on demand": {"pools": (HugetlbPool(2 * MIB, 0, 0, 0, 0, overcommit=100),)},
    "a kernel without hugetlb": {"pools": (), "missing": {"hugetlb_pages": "no"}},
    "root may lock": {"rlimit_memlock": 8 * MIB, "memlock_enforced": 0},
    "a cgroup larger than memory": {"cgroups": memory_cgroup("/c", 64 * GIB, GIB)},
    "a cgroup without limits": {"cgroups": memory_cgroup("/c", None, GIB)},
    "/dev/shm fits the cgroup": {
        "cgroups": memory_cgroup("/c", 200 * MIB, 0), "mem_available": 100 * MIB, "dev_shm_size": 64 * MIB,
        "dev_shm_free": 64 * MIB,
    },
    "/dev/shm without a limit": {"dev_shm_size": None, "dev_shm_free": None},
    "capabilities switched off by hand": {"missing": {"map_files": "switched off by PREFAULT_WITHOUT or a test"}},
    "a quota above the CPUs": {"cgroups": (Reading("cpu_quota", 16.0, "cpus", "/c/cpu.max"),)},
    "no swap": NO_SWAP,
}  # fmt: skip


@pytest.mark.parametrize("what", QUIET)
def test_no_advice_where_nothing_is_wrong(what: str) -> None:
    assert advise(record(**QUIET[what])) == ()


def test_a_record_of_unknown_values_brings_no_advice() -> None:
    readings = tuple(
        Reading(name, None, "word", "hidden", "Permission denied") for name in (*HEALTHY_WORDS, *HEALTHY_NUMBERS)
    )
    assert advise(record(unknown=readings, pools=())) == ()


def test_an_old_kernel_in_full() -> None:
    """Linux 5.10: no MADV_POPULATE_*, no PAGEMAP_SCAN, no setting for single sizes of huge pages."""
    unknown = "this kernel does not know it"
    old = {each.name: unknown for each in capabilities.ALL if tuple(map(int, each.since.split("."))) > (5, 10)}
    found = advise(record(missing=old, enabled_pmd=None, shmem_enabled_pmd=None, on=machine(kernel="5.10.0")))
    assert [advice.rule for advice in found] == ["populate-missing", "userfaultfd-old", "residency-pagemap"]
    assert [advice.remedy for advice in found] == ["Linux 5.14 or newer", "Linux 6.6 or newer", "Linux 6.7 or newer"]


def test_a_container_in_full() -> None:
    found = advise(
        record(
            missing={"map_files": "Operation not permitted"},
            on=machine(user_id=0, seccomp=2),
            cgroups=(
                *memory_cgroup("/sys/fs/cgroup", GIB, 100 * MIB),
                Reading("cpu_quota", 2.0, "cpus", "/sys/fs/cgroup/cpu.max"),
            ),
            cpus_usable=2,
            dev_shm_size=64 * MIB,
            dev_shm_free=64 * MIB,
            dev_shm_huge="never",
            shmem_enabled="never",
            rlimit_memlock=8 * MIB,
            rlimit_memlock_hard=8 * MIB,
            memlock_enforced=1,
            pools=(HugetlbPool(2 * MIB, 0, 0, 0, 0, 0),),
        )
    )  # fmt: skip
    assert [advice.rule for advice in found if advice.severity == "warning"] == [
        "memory-cgroup",
        "dev-shm-small",
        "shmem-never",
    ]
    tips = {advice.rule for advice in found if advice.severity == "tip"}
    assert tips == {"rlimit-memlock", "dev-shm-huge", "hugetlb-empty", "privileges", "cpu-quota"}
    # The advised /dev/shm is half of what the container may use, not of the machine.
    assert "size=512m" in next(advice.remedy for advice in found if advice.rule == "dev-shm-small")


def test_no_two_pieces_of_advice_contradict() -> None:
    """A thousand machines, each with up to six faults at once."""
    choose = random.Random(2021)
    exclusive = [
        {"populate-missing", "populate-impossible"}, {"residency-mincore", "residency-pagemap"},
        {"dev-shm-small", "dev-shm-full", "dev-shm-missing"}, {"hugetlb-empty", "hugetlb-used-up"},
        {"cpu-quota", "cpu-affinity", "one-cpu"}, {"thp-never", "thp-defrag"},
        {"userfaultfd-missing", "userfaultfd-old", "userfaultfd-user-mode"},
    ]  # fmt: skip
    for _ in range(1000):
        changes: dict[str, Any] = {}
        chosen = choose.sample([*CASES], choose.randint(1, 6))
        overwritten = False  # one fault may take back what another one needs
        for what in chosen:
            for key, value in CASES[what][0].items():
                overwritten |= key in changes
                changes[key] = {**changes.get(key, {}), **value} if isinstance(value, dict) else value
        found = advise(record(**changes))
        names = rules(found)
        assert found or overwritten, chosen
        for group in exclusive:
            assert len(names & group) <= 1, chosen
        writes = [match for advice in found for match in re.findall(r"echo (\S+) > (\S+)", advice.remedy)]
        assert len({path for _, path in writes}) == len(writes), f"a file is to be written twice: {writes}, {chosen}"
        gravity = [["problem", "warning", "tip"].index(advice.severity) for advice in found]
        assert gravity == sorted(gravity)
        for advice in found:
            assert advice.sentence[-1] not in ".!"
            assert not re.search(r"None|\bnan\b|(?<!\w)-\d", advice.sentence), advice.sentence


def test_what_a_remedy_sets_silences_its_advice() -> None:
    names = ("enabled", "enabled_pmd", "shmem_enabled", "shmem_enabled_pmd", "defrag")
    choices = (("always", "madvise", "never"), ("inherit", "never", "always"), ("never", "deny", "advise"),
               ("inherit", "never"), ("never", "madvise"))  # fmt: skip
    for words in itertools.product(*choices):
        changes: dict[str, Any] = dict(zip(names, words, strict=True))
        found = [advice for advice in advise(record(**changes)) if advice.rule in ("thp-never", "shmem-never")]
        for advice in found:
            for word, path in re.findall(r"echo (\S+) > (\S+)", advice.remedy):
                relative = str(Path(path).relative_to(THP))
                changes[relative.replace("hugepages-2048kB/enabled", "enabled_pmd")
                        .replace("hugepages-2048kB/shmem_enabled", "shmem_enabled_pmd")] = word  # fmt: skip
        assert not rules(advise(record(**changes))) & {"thp-never", "shmem-never"}, (words, found)


# --- this machine


def meminfo(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    assert match
    return int(match[1]) * KIB


def test_the_record_agrees_with_the_kernel() -> None:
    found = collect()
    values = {reading.name: reading.value for reading in (*found.limits, *found.settings)}
    assert values["mem_total"] == meminfo("MemTotal")
    assert abs(int(values["mem_available"] or 0) - meminfo("MemAvailable")) < 2 * GIB  # others are at work
    assert values["swap_total"] == meminfo("SwapTotal")
    assert values["overcommit_mode"] == int(Path("/proc/sys/vm/overcommit_memory").read_text())
    assert values["max_map_count"] == int(Path("/proc/sys/vm/max_map_count").read_text())
    assert abs(int(values["mappings"] or 0) - oracle.mappings()) < 50
    for name in ("MEMLOCK", "AS", "DATA"):
        for index, suffix in enumerate(("", "_hard")):
            expected = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[index]
            assert values[f"rlimit_{name.lower()}{suffix}"] == (None if expected == -1 else expected)
    assert values["cpus_affinity"] == len(os.sched_getaffinity(0))
    assert values["cpus_online"] == len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.M))


def test_dev_shm_as_df_sees_it() -> None:
    if not os.path.ismount("/dev/shm"):
        needs.missing("/dev/shm is not mounted")
    found = collect()
    size, used = (
        int(text) for text in subprocess.run(
            ["df", "--block-size=1", "--output=size,used", "/dev/shm"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[1].split()
    )  # fmt: skip
    assert found.size("dev_shm_size") == size
    assert abs((found.size("dev_shm_free") or 0) - (size - used)) < GIB


def test_the_settings_of_huge_pages() -> None:
    if not THP.is_dir():
        needs.missing("the kernel has no transparent huge pages")
    settings = {setting.name: setting for setting in collect().settings}
    for name in ("enabled", "shmem_enabled", "defrag"):
        assert f"[{settings[name].value}]" in (THP / name).read_text()
        assert settings[name].source == str(THP / name)
    assert settings["pmd_size"].value == int((THP / "hpage_pmd_size").read_text())
    assert settings["use_zero_page"].value == int((THP / "use_zero_page").read_text())


def test_every_word_that_this_kernel_knows_is_explained() -> None:
    if not THP.is_dir():
        needs.missing("the kernel has no transparent huge pages")
    for name in ("enabled", "shmem_enabled", "defrag"):
        words = (THP / name).read_text().replace("[", "").replace("]", "").split()
        assert set(words) == set(MEANINGS[name])


def test_the_hugetlb_pools(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(4)
    pool = next(pool for pool in collect().pools if pool.page_size == needs.HUGE)
    directory = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    assert pool.total == int((directory / "nr_hugepages").read_text()) >= 4
    assert pool.free == int((directory / "free_hugepages").read_text())
    assert not rules(advise(collect())) & {"hugetlb-empty", "hugetlb-used-up"}
    with prefault.Mapping(pool.available * needs.HUGE, backing="hugetlb"):
        found = collect()
        assert next(pool for pool in found.pools if pool.page_size == needs.HUGE).available == 0
        assert "hugetlb-used-up" in rules(advise(found))


def test_the_setting_of_unprivileged_userfaultfd_is_read() -> None:
    found = {reading.name: reading for reading in collect().limits}
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if setting.exists():
        assert found["unprivileged_userfaultfd"].value == int(setting.read_text())
    if Path("/dev/userfaultfd").exists():
        opened = subprocess.run(["sh", "-c", ": <>/dev/userfaultfd"], capture_output=True, check=False).returncode == 0
        assert found["userfaultfd_device"].value == opened
    else:
        assert found["userfaultfd_device"].unknown


def test_userfaultfd_as_an_ordinary_user() -> None:
    needs.root("become another user")
    needs.capability(capabilities.UFFD_KERNEL_FAULTS)
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        needs.missing("vm.unprivileged_userfaultfd gives every user the right")

    def ask() -> tuple[bool, bool, set[str]]:
        os.setuid(65534)
        answers = {each.name: each.available for each in capabilities.ALL}
        return answers["userfaultfd"], answers["uffd_kernel_faults"], rules(advise(collect()))

    with Child(ask) as process:
        user_mode, kernel_too, advised = process.result()
    assert (user_mode, kernel_too) == (True, False)
    assert "userfaultfd-user-mode" in advised
    assert "userfaultfd-missing" not in advised


def test_the_machine() -> None:
    found = collect().machine
    assert (found.kernel, found.architecture) == (platform.release(), platform.machine())
    assert found.page_size == os.sysconf("SC_PAGESIZE")
    assert found.prefault == prefault.__version__
    assert found.user_id == os.geteuid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found.date)
    status = Path("/proc/self/status").read_text()
    assert f"Seccomp:\t{found.seccomp}\n" in status


def test_every_capability_says_what_happens_without_it() -> None:
    names = {each.name for each in capabilities.ALL}
    assert set(WITHOUT) == names
    assert {answer.name for answer in collect().capabilities} == names
    with without(*names):
        assert all(not answer.available and answer.refusal and answer.without for answer in collect().capabilities)


def test_a_refusal_has_no_errno_numbers() -> None:
    def ask(error: OSError) -> str | None:
        def refuse() -> None:
            raise error

        return capabilities.Capability("x", "1", "?", refuse).refusal

    assert ask(OSError(22, "madvise: Invalid argument")) == "madvise: Invalid argument (this kernel does not know it)"
    assert ask(PermissionError(13, "Permission denied", "/proc/x")) == (
        "/proc/x: Permission denied (this process lacks the privilege, or a sandbox forbids it)"
    )
    assert ask(OSError(95, "the page says so")) == "the page says so"


# --- JSON


def test_json_round_trip() -> None:
    report = examine()
    text = json.dumps(to_json(report))
    again = json.loads(text)
    assert again == to_json(report)
    assert (again["schema"], again["kind"]) == (doctor.SCHEMA, "prefault-doctor") == (1, "prefault-doctor")
    rebuilt = Record(
        MachineFacts(**again["machine"]),
        tuple(CapabilityAnswer(**item) for item in again["capabilities"]),
        tuple(Reading(**item) for item in again["transparent_huge_pages"]),
        tuple(HugetlbPool(**item) for item in again["hugetlb_pools"]),
        tuple(Reading(**item) for item in again["limits"]),
    )
    assert rebuilt == report.record
    assert tuple(Advice(**item) for item in again["advice"]) == report.advice == advise(rebuilt)
    for item in again["limits"]:
        if item["unit"] in ("bytes", "count", "mode", "flag"):
            assert item["value"] is None or type(item["value"]) is int


def test_json_is_documented() -> None:
    text = DOCUMENT.read_text()
    keys = set(to_json(examine())) | {
        field.name for kind in (MachineFacts, CapabilityAnswer, Reading, Advice) for field in fields(kind)
    }
    keys |= set(HugetlbPool._fields)
    named = {reading.name for reading in (*collect().settings, *collect().limits)}
    named |= {"commit_limit", "committed", "memory_cgroup_high", "memlock_enforced"}
    advised = {rule for _, rule, *_ in CASES.values()}
    assert {word for word in keys | named | advised if f"`{word}`" not in text} == set()


# --- other circumstances, each in a child process

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


def unshared(command: str) -> tuple[str, ...]:
    """The prefix of a command that runs in a mount namespace of its own, where ``command`` was run first."""
    needs.root("change what a process sees of /sys and /proc")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        needs.missing("no mount namespace can be made")
    return "unshare", "--mount", "sh", "-ec", f'{command}\nexec "$@"', "sh"


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


# --- cgroups made for the test


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


# --- remedies that change the whole machine: set, looked at, set back


@pytest.mark.parametrize("word", ["never", "deny"])
def test_the_remedy_for_shared_memory(word: str, thp_setting: Callable[[str, str], None]) -> None:
    needs.capability(capabilities.MADV_POPULATE)
    thp_setting("shmem_enabled", word)

    def huge_bytes(backing: str) -> int:
        with prefault.Mapping(4 * MIB, backing=backing, shared=True) as mapping:
            prefault.populate(mapping)
            return int(oracle.smaps(mapping.range.start)["ShmemPmdMapped"])

    assert huge_bytes("memfd") == 0
    advice = next(advice for advice in examine().advice if advice.rule == "shmem-never")
    subprocess.run(["sh", "-c", advice.remedy], check=True)
    assert huge_bytes("memfd") == huge_bytes("anonymous") == 4 * MIB
    assert "shmem-never" not in rules(examine().advice)


def test_the_remedy_for_private_memory(thp_setting: Callable[[str, str], None]) -> None:
    needs.capability(capabilities.MADV_POPULATE)
    thp_setting("enabled", "never")

    def huge_bytes() -> int:
        with prefault.Mapping(4 * MIB, huge="advise") as mapping:
            prefault.populate(mapping)
            return int(oracle.smaps(mapping.range.start)["AnonHugePages"])

    assert huge_bytes() == 0
    advice = next(advice for advice in examine().advice if advice.rule == "thp-never")
    subprocess.run(["sh", "-c", advice.remedy], check=True)
    assert huge_bytes() == 4 * MIB
    assert "thp-never" not in rules(examine().advice)


def test_the_remedy_for_files_in_memory() -> None:
    """What is advised for /dev/shm, done to a tmpfs of our own in a namespace of its own."""
    before = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import prefault
from support import oracle
with prefault.Mapping({4 * MIB}, backing=prefault.TemporaryFile("/dev/shm")) as mapping:
    prefault.populate(mapping)
    print(oracle.smaps(mapping.range.start)["ShmemPmdMapped"], file=sys.stderr)
"""
    small = "mount -t tmpfs -o size=64m,huge=never none /dev/shm"
    remedy = only(advise(record(dev_shm_huge="never")), "dev-shm-huge").remedy
    shown = []
    for prefix in (unshared(small), unshared(f"{small}\n{remedy}")):
        done = subprocess.run([*prefix, sys.executable, "-c", before], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown.append(int(done.stderr))
    assert shown == [0, 4 * MIB]
    assert "dev-shm-huge" not in advised(child(*unshared(f"{small}\n{remedy}")))


def test_examining_leaves_nothing(no_leaks: None) -> None:
    def address_space() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4 * KIB

    examine()
    before = address_space()
    for _ in range(20):
        examine()
    assert address_space() - before < 32 * MIB
