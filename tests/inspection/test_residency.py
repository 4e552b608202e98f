"""The state of each page from each of the three sources, against pagemap and smaps."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, Mapping, PageRange, PageState, RangeSet
from prefault._kernel import mman
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities, thp
from prefault._system.proc import Mount
from prefault.inspection import page_cache
from prefault.inspection.scan import populated_before, residency_of
from prefault.memory.vma import vma_at
from prefault.testing import without
from support import file_beds, needs, oracle
from support.children import in_child
from support.regions import READ, WRITE, Region, Span, file_of
from support.userfaultfd import tracking_writes

_HUGE = needs.HUGE
_PRESENT, _ALLOCATED, _FILE, _GUARD, _WRITTEN = (
    PageState.PRESENT, PageState.ALLOCATED, PageState.FILE, PageState.GUARD, PageState.WRITTEN,
)  # fmt: skip
_OWN = _PRESENT | _ALLOCATED

# Each with what is switched off to get it, and the states that it can tell.
_SOURCES = {
    "pagemap_scan": ((), _OWN | PageState.HUGE | PageState.SWAPPED | _FILE | _GUARD),
    "pagemap": (("pagemap_scan",), _PRESENT | PageState.SWAPPED | _FILE | _GUARD),
    "mincore": (("pagemap_scan", "pagemap"), _PRESENT),
}


@pytest.fixture(params=_SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    """One source after the other; what the machine has not got is skipped."""
    for what in (capabilities.PAGEMAP, capabilities.PAGEMAP_SCAN, capabilities.PAGE_IS_GUARD):
        needs.capability(what)
    return str(request.param)


def _states(memory: object, source: str) -> list[PageState]:
    """The states of the pages, from the source, without those that this kernel cannot tell."""
    off, _ = _SOURCES[source]
    with without(*off):
        found = prefault.residency(memory)
    assert found.source == source
    return [PageState(int(state)) & ~_WRITTEN for state in found.pages()]


def _can_tell(expected: list[PageState], source: str) -> list[PageState]:
    _, tells = _SOURCES[source]
    return [state & tells for state in expected]


def test_private_anonymous_memory(source: str) -> None:
    with Region(8) as region:
        prefault.populate(region.part(1, 2), access="read")  # the zero page
        prefault.populate(region.part(3, 2), access="write")
        region.fill(6, b"x")
        expected = [PageState(0), _PRESENT, _PRESENT, _OWN, _OWN, PageState(0), _OWN, PageState(0)]
        assert _states(region, source) == _can_tell(expected, source)
        assert [bool(state & _PRESENT) for state in expected] == oracle.present(region.address, region.length)
        assert oracle.smaps(region.address)["Rss"] == 3 * PAGE_SIZE  # the zero page does not count


def test_counts_ranges_and_text() -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    with Region(8) as region:
        prefault.populate(region.part(1, 2), access="read")
        prefault.populate(region.part(3, 2), access="write")
        found = prefault.residency(region)
        assert found.range == PageRange(region.address, region.address + region.length)
        assert (found.present_bytes, found.allocated_bytes) == (4 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert (found.huge_bytes, found.swapped_bytes) == (0, 0)
        assert found.bytes_in(_OWN) == 2 * PAGE_SIZE
        assert found.ranges() == RangeSet([PageRange(PAGE_SIZE, 5 * PAGE_SIZE)])
        assert found.ranges(_ALLOCATED) == RangeSet([PageRange(3 * PAGE_SIZE, 5 * PAGE_SIZE)])
        assert found.ranges(PageState.SWAPPED) == RangeSet()
        assert (found.pages().dtype, found.pages().shape) == (numpy.dtype("uint8"), (8,))
        assert str(found) == "32.0 KiB: 16.0 KiB present, 8.0 KiB allocated"
        assert repr(found).endswith("(from pagemap_scan)>")
        assert found.page_cache is None
        # A part, as bytes: every page that holds one of them.
        part = prefault.residency(region, offset=3 * PAGE_SIZE - 1, length=2)
        assert part.range == PageRange(region.page(2), region.page(4))
        assert part.ranges(_ALLOCATED) == RangeSet([PageRange(PAGE_SIZE, 2 * PAGE_SIZE)])
        with without("pagemap_scan"):
            assert str(prefault.residency(region)) == "32.0 KiB: 16.0 KiB present"


def test_states_that_a_source_cannot_tell(source: str) -> None:
    off, tells = _SOURCES[source]
    with Region(2) as region, without(*off):
        prefault.populate(region, access="read")
        found = prefault.residency(region)
        for state in PageState:
            if state & tells:
                assert state not in found.unknown
                assert found.bytes_in(state) in (0, 2 * PAGE_SIZE)
            elif state is not _WRITTEN:
                assert found.unknown[state]
                for ask in (found.bytes_in, found.ranges):
                    with pytest.raises(ValueError, match=f"{state.name} cannot be told: {re.escape(found.unknown[state])}"):
                        ask(state | _PRESENT)
        assert (found.allocated_bytes is None) == (not tells & _ALLOCATED)
        assert (found.huge_bytes is None) == (not tells & PageState.HUGE)
        assert (found.swapped_bytes is None) == (not tells & PageState.SWAPPED)
        assert found.present_bytes == 2 * PAGE_SIZE


def test_guard_regions_before_linux_6_15() -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    for off in (("page_is_guard",), ("page_is_guard", "pagemap_scan")):
        with Region(2) as region, without(*off):
            prefault.populate(region)
            found = prefault.residency(region)
            assert "6.15" in found.unknown[_GUARD]
            assert found.present_bytes == 2 * PAGE_SIZE


def test_guard_regions(source: str) -> None:
    needs.capability(capabilities.GUARD_REGIONS)
    with Region(4) as region:
        prefault.populate(region)
        mman.madvise(region.page(1), PAGE_SIZE, mman.MADV_GUARD_INSTALL)
        expected = [_OWN, _GUARD, _OWN, _OWN]
        if source != "mincore":  # which tells what is in memory, and a guard page's memory is given back at leisure
            assert _states(region, source) == _can_tell(expected, source)
        assert oracle.present(region.address, region.length) == [True, False, True, True]


@pytest.mark.parametrize("shared", [False, True])
def test_file_pages(tmp_path: Path, source: str, shared: bool) -> None:
    with file_of(tmp_path, 4 * PAGE_SIZE) as (fd, _):
        os.pwrite(fd, b"x" * 4 * PAGE_SIZE, 0)
        with Region(4, fd=fd, shared=shared) as region:
            prefault.populate(region.part(0, 3), access="read")
            region.fill(1, b"y")  # a private mapping copies it
            mman.madvise(region.page(3), PAGE_SIZE, mman.MADV_DONTNEED)  # a fault maps what lies around it as well
            of_file = _OWN | _FILE
            expected = [of_file, of_file if shared else _OWN, of_file, PageState(0)]
            if source == "mincore":  # it tells of the page cache
                assert _states(region, source) == [_PRESENT] * 4
            else:
                assert _states(region, source) == _can_tell(expected, source)
                files = [bool(state & _FILE) for state in expected]
                assert files == oracle.file_pages(region.address, region.length)


def test_shared_memory_is_file_backed(source: str) -> None:
    with Region(3, shared=True) as region:
        region.fill(1, b"x")
        expected = [PageState(0), _OWN | _FILE, PageState(0)]
        assert _states(region, source) == _can_tell(expected, source)


def test_transparent_huge_pages(source: str) -> None:
    if thp.read_setting("enabled") in (None, "never"):
        needs.missing("transparent huge pages are off")
    with Mapping(2 * _HUGE, huge="advise") as mapping:
        prefault.populate(mapping, length=_HUGE)
        assert oracle.smaps(mapping.range.start)["AnonHugePages"] == _HUGE
        expected = [_OWN | PageState.HUGE] * 512 + [PageState(0)] * 512
        assert _states(mapping, source) == _can_tell(expected, source)


def test_the_huge_zero_page() -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    if thp.read_setting("enabled") in (None, "never") or thp.read_setting("use_zero_page") != "1":
        needs.missing("the huge zero page is off")
    with Mapping(_HUGE, huge="advise") as mapping:
        prefault.populate(mapping, access="read")
        found = prefault.residency(mapping)
        assert (found.present_bytes, found.allocated_bytes, found.huge_bytes) == (_HUGE, 0, _HUGE)
        assert oracle.smaps(mapping.range.start)["Rss"] == 0


@pytest.mark.parametrize("shared", [False, True])
def test_huge_pages_of_hugetlb(hugetlb_pool: Callable[[int], None], source: str, shared: bool) -> None:
    hugetlb_pool(2)
    with Mapping(2 * _HUGE, backing="hugetlb", shared=shared) as mapping:
        prefault.populate(mapping, length=_HUGE)
        state = _OWN | PageState.HUGE | (_FILE if shared else PageState(0))
        expected = [state] * 512 + [PageState(0)] * 512
        assert _states(mapping, source) == _can_tell(expected, source)
        # A part of a huge page is looked at as that part.
        assert prefault.residency(mapping, offset=PAGE_SIZE, length=1).range.length == PAGE_SIZE


def test_many_runs(source: str) -> None:
    # More than the 1024 regions of one PAGEMAP_SCAN call: every second page, and some at random.
    pages = 10_000
    chosen = set(range(0, pages, 2)) | set(random.Random(7).sample(range(pages), 500))
    with Mapping(pages * PAGE_SIZE, huge="never") as mapping:
        view = mapping.ndarray()
        for page in chosen:
            view[page * PAGE_SIZE] = 1
        del view
        states = _states(mapping, source)
        assert {page for page, state in enumerate(states) if state & _PRESENT} == chosen
        expected = RangeSet(PageRange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in chosen)
        off, _ = _SOURCES[source]
        with without(*off):
            found = prefault.residency(mapping)
        assert found.ranges() == expected
        assert len(found.ranges()) > 3000
        assert found.present_bytes == len(chosen) * PAGE_SIZE


@pytest.mark.parametrize("runs", [1, 511, 512, 513, 600, 1023, 1024, 1025, 1536, 1537, 2048, 3000])
def test_every_run_comes_once(runs: int) -> None:
    # The kernel's own buffer holds 512 regions, ours 1024.
    needs.capability(capabilities.PAGEMAP_SCAN)
    with Mapping(2 * runs * PAGE_SIZE, huge="never") as mapping:
        mapping.ndarray()[:: 2 * PAGE_SIZE] = 1
        found = prefault.residency(mapping)
        assert [run.start for run in found.runs] == [mapping.range.start + 2 * run * PAGE_SIZE for run in range(runs)]
        assert found.present_bytes == runs * PAGE_SIZE
        again = prefault.populate(mapping)
        assert (again.present_bytes, again.bytes) == (runs * PAGE_SIZE, runs * PAGE_SIZE)


def test_more_than_one_call_walks_at_once(source: str) -> None:
    # The sources take a GiB or less at a time; what lies at the seams must be told once.
    with Mapping("2100 MiB", noreserve=True, huge="never") as mapping:
        marks = [0, (256 << 20) - PAGE_SIZE, 256 << 20, (1 << 30) - PAGE_SIZE, 1 << 30, len(mapping) - PAGE_SIZE]
        view = mapping.ndarray()
        view[marks] = 1
        del view
        off, _ = _SOURCES[source]
        with without(*off):
            found = prefault.residency(mapping)
        assert found.present_bytes == len(marks) * PAGE_SIZE
        assert found.ranges() == RangeSet(PageRange(mark, mark + PAGE_SIZE) for mark in marks)


def test_random_states_against_the_kernel(source: str) -> None:
    choose = random.Random(11)
    with Region(300) as region:
        expected = []
        for page in range(300):
            what = choose.choice(("nothing", "read", "write", "written and dropped"))
            if what == "read":
                prefault.populate(region.part(page, 1), access="read")
            elif what != "nothing":
                region.fill(page, b"x")
            if what == "written and dropped":
                mman.madvise(region.page(page), PAGE_SIZE, mman.MADV_DONTNEED)
            expected.append({"read": _PRESENT, "write": _OWN}.get(what, PageState(0)))
        assert _states(region, source) == _can_tell(expected, source)
        assert [bool(state) for state in expected] == oracle.present(region.address, region.length)


def test_holes_in_the_range(source: str) -> None:
    off, _ = _SOURCES[source]
    with Region(5) as region, without(*off):
        prefault.populate(region)
        region.punch(2, 1)
        found = prefault.residency(region)
        assert found.ranges() == RangeSet([PageRange(0, 2 * PAGE_SIZE), PageRange(3 * PAGE_SIZE, 5 * PAGE_SIZE)])
        assert [bool(state) for state in found.pages()] == [True, True, False, True, True]


# --- written


def test_writes_that_are_not_tracked(source: str) -> None:
    if capabilities.SOFT_DIRTY.available:
        pytest.skip("this kernel tracks writes always (soft-dirty)")
    off, _ = _SOURCES[source]
    with Region(2) as region, without(*off):
        region.fill(0, b"x")
        found = prefault.residency(region)
        assert _WRITTEN in found.unknown
        with pytest.raises(ValueError, match="WRITTEN cannot be told"):
            found.bytes_in(_WRITTEN)


@pytest.mark.parametrize("shared", [False, True])
def test_written_pages_that_are_tracked(shared: bool) -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    with Region(8, shared=shared) as region:
        for page in range(6):
            region.fill(page, b"before")
        with tracking_writes(region.address, region.length):
            assert prefault.residency(region).bytes_in(_WRITTEN) == 0
            for page in (1, 4):
                region.fill(page, b"after")
            assert region.read(2, 1)[:6] == b"before"
            found = prefault.residency(region)
            assert _WRITTEN not in found.unknown
            written = [bool(int(state) & _WRITTEN) for state in found.pages()]
            assert written == [page in (1, 4) for page in range(8)]
            assert found.bytes_in(_WRITTEN) == 2 * PAGE_SIZE


# --- swap


def _swap_entries(region: Span) -> list[bool]:
    return [bool(entry & 1 << 62) for entry in oracle.entries(region.address, region.length)]


@pytest.mark.stress
def test_swapped_pages(tmp_path: Path) -> None:
    needs.root("add swap space")
    needs.capability(capabilities.PAGEMAP_SCAN)
    path = tmp_path / "swap"
    path.write_bytes(bytes(64 << 20))
    path.chmod(0o600)
    for command in (["mkswap", str(path)], ["swapon", str(path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            needs.missing(f"{command[0]} does not work here: {done.stderr.strip()}")
    try:
        with Region(16) as region:
            for page in range(12):
                region.fill(page, b"content %d" % page)
            mman.madvise(region.page(2), 4 * PAGE_SIZE, mman.MADV_PAGEOUT)
            expected = _swap_entries(region)
            assert expected == [2 <= page < 6 for page in range(16)]
            assert oracle.smaps(region.address)["Swap"] == 4 * PAGE_SIZE
            for off in ((), ("pagemap_scan",)):
                with without(*off):
                    found = prefault.residency(region)
                    states = [PageState(int(state)) for state in found.pages()]
                    assert [bool(state & PageState.SWAPPED) for state in states] == expected
                    assert not any(state & _PRESENT for state in states[2:6])
                    assert found.swapped_bytes == 4 * PAGE_SIZE
                    assert found.ranges(PageState.SWAPPED) == RangeSet([PageRange(2 * PAGE_SIZE, 6 * PAGE_SIZE)])
            assert "16.0 KiB swapped" in str(prefault.residency(region))
            result = prefault.populate(region)
            assert (result.bytes, result.present_bytes) == (8 * PAGE_SIZE, 8 * PAGE_SIZE)
            assert not any(_swap_entries(region))
            for page in range(12):
                assert region.read(page, 1).startswith(b"content %d" % page)
    finally:
        subprocess.run(["swapoff", path], check=True)


# --- the page cache


def test_the_page_cache_of_a_file(tmp_path: Path) -> None:
    needs.capability(capabilities.CACHESTAT)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 16 * PAGE_SIZE)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with Mapping(8 * PAGE_SIZE, backing=prefault.File(path, 4 * PAGE_SIZE)) as mapping:
        cold = prefault.residency(mapping).page_cache
        assert cold is not None
        assert (cold.cached, cold.dirty) == (0, 0)
        prefault.populate(mapping)
        mapping.memoryview()[:] = b"y" * len(mapping)
        warm = prefault.residency(mapping).page_cache
        assert warm is not None
        assert (warm.cached, warm.dirty) == (8, 8)
        part = prefault.residency(mapping, offset=2 * PAGE_SIZE, length=3 * PAGE_SIZE).page_cache
        assert part is not None
        assert part.cached == 3
        with without("cachestat"):
            assert prefault.residency(mapping).page_cache is None
        assert prefault.residency(mapping, length=0).page_cache is None


def _cached(buffer: Any) -> int | None:
    return prefault.residency(buffer).cached_bytes


def _evict(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("how", ["cachestat", "mincore"])
def test_the_page_cache_of_pages_that_another_process_mapped(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 64 * PAGE_SIZE)
    with path.open("rb") as file, ExitStack() as stack:
        if how == "cachestat":
            needs.capability(capabilities.CACHESTAT)
        else:
            stack.enter_context(without("cachestat"))
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # no fault-around, no read-ahead
        assert _cached(mapped) == 64 * PAGE_SIZE
        text = str(prefault.residency(mapped))
        assert text == "256.0 KiB: 0 bytes present, 0 bytes allocated, 256.0 KiB of the file in the page cache"
        assert _cached(memoryview(mapped)[5 * PAGE_SIZE : 8 * PAGE_SIZE]) == 3 * PAGE_SIZE
        _evict(path)
        assert _cached(mapped) == 0
        assert mapped[PAGE_SIZE] == ord("x")
        assert _cached(mapped) == PAGE_SIZE
        private = numpy.memmap(path, "u1", mode="c")
        # mincore takes private copies for pages of the file, so nothing is said then.
        assert _cached(private) == (PAGE_SIZE if how == "cachestat" else None)


def test_the_page_cache_of_a_file_on_overlay(tmp_path: Path) -> None:
    """The pages are those of the file below, which cachestat does not count."""
    with file_beds.overlay(tmp_path) as merged:
        file_beds.make(tmp_path / "lower" / "file", 64 * PAGE_SIZE)
        path = merged / "file"
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert _cached(mapped) == 64 * PAGE_SIZE
            with prefault.Mapping(backing=prefault.File(path), writable=False) as mapping:
                assert _cached(mapping) == 64 * PAGE_SIZE
            file_beds.evict(tmp_path / "lower" / "file")
            assert _cached(mapped) == 0


def test_the_page_cache_of_another_users_file(tmp_path: Path) -> None:
    """Of such a file mincore says that every page is there, and cachestat refuses since Linux 6.14."""
    needs.root("become somebody else")
    path = tmp_path / "file"
    path.write_bytes(b"x" * 64 * PAGE_SIZE)
    path.chmod(0o644)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        _evict(path)

        def as_somebody_else() -> tuple[int | None, int | None, str]:
            os.setegid(65534)
            os.seteuid(65534)
            with without("cachestat"):
                by_mincore = _cached(mapped)
            return by_mincore, _cached(mapped), str(prefault.residency(mapped))

        by_mincore, cached, text = in_child(as_somebody_else)
    assert by_mincore is None
    assert cached in (0, None)
    assert ("page cache" in text) == (cached == 0)


def test_memory_without_a_file_has_no_page_cache() -> None:
    for buffer in (bytearray(100_000), numpy.zeros(100_000), mmap.mmap(-1, 16 * PAGE_SIZE)):
        assert _cached(buffer) is None
        assert "page cache" not in str(prefault.residency(buffer))


def test_memory_whose_page_cache_is_unknown(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(1)
    with Mapping(1, backing="memfd-hugetlb") as mapping:
        assert prefault.residency(mapping).page_cache is None
    assert prefault.residency(mmap.mmap(-1, PAGE_SIZE)).page_cache is None


# --- what needs no population


def test_populated_before(tmp_path: Path) -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    with file_of(tmp_path, 6 * PAGE_SIZE) as (fd, _), Region(6, READ | WRITE, fd=fd) as of_file, Region(6) as anonymous:
        for region in (of_file, anonymous):
            prefault.populate(region.part(0, 4), access="read")
            region.fill(2, b"x")
            mman.madvise(region.page(4), 2 * PAGE_SIZE, mman.MADV_DONTNEED)  # a fault maps what lies around it as well

            def ready(region: Region = region, **options: bool) -> set[int]:
                populated = populated_before(region.address, region.page(6), **options)
                return {page for page in range(6) if region.page(page) in populated}

            assert ready(write=False, private=True) == {0, 1, 2, 3}
            assert ready(write=True, private=True) == {2}  # neither the zero page nor a page of the file
            assert ready(write=True, private=False) == {0, 1, 2, 3}
            with without("pagemap_scan"):
                assert ready(write=False, private=True) == {0, 1, 2, 3}
            with without("pagemap_scan", "pagemap"):
                assert ready(write=False, private=True) == set()


def test_addresses_without_a_buffer() -> None:
    with Region(3) as region:
        region.fill(1, b"x")
        assert residency_of(PageRange(region.address, region.page(3))).present_bytes == PAGE_SIZE
    assert residency_of(PageRange(0, 0)).present_bytes == 0


def test_no_descriptor_is_left_open() -> None:
    with Region(3) as region:
        prefault.residency(region)
        before = oracle.descriptors()
        for off, _ in _SOURCES.values():
            with without(*off):
                prefault.residency(region)
        assert oracle.descriptors() == before


def test_the_memory_is_not_touched() -> None:
    with Region(4) as region:
        prefault.residency(region)
        assert not any(oracle.present(region.address, region.length))
        assert ctypes.string_at(region.address, 1) == b"\0"


def test_a_signal_handler_may_ask_in_the_middle_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector of PAGEMAP_SCAN is used again: a second question must not overwrite the first one's answer."""
    module = sys.modules["prefault.inspection.pagemap_scan"]
    with prefault.Mapping(64 * PAGE_SIZE, huge="never") as mapping:
        for page in range(0, 64, 2):
            prefault.populate(mapping, offset=page * PAGE_SIZE, length=PAGE_SIZE)
        start, present = mapping.range.start, int(PageCategory.PRESENT)
        span = start, start + 64 * PAGE_SIZE
        expected = module.scan(span, present, 0, 0, present)
        assert len(expected) == 3 * 32
        asked: list[int] = []
        struck: list[bool] = []

        class Interrupted:
            """The open pagemap; a signal handler runs when the kernel has answered, before its answer is copied."""

            def ioctl(self, request: int, argument: ctypes.Structure, *, quick: bool = False) -> int:
                count = pagemap_file.ioctl(request, argument, quick=quick)
                if not struck:
                    struck.append(True)
                    asked.append(prefault.residency(mapping, offset=PAGE_SIZE, length=9 * PAGE_SIZE).present_bytes)
                return int(count)

        pagemap_file = module._pagemap_file
        monkeypatch.setattr(module, "_pagemap_file", Interrupted())
        assert module.scan(span, present, 0, 0, present) == expected
        assert asked == [4 * PAGE_SIZE]


