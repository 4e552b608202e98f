"""Demand of a populate call, and admission control: against made-up answers of the limits."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import prefault
from prefault._kernel import mman
from prefault._system.memory_cgroups import Bound
from prefault.engine.methods import Access
from prefault.errors import HeadroomError
from prefault.inspection import page_cache
from prefault.inspection.scan import populated_before
from prefault.intervals import Intervals
from prefault.limits import admission
from prefault.limits.admission import AdmissionControl
from prefault.limits.allowance import _Allowance, allowance
from prefault.limits.demand import Demand, uncached_in_all
from prefault.limits.limit import Limit, Shortfall
from prefault.limits.memory_limits import MemoryAnswer
from prefault.limits.memory_use import MemoryUse
from prefault.memory.vma import Backing, Vma, vma_at
from prefault.sizes import GIB, MIB, PAGE_SIZE
from prefault.testing import without
from support import file_beds
from support.children import in_child
from support.regions import Region

# The module, not the function of the same name that the package exports.
PLANNING, TABLE, MEMORY, EVICTED = (
    sys.modules[f"prefault.{name}"]
    for name in ("engine.planning", "limits.table", "limits.memory_limits", "limits.evicted_meanwhile")
)
PAGES = 64
LENGTH = PAGES * PAGE_SIZE
LIMIT = Limit("a limit", "memory", GIB, 0, 0, 0, "consequence", "source", "remedy")


@pytest.fixture(autouse=True)
def _no_allowance() -> Iterator[None]:
    allowance.empty()
    yield
    allowance.empty()


def demand_of(mapping: prefault.Mapping, access: Access | None = None) -> Demand:
    """Make the demand of a whole mapping."""
    plan = prefault.plan(mapping, access=access)
    (segment,) = plan.segments
    write, private = segment.method.access == "write", not segment.target.shared
    present = populated_before(segment.start, segment.stop, write=write, private=private)
    return Demand(segment.use, Intervals([(segment.start, segment.stop)]) - present, mapping.fd)


def needed(mapping: prefault.Mapping, access: Access | None = None) -> int:
    """Count the pages of memory, page tables not counted, that populating the mapping takes."""
    demand = demand_of(mapping, access)
    start, stop = mapping.range
    memory = demand.memory(start, stop)
    assert memory + demand.overhead(start, stop) <= demand.at_most(start, stop)
    # Counted piece by piece, the sum is equal.
    cut = start + 24 * PAGE_SIZE
    assert demand.memory(start, cut) + demand.memory(cut, stop) == memory
    return memory // PAGE_SIZE


# --- demand ---------------------------------------------------------------------------------------------------------------


def test_private_memory() -> None:
    with prefault.Mapping(LENGTH, huge="never") as mapping:
        assert (needed(mapping), needed(mapping, "read")) == (PAGES, 0)
        prefault.populate(mapping, access="read")
        assert (needed(mapping), needed(mapping, "read")) == (PAGES, 0)  # the zero page
        prefault.populate(mapping, offset=8 * PAGE_SIZE, length=4 * PAGE_SIZE)
        assert needed(mapping) == PAGES - 4
        prefault.populate(mapping)
        assert (needed(mapping), needed(mapping, "read")) == (0, 0)
        assert in_child(lambda: needed(mapping)) == PAGES  # to be copied from the parent
        assert needed(mapping) == 0


@pytest.mark.parametrize("access", ["read", "write"])
def test_shared_memory(access: Access) -> None:
    with prefault.Mapping(LENGTH, backing="memfd", huge="never") as mapping:
        assert mapping.fd is not None
        assert needed(mapping, access) == PAGES
        os.pwrite(mapping.fd, b"x", 9 * PAGE_SIZE)
        os.posix_fallocate(mapping.fd, 16 * PAGE_SIZE, 8 * PAGE_SIZE)  # allocated, not touched by any process
        assert needed(mapping, access) == PAGES - 9
        assert demand_of(mapping, access).unallocated(*mapping.range) == (PAGES - 9) * PAGE_SIZE
        with without("cachestat"):
            assert needed(mapping, access) == PAGES - 1  # more than is needed: what was not touched cannot be told
        prefault.populate(mapping, access="read")
        assert needed(mapping, access) == 0


def test_shared_memory_of_which_only_a_child_has_pages() -> None:
    with prefault.Mapping(LENGTH, shared=True, huge="never") as mapping:
        in_child(lambda: prefault.populate(mapping, length=LENGTH // 2).bytes)
        assert needed(mapping) == PAGES // 2


def test_private_mappings_of_files() -> None:
    """A hole of a memfd is filled, and copied where it is written; both count."""
    with prefault.Mapping(LENGTH, backing="memfd", shared=False, huge="never") as mapping:
        assert (needed(mapping, "read"), needed(mapping, "write")) == (PAGES, 2 * PAGES)
        prefault.populate(mapping, access="read")
        assert (needed(mapping, "read"), needed(mapping, "write")) == (0, PAGES)
        prefault.populate(mapping, access="write")
        assert needed(mapping, "write") == 0


def test_files_on_a_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("disk") / "file"
    path.write_bytes(bytes(LENGTH))
    cases: tuple[tuple[bool, Access, int], ...] = (
        (True, "read", 0), (True, "write", 0), (False, "read", 0), (False, "write", PAGES),
    )  # fmt: skip
    for shared, access, pages in cases:
        with prefault.Mapping(backing=prefault.File(path), shared=shared) as mapping:
            assert needed(mapping, access) == pages


def test_no_further_than_the_file() -> None:
    with prefault.Mapping(LENGTH, backing="memfd", huge="never") as mapping:
        assert mapping.fd is not None
        os.ftruncate(mapping.fd, 10 * PAGE_SIZE - 1)
        assert needed(mapping) == 10


def test_memory_that_may_not_be_written_or_is_not_there() -> None:
    with Region(PAGES, mman.PROT_NONE) as region:
        for access in ("read", "write"):
            segments = prefault.plan(region, access=access).segments
            demand = Demand(segments[0].use, Intervals([(region.address, region.address + LENGTH)]))
            assert demand.memory(region.address, region.address + LENGTH) == 0
    with Region(PAGES) as region:
        region.punch(0, PAGES)
        (segment,) = prefault.plan(region).segments
        demand = Demand(segment.use, Intervals([(region.address, region.address + LENGTH)]))
        assert demand.at_most(region.address, region.address + LENGTH) == 0


def test_without_pagemap() -> None:
    with prefault.Mapping(LENGTH, huge="never") as mapping, without("pagemap", "pagemap_scan"):
        assert needed(mapping) == PAGES
        prefault.populate(mapping, length=LENGTH // 4)
        assert needed(mapping) == PAGES - PAGES // 4
        assert needed(mapping, "read") == 0


def test_the_missing_pages_of_a_stretch() -> None:
    with prefault.Mapping(LENGTH, huge="never") as mapping:
        start = mapping.range.start
        for page in (0, 1, 5, 9, 63):
            prefault.populate(mapping, offset=page * PAGE_SIZE, length=PAGE_SIZE)
        demand = demand_of(mapping)
        populated = {0, 1, 5, 9, 63}
        for first in range(12):
            for last in range(first, PAGES + 1):
                expected = sum(page not in populated for page in range(first, last))
                assert demand.missing_bytes(start + first * PAGE_SIZE, start + last * PAGE_SIZE) == expected * PAGE_SIZE


# --- admission control ----------------------------------------------------------------------------------------------------


class Answers:
    """Instead of the machine's memory: so many bytes are left, however often one asks."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.asked: list[tuple[int, float, bool]] = []

    def __call__(self, needed: int, *, reserve: float = 1.0, only_shrinking: bool = False) -> MemoryAnswer:
        self.asked.append((needed, reserve, only_shrinking))
        return MemoryAnswer(LIMIT if self.left < needed else None, self.left)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Answers]:
    def make(left: int) -> Answers:
        made = Answers(left)
        monkeypatch.setattr(admission, "ask_for_memory", made)
        return made

    return make


