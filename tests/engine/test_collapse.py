"""collapse: which memory becomes huge, what is left and why. smaps is the oracle."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefault
from prefault._kernel import mman
from prefault._system import capabilities, thp
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import without
from support import needs, oracle
from support.cgroups import groups
from support.children import in_child
from support.regions import Region

HUGE = 2 * MIB
_COUNTERS = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")


@pytest.fixture(autouse=True)
def _needed() -> None:
    if thp.pmd_size() != HUGE:
        needs.missing("the kernel has transparent huge pages of 2 MiB")
    needs.capability(capabilities.MADV_COLLAPSE)


@pytest.fixture(params=["anonymous", "memfd"])
def mapping(request: pytest.FixtureRequest) -> Iterator[prefault.Mapping]:
    """8 MiB in base pages, each with other bytes."""
    with prefault.Mapping(8 * MIB, backing=request.param) as mapping:
        pages = mapping.ndarray("uint64", (8 * MIB // PAGE_SIZE, PAGE_SIZE // 8))
        pages[:, 0] = range(len(pages))
        del pages
        assert _huge(mapping) == 0
        yield mapping


def _huge(mapping: prefault.Mapping) -> int:
    """Bytes of the mapping that smaps counts as mapped by huge entries."""
    counters = oracle.smaps(mapping.range.start)
    return sum(counters[name] for name in _COUNTERS)


def _left(result: prefault.CollapseResult) -> list[tuple[int, int | None, int]]:
    return [(item.bytes, item.errno, item.offset) for item in result.left]


def test_all_of_it_becomes_huge_and_keeps_its_bytes(mapping: prefault.Mapping) -> None:
    result = prefault.collapse(mapping)
    assert _huge(mapping) == 8 * MIB == result.made_bytes
    assert result.huge_before_bytes == 0 == result.left_bytes
    pages = mapping.ndarray("uint64", (8 * MIB // PAGE_SIZE, PAGE_SIZE // 8))
    assert pages[:, 0].tolist() == list(range(len(pages)))
    assert "8.0 MiB made huge" in str(result)


def test_once_more_changes_nothing(mapping: prefault.Mapping) -> None:
    prefault.collapse(mapping, length=4 * MIB)
    assert _huge(mapping) == 4 * MIB
    result = prefault.collapse(mapping)
    assert (result.made_bytes, result.huge_before_bytes) == (4 * MIB, 4 * MIB)
    result = prefault.collapse(mapping)
    assert (result.made_bytes, result.huge_before_bytes) == (0, 8 * MIB)
    assert "8.0 MiB were before" in str(result)


def test_only_whole_huge_pages_of_the_range(mapping: prefault.Mapping) -> None:
    result = prefault.collapse(mapping, offset=PAGE_SIZE, length=6 * MIB)
    assert result.made_bytes == 4 * MIB == _huge(mapping)
    assert _left(result) == [(2 * MIB, None, PAGE_SIZE)]
    assert "whole huge page" in result.left[0].reason


def test_nothing_at_all() -> None:
    result = prefault.collapse(bytearray())
    assert result[:3] == (0, 0, ())


def test_unpopulated_memory_stays_so() -> None:
    with prefault.Mapping(8 * MIB) as mapping:
        prefault.populate(mapping, offset=4 * MIB, length=2 * MIB)
        result = prefault.collapse(mapping)
        assert result.made_bytes == 2 * MIB == _huge(mapping) == oracle.smaps(mapping.range.start)["Rss"]
        assert _left(result) == [(6 * MIB, None, 0)]
        assert "populate it first" in result.left[0].reason


def test_missing_pages_of_a_huge_page_become_zeros() -> None:
    with prefault.Mapping(4 * MIB) as mapping:
        mapping.memoryview()[2 * MIB + 5] = 7
        assert prefault.collapse(mapping).made_bytes == 2 * MIB == oracle.smaps(mapping.range.start)["Rss"]
        assert bytes(mapping.memoryview()[2 * MIB :]) == bytes(5) + b"\7" + bytes(2 * MIB - 6)


# --- refusals of the kernel


def test_memory_that_forbids_it() -> None:
    with prefault.Mapping(4 * MIB, huge="never") as mapping:
        prefault.populate(mapping)
        result = prefault.collapse(mapping)
        assert _huge(mapping) == 0 == result.made_bytes
        assert _left(result) == [(4 * MIB, errno.EINVAL, 0)]
        assert "MADV_NOHUGEPAGE" in str(result)


def test_one_bad_huge_page_among_good_ones() -> None:
    needs.capability(capabilities.GUARD_REGIONS)
    with prefault.Mapping(8 * MIB) as mapping:
        prefault.populate(mapping)
        mman.madvise(mapping.range.start + 2 * MIB + PAGE_SIZE, PAGE_SIZE, mman.MADV_GUARD_INSTALL)
        result = prefault.collapse(mapping)
        assert _huge(mapping) == 6 * MIB == result.made_bytes
        assert _left(result) == [(2 * MIB, errno.EINVAL, 2 * MIB)]
        assert "guard" in result.left[0].reason


def test_a_process_that_forbids_it() -> None:
    def forbidden() -> prefault.CollapseResult:
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
        with prefault.Mapping(2 * MIB) as mapping:
            prefault.populate(mapping)
            return prefault.collapse(mapping)

    assert "PR_SET_THP_DISABLE" in str(in_child(forbidden))


def test_a_pinned_page_is_left_for_now() -> None:
    """A page in a pipe by vmsplice(2) is pinned, as by direct I/O."""
    vmsplice = ctypes.CDLL(None, use_errno=True).vmsplice
    read, write = os.pipe()
    try:
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 16)
        with prefault.Mapping(4 * MIB) as mapping:
            prefault.populate(mapping)
            vector = mman.IoVec(mapping.range.start + 2 * MIB, PAGE_SIZE)
            assert vmsplice(write, ctypes.byref(vector), 1, 0) == PAGE_SIZE
            result = prefault.collapse(mapping)
            assert _left(result) == [(2 * MIB, errno.EAGAIN, 2 * MIB)]
            assert _huge(mapping) == 2 * MIB == result.made_bytes
            assert "pinned" in str(result)
            os.read(read, PAGE_SIZE)
            assert prefault.collapse(mapping).made_bytes == 2 * MIB
            assert _huge(mapping) == 4 * MIB
    finally:
        os.close(read)
        os.close(write)


def test_a_full_cgroup_is_named() -> None:
    with groups() as make:
        group = make(96 * MIB)

        def inside() -> tuple[prefault.CollapseResult, int]:
            with prefault.Mapping(32 * MIB) as mapping, prefault.Mapping(4 * MIB, huge="never") as rehearsal:
                prefault.populate(mapping)
                prefault.populate(rehearsal)
                str(prefault.collapse(rehearsal)), _huge(rehearsal)  # whatever Python allocates for it is there by then
                filler = prefault.Mapping(96 * MIB, noreserve=True)
                filled = 96 * MIB - group.usage - 2 * MIB
                prefault.populate(filler, length=filled, headroom="ignore")
                # Less and less is left, since nobody knows how much the kernel can reclaim, or Python takes.
                for offset in range(0, 32 * MIB, 2 * MIB):
                    result = prefault.collapse(mapping, offset=offset, length=2 * MIB)
                    if result.left:
                        break
                    prefault.populate(filler, offset=filled, length=128 * 1024, headroom="ignore")
                    filled += 128 * 1024
                return result, _huge(mapping) - offset

        result, huge = in_child(group.inside(inside))
        assert huge == result.made_bytes == 0
        assert _left(result) == [(2 * MIB, errno.EBUSY, result.left[0].offset)]
        assert "memory cgroup" in str(result)
        assert group.killed == 0


def test_files_of_a_disk_are_refused_or_huge_by_themselves(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4 * MIB))
    with prefault.Mapping(backing=prefault.File(file)) as mapping:
        prefault.populate(mapping)
        before = _huge(mapping)
        result = prefault.collapse(mapping)
        assert _huge(mapping) == before + result.made_bytes
        assert result.huge_before_bytes == before
        assert before + result.made_bytes + result.left_bytes == 4 * MIB
        assert all(item.errno == errno.EINVAL for item in result.left)


def test_a_file_at_an_odd_address(tmp_path: Path) -> None:
    del tmp_path
    fd = os.memfd_create("odd")
    try:
        os.ftruncate(fd, 8 * MIB)
        with Region(8 * MIB // PAGE_SIZE) as region:
            address = region.address + -region.address % HUGE
            flags = mman.MAP_SHARED | mman.MAP_FIXED
            mman.mmap(address, 4 * MIB, mman.PROT_READ | mman.PROT_WRITE, flags, fd, PAGE_SIZE)
            odd = (ctypes.c_char * (4 * MIB)).from_address(address)
            prefault.populate(odd)
            result = prefault.collapse(odd)
            del odd
    finally:
        os.close(fd)
    assert _left(result) == [(4 * MIB, errno.EINVAL, 0)]
    assert "differ modulo 2.0 MiB" in str(result)


def test_hugetlb_is_huge_already(hugetlb_pool: object) -> None:
    hugetlb_pool(2)  # type: ignore[operator]
    with prefault.Mapping(4 * MIB, backing="hugetlb") as mapping:
        prefault.populate(mapping)
        assert prefault.collapse(mapping)[:3] == (0, 4 * MIB, ())


# --- sparse memory


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_sparse_memory_gets_no_block_that_it_did_not_populate(unpopulated: str) -> None:
    with prefault.SparseMemory(8 * MIB, unpopulated=unpopulated, huge="auto", block=HUGE) as memory:  # type: ignore[arg-type]
        memory.populate(2 * MIB, 4 * MIB)
        before = memory.populated
        result = prefault.collapse(memory)
        assert result.made_bytes == 4 * MIB
        assert result.left_bytes == 4 * MIB
        assert memory.populated == before
        mman.madvise(memory.range.start + 2 * MIB, PAGE_SIZE, mman.MADV_DONTNEED)
        result = prefault.collapse(memory)
        assert memory.populated.length == 4 * MIB - PAGE_SIZE
        assert any("a part of it is not populated" in item.reason for item in result.left)


# --- around a call


def test_progress_counts_what_is_tried(mapping: prefault.Mapping) -> None:
    seen: list[tuple[int, int]] = []
    prefault.collapse(mapping, progress=lambda *numbers: seen.append(numbers))
    assert seen[-1] == (8 * MIB, 8 * MIB)
    assert seen == sorted(seen)


def test_ctrl_c_ends_it_between_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    advise = mman.madvise

    def interrupting(start: int, length: int, advice: int) -> None:
        advise(start, length, advice)
        calls.append(length)
        if len(calls) == 2:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with prefault.Mapping(256 * MIB) as mapping:  # beside a busy machine the second chunk has 64 MiB
        prefault.populate(mapping)
        monkeypatch.setattr(mman, "madvise", interrupting)
        with pytest.raises(KeyboardInterrupt) as caught:
            prefault.collapse(mapping)
        monkeypatch.undo()
        assert _huge(mapping) == sum(calls) < 256 * MIB
        assert any("MiB made huge by then" in note for note in caught.value.__notes__)


def test_a_kernel_without_it_leaves_all(mapping: prefault.Mapping) -> None:
    with without("madv_collapse"):
        result = prefault.collapse(mapping)
    assert _huge(mapping) == 0 == result.made_bytes
    assert _left(result) == [(8 * MIB, None, 0)]
    assert "no MADV_COLLAPSE (Linux 6.1)" in str(result)


@pytest.mark.parametrize("missing", [("pagemap_scan",), ("pagemap_scan", "pagemap")])
def test_a_kernel_that_does_not_tell_huge_pages(mapping: prefault.Mapping, missing: tuple[str, ...]) -> None:
    with without(*missing):
        result = prefault.collapse(mapping)
    assert _huge(mapping) == 8 * MIB == result.made_bytes
    assert result.huge_before_bytes is None


def test_bad_arguments(mapping: prefault.Mapping) -> None:
    with pytest.raises(ValueError, match="outside"):
        prefault.collapse(mapping, offset=9 * MIB)
    with pytest.raises(TypeError):
        prefault.collapse(5)
    with pytest.raises(TypeError, match="progress"):
        prefault.collapse(mapping, progress="yes")  # type: ignore[arg-type]
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        prefault.collapse(mapping)


def test_it_leaks_nothing(mapping: prefault.Mapping, no_leaks: None) -> None:
    for _ in range(20):
        prefault.collapse(mapping)
