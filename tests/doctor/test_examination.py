"""prefault doctor on this machine: the record against independent readings, and its form as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import prefault
from prefault import doctor
from prefault._system import capabilities
from prefault._system.hugetlb import HugetlbPool
from prefault.doctor import Advice, CapabilityAnswer, MachineFacts, Reading, Record, advise, collect, examine, to_json
from prefault.doctor.words import MEANINGS, WITHOUT
from prefault.testing import without
from support import needs, oracle
from support.children import Child
from support.examinations import GIB, KIB, MIB, THP, rules


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


def test_examining_leaves_nothing(no_leaks: None) -> None:
    def address_space() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4 * KIB

    examine()
    before = address_space()
    for _ in range(20):
        examine()
    assert address_space() - before < 32 * MIB


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