def test_all_of_it_at_the_start_and_what_is_ahead_later(answers: Callable[[int], Answers]) -> None:
    with prefault.Mapping("32 MiB", huge="never") as mapping:
        start, stop = mapping.range
        control = AdmissionControl([demand_of(mapping)], start)
        made = answers(33 * MIB)
        control.start()
        assert 32 * MIB < made.asked[0][0] < 33 * MIB
        assert made.asked[0][1] == 1.0
        made.left = 5 * MIB
        with control.ahead(start, start + 4 * MIB):
            pass
        made.left = 3 * MIB
        with pytest.raises(HeadroomError, match="stopped at offset 8388608") as caught, control.ahead(start + 8 * MIB, stop):
            raise AssertionError("not to be reached")
        assert (caught.value.offset, caught.value.limit, caught.value.available_bytes) == (8 * MIB, "a limit", 3 * MIB)
        with pytest.raises(HeadroomError, match=r"cannot populate 32\.0 MiB: .*; nothing was populated"):
            control.start()
        made.left = 0
        prefault.populate(mapping, headroom="ignore")
        AdmissionControl([demand_of(mapping)]).start()  # nothing is missing any more


def test_page_tables_may_come_out_of_the_reserve(answers: Callable[[int], Answers]) -> None:
    made = answers(0)
    with prefault.Mapping("32 MiB", huge="never") as mapping:
        reading, writing = demand_of(mapping, "read"), demand_of(mapping, "write")
        made.asked.clear()  # by the plans of these
        assert AdmissionControl([reading]).whole() is not None
        assert [reserve for _, reserve, _ in made.asked] == [1.0, 0.0]
        made.asked.clear()
        assert AdmissionControl([writing]).whole() is not None
        assert [reserve for _, reserve, _ in made.asked] == [1.0, 1.0]


