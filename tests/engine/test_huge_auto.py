"""populate(huge="auto"): which memory is advised huge pages, and which is left as it is. smaps is the oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import prefault
from prefault._kernel import mman
from prefault._system import thp
from prefault.engine import planning
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import without
from support import needs, oracle
from support.children import in_child
from support.machine_lock import MachineLock

HUGE = 2 * MIB
Setting = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def setting(thp_setting: Setting, machine_lock: MachineLock) -> Setting:
    """Base pages unless they are asked for, whatever this machine is set to."""
    del machine_lock
    if thp.pmd_size() != HUGE:
        needs.missing("the kernel has transparent huge pages of 2 MiB")
    thp_setting("enabled", "madvise")
    return thp_setting


@pytest.fixture
def mapping() -> Iterator[prefault.Mapping]:
    with prefault.Mapping(16 * MIB) as mapping:
        yield mapping


def _huge(address: int) -> int:
    return oracle.smaps(address)["AnonHugePages"]


@pytest.mark.parametrize("missing", [(), ("madv_collapse",), ("process_madvise",), ("pagemap_scan",)])
@pytest.mark.parametrize("rollback", [False, True])
def test_missing_memory_gets_huge_pages(mapping: prefault.Mapping, missing: tuple[str, ...], rollback: bool) -> None:
    with without(*missing):
        result = prefault.populate(mapping, huge="auto", rollback=rollback)
    assert _huge(mapping.range.start) == 16 * MIB == result.bytes
    assert ("16.0 MiB in huge pages" in str(result)) == ("pagemap_scan" not in missing)
    assert bytes(mapping.memoryview()) == bytes(16 * MIB)


def test_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    with prefault.Mapping(128 * MIB) as mapping:
        result = prefault.populate(mapping, huge="auto")
        assert result.threads == 2
        assert _huge(mapping.range.start) == 128 * MIB == result.bytes


def test_few_calls_advise_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the mmap lock for writing, for which it waits for the chunks of other threads."""
    calls: list[tuple[int, int]] = []
    advise = mman.madvise

    def counting(start: int, length: int, advice: int) -> None:
        if advice == mman.MADV_HUGEPAGE:
            calls.append((start, start + length))
        advise(start, length, advice)

    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    monkeypatch.setattr(mman, "madvise", counting)
    with prefault.Mapping(512 * MIB) as mapping:
        prefault.populate(mapping, huge="auto", rate="1 TiB/s")  # which keeps chunks to 64 MiB
        assert _huge(mapping.range.start) == 512 * MIB
        assert sum(stop - start for start, stop in calls) == 512 * MIB
        assert len(calls) <= 9  # doubling from a chunk of 4 MiB or less on
        ahead = 0
        for start, stop in calls:
            assert stop - start <= 64 * MIB + ahead
            ahead += stop - start


def test_without_it_memory_stays_as_it_is(mapping: prefault.Mapping) -> None:
    prefault.populate(mapping)
    assert _huge(mapping.range.start) == 0
    assert "hg" not in oracle.vma_flags(mapping.range.start)


def test_only_whole_huge_pages_inside_the_range(mapping: prefault.Mapping) -> None:
    result = prefault.populate(mapping, offset=HUGE + PAGE_SIZE, length=2 * HUGE, huge="auto")
    assert result.bytes == 2 * HUGE == oracle.present_bytes(mapping.range.start, 16 * MIB)
    assert _huge(mapping.range.start + 2 * HUGE) == HUGE
    assert "hg" not in oracle.vma_flags(mapping.range.start)
    assert "hg" not in oracle.vma_flags(mapping.range.start + 3 * HUGE)


def test_small_memory_is_left_alone(mapping: prefault.Mapping) -> None:
    result = prefault.populate(mapping, offset=PAGE_SIZE, length=2 * HUGE - 2 * PAGE_SIZE, huge="auto")
    assert "no whole huge page of 2.0 MiB lies in it" in str(result)
    assert "hg" not in oracle.vma_flags(mapping.range.start)


