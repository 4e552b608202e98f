"""The CPUs that may be kept busy: by affinity, and by the quota of every cgroup above."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefault._system import cgroups
from prefault._system.cpus import usable_cpus, why_not_more_cpus
from support import needs
from support.children import in_child


def test_never_more_than_the_affinity_allows() -> None:
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))

    def on_one_cpu() -> int:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return usable_cpus()

    assert in_child(on_one_cpu) == 1


def _v2(directory: Path, line: str | None) -> Path:
    directory.mkdir(parents=True)
    if line is not None:
        (directory / "cpu.max").write_text(line + "\n")
    return directory


def _v1(directory: Path, quota: int, period: int) -> Path:
    directory.mkdir(parents=True)
    (directory / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (directory / "cpu.cfs_period_us").write_text(f"{period}\n")
    return directory


@pytest.fixture
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("_eight_cpus")
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], 8),
        (["max 100000"], 8),
        ([None], 8),  # the root has no such file
        (["300000 100000"], 3),
        (["250000 100000"], 3),  # two and a half keep three busy
        (["50000 100000"], 1),
        (["1000 100000"], 1),
        (["6400000 100000"], 8),  # more than there are
        (["400000 100000", "max 100000", "200000 100000", None], 2),  # the tightest of all levels
        (["max 100000", "150000 50000"], 3),
    ],
)
def test_quotas_of_cgroup_v2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str | None], expected: int
) -> None:
    levels = [_v2(tmp_path / str(level), line) for level, line in enumerate(lines)]
    monkeypatch.setattr(cgroups, "directories", lambda controller: levels if controller == "cpu" else [])
    assert usable_cpus() == expected


@pytest.mark.usefixtures("_eight_cpus")
@pytest.mark.parametrize(
    ("quotas", "expected"),
    [([(-1, 100000)], 8), ([(300000, 100000)], 3), ([(-1, 100000), (120000, 50000)], 3), ([(10000, 100000)], 1)],
)
def test_quotas_of_cgroup_v1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quotas: list[tuple[int, int]], expected: int
) -> None:
    levels = [_v1(tmp_path / str(level), *quota) for level, quota in enumerate(quotas)]
    monkeypatch.setattr(cgroups, "directories", lambda _: levels)
    assert usable_cpus() == expected


@pytest.mark.usefixtures("_eight_cpus")
def test_a_v1_directory_with_half_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _v1(tmp_path / "half", 100000, 100000)
    (directory / "cpu.cfs_period_us").unlink()
    monkeypatch.setattr(cgroups, "directories", lambda _: [directory])
    assert usable_cpus() == 8


# --- the reason in words


def test_the_machine_itself_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "directories", lambda _: [])
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)))
    assert why_not_more_cpus() == f"the machine has {os.cpu_count()} CPU" + "s" * (os.cpu_count() != 1)


def test_an_affinity_is_the_reason() -> None:
    if (os.cpu_count() or 1) < 2:
        needs.missing("a machine with two CPUs")

    def on_one_cpu() -> str:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return why_not_more_cpus()

    assert f"leaves this process 1 of {os.cpu_count()} CPUs" in in_child(on_one_cpu)


@pytest.mark.usefixtures("_eight_cpus")
def test_the_tightest_quota_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [_v2(tmp_path / "loose", "400000 100000"), _v2(tmp_path / "tight", "150000 100000")]
    monkeypatch.setattr(cgroups, "directories", lambda _: levels)
    assert why_not_more_cpus() == f"{levels[1] / 'cpu.max'} allows 1.5 of {os.cpu_count()} CPUs"
