"""No input of which a call takes far longer than a simple loop: the number of calls and of looks, and equal results.

Times are for ``bench/cliffs.py``.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefault
from prefault import PAGE_SIZE, PageRange, PageState, RangeSet
from prefault._kernel import mman
from prefault._system import capabilities
from prefault._system.kept_files import KeptFile
from prefault.engine.chunking import ChunkSize
from prefault.inspection import pagemap_scan
from prefault.inspection.scan import populated_before, residency_of
from prefault.intervals import Intervals
from prefault.limits.allowance import allowance
from prefault.limits.demand import Demand, demands_of
from prefault.memory import vma
from prefault.sizes import GIB, MIB
from prefault.testing import without
from support import needs, oracle
from support.regions import READ, Region, filesystem_of

RESIDENCY = sys.modules["prefault.inspection.scan"]
MAPPINGS = 600


class Counter:
    """Counts the calls of a function of a module, and makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> None:
        self.calls = 0
        function = getattr(where, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return function(*arguments, **options)

        monkeypatch.setattr(where, name, counted)


@pytest.fixture
def alternating() -> Iterator[Region]:
    """Mappings of one page each, in turn writable and not."""
    with Region(MAPPINGS) as region:
        for page in range(1, MAPPINGS, 2):
            region.protect(page, 1, READ)
        yield region


# --- many mappings


def test_many_mappings_take_few_calls(alternating: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    needs.capability(capabilities.PROCESS_MADVISE)
    needs.capability(capabilities.PAGEMAP_SCAN)
    prefault.populate(alternating)  # asks once what this kernel can do
    mman.madvise(alternating.address, alternating.length, mman.MADV_DONTNEED)
    allowance.empty()
    vectors = Counter(monkeypatch, mman, "process_madvise_vector")
    singles = Counter(monkeypatch, mman, "madvise")
    bounds = Counter(monkeypatch, Demand, "at_most")
    scans = Counter(monkeypatch, pagemap_scan, "_scan")
    result = prefault.populate(alternating)
    assert (result.bytes, result.present_bytes, result.method) == (
        MAPPINGS * PAGE_SIZE, 0, "populate_write, populate_read",
    )  # fmt: skip
    assert oracle.present(alternating.address, alternating.length) == [True] * MAPPINGS
    # One vector for each of the two methods and one scan; two chunks where the mappings lie across a multiple of 4 MiB.
    assert vectors.calls in (2, 4)
    assert (singles.calls, scans.calls) == (0, 1)
    assert bounds.calls <= 12
    assert prefault.populate(alternating).present_bytes == MAPPINGS * PAGE_SIZE
    assert len(prefault.plan(alternating).segments) == MAPPINGS


def test_many_mappings_are_discarded_together(alternating: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    prefault.populate(alternating)
    scans = Counter(monkeypatch, RESIDENCY, "residency_of")
    singles = Counter(monkeypatch, mman, "madvise")
    module = sys.modules["prefault.engine.discarding"]
    monkeypatch.setattr(module, "residency_of", RESIDENCY.residency_of)
    result = prefault.discard(alternating)
    assert result.bytes == MAPPINGS * PAGE_SIZE
    assert result.freed_bytes in (None, MAPPINGS // 2 * PAGE_SIZE)  # what was only read is the zero page
    assert not any(oracle.present(alternating.address, alternating.length))
    assert scans.calls == 1
    assert singles.calls in (1, 2)  # two where the mappings lie across a multiple of 64 MiB


def test_a_locked_page_among_many_mappings_is_discarded_too(alternating: Region) -> None:
    needs.capability(capabilities.DONTNEED_LOCKED)
    prefault.populate(alternating)
    mman.mlock2(alternating.page(100), PAGE_SIZE)
    result = prefault.discard(alternating)
    assert set(result.method.split(", ")) == {"MADV_DONTNEED", "MADV_DONTNEED_LOCKED"}
    assert not any(oracle.present(alternating.address, alternating.length))


@pytest.mark.parametrize("rollback", [False, True])
def test_a_page_that_fails_among_many_mappings(alternating: Region, rollback: bool) -> None:
    prefault.populate(alternating.part(2, 1))
    alternating.protect(401, 1, 0)
    with pytest.raises(prefault.ProtectionError) as caught:
        prefault.populate(alternating, rollback=rollback)
    assert caught.value.offset == 401 * PAGE_SIZE
    there = {page for page, present in enumerate(oracle.present(alternating.address, alternating.length)) if present}
    if rollback:
        assert there == {2}
    else:
        assert there >= set(range(401))
        told = caught.value.populated.shifted(-alternating.address) if caught.value.populated else RangeSet()
        assert {page for page in range(MAPPINGS) if page * PAGE_SIZE in told} == there - {2}


def test_special_memory_beside_many_mappings_keeps_its_kind() -> None:
    """Anonymous memory and [vvar] differ by nothing but the name."""
    needs.capability(capabilities.PROCMAP_QUERY)
    with Region(2, READ) as readable, Region(2, READ | mman.PROT_EXEC) as code:
        found = {start: kind.backing for start, _, kind in vma.vmas_by_kind(0, 1 << 47)}
        assert found[readable.address] is found[code.address] is vma.Backing.ANONYMOUS
        every = list(vma.vmas(0, 1 << 47))
        for one in every:
            assert found[one.start] is one.backing, one
    assert any(one.backing is vma.Backing.SPECIAL for one in every)


def test_a_process_without_procmap_query_and_process_madvise(alternating: Region) -> None:
    with without("procmap_query", "process_madvise"):
        assert prefault.populate(alternating).bytes == MAPPINGS * PAGE_SIZE
    assert all(oracle.present(alternating.address, alternating.length))


_PAGES = 48


@settings(max_examples=40, deadline=None)
@given(
    readable=st.sets(st.integers(0, _PAGES - 1)),
    written=st.sets(st.integers(0, _PAGES - 1)),
    read=st.sets(st.integers(0, _PAGES - 1)),
    cut=st.tuples(st.integers(0, _PAGES), st.integers(0, _PAGES)),
)
def test_what_kinds_need_is_what_their_segments_need(
    readable: set[int], written: set[int], read: set[int], cut: tuple[int, int]
) -> None:
    with Region(_PAGES) as region:
        for page in written:
            prefault.populate(region.part(page, 1), access="write")
        for page in read - written:
            prefault.populate(region.part(page, 1), access="read")
        for page in readable:
            region.protect(page, 1, READ)
        segments = prefault.plan(region).segments
        every = [
            populated_before(segment.start, segment.stop, write=segment.method.access == "write", private=True)
            for segment in segments
        ]
        module = sys.modules["prefault.engine.populated_pages"]
        together = module.populated_pages(segments)
        assert together == Intervals.union_of(every)
        start, stop = sorted(region.page(page) for page in cut)
        spans = [(s, max(s.start, start), min(s.stop, stop)) for s in segments if s.start < stop and s.stop > start]
        naive = [
            (Demand(s.use, Intervals([(s.start, s.stop)]) - module.populated_pages((s,))), first, last)
            for s, first, last in spans
        ]
        kinds = [
            (part, max(start, part.use.start), min(stop, part.use.stop))
            for part in demands_of([s.use for s in segments], together, None)
            if part.use.start < stop and part.use.stop > start
        ]  # fmt: skip
        assert len(segments) == 1 or len(kinds) <= len({s.use.kind for s in segments})
        for ask in (Demand.missing_bytes, Demand.memory):
            name = ask.__name__
            assert sum(getattr(part, name)(a, b) for part, a, b in kinds) == sum(
                getattr(part, name)(a, b) for part, a, b in naive
            )
        for part, first, last in kinds:
            assert part.memory(first, last) + part.overhead(first, last) <= part.at_most(first, last)


# --- residency


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(("nothing", "read", "write")), min_size=1, max_size=60))
def test_many_runs_are_told_as_few_are(states: list[str]) -> None:
    """With numpy and without."""
    with Region(len(states)) as region:
        for page, state in enumerate(states):
            if state != "nothing":
                prefault.populate(region.part(page, 1), access=state)  # type: ignore[arg-type]
        pages = PageRange(region.address, region.address + region.length)
        answers = []
        for many in (1 << 60, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("prefault.inspection.result._MANY", many)
                found = residency_of(pages)
                told = found.ranges(), found.present_bytes, found.allocated_bytes, found.runs, found.pages().tolist()
            answers.append(told)
        assert answers[0] == answers[1]
        present = oracle.present(region.address, region.length)
        assert [bool(state & PageState.PRESENT) for state in answers[0][4]] == present
        naive = RangeSet(PageRange(at * PAGE_SIZE, (at + 1) * PAGE_SIZE) for at, there in enumerate(present) if there)
        assert answers[0][0] == naive


def test_runs_are_made_when_asked_for() -> None:
    with Region(4) as region:
        prefault.populate(region)
        found = prefault.residency(region)
        assert found.present_bytes == region.length
        assert "runs" not in vars(found)
        assert len(found.runs) == 1


# --- looks at the limits


def test_a_kept_file_is_read_without_giving_up_the_gil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.pread and os.fstat give it up; beside busy threads each takes milliseconds then."""
    (tmp_path / "file").write_text("content")
    file = KeptFile(str(tmp_path / "file"))
    assert file.read() == b"content"
    given_up = [Counter(monkeypatch, os, name) for name in ("pread", "fstat", "open")]
    assert file.read() == b"content"
    assert [counter.calls for counter in given_up] == [0, 0, 0]


def test_a_far_too_large_range_is_refused_after_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    allowance.empty()
    for shared in (False, True):
        with prefault.Mapping(4096 * GIB, shared=shared, noreserve=True, huge="never") as mapping:
            looks = Counter(monkeypatch, Demand, "memory")
            with pytest.raises(prefault.HeadroomError) as caught:
                prefault.populate(mapping)
            assert caught.value.needed_bytes >= 4096 * GIB
            memory = os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE
            assert 1 <= looks.calls <= memory // GIB + 4
            assert not oracle.present_bytes(mapping.range.start, MIB)


def test_what_is_empty_is_not_read_entry_by_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    with prefault.Mapping(8 * GIB, noreserve=True, huge="never") as mapping:
        prefault.populate(mapping, offset=3 * GIB, length=MIB)
        (segment,) = prefault.plan(mapping).segments
        part = Demand(segment.use, Intervals([mapping.range]))
        read: list[int] = []
        module = sys.modules["prefault.limits.demand"]
        original = module.pagemap.read_pagemap

        def counted(fd: int, first: int, pages: int) -> bytes:
            read.append(pages)
            return bytes(original(fd, first, pages))

        monkeypatch.setattr(module.pagemap, "read_pagemap", counted)
        assert part.memory(*mapping.range) == 8 * GIB - MIB
        assert read == [MIB // PAGE_SIZE]


# --- the pace


def test_chunks_grow_at_once_beside_several_busy_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.test_chunking import FakeTimes

    times, one = FakeTimes(monkeypatch), ChunkSize(on_disk=False)
    assert times.chunk(one, 2, waited_ms=40, sleeps=1) == 64 * MIB  # 32 ms
    assert times.chunk(one, 32, waited_ms=40, sleeps=1) == 64 * MIB
    assert times.chunk(one, 80, waited_ms=40, sleeps=1) == 32 * MIB
    assert times.chunk(one, 40) == 16 * MIB


def test_long_chunks_let_the_mmap_lock_go(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.capability(capabilities.PROCESS_MADVISE)
    from prefault.engine import attempts

    calls: list[int] = []
    original = mman.process_madvise_vector

    def counted(pidfd: int, address: int, count: int, advice: int) -> int:
        calls.append(count)
        return original(pidfd, address, count, advice)

    monkeypatch.setattr(mman, "process_madvise_vector", counted)
    with prefault.Mapping("33 MiB", huge="never") as mapping:
        (segment,) = prefault.plan(mapping).segments
        assert attempts.populate_long(segment, segment.start + MIB, segment.stop)
        assert oracle.present_bytes(segment.start, segment.length) == 32 * MIB
    assert 8 <= sum(calls) <= 9


# --- files that are advised to be read at random


def _cold(path: Path, fd: int) -> None:
    """Drop the file from the page cache, or skip."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with prefault.Mapping(backing=prefault.File(path), shared=True) as mapping:
        resident = sum(byte & 1 for byte in mman.mincore(mapping.range.start, len(mapping)))
    if resident > 16:
        needs.missing("the file system keeps the file in memory")


@pytest.mark.parametrize("pages", [1024, 4096])
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_read_ahead_whatever_its_mapping_was_advised(
    tmp_path: Path, shared: bool, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if filesystem_of(tmp_path) == "tmpfs":
        needs.missing("the temporary directory is not on a disk")
    looks = Counter(monkeypatch, sys.modules["prefault.engine.readahead"], "_advised_random")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(pages * PAGE_SIZE))
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        with Region(pages, fd=fd, shared=shared) as region:
            mman.madvise(region.address, region.length, mman.MADV_RANDOM)
            _cold(path, fd)
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            assert prefault.populate(region, access="read").bytes == region.length
            waited = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before
            assert waited < pages // 4
            # The last 8 MiB are not worth a look at smaps.
            assert looks.calls == (pages > 2048 or not capabilities.PROCESS_MADVISE.available)
            # The advice is there again, on all of it.
            for page in (0, 20, pages // 2, pages - 1):
                assert "rr" in oracle.vma_flags(region.page(page))
            assert region.read(0, pages) == path.read_bytes()
    finally:
        os.close(fd)


def test_the_advice_is_there_again_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefault.engine import readahead

    path = tmp_path / "file"
    path.write_bytes(bytes(16 * PAGE_SIZE))
    fd = os.open(path, os.O_RDWR)
    try:
        with Region(16, fd=fd, shared=True) as region:
            mman.madvise(region.address, region.length, mman.MADV_RANDOM)
            whole = PageRange(region.address, region.address + region.length)
            ahead = readahead.ReadAhead(whole)
            ahead._is_read_by_page, ahead._random = True, readahead._advised_random(whole)
            monkeypatch.setattr(readahead, "_FEW", 0)
            assert ahead._random.length == region.length

            def interrupted() -> None:
                assert "rr" not in oracle.vma_flags(region.address)
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                ahead.run(whole, interrupted)
            assert "rr" in oracle.vma_flags(region.address)
    finally:
        os.close(fd)


def test_ranges_against_a_set_of_pages() -> None:
    """RangeSet keeps edges only: what it yields, finds and counts."""
    choose = numpy.random.default_rng(5)
    for _ in range(50):
        pages = set(choose.integers(0, 40, 20).tolist())
        ranges = RangeSet(PageRange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in pages)
        assert {page for item in ranges for page in range(item.start // PAGE_SIZE, item.stop // PAGE_SIZE)} == pages
        assert {page for page in range(41) if page * PAGE_SIZE in ranges} == pages
        assert all(type(item) is PageRange and item in ranges for item in ranges)
        assert [ranges[index] for index in range(-len(ranges), 0)] == list(ranges)
        assert ranges.pages == len(pages)
        with pytest.raises(IndexError):
            ranges[len(ranges)]