def test_huge_pages_with_populated_pages_are_left_alone(mapping: prefault.Mapping) -> None:
    mapping.memoryview()[HUGE + 5] = 7
    result = prefault.populate(mapping, huge="auto")
    assert _huge(mapping.range.start) == HUGE
    assert _huge(mapping.range.start + 2 * HUGE) == 16 * MIB - 2 * HUGE
    assert "hg" not in oracle.vma_flags(mapping.range.start + HUGE)
    assert "14.0 MiB in huge pages" in str(result)


@pytest.mark.parametrize("missing", [(), ("madv_collapse",)])
def test_memory_that_forbids_them_goes_on_forbidding_them(missing: tuple[str, ...]) -> None:
    with without(*missing), prefault.Mapping(8 * MIB, huge="never") as mapping:
        mman.madvise(mapping.range.start, 4 * MIB, mman.MADV_HUGEPAGE)
        result = prefault.populate(mapping, huge="auto")
        assert _huge(mapping.range.start) == 4 * MIB
        assert _huge(mapping.range.start + 4 * MIB) == 0
        assert "nh" in oracle.vma_flags(mapping.range.start + 4 * MIB)
    assert result.bytes == 8 * MIB
    assert "4.0 MiB keep base pages: MADV_NOHUGEPAGE" in str(result)


def test_a_process_that_forbids_them() -> None:
    def forbidden() -> tuple[prefault.PopulateResult, int]:
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
        with prefault.Mapping(8 * MIB) as mapping:
            return prefault.populate(mapping, huge="auto"), _huge(mapping.range.start)

    result, huge = in_child(forbidden)
    assert (result.bytes, huge) == (8 * MIB, 0)
    assert "PR_SET_THP_DISABLE" in str(result)


@pytest.mark.parametrize(("word", "reason"), [("never", "administrator allows none"), ("always", "without being asked")])
def test_the_setting_of_the_system_is_obeyed(mapping: prefault.Mapping, setting: Setting, word: str, reason: str) -> None:
    setting("enabled", word)
    plan, result = prefault.plan(mapping, huge="auto"), prefault.populate(mapping, huge="auto")
    assert reason in str(plan)
    assert reason in str(result)
    assert "hg" not in oracle.vma_flags(mapping.range.start)


def test_shared_memory_files_and_reading(tmp_path: Path, mapping: prefault.Mapping) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4 * MIB))
    with prefault.Mapping(4 * MIB, backing="memfd") as memfd, prefault.Mapping(backing=prefault.File(file)) as disk:
        for memory, access in ((memfd, None), (disk, None), (mapping, "read")):
            note = "no huge pages asked for: it is not private anonymous memory"
            assert note in str(prefault.plan(memory, access=access, huge="auto"))  # type: ignore[arg-type]
            assert note in str(prefault.populate(memory, access=access, huge="auto"))  # type: ignore[arg-type]
            assert "hg" not in oracle.vma_flags(memory.range.start)


def test_sparse_memory_decides_itself() -> None:
    with prefault.SparseMemory(8 * MIB, block=HUGE) as memory:
        assert "sparse memory decides" in str(prefault.populate(memory, huge="auto"))
        assert _huge(memory.range.start) == 0


def test_the_plan_touches_nothing(mapping: prefault.Mapping) -> None:
    plan = prefault.plan(mapping, huge="auto")
    assert "huge pages for 16.0 MiB" in str(plan)
    assert oracle.present_bytes(mapping.range.start, 16 * MIB) == 0
    assert "hg" not in oracle.vma_flags(mapping.range.start)


def test_a_failure_behind_it_is_reported_as_ever(mapping: prefault.Mapping) -> None:
    bad = mapping.range.start + 6 * MIB + PAGE_SIZE
    mman.mprotect(bad, PAGE_SIZE, mman.PROT_NONE)
    with pytest.raises(prefault.ProtectionError) as caught:
        prefault.populate(mapping, huge="auto", rollback=True)
    assert caught.value.address == bad
    assert oracle.present_bytes(mapping.range.start, 16 * MIB) == 0


def test_another_word_is_refused(mapping: prefault.Mapping) -> None:
    for call in (prefault.populate, prefault.plan):
        with pytest.raises(ValueError, match="'auto' or None"):
            call(mapping, huge="advise")  # type: ignore[arg-type]
