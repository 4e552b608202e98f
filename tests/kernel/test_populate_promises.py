"""What populate promises, beyond the table of failures: the demands A1 to A12 of the project.

Like the table, every test runs with MADV_POPULATE_* and on the fallbacks.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest

import prefault
from prefault import BackingFullError, HoleError, PopulateError, ProtectionError
from prefault._kernel import cachestat, mman, pagemap
from prefault._system import capabilities
from prefault.engine.methods import Access
from prefault.testing import without
from support import needs, oracle
from support.children import Child
from support.memory_kinds import HUGE, MemoryKind, Sample, sample
from support.populate_modes import PopulateMode
from support.populating import assert_populated
from support.regions import PAGE, READ, Region, Span, data_pages, file_of

pytestmark = pytest.mark.usefixtures("way")

EACH_ACCESS: tuple[Access, ...] = ("read", "write")
each_access = pytest.mark.parametrize("access", EACH_ACCESS)
each_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=kind.value, marks=[pytest.mark.alone] if kind.page_size == HUGE else []) for kind in MemoryKind],
)


@pytest.fixture
def memory(request: pytest.FixtureRequest, kind: MemoryKind, disk: Path) -> Iterator[Sample]:
    """Eight pages of each kind."""
    if kind.page_size == HUGE:
        request.getfixturevalue("hugetlb_pool")(8)
    with sample(kind, disk) as made:
        yield made


def faults_of(view: numpy.typing.NDArray[numpy.uint8], *, write: bool) -> int:
    """Page faults while every page is touched."""
    before = oracle.minor_faults()
    if write:
        numpy.bitwise_or(view[::PAGE], numpy.uint8(0), out=view[::PAGE])
    else:
        view[::PAGE].max()
    return oracle.minor_faults() - before


# --- A1, A2, A3: readable, writable, all of it ------------------------------------------------------------------------


@each_access
def test_touching_what_is_populated_faults_no_more(access: Access) -> None:
    with Region(512) as region, Region(512) as control:
        # The interpreter faults a page or two for itself.
        assert faults_of(numpy.asarray(control), write=access == "write") >= 512
        assert_populated(region, access)
        assert faults_of(numpy.asarray(region), write=access == "write") < 32


@each_kind
@each_access
def test_all_of_it_is_present_and_no_byte_changed(memory: Sample, kind: MemoryKind, access: Access) -> None:
    if memory.fd is not None:
        memory.write_to_file()
    else:
        memory.write_to_memory()
    assert_populated(memory.region, access)
    memory.assert_intact()


@each_kind
@each_access
def test_what_is_in_the_memory_already_stays(memory: Sample, kind: MemoryKind, access: Access) -> None:
    memory.write_to_memory()
    assert_populated(memory.region, access)
    memory.assert_intact()


def test_readable_leaves_private_pages_of_a_file_to_the_file(disk: Path) -> None:
    with sample(MemoryKind.PRIVATE_DISK, disk) as memory:
        assert memory.fd is not None
        memory.write_to_file()
        assert_populated(memory.region, "read")
        assert all(oracle.file_pages(memory.region.address, memory.region.length))
        with Region(8, READ, fd=memory.fd, shared=True) as shared:
            shared.read(0, 8)
            frames = oracle.frames(shared.address, shared.length)
            assert oracle.frames(memory.region.address, memory.region.length) == frames
        assert oracle.smaps(memory.region.address)["Anonymous"] == 0


def test_writable_copies_private_pages_of_a_file(disk: Path) -> None:
    with sample(MemoryKind.PRIVATE_DISK, disk) as memory:
        assert memory.fd is not None
        memory.write_to_file()
        assert_populated(memory.region, "read")
        # They are present, but not yet writable without a fault: work that counts.
        assert assert_populated(memory.region, "write").bytes == memory.region.length
        assert prefault.populate(memory.region, access="write").bytes == 0
        assert not any(oracle.file_pages(memory.region.address, memory.region.length))
        assert oracle.smaps(memory.region.address)["Anonymous"] == memory.region.length
        memory.assert_intact()
        memory.region.fill(0, b"private")
        assert os.pread(memory.fd, 7, 0) != b"private"


def exclusive(region: Region) -> list[bool]:
    return [bool(entry & pagemap.PM_MMAP_EXCLUSIVE) for entry in oracle.entries(region.address, region.length)]


def test_after_fork_readable_shares_and_writable_copies(way: PopulateMode) -> None:
    """process_vm_readv pins what it reads, and since Linux 5.19 the kernel copies a shared page before it pins it.

    So this fallback breaks copy-on-write where pages are present and shared with a child. No byte changes by it.
    """
    needs.page_frames()
    with Region(8) as region:
        content = random.Random(2).randbytes(8 * PAGE)
        region.fill(0, content)
        frames = oracle.frames(region.address, region.length)
        with Child(signal.pause) as child:
            assert exclusive(region) == [False] * 8
            result = assert_populated(region, "read")
            assert (result.bytes, result.present_bytes) == (0, 8 * PAGE)
            if way is PopulateMode.MADVISE:
                assert oracle.frames(region.address, region.length) == frames
                assert exclusive(region) == [False] * 8
            else:
                assert exclusive(region) == [True] * 8
            assert_populated(region, "write")
            assert exclusive(region) == [True] * 8
            assert not set(oracle.frames(region.address, region.length)) & set(frames)
            assert all(oracle.present(region.address, region.length, child.pid))
        assert region.read(0, 8) == content


def test_after_fork_the_child_keeps_its_bytes() -> None:
    with Region(8) as region:
        content = random.Random(3).randbytes(8 * PAGE)
        region.fill(0, content)
        gate, opener = os.pipe()

        def look() -> bytes:
            os.read(gate, 1)
            return region.read(0, 8)

        with Child(look) as child:
            assert_populated(region, "write")
            region.fill(0, bytes(8 * PAGE))
            os.write(opener, b"x")
            assert child.result() == content
        os.close(gate)
        os.close(opener)


def test_writable_leaves_no_zero_page() -> None:
    with Region(8) as region:
        assert_populated(region, "read")
        zero_frames = set(oracle.frames(region.address, region.length))
        assert len(zero_frames) == 1
        result = assert_populated(region, "write")
        # Only PAGEMAP_SCAN tells the zero page from others, so that replacing it counts as work.
        assert result.bytes == (8 * PAGE if capabilities.PAGEMAP_SCAN.available else 0)
        assert exclusive(region) == [True] * 8
        assert oracle.smaps(region.address)["Anonymous"] == 8 * PAGE
        if oracle.shows_frames():
            assert not zero_frames & set(oracle.frames(region.address, region.length))


def test_writable_leaves_no_huge_zero_page() -> None:
    with prefault.Mapping(HUGE, huge="advise") as mapping:
        prefault.populate(mapping, access="read")
        assert oracle.smaps(mapping.range.start)["Anonymous"] == 0
        prefault.populate(mapping, access="write")
        assert oracle.smaps(mapping.range.start)["Anonymous"] == HUGE
        assert oracle.present_bytes(mapping.range.start, HUGE) == HUGE


# --- A5: a failure says how much, and is undone when asked ------------------------------------------------------------


@each_kind
@each_access
def test_rollback_takes_exactly_what_came(memory: Sample, kind: MemoryKind, access: Access) -> None:
    step = memory.page_size
    memory.filled = [index for index in memory.filled if index < memory.pages - 1]
    memory.write_to_memory()
    region = memory.region
    there = oracle.present(region.address, region.length)
    held = (data_pages(memory.fd), os.fstat(memory.fd).st_blocks) if memory.fd is not None else ([], 0)
    last = (memory.pages - 1) * step // PAGE
    region.protect(last, step // PAGE, mman.PROT_NONE)
    with pytest.raises(ProtectionError, match="discarded again") as caught:
        prefault.populate(region, access=access, rollback=True)
    error = caught.value
    assert (error.offset, error.populated_bytes, len(error.populated)) == ((memory.pages - 1) * step, 0, 0)
    assert oracle.present(region.address, region.length) == there
    if memory.fd is not None:
        assert data_pages(memory.fd) == held[0]
        # ext4 may have added a block for the list of extents, and keeps that.
        assert os.fstat(memory.fd).st_blocks * 512 - held[1] * 512 in ((0, PAGE) if kind is MemoryKind.SHARED_DISK else (0,))
    region.protect(last, step // PAGE, READ)
    memory.content[memory.pages - 1] = bytes(step)
    memory.assert_intact()


def test_rollback_when_tmpfs_is_full(small_tmpfs: Callable[[str], Path]) -> None:
    """With a descriptor and without one; what others put into the file stays theirs."""
    directory = small_tmpfs("32k")
    with file_of(directory, 16 * PAGE) as (fd, path):
        os.pwrite(fd, b"theirs", 2 * PAGE)
        with prefault.Mapping(backing=prefault.File(path)) as mapping, Region(16, fd=fd, shared=True) as region:
            view = mapping.memoryview()
            view[:4] = b"ours"
            before = oracle.present(mapping.range.start, 16 * PAGE)
            assert before[0]
            for buffer, span in ((mapping, Span(mapping.range.start, 16 * PAGE)), (region, region)):
                there = oracle.present(span.address, span.length)
                with pytest.raises(BackingFullError) as caught:
                    prefault.populate(buffer, rollback=True, headroom="ignore")
                assert caught.value.populated_bytes == 0
                assert oracle.present(span.address, span.length) == there
                assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
            assert bytes(view[:4]) == b"ours"
            assert bytes(view[2 * PAGE : 2 * PAGE + 6]) == b"theirs"
            del view


def test_rollback_when_the_hugetlb_pool_is_empty(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(3)
    for backing in ("hugetlb", "memfd-hugetlb"):
        with prefault.Mapping(4 * HUGE, backing=backing, noreserve=True) as mapping:
            view = mapping.memoryview()
            view[HUGE] = 7
            free = prefault._system.hugetlb.read_pool(HUGE).free
            with pytest.raises(BackingFullError) as caught:
                prefault.populate(mapping, rollback=True, headroom="ignore")
            assert (caught.value.offset, caught.value.populated_bytes) == (3 * HUGE, 0)
            there = oracle.present(mapping.range.start, 4 * HUGE)
            assert there == [False] * 512 + [True] * 512 + [False] * 1024
            assert view[HUGE] == 7
            assert prefault._system.hugetlb.read_pool(HUGE).free == free
            del view


def test_rollback_makes_holes_of_a_disk_file_again(disk: Path) -> None:
    """fallocate gave them blocks, also to the part of a page at the end of the file; what was written stays."""
    with file_of(disk, 12 * PAGE - 100) as (fd, _), Region(16, fd=fd, shared=True) as region:
        os.pwrite(fd, b"data", 4 * PAGE)
        os.fsync(fd)
        blocks = os.fstat(fd).st_blocks
        region.punch(12, 4)
        assert prefault.plan(region.part(0, 12)).method.startswith("fallocate+")
        with pytest.raises(HoleError) as caught:
            prefault.populate(region, rollback=True)
        assert (caught.value.offset, caught.value.populated_bytes) == (12 * PAGE, 0)
        assert oracle.present_bytes(region.address, 12 * PAGE) == 0
        assert os.fstat(fd).st_blocks == blocks
        assert region.read(4, 1).startswith(b"data")


def test_rollback_of_locked_memory() -> None:
    needs.capability(capabilities.DONTNEED_LOCKED)
    with Region(8) as region:
        region.fill(1, b"mine")
        mman.mlock2(region.address, region.length, mman.MLOCK_ONFAULT)
        region.protect(7, 1, mman.PROT_NONE)
        with pytest.raises(ProtectionError):
            prefault.populate(region, rollback=True)
        assert oracle.present(region.address, region.length) == [False, True] + [False] * 6
        assert region.read(1, 1).startswith(b"mine")


def test_rollback_without_pagemap_scan() -> None:
    """The entries of pagemap tell what was there before, just more slowly."""
    with Region(8) as region, without("pagemap_scan"):
        content = random.Random(4).randbytes(4 * PAGE)
        region.fill(0, content)
        region.punch(7, 1)
        with pytest.raises(HoleError) as caught:
            prefault.populate(region, access="write", rollback=True)
        assert (caught.value.offset, caught.value.populated_bytes) == (7 * PAGE, 0)
        assert oracle.present(region.address, region.length) == [True] * 4 + [False] * 4
        assert region.read(0, 4) == content


def test_no_rollback_where_nothing_tells_what_was_there_before() -> None:
    """Whatever was there would be lost: refused before anything is done."""
    with Region(8) as region, without("pagemap_scan", "pagemap"):
        content = random.Random(4).randbytes(4 * PAGE)
        region.fill(0, content)
        with pytest.raises(PopulateError, match="rollback is not possible") as caught:
            prefault.populate(region, access="write", rollback=True)
        assert (type(caught.value), caught.value.errno) == (PopulateError, errno.EOPNOTSUPP)
        assert oracle.present(region.address, region.length) == [True] * 4 + [False] * 4
        assert region.read(0, 4) == content
        assert_populated(region, "write")


@pytest.mark.parametrize("rollback", [False, True], ids=["stays", "rollback"])
def test_several_threads_account_for_every_page(rollback: bool) -> None:
    """One meets a page that it cannot have, the others are at work above it."""
    pages = 16 * 1024
    with Region(pages) as region:
        region.fill(100, b"before")
        region.protect(9 * 1024 + 3, 1, mman.PROT_NONE)
        with pytest.raises(ProtectionError) as caught:
            prefault.populate(region, access="write", threads=4, rollback=rollback)
        error = caught.value
        assert error.address == region.page(9 * 1024 + 3)
        there = {index for index, present in enumerate(oracle.present(region.address, region.length)) if present}
        said = {(at - region.address) // PAGE for part in error.populated for at in range(part.start, part.stop, PAGE)}
        assert said == there - {100}
        assert (said == set()) == rollback
        assert region.read(100, 1).startswith(b"before")


# --- A8: no signal ----------------------------------------------------------------------------------------------------


def caught_signals() -> str:
    """The signals that this process has handlers for, as the kernel sees it."""
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path("/proc/self/status").read_text())
    return str(mask)


def test_failures_need_no_signal_handler(small_tmpfs: Callable[[str], Path]) -> None:
    """In a child without handlers, where a SIGBUS or SIGSEGV would be the end."""
    directory = small_tmpfs("16k")

    def fail() -> tuple[str, str, list[str]]:
        for number in (signal.SIGBUS, signal.SIGSEGV):
            signal.signal(number, signal.SIG_DFL)
        before = caught_signals()
        names = []
        for access in EACH_ACCESS:
            with file_of(directory, 8 * PAGE) as (fd, _), Region(8, fd=fd, shared=True) as region:
                for _ in range(2):
                    with pytest.raises(PopulateError) as caught:
                        prefault.populate(region, access=access, headroom="ignore")
                    names.append(type(caught.value).__name__)
                    os.ftruncate(fd, PAGE)
            with Region(8, mman.PROT_NONE) as region, pytest.raises(PopulateError) as caught:
                prefault.populate(region, access=access)
            names.append(type(caught.value).__name__)
        return before, caught_signals(), names

    with Child(fail) as child:
        before, after, names = child.result()
    assert before == after
    assert names == ["BackingFullError", "BeyondEndError", "ProtectionError"] * 2


# --- A9: no wear ------------------------------------------------------------------------------------------------------


def dirty(mapping: prefault.Mapping) -> tuple[int, int]:
    """Bytes of the file that will be written back, as the page cache and as the page tables see it."""
    assert mapping.fd is not None
    cache = cachestat.cachestat(mapping.fd)
    return (cache.dirty + cache.writeback) * PAGE, oracle.smaps(mapping.range.start)["Shared_Dirty"] + oracle.smaps(
        mapping.range.start
    )["Private_Dirty"]


def test_a_shared_disk_file_is_allocated_but_not_dirtied(disk: Path) -> None:
    needs.capability(capabilities.CACHESTAT)
    with prefault.Mapping(64 * PAGE, backing=prefault.TemporaryFile(disk)) as mapping:
        assert mapping.fd is not None
        assert os.fstat(mapping.fd).st_blocks == 0
        result = prefault.populate(mapping)
        assert result.access == "read"
        assert dirty(mapping) == (0, 0)
        assert os.fstat(mapping.fd).st_blocks * 512 >= 64 * PAGE
        assert oracle.present_bytes(mapping.range.start, 64 * PAGE) == 64 * PAGE
        assert not any("dirty" in note for note in result.notes)


def test_writable_dirties_a_shared_disk_file_and_says_so(disk: Path) -> None:
    needs.capability(capabilities.CACHESTAT)
    with prefault.Mapping(64 * PAGE, backing=prefault.TemporaryFile(disk)) as mapping:
        result = prefault.populate(mapping, access="write")
        assert dirty(mapping) == (64 * PAGE, 64 * PAGE)
        assert any("dirty" in note for note in result.notes)


def test_the_files_own_bytes_are_not_dirtied_either(disk: Path) -> None:
    needs.capability(capabilities.CACHESTAT)
    with file_of(disk, 8 * PAGE) as (fd, path):
        content = random.Random(5).randbytes(8 * PAGE)
        os.pwrite(fd, content, 0)
        os.fsync(fd)
        with prefault.Mapping(backing=prefault.File(path)) as mapping:
            prefault.populate(mapping)
            assert dirty(mapping) == (0, 0)
            assert bytes(mapping.memoryview()) == content


# --- A11: the fastest way for what is mapped --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "access", "allocates"),
    [
        ({"backing": "anonymous"}, "write", False),
        ({"backing": "anonymous", "shared": True}, "write", False),
        ({"backing": "anonymous", "writable": False}, "read", False),
        ({"backing": "memfd"}, "write", True),
        ({"backing": "memfd", "shared": False}, "read", False),
        ({"backing": "memfd", "writable": False}, "read", False),
        ({"backing": "tmpfs"}, "write", True),
        ({"backing": "disk"}, "read", True),
        ({"backing": "disk", "shared": False}, "read", False),
        ({"backing": "disk", "writable": False}, "read", False),
    ],
    ids=lambda value: "-".join(map(str, itertools.chain(*value.items()))) if isinstance(value, dict) else None,
)
def test_method_of_a_mapping(
    way: PopulateMode, disk: Path, options: dict[str, object], access: Access, allocates: bool
) -> None:
    backing = prefault.TemporaryFile(disk) if options["backing"] == "disk" else options["backing"]
    with prefault.Mapping(8 * PAGE, **{**options, "backing": backing}) as mapping:  # type: ignore[arg-type]
        wanted = ("fallocate+" if allocates else "") + way.method(access)
        plan = prefault.plan(mapping)
        assert (plan.method, plan.access) == (wanted, access)
        result = prefault.populate(mapping)
        assert (result.method, result.access, result.bytes) == (wanted, access, 8 * PAGE)
        assert oracle.present_bytes(mapping.range.start, 8 * PAGE) == 8 * PAGE
        slower = any("no MADV_POPULATE" in note for note in result.notes)
        assert slower == (way is PopulateMode.FALLBACKS)


@pytest.mark.parametrize(("backing", "allocates"), [("hugetlb", False), ("memfd-hugetlb", True)])
def test_method_of_huge_pages(way: PopulateMode, backing: str, allocates: bool, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with prefault.Mapping(2 * HUGE, backing=backing) as mapping:
        wanted = ("fallocate+" if allocates else "") + way.method("write")
        assert prefault.plan(mapping).method == prefault.populate(mapping).method == wanted
        assert oracle.present_bytes(mapping.range.start, 2 * HUGE) == 2 * HUGE


def test_method_of_what_others_mapped(way: PopulateMode, disk: Path) -> None:
    """Of a file on disk the descriptor matters, so it is looked for; shared memory does as well without."""
    with file_of(disk, 8 * PAGE) as (fd, _), mmap.mmap(fd, 8 * PAGE) as memory:
        assert prefault.plan(memory).method == f"fallocate+{way.method('read')}"
    with mmap.mmap(-1, 8 * PAGE) as memory:  # shared anonymous
        assert prefault.plan(memory).method == way.method("write")
    assert prefault.plan(bytes(8 * PAGE)).method == way.method("read")
    assert prefault.plan(bytearray(8 * PAGE)).method == way.method("write")
    assert prefault.plan(numpy.zeros(8 * PAGE, numpy.uint8)).method == way.method("write")


def test_a_buffer_over_several_mappings_gets_a_method_for_each(way: PopulateMode) -> None:
    with Region(8) as region:
        region.protect(4, 4, READ)
        plan = prefault.plan(region)
        assert [segment.method.name for segment in plan.segments] == [way.method("write"), way.method("read")]
        assert [segment.length for segment in plan.segments] == [4 * PAGE, 4 * PAGE]


# --- A12: with mlock --------------------------------------------------------------------------------------------------


@each_access
def test_memory_that_is_locked_already_is_populated_and_stays_locked(access: Access) -> None:
    with Region(8) as region:
        mman.mlock2(region.address, region.length)
        assert_populated(region, access)
        assert oracle.smaps(region.address)["Locked"] == 8 * PAGE


# --- the errno that a caller may rely on ------------------------------------------------------------------------------


def test_errors_of_the_fallbacks_carry_the_errno_of_madvise(way: PopulateMode) -> None:
    """A program that looks at errno sees the same on every kernel; __cause__ is what this kernel said."""
    said = {PopulateMode.MADVISE: errno.EINVAL, PopulateMode.FALLBACKS: errno.EFAULT}[way]
    with Region(8, mman.PROT_NONE) as region, pytest.raises(ProtectionError) as caught:
        prefault.populate(region, access="write")
    assert caught.value.errno == errno.EINVAL
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == said