@pytest.mark.parametrize(
    ("options", "expected"),
    [("rw", True), ("rw,dax=never", True), ("rw,dax=inode", True), ("rw,dax", False), ("rw,dax=always,x", False)],
)
def test_files_of_dax_mounts_take_no_page_cache(
    options: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_beds.make(tmp_path / "file", PAGE_SIZE)
    with Mapping(backing=prefault.File(path), writable=False) as mapping:
        vma = vma_at(mapping.range.start)
        assert vma is not None
        monkeypatch.setattr(page_cache, "read_mounts", lambda: [Mount(vma.device, "/", "/", "xfs", options)])
        assert page_cache.takes_page_cache(vma) is expected


@pytest.mark.parametrize("mapped_by_us", [False, True])
def test_a_file_that_shrank_has_no_page_cache_beyond_its_end(tmp_path: Path, mapped_by_us: bool) -> None:
    """The kernel may keep a large folio whole, whose first page alone is left in the file."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    with ExitStack() as stack:
        if mapped_by_us:
            memory: Any = stack.enter_context(prefault.Mapping("1 MiB", backing=prefault.File(path)))
        else:
            file = stack.enter_context(path.open("r+b"))
            memory = stack.enter_context(mmap.mmap(file.fileno(), 0))
            memory[5]
        os.truncate(path, PAGE_SIZE)
        assert prefault.residency(memory).cached_bytes == PAGE_SIZE