def test_chunks_are_small_where_little_is_left(answers: Callable[[int], Answers]) -> None:
    with prefault.Mapping("8 MiB", huge="never") as mapping:
        sizes = []
        for left in (10 * MIB, 60 * MIB, 8 * GIB):
            answers(left)
            control = AdmissionControl([demand_of(mapping)])
            control.start()
            sizes.append(control.largest_chunk)
        assert sizes == [MIB, 7 * MIB, GIB]  # the pace sets the size then


def test_a_thread_waits_for_what_others_have_ahead(answers: Callable[[int], Answers]) -> None:
    """A chunk under way may be charged already or not: only its end tells."""
    made = answers(6 * MIB)
    with prefault.Mapping("8 MiB", huge="never") as mapping:
        start, stop = mapping.range
        control = AdmissionControl([demand_of(mapping)])
        admitted = threading.Event()
        results: list[Shortfall | None] = []

        def other() -> None:
            results.append(control.admit(start + 4 * MIB, stop))
            admitted.set()
            control.release()

        assert control.admit(start, start + 4 * MIB) is None
        thread = threading.Thread(target=other)
        thread.start()
        deadline = time.monotonic() + 30
        while len(made.asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not admitted.is_set()
        control.release()
        thread.join(30)
        assert results == [None]
        made.left = 2 * MIB
        assert control.admit(start, start + 4 * MIB) is not None  # no other thread to wait for


def test_ctrl_c_just_after_being_admitted_keeps_no_helper_waiting(
    answers: Callable[[int], Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An admitted chunk that is never populated must not keep the others waiting for its end."""
    made = answers(GIB)
    mine, waiting, admit = threading.get_ident(), threading.Event(), AdmissionControl.admit

    def interrupted(self: AdmissionControl, start: int, stop: int) -> Shortfall | None:
        shortfall = admit(self, start, stop)
        if threading.get_ident() == mine:
            made.left = 3 * MIB
            made.asked.clear()
            while len(made.asked) < 2:  # the helper asks for its next chunk, and again
                time.sleep(0.001)
            waiting.set()
            raise KeyboardInterrupt
        return shortfall

    monkeypatch.setattr(AdmissionControl, "admit", interrupted)
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
    with prefault.Mapping("512 MiB", huge="never") as mapping:
        with pytest.raises(prefault.PopulateInterrupted):
            prefault.populate(mapping, threads=2)
        assert waiting.is_set()


def test_a_small_call_asks_once_in_a_while(answers: Callable[[int], Answers]) -> None:
    made = answers(64 * GIB)
    with prefault.Mapping("4 MiB", huge="never") as mapping:
        for page in range(1000):
            prefault.populate(mapping, offset=page * PAGE_SIZE, length=PAGE_SIZE)
    assert 1 <= len(made.asked) < 500  # each answer holds for 20 ms
    made = answers(8 * MIB)
    allowance.empty()
    with prefault.Mapping("4 MiB", huge="never") as mapping:
        for page in range(100):
            prefault.populate(mapping, offset=page * PAGE_SIZE, length=PAGE_SIZE)
    assert len(made.asked) == 100  # a tight one does not hold at all
    made.asked.clear()
    with prefault.SparseMemory("4 MiB", unpopulated="fault", huge="never") as memory:
        for page in range(100):
            memory.populate(page * PAGE_SIZE, PAGE_SIZE)
    assert len(made.asked) == 100  # nor is the only chunk looked at twice where it could be undone


def test_the_allowance_is_spent_and_expires() -> None:
    fresh = _Allowance()
    assert not fresh.spend(0, 0)
    fresh.fill(GIB, 1000)
    until = 1000 + GIB // 128
    assert fresh.spend(GIB // 8, 1001)
    assert not fresh.spend(GIB // 8 + 1, 1001)
    assert fresh.spend(GIB // 8, until - 1)
    assert not fresh.spend(1, until - 1)
    fresh.fill(1 << 60, 0)
    assert fresh.spend(1, 19_999_999)
    assert not fresh.spend(1, 20_000_000)
    fresh.fill(15 * MIB, 0)
    assert not fresh.spend(1, 0)
    fresh.fill(GIB, 0)
    fresh.empty()
    assert not fresh.spend(1, 0)


# --- page cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached_file(tmp_path: Path) -> Iterator[prefault.Mapping]:
    """A mapped file of 16 MiB, all of it in the page cache and none of it populated."""
    path = file_beds.make(tmp_path / "file", 16 * MIB)
    file_beds.evict(path)
    file_beds.touch(path, *range(16 * MIB // PAGE_SIZE))  # single pages, not large folios
    with prefault.Mapping(backing=prefault.File(path), writable=False) as mapping:
        yield mapping


def _drop(mapping: prefault.Mapping, first: int, pages: int) -> None:
    """Take pages out of the page tables and out of the page cache."""
    if not pages:
        return
    start, length = first * PAGE_SIZE, pages * PAGE_SIZE
    assert mapping.fd is not None
    mman.madvise(mapping.range.start + start, length, mman.MADV_DONTNEED)
    for _ in range(100):  # pages that another CPU has in hand stay
        os.posix_fadvise(mapping.fd, start, length, os.POSIX_FADV_DONTNEED)
        if not any(mman.mincore(mapping.range.start + start, length)):
            return
        time.sleep(0.005)
    raise AssertionError("the kernel keeps them")


def test_nothing_is_looked_at_where_memory_is_free(cached_file: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(*_: object) -> None:
        raise AssertionError

    for module, name in ((TABLE, "cgroup_cache_limits"), (TABLE, "machine_cache_limits"), (admission, "evicted_meanwhile")):
        monkeypatch.setattr(module, name, looked)
    assert prefault.populate(cached_file).bytes == 16 * MIB


def test_what_is_free_is_asked_once_for_a_short_call(cached_file: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def has_free(needed: int) -> bool:
        asked.append(needed)
        return True

    rows = [row if row.has_free is None else row._replace(has_free=has_free) for row in TABLE.TABLE]
    monkeypatch.setattr(TABLE, "TABLE", rows)
    count = sum(row.has_free is not None for row in rows)
    control = AdmissionControl([demand_of(cached_file, "read")])
    asked.clear()
    assert control.whole() is None
    assert len(asked) == count
    assert control.look_again() is None
    assert len(asked) == count
    monkeypatch.setattr(admission, "_SHORT", 16 * MIB - 1)  # a long one
    assert control.look_again() is None
    assert len(asked) == 2 * count


def test_little_is_not_even_compared(monkeypatch: pytest.MonkeyPatch, cached_file: prefault.Mapping) -> None:
    monkeypatch.setattr(MEMORY, "_bounds", lambda _: [(0, Bound("file", "memory", MIB, MIB))])
    assert not MEMORY.cgroups_have_free(5 * MIB)
    assert MEMORY.cgroups_have_free(4 * MIB)
    monkeypatch.setattr(MEMORY, "read_meminfo", lambda *names: tuple(MIB for _ in names))
    assert not MEMORY.machine_has_free(5 * MIB)
    assert MEMORY.machine_has_free(4 * MIB)


@pytest.mark.parametrize(("gone", "told"), [(0, 0), (63, 0), (64, 64), (1000, 1000)])
@pytest.mark.parametrize("source", ["pagemap_scan", "pagemap"])
def test_a_few_pages_that_went_are_no_proof(
    gone: int, told: int, source: str, cached_file: prefault.Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4096 pages: fewer than a 64th may be those of a kernel that reclaims cold pages all the time."""
    monkeypatch.setattr(admission, "has_free_memory", lambda _: False)
    with without(*{"pagemap_scan": (), "pagemap": ("pagemap_scan",)}[source]):
        control = AdmissionControl([demand_of(cached_file, "read")])
        control.start()
        prefault.populate(cached_file, headroom="ignore")
        start = cached_file.range.start
        assert cached_file.fd is not None
        mman.madvise(start, 8 * MIB, mman.MADV_DONTNEED)
        assert control.look_again() is None  # in the page cache they are
        prefault.populate(cached_file, headroom="ignore")
        _drop(cached_file, 100, gone)
        found = control.look_again()
        assert (0 if found is None else found.pages.length) == told * PAGE_SIZE
        if found is not None:
            assert found.pages.span == (start + 100 * PAGE_SIZE, start + (100 + gone) * PAGE_SIZE)
            assert found.shortfall.needed_bytes == 16 * MIB
            assert found.shortfall.available_bytes == 16 * MIB - gone * PAGE_SIZE


def test_pages_of_which_the_kernel_does_not_tell_are_populated_once_more(
    cached_file: prefault.Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without a name, as that of another user: mincore says of it that all is there."""
    monkeypatch.setattr(admission, "has_free_memory", lambda _: False)
    control = AdmissionControl([demand_of(cached_file, "read")])
    control.start()
    assert cached_file.fd is not None
    os.unlink(os.readlink(f"/proc/self/fd/{cached_file.fd}"))
    start = cached_file.range.start
    prefault.populate(cached_file, headroom="ignore")
    mman.madvise(start, 8 * MIB, mman.MADV_DONTNEED)
    assert control.look_again() is None
    assert all(mman.mincore(start, 8 * MIB))

    def populate_and_evict(pages: Intervals) -> bool:
        assert pages == Intervals([(start + 100 * PAGE_SIZE, start + 164 * PAGE_SIZE)])
        populated = bool(populate(pages))
        _drop(cached_file, 200, 70)
        return populated

    populate = EVICTED._populated
    monkeypatch.setattr(EVICTED, "_populated", populate_and_evict)
    _drop(cached_file, 100, 64)
    found = control.look_again()
    assert found is not None
    assert found.pages == found.unmapped == Intervals([(start + 200 * PAGE_SIZE, start + 270 * PAGE_SIZE)])
    monkeypatch.setattr(EVICTED, "_populated", lambda _: False)
    assert control.look_again() is None


def test_without_pagemap_the_page_cache_tells(cached_file: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "has_free_memory", lambda _: False)
    with without("pagemap_scan", "pagemap"):
        control = AdmissionControl([demand_of(cached_file, "read")])
        control.start()
        assert control.look_again() is None  # in no page table, but in the page cache


def test_what_the_page_cache_lacks(cached_file: prefault.Mapping) -> None:
    demand = demand_of(cached_file, "read")
    assert uncached_in_all([demand]) == 0
    _drop(cached_file, 1000, 500)
    assert uncached_in_all([demand]) == 500 * PAGE_SIZE
    assert uncached_in_all([demand, demand]) == 500 * PAGE_SIZE  # once
    with without("cachestat"):
        assert uncached_in_all([demand]) == 500 * PAGE_SIZE
    assert uncached_in_all([demand_of(cached_file, "write")]) == 0  # not writable: the kernel's error says more


def test_facts_on_a_file_that_is_mapped_many_times_are_found_out_once(
    cached_file: prefault.Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()

    def counted(name: str) -> Callable[[Vma], object]:
        real: Callable[[Vma], object] = getattr(page_cache, name)

        def ask(vma: Vma) -> object:
            asked[name] += 1
            return real(vma)

        return ask

    for name in ("any_descriptor", "file_size", "takes_page_cache"):
        monkeypatch.setattr(page_cache, name, counted(name))
    path = os.readlink(f"/proc/self/fd/{cached_file.fd}")
    with ExitStack() as stack:
        mappings = [stack.enter_context(prefault.Mapping(backing=prefault.File(path), writable=False)) for _ in range(20)]
        starts = [mapping.range.start for mapping in mappings]
        demands = [
            Demand(
                MemoryUse(start, start + PAGE_SIZE, Backing.FILE, shared=True, access="read"),
                Intervals([(start, start + PAGE_SIZE)]),
            )
            for start in starts
        ]
        assert uncached_in_all(demands) == 0
    assert asked == {"any_descriptor": 1, "file_size": 1, "takes_page_cache": 1}


def test_a_descriptor_that_is_another_file_by_now_is_not_asked(cached_file: prefault.Mapping, tmp_path: Path) -> None:
    vma = vma_at(cached_file.range.start)
    assert vma is not None
    files = page_cache.KnownFiles()
    first = files.descriptor(vma)
    assert first is not None
    spare = os.dup(first)
    other = os.open(file_beds.make(tmp_path / "other", PAGE_SIZE), os.O_RDONLY)
    try:
        os.dup2(other, first)
        second = files.descriptor(vma)
        assert second != first
        assert second is not None
        assert os.path.samestat(os.fstat(second), os.fstat(spare))
    finally:
        os.dup2(spare, first)
        os.close(spare)
        os.close(other)
