"""prefault doctor: the advice for machines that were made up."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from prefault._system import capabilities
from prefault._system.hugetlb import HugetlbPool
from prefault.doctor import Advice, CapabilityAnswer, MachineFacts, Reading, advise, collect, examine, to_json
from prefault.doctor.record import NOT_MOUNTED
from support.examinations import (
    GIB,
    HEALTHY_NUMBERS,
    HEALTHY_WORDS,
    MIB,
    POOL,
    THP,
    machine,
    memory_cgroup,
    only,
    record,
    rules,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "doctor-json.md"


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
    "DAMON": (
        {"cgroups": (Reading("proactive_reclaim", 60.0, "seconds", "/sys/x/schemes/0"),)}, "proactive-reclaim", "warning",
        "nobody used for 60 s is taken away, though there is enough (DAMON, /sys/x/schemes/0)", "prefault lock PATH",
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
