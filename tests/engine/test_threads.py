"""How many threads populate, and the reason in words: by size, affinity and CPU quota."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefault
from prefault._system import cgroups
from prefault.engine import execution, planning
from prefault.memory.vma import Backing
from prefault.sizes import MIB
from support import needs, oracle
from support.children import in_child


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: 64)


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("size", "threads", "reason"),
    [
        ("63 MiB", 1, "a second one pays from 64.0 MiB on"),
        ("64 MiB", 2, "one for each 32.0 MiB"),
        ("256 MiB", 8, "one for each 32.0 MiB"),
        ("4 GiB", 8, "memory bandwidth"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", None])
def test_the_size_decides(size: str, threads: int, reason: str, asked: planning.Threads) -> None:
    with prefault.Mapping(size, noreserve=True) as mapping:
        plan = prefault.plan(mapping, threads=asked)
    assert plan.threads == threads
    assert reason in plan.threads_reason
    assert reason in str(plan)
    assert not plan.notes


@pytest.mark.usefixtures("many_cpus")
def test_a_file_on_a_disk_has_one_thread(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(65 * MIB))
    with prefault.Mapping(backing=prefault.File(file)) as mapping:
        plan = prefault.plan(mapping, threads="auto")
        if plan.segments[0].backing is not Backing.FILE:
            needs.missing("the temporary directory is on a disk")
    assert (plan.threads, plan.threads_reason) == (1, "a disk likes its requests in order")


def test_all_cpus_of_the_machine_are_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: os.cpu_count())
    monkeypatch.setattr(planning, "MAX_THREADS", 1 << 20)
    with prefault.Mapping("1 TiB", noreserve=True) as mapping:
        plan = prefault.plan(mapping)
    assert plan.threads == os.cpu_count()
    assert not [note for note in plan.notes if "CPU" in note]


def test_an_affinity_that_leaves_fewer_is_in_the_notes() -> None:
    if (os.cpu_count() or 1) < 2:
        needs.missing("a machine with two CPUs")

    def on_one_cpu() -> tuple[prefault.Plan, prefault.PopulateResult, int]:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with prefault.Mapping("64 MiB") as mapping:
            plan, result = prefault.plan(mapping), prefault.populate(mapping, threads="auto")
            return plan, result, oracle.present_bytes(mapping.range.start, 64 * MIB)

    plan, result, present = in_child(on_one_cpu)
    assert present == 64 * MIB
    assert plan.threads == result.threads == 1
    assert result.notes == plan.notes
    assert plan.notes[0].startswith("1 thread in place of 2: ")
    assert f"leaves this process 1 of {os.cpu_count()} CPUs" in str(result)
    assert str(plan).count("in place of") == 1


@contextlib.contextmanager
def _quota_group() -> Iterator[Path]:
    """A cgroup of one CPU and a half, of the controller that this machine has for that."""
    needs.root("make a cgroup")
    found = cgroups.governing("cpu")
    if not found.directories:
        needs.missing("the cpu controller of cgroups is mounted")
    directory = Path(found.directories[0], f"prefault-test-cpu-{os.getpid()}")
    directory.mkdir()
    try:
        if found.version == 1:
            (directory / "cpu.cfs_period_us").write_text("100000")
            (directory / "cpu.cfs_quota_us").write_text("100000")
        else:
            (directory / "cpu.max").write_text("100000 100000")
        yield directory
    finally:
        directory.rmdir()


def test_a_quota_is_named_with_its_file() -> None:
    if (os.cpu_count() or 1) < 2:
        needs.missing("a machine with two CPUs")
    with _quota_group() as directory:

        def inside() -> prefault.Plan:
            (directory / "cgroup.procs").write_text(str(os.getpid()))
            try:
                with prefault.Mapping("1 GiB", noreserve=True) as mapping:
                    return prefault.plan(mapping)
            finally:
                (directory.parent / "cgroup.procs").write_text(str(os.getpid()))

        plan = in_child(inside)
    assert plan.threads == 1
    assert plan.notes == (f"1 thread in place of 8: {plan.threads_reason}",)
    assert plan.threads_reason.startswith(f"{directory}/cpu.")
    assert plan.threads_reason.endswith(f"allows 1 of {os.cpu_count()} CPUs")


def test_fewer_than_asked_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    with prefault.Mapping("64 MiB") as mapping:
        assert prefault.populate(mapping, threads=2).notes == ()
        result = prefault.populate(mapping, threads=16)
    assert result.threads == 2
    assert result.notes[0].startswith("2 threads in place of 16: ")


def test_threads_that_the_system_refuses_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    monkeypatch.setattr(execution, "start_new_thread", refuse)
    with prefault.Mapping("64 MiB") as mapping:
        result = prefault.populate(mapping, threads=2)
    assert result.threads == 1
    assert "1 of 2 threads" in str(result)


@pytest.mark.parametrize("size", [4096, 64 * MIB])
def test_other_words_are_refused(size: int) -> None:
    with prefault.Mapping(size) as mapping:
        for call in (prefault.populate, prefault.plan):
            with pytest.raises(ValueError, match="'auto'"):
                call(mapping, threads="many")  # type: ignore[arg-type]
        assert prefault.populate(mapping, threads="auto").bytes == size
