"""The table of the limits: every row is complete, and demands that draw on one limit are added up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import prefault
from prefault._kernel import mman
from prefault.device.pages.frame_headroom import FrameHeadroom
from prefault.intervals import Intervals
from prefault.limits import admission, table
from prefault.limits.allowance import allowance
from prefault.limits.demand import Demand
from prefault.limits.limit import Limit
from prefault.limits.memory_limits import MemoryAnswer
from prefault.limits.memory_use import MemoryUse
from prefault.limits.process_limits import PROCESS_LIMITS, explain_limit
from prefault.limits.table import limits_on, refusal_ahead, shortfall_of
from prefault.memory.vma import Backing
from prefault.sizes import MIB, PAGE_SIZE
from support import file_beds, needs
from support.regions import Region

SPACE = 4 * MIB


@contextmanager
def _file(directory: Path, name: str, length: int) -> Iterator[int]:
    fd = os.open(directory / name, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


def _demand(region: Region, fd: int | None = None) -> Demand:
    """Make the demand of a shared mapping of tmpfs of which no page is present."""
    stop = region.address + region.length
    use = MemoryUse(region.address, stop, Backing.TMPFS, shared=True)
    return Demand(use, Intervals([(region.address, stop)]), fd)


@contextmanager
def _mapped(fd: int) -> Iterator[Region]:
    with Region(3 * MIB // PAGE_SIZE, fd=fd, shared=True) as region:
        yield region


@pytest.mark.parametrize("with_descriptor", [True, False])
def test_two_files_of_one_tmpfs_are_added_up(small_tmpfs: Callable[[str], Path], with_descriptor: bool) -> None:
    directory = small_tmpfs(str(SPACE))
    with (
        _file(directory, "a", 3 * MIB) as a, _file(directory, "b", 3 * MIB) as b, _mapped(a) as one, _mapped(b) as two,
    ):  # fmt: skip
        demands = [_demand(one, a if with_descriptor else None), _demand(two, b if with_descriptor else None)]
        assert [refusal_ahead([demand]) for demand in demands] == [None, None]
        short = refusal_ahead(demands)
        assert short is not None
        assert (short.needed_bytes, short.available_bytes) == (6 * MIB, SPACE)
        assert short.limit.name == f"tmpfs space of {directory}"
        prefault.populate(one)
        short = refusal_ahead(demands)  # one file has its pages by now
        assert short is not None
        assert (short.needed_bytes, short.available_bytes) == (3 * MIB, MIB)


def test_a_file_that_is_mapped_twice_takes_its_pages_once(small_tmpfs: Callable[[str], Path]) -> None:
    with _file(small_tmpfs(str(SPACE)), "a", 3 * MIB) as fd, _mapped(fd) as one, _mapped(fd) as two:
        assert refusal_ahead([_demand(one, fd), _demand(two, fd)]) is None


@pytest.mark.parametrize("readonly", [False, True])
def test_populate_is_refused_for_two_mappings_that_fit_one_by_one(
    small_tmpfs: Callable[[str], Path], readonly: bool
) -> None:
    """Two files of one tmpfs, mapped side by side: as one segment, or as two where their protection differs."""
    half = 3 * MIB
    directory = small_tmpfs(str(SPACE))
    shared = mman.MAP_SHARED | mman.MAP_FIXED
    with _file(directory, "a", half) as a, _file(directory, "b", half) as b, Region(2 * half // PAGE_SIZE) as region:
        mman.mmap(region.address, half, mman.PROT_READ | mman.PROT_WRITE, shared, a, 0)
        mman.mmap(region.address + half, half, mman.PROT_READ | (0 if readonly else mman.PROT_WRITE), shared, b, 0)
        assert len(prefault.plan(region).segments) == 1 + readonly
        with pytest.raises(prefault.HeadroomError, match="of tmpfs space are needed") as caught:
            prefault.populate(region)
        assert caught.value.needed_bytes == 2 * half
        assert (os.fstat(a).st_blocks, os.fstat(b).st_blocks) == (0, 0)


def test_the_commit_limit_is_one_for_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Limit("CommitLimit", "commit", 3 * MIB, MIB, 0, 0, "consequence", "source", "remedy")
    monkeypatch.setattr(table, "commit_limits", lambda: [commit])
    with prefault.Mapping(2 * MIB, backing="memfd") as one, prefault.Mapping(2 * MIB, backing="tmpfs") as two:
        demands = [
            Demand(segment.use, Intervals([mapping.range]), mapping.fd)
            for mapping in (one, two)
            for segment in prefault.plan(mapping).segments
        ]
        assert refusal_ahead(demands[:1], "CommitLimit") is None
        short = refusal_ahead(demands, "CommitLimit")
        assert short is not None
        assert (short.needed_bytes, short.available_bytes) == (4 * MIB, 2 * MIB)


def test_locked_memory_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit("RLIMIT_MEMLOCK", "locked memory", MIB, 0, 0, 0, "consequence", "source", "remedy")
    monkeypatch.setattr(table, "resource_limit", lambda name: [limit] if name == limit.name else [])
    with prefault.Mapping(2 * MIB, huge="never") as mapping:
        demand = Demand(MemoryUse(*mapping.range, locks=True), Intervals([mapping.range]))
        short = refusal_ahead([demand])
        assert short is not None
        assert (short.needed_bytes, short.available_bytes) == (2 * MIB, MIB)
        try:
            prefault.lock(mapping, length=MIB, headroom="ignore")
        except prefault.OutOfMemoryError:
            needs.missing("RLIMIT_MEMLOCK does not permit 1 MiB")
        assert refusal_ahead([demand]) is None


def test_every_row_has_a_name_of_its_own_and_concerns_some_memory() -> None:
    names = [row.name for row in table.TABLE]
    assert len(set(names)) == len(names)
    uses = [
        MemoryUse(backing=backing, shared=shared, mapped=mapped, locks=True, allocates=shared, nodes=nodes)
        for backing in Backing
        for shared in (False, True)
        for mapped in (False, True)
        for nodes in ((), (0,))
    ]
    for row in table.TABLE:
        assert row.set_by
        assert any(row.concerns(use) for use in uses), row.name
        assert not all(row.concerns(use) for use in uses) or row.name == "RLIMIT_MEMLOCK"


def test_a_new_row_is_seen_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """headroom, populate, device frames: one row is all that a limit takes."""
    quota = Limit("a quota", "memory", MIB, 0, 0, 0, "ENOMEM", "source", "remedy")
    row = table.LimitRow("quota", "a test", lambda use: use.backing is Backing.MEMFD, lambda _: [quota])
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, row))
    use = MemoryUse(backing=Backing.MEMFD, shared=True)
    assert quota in limits_on(use)
    assert shortfall_of(use, 2 * MIB) == (quota, 2 * MIB, MIB)
    assert quota in prefault.headroom("memfd").limits
    with prefault.Mapping(2 * MIB, backing="memfd") as mapping:
        assert quota in prefault.headroom(mapping).limits
        with pytest.raises(prefault.HeadroomError, match="a quota leaves"):
            prefault.populate(mapping)


def test_a_new_row_that_kills_is_seen_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """headroom, populate before its start and between its chunks, device frames: also one row."""
    left = 40 * MIB
    node = Limit("a node's memory", "memory", 64 * MIB, 24 * MIB, 0, 0, "the OOM killer", "source", "use another node")

    def check(needed: int, reserve: float) -> MemoryAnswer:
        return MemoryAnswer(node if needed > left else None, left)

    row = table.LimitRow("node", "a test", lambda use: use.takes_memory, lambda _: [node], check=check, shrinks=True)
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, row))
    allowance.empty()
    with prefault.Mapping(64 * MIB, huge="never") as mapping:
        assert node in prefault.headroom(mapping).limits
        with pytest.raises(prefault.HeadroomError, match=r"a node's memory leaves 40\.0 MiB") as caught:
            prefault.populate(mapping)
        assert caught.value.populated_bytes == 0
    frames: Any = SimpleNamespace(frames=SimpleNamespace(page_size=PAGE_SIZE, huge=False))
    short = FrameHeadroom(frames).short_of(64 * MIB // PAGE_SIZE)
    assert short is not None
    assert (short.limit, short.available_bytes) == ("a node's memory", left)
    with prefault.Mapping(32 * MIB, huge="never") as mapping:

        def report(done: int, whole: int) -> None:
            nonlocal left
            left = 0

        with pytest.raises(prefault.HeadroomError, match=r"stopped at offset .* a node's memory leaves 0 bytes"):
            prefault.populate(mapping, threads=1, progress=report)


def test_a_node_is_asked_only_for_what_is_taken_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pages that a memfd or the page cache has, and the zero page, come from nowhere."""
    node = Limit("a node's memory", "memory", 64 * MIB, 24 * MIB, 0, 0, "the OOM killer", "source", "use another node")
    asked: list[tuple[object, ...]] = []

    def limits(*about: object) -> list[Limit]:
        asked.append(about)
        return [node]

    for module in (table, admission):
        monkeypatch.setattr(module, "node_limits", limits)
    with prefault.Mapping(64 * MIB, backing="memfd", huge="never") as first:
        assert first.fd is not None
        with pytest.raises(prefault.HeadroomError, match=r"a node's memory leaves 40\.0 MiB"):
            prefault.populate(first, node=0)
        prefault.populate(first)
        with Region(64 * MIB // PAGE_SIZE, fd=first.fd, shared=True) as second:
            assert prefault.populate(second, node=0).bytes == 64 * MIB
    with prefault.Mapping(64 * MIB, huge="never") as mapping:
        assert prefault.populate(mapping, access="read", node=0).bytes == 64 * MIB
        with pytest.raises(prefault.HeadroomError, match=r"a node's memory leaves 40\.0 MiB"):
            prefault.populate(mapping, node=0)
    assert {len(about) for about in asked} == {1, 2}  # before the start and between the chunks
    asked.clear()
    path = file_beds.make(tmp_path / "file", 64 * MIB)
    with prefault.Mapping(backing=prefault.File(path), writable=False, shared=False) as mapping:
        assert prefault.populate(mapping, node=0).bytes == 64 * MIB
    assert asked
    asked.clear()
    with prefault.Mapping(backing=prefault.File(path)) as mapping:
        assert prefault.populate(mapping, node=0).bytes == 64 * MIB
    assert not asked


def test_every_limit_without_bytes_has_a_sentence() -> None:
    for row in PROCESS_LIMITS:
        sentence = explain_limit(row.errno)
        assert sentence is None or ": " in sentence
    assert explain_limit(None) is None
