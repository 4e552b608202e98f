"""SparseMemory: making it, its bytes, its views, its size, its end."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import resource
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault.errors import HeadroomError, MappingError, NotPopulatedError
from prefault.memory.backings import Descriptor, File, Memfd, TemporaryFile
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import GIB, MIB
from prefault.sparse import SparseMemory
from support import oracle
from support.children import in_child
from support.sparse import HUGE_KINDS, KINDS, PAGE, SparseKind, faults, present_blocks, status_kib

BLOCK = 4 * PAGE

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
both = pytest.mark.parametrize("unpopulated", ["zeros", "fault"])


@pytest.fixture(autouse=True)
def _no_leaks(no_leaks: None) -> None:
    """Every test gives back what it takes."""


# --- populating and discarding


@kinds
@both
def test_the_life_of_a_block(kind: SparseKind, unpopulated: Any, tmp_path: Path) -> None:
    with kind.make(16 * BLOCK, tmp_path, block=BLOCK, unpopulated=unpopulated) as memory:
        assert memory.populated == RangeSet()
        result = memory.populate(BLOCK + PAGE, PAGE, access="write")  # outward: the whole block
        assert (result.bytes, result.access) == (BLOCK, "write")
        # Where touching is not forbidden, a fault maps pages of the file around it that are in the page cache.
        if not (kind.is_disk and unpopulated == "zeros"):
            assert present_blocks(memory) == [1]
            assert memory.populated == RangeSet([PageRange(BLOCK, 2 * BLOCK)])
        assert PageRange(BLOCK, 2 * BLOCK) in memory.populated
        assert memory.read(BLOCK, BLOCK) == kind.unwritten(BLOCK, BLOCK)
        memory.write(BLOCK, b"x" * BLOCK)
        assert not memory.discard(BLOCK + PAGE, BLOCK - PAGE).bytes  # inward: no whole block
        assert memory.read(BLOCK, BLOCK) == b"x" * BLOCK
        assert memory.discard(BLOCK, BLOCK).bytes == BLOCK
        assert PageRange(BLOCK, 2 * BLOCK) not in memory.populated
        memory.discard()
        assert memory.populated == RangeSet()
        assert not oracle.present_bytes(memory.range.start, len(memory))
        memory.populate(BLOCK, BLOCK)
        # A file that is not ours to change keeps what was written to it.
        kept = kind.is_disk and kind.shared
        assert memory.read(BLOCK, BLOCK) == (b"x" * BLOCK if kept else kind.unwritten(BLOCK, BLOCK))


@kinds
@both
def test_prefault_populate_and_discard_are_the_same_thing(kind: SparseKind, unpopulated: Any, tmp_path: Path) -> None:
    if kind.is_disk:
        unpopulated = "fault"  # else a fault maps more of the file than was asked for
    with kind.make(16 * BLOCK, tmp_path, block=BLOCK, unpopulated=unpopulated) as memory:
        prefault.populate(memory, offset=BLOCK, length=1, access="write")
        assert present_blocks(memory) == [1]
        prefault.populate(memory, offset=5 * BLOCK, length=2 * BLOCK)
        assert present_blocks(memory) == [1, 5, 6]
        prefault.discard(memory, offset=BLOCK - 1, length=BLOCK + 1)
        assert present_blocks(memory) == [5, 6]
        prefault.discard(memory)
        assert present_blocks(memory) == []


@both
@pytest.mark.parametrize("kind", HUGE_KINDS, ids=lambda kind: kind.name)
def test_huge_pages(
    kind: SparseKind, unpopulated: Any, tmp_path: Path, hugetlb_pool: Callable[[int], None]
) -> None:  # fmt: skip
    hugetlb_pool(4)
    from prefault._system import hugetlb

    def free() -> int:
        return hugetlb.read_pool(kind.page_size).free

    before = free()
    with kind.make(64 * kind.page_size, tmp_path, unpopulated=unpopulated) as memory:
        assert free() == before  # nothing is reserved
        memory.populate(3 * kind.page_size, 1)
        memory.populate_many([(9 * kind.page_size, 1), (5 * kind.page_size, kind.page_size)])
        assert free() == before - 3
        assert present_blocks(memory) == [3, 5, 9]
        memory.write(5 * kind.page_size, b"abc")
        with pytest.raises(prefault.BackingFullError) as caught:
            memory.populate(20 * kind.page_size, 4 * kind.page_size, headroom="ignore")
        assert caught.value.populated_bytes == 0
        assert free() == before - 3
        assert memory.read(5 * kind.page_size, 4) == b"abc\0"
        memory.discard(3 * kind.page_size, kind.page_size)
        assert free() == before - 2
        memory.discard_many([(5 * kind.page_size, 5 * kind.page_size)])
        assert free() == before
        assert present_blocks(memory) == []
    assert free() == before


# --- making it


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"size": 0}, "0 bytes"),
        ({"size": -1}, "negative"),
        ({"size": 1 << 80}, "beyond"),
        ({"size": 1 << 62}, "more than the kernel can map"),
        ({"size": None}, "no size of its own"),
        ({"size": PAGE, "block": 0}, "a block is a multiple"),
        ({"size": PAGE, "block": PAGE + 1}, "a block is a multiple"),
        ({"size": PAGE, "block": PAGE // 2}, "a block is a multiple"),
        ({"size": 2 * PAGE, "reservation": PAGE}, "smaller than the size"),
        ({"size": PAGE, "unpopulated": "hole"}, "'zeros' or 'fault'"),
        ({"size": PAGE, "huge": "yes"}, "huge is"),
        ({"size": PAGE, "backing": "paper"}, "unknown backing"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SparseMemory(**arguments)


def test_a_size_is_rounded_up_to_blocks() -> None:
    with SparseMemory(5 * PAGE, block=4 * PAGE, reservation=9 * PAGE) as memory:
        assert (len(memory), memory.reservation, memory.block) == (8 * PAGE, 12 * PAGE, 4 * PAGE)
        assert memory.range.length == 8 * PAGE


@both
def test_a_reservation_of_a_terabyte_takes_no_memory(unpopulated: Any) -> None:
    before = oracle.mappings()
    with SparseMemory("64 TiB", unpopulated=unpopulated) as memory:
        assert len(memory) == 64 << 40
        assert oracle.mappings() <= before + 2
        memory.populate("63 TiB", "64 KiB")
        memory.write("63 TiB", b"far")
        assert memory.read("63 TiB", 4) == b"far\0"


def test_more_than_the_address_space() -> None:
    with pytest.raises(MappingError, match="address space"):
        SparseMemory("200 TiB")
    with SparseMemory("1 TiB", reservation="2 TiB"):
        pass


def test_a_limit_of_addresses() -> None:
    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_AS, (GIB * 16, GIB * 16))
        with pytest.raises(MappingError) as caught:
            SparseMemory("1 TiB")
        return str(caught.value)

    assert "RLIMIT_AS" in in_child(limited)


def test_shared_anonymous_memory_has_a_descriptor() -> None:
    with SparseMemory(MIB, shared=True) as memory:
        assert memory.fd is not None
        memory.populate()
        assert os.fstat(memory.fd).st_blocks * 512 == MIB
        memory.discard(PAGE, PAGE)
        assert os.fstat(memory.fd).st_blocks * 512 == MIB - PAGE


# --- attaching


@both
def test_attach_by_descriptor(unpopulated: Any) -> None:
    with SparseMemory(16 * PAGE, backing="memfd", unpopulated=unpopulated) as memory:
        assert memory.fd is not None
        memory.populate(PAGE, PAGE)
        memory.write(PAGE, b"hello")
        with SparseMemory(None, backing=Descriptor(memory.fd), unpopulated=unpopulated) as other:
            assert len(other) == len(memory)
            assert other.populated == RangeSet()  # page tables, and so protection, belong to each mapping
            other.populate(PAGE, PAGE)
            assert other.read(PAGE, 5) == b"hello"
            other.discard(PAGE, PAGE)
            assert memory.populated == RangeSet()  # the file lost the page


def test_attach_in_another_process() -> None:
    with SparseMemory(16 * PAGE, backing="memfd", unpopulated="fault") as memory:
        fd = memory.fd
        assert fd is not None

        def attached() -> bool:
            with SparseMemory(16 * PAGE, backing=Descriptor(fd), unpopulated="fault") as other:
                other.populate(3 * PAGE, PAGE)
                other.write(3 * PAGE, b"from the child")
            return True

        assert in_child(attached)
        assert faults(memory, 3 * PAGE)
        memory.populate(3 * PAGE, PAGE)
        assert memory.read(3 * PAGE, 14) == b"from the child"


def test_attach_by_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 3 * PAGE)
    with SparseMemory(None, backing=File(path)) as memory:
        assert len(memory) == 3 * PAGE
        memory.populate()
        memory.write(PAGE, b"b")
    assert path.read_bytes()[PAGE - 1 : PAGE + 2] == b"aba"
    with pytest.raises(MappingError, match="is too short"):
        SparseMemory(4 * PAGE, backing=File(path))
    with pytest.raises(MappingError, match="in whole blocks"):
        SparseMemory(3 * PAGE, backing=File(path), block=2 * PAGE)


def test_an_offset_in_the_file() -> None:
    fd = os.memfd_create("prefault-test")
    try:
        os.ftruncate(fd, 8 * PAGE)
        os.pwrite(fd, b"x" * 8 * PAGE, 0)
        with SparseMemory(4 * PAGE, backing=Descriptor(fd, 2 * PAGE), unpopulated="fault") as memory:
            assert memory.file_offset == 2 * PAGE
            memory.populate(0, 2 * PAGE)
            memory.discard_many([(0, PAGE)])
            memory.discard(PAGE, PAGE)
            assert os.pread(fd, 8 * PAGE, 0) == b"x" * 2 * PAGE + bytes(2 * PAGE) + b"x" * 4 * PAGE
    finally:
        os.close(fd)


# --- bytes


def test_reading_unpopulated_blocks() -> None:
    with SparseMemory(16 * BLOCK, block=BLOCK, unpopulated="fault") as memory:
        memory.populate(BLOCK, 2 * BLOCK)
        for use in (lambda: memory.read(0, 1), lambda: memory.write(PAGE, b"x"), lambda: memory.read(BLOCK - 1, 2)):
            with pytest.raises(NotPopulatedError, match="block of 16384 bytes at offset 0 is not populated"):
                use()
        with pytest.raises(NotPopulatedError) as caught:
            memory.write(2 * BLOCK, b"x" * 2 * BLOCK)
        assert caught.value.offset == 3 * BLOCK
        assert memory.read(2 * BLOCK, BLOCK) == bytes(BLOCK)  # nothing was written
        assert memory.read(3 * BLOCK, 0) == b""
    with SparseMemory(16 * BLOCK, block=BLOCK) as memory:
        assert memory.read(0, 3) == bytes(3)


def test_reading_a_page_without_memory_for_it(small_tmpfs: Callable[[str], Path]) -> None:
    with SparseMemory(64 * PAGE, backing=TemporaryFile(small_tmpfs("64k"))) as memory:
        with pytest.raises(prefault.BackingFullError) as caught:
            memory.write(0, b"x" * 64 * PAGE)
        assert caught.value.offset == 16 * PAGE


def test_bytes_outside() -> None:
    with SparseMemory(4 * PAGE, reservation=8 * PAGE) as memory:
        uses: list[Callable[[], object]] = [
            lambda: memory.read(4 * PAGE, 1),
            lambda: memory.read(-1, 1),
            lambda: memory.write(4 * PAGE - 1, b"xx"),
            lambda: memory.populate(4 * PAGE, 1),
            lambda: memory.populate(0, 5 * PAGE),
            lambda: memory.discard(0, 5 * PAGE),
            lambda: memory.view(5 * PAGE),
            lambda: memory.ndarray(shape=4 * PAGE + 1),
        ]
        for use in uses:
            with pytest.raises((ValueError, TypeError)):
                use()
        assert not memory.populated


# --- views and size


def test_views() -> None:
    memory = SparseMemory(16 * PAGE, backing="memfd")
    view = memory.view(PAGE, 2 * PAGE)
    array = memory.ndarray("uint32", offset=PAGE)
    view[0] = 7
    assert (len(view), array.shape, array[0]) == (2 * PAGE, (15 * PAGE // 4,), 7)
    assert memory.ndarray("S8", (2, 2)).shape == (2, 2)
    for wrong in ("O", "S0"):
        with pytest.raises((ValueError, TypeError)):
            memory.ndarray(wrong)
    with pytest.raises(BufferError, match="a view of the mapping is still alive"):
        memory.close()
    memory.populate()
    del array
    view.release()
    gc.collect()
    memory.close()
    memory.close()


def test_a_forgotten_memory_with_a_live_view_keeps_its_pages() -> None:
    memory = SparseMemory(4 * PAGE)
    memory.populate()
    start, gone = memory.range.start, weakref.ref(memory)
    view = memory.view()
    del memory
    gc.collect()
    assert gone() is None
    view[0] = 1
    assert oracle.present_bytes(start, 4 * PAGE) == 4 * PAGE
    view.release()


@both
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_growing(unpopulated: Any, backing: str) -> None:
    with SparseMemory(4 * PAGE, reservation="1 GiB", backing=backing, unpopulated=unpopulated) as memory:
        view = memory.view()
        memory.populate()
        view[0] = 5
        start = memory.range.start
        assert faults(memory, 4 * PAGE)
        assert faults(memory, GIB - 1)
        memory.resize("64 MiB")
        assert (len(memory), memory.range.start, len(view)) == (64 * MIB, start, 4 * PAGE)
        assert faults(memory, 64 * MIB)
        memory.populate(63 * MIB, MIB)
        memory.write(64 * MIB - 3, b"end")
        assert memory.view()[64 * MIB - 1] == ord("d")
        assert view[0] == 5
        memory.resize("1 GiB")
        memory.populate(GIB - PAGE)
        for wrong, complaint in ((GIB + 1, f"{GIB + 1} bytes are more than the reservation of {GIB}"), (PAGE, "only grows")):
            with pytest.raises(ValueError, match=complaint):
                memory.resize(wrong)
        del view


def test_growing_over_a_file_that_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    with SparseMemory(4 * PAGE, backing=File(path), reservation=8 * PAGE) as memory:
        with pytest.raises(MappingError, match=r"os\.truncate"):
            memory.resize(8 * PAGE)
        assert len(memory) == 4 * PAGE
        os.truncate(path, 8 * PAGE)
        memory.resize(8 * PAGE)
        memory.populate()
        assert len(present_blocks(memory)) == 8


# --- the end


def test_a_closed_memory() -> None:
    memory = SparseMemory(PAGE, backing=Memfd())
    memory.close()
    uses: list[Callable[[], object]] = [
        memory.populate, memory.discard, lambda: memory.populate_many([(0, 1)]), lambda: memory.discard_many([]),
        lambda: memory.populated, lambda: memory.read(0, 1), lambda: memory.write(0, b"x"), memory.view, memory.ndarray,
        lambda: memory.resize(PAGE), lambda: memory.fd, lambda: memory.range, lambda: prefault.populate(memory),
        lambda: memory.file_offset,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match="closed"):
            use()
    assert memory.closed
    assert "closed" in repr(memory)


def test_leaving_with_an_exception_and_a_view() -> None:
    views = []

    def fail() -> None:
        with SparseMemory(PAGE) as memory:
            views.append(memory.view())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    view = views.pop()
    view[0] = 1
    view.release()
    memory = SparseMemory(PAGE)
    view = memory.view()
    with pytest.raises(BufferError), memory:
        pass
    view.release()
    memory.close()


# --- limits


def test_headroom_is_checked(small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("1m")
    with SparseMemory(4 * MIB, backing=TemporaryFile(directory), unpopulated="fault") as memory:
        with pytest.raises(HeadroomError):
            memory.populate()
        with pytest.raises(HeadroomError):
            memory.populate_many([(at, PAGE) for at in range(0, 4 * MIB, 2 * PAGE)])
        assert not memory.populated
        memory.populate(0, MIB)
        with pytest.raises(prefault.BackingFullError):
            memory.populate_many([(2 * MIB, PAGE), (3 * MIB, PAGE)], headroom="ignore")
        with pytest.raises(ValueError, match="'check' or 'ignore'"):
            memory.populate_many([(0, 1)], headroom="maybe")  # type: ignore[arg-type]


# --- memory really returns


def test_a_scratch_file_on_a_disk_gives_its_blocks_back(tmp_path: Path) -> None:
    with SparseMemory(64 * PAGE, backing=TemporaryFile(tmp_path), unpopulated="fault") as memory:
        assert memory.fd is not None
        ways: list[Callable[[], object]] = [
            memory.discard,
            lambda: memory.discard_many([(0, 32 * PAGE), (32 * PAGE, 32 * PAGE)]),
        ]
        for discard in ways:
            memory.populate()
            memory.write(0, b"x" * 64 * PAGE)
            os.fsync(memory.fd)
            assert os.fstat(memory.fd).st_blocks * 512 >= 64 * PAGE
            discard()
            assert os.fstat(memory.fd).st_blocks * 512 < 8 * PAGE
        memory.populate()
        assert memory.read(0, 64 * PAGE) == bytes(64 * PAGE)


@both
def test_resident_memory_returns(unpopulated: Any) -> None:
    def resident() -> int:
        return status_kib("VmRSS") * 1024

    with SparseMemory("1 GiB", unpopulated=unpopulated, huge="never") as memory:
        before = resident()
        memory.populate(512 * MIB, 64 * MIB)
        assert resident() > before + 60 * MIB
        memory.discard(512 * MIB, 64 * MIB)
        assert resident() < before + 4 * MIB
        memory.populate_many([(at * 2 * MIB, MIB) for at in range(64)])
        assert resident() > before + 60 * MIB
        memory.discard_many([(at * 2 * MIB, MIB) for at in range(64)])
        assert resident() < before + 4 * MIB


def test_protected_blocks_through_a_view() -> None:
    with SparseMemory(64 * PAGE, unpopulated="fault") as memory:
        memory.populate(0, PAGE)
        memory.populate(2 * PAGE, PAGE)
        with memory.view() as view:
            with pytest.raises(prefault.GuardPageError):
                prefault.populate(view[: 3 * PAGE])
            with pytest.raises(prefault.ProtectionError):
                prefault.populate(view[2 * PAGE :])
        assert present_blocks(memory) == [0, 2]


def test_blocks_and_huge_pages_fit_each_other() -> None:
    """A huge page in the place of a smaller block would bring in, and keep, memory that the caller did not ask for."""
    with pytest.raises(ValueError, match="a multiple of 2097152 bytes, not 65536 bytes"):
        SparseMemory(GIB, block="64 KiB", huge="advise")
    with SparseMemory(3 * MIB, huge="advise") as memory:
        assert (memory.block, len(memory)) == (2 * MIB, 4 * MIB)
        assert "hg" in oracle.vma_flags(memory.range.start)
    with SparseMemory(GIB, block="64 KiB") as memory:
        assert "nh" in oracle.vma_flags(memory.range.start)
    with SparseMemory(GIB, block="4 MiB") as memory:
        assert not {"nh", "hg"} & oracle.vma_flags(memory.range.start)


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_the_plan_of_protected_memory_is_what_populate_will_do(backing: str) -> None:
    with SparseMemory(4 * MIB, backing=backing, unpopulated="fault") as memory:
        planned = prefault.plan(memory)
        assert (planned.method, planned.access) == (memory.populate().method, "write")


def test_two_owners_of_one_mapping_are_refused() -> None:
    with SparseMemory(PAGE) as memory:
        for twice in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="SparseMemory cannot be copied or pickled"):
                twice(memory)


def test_a_block_that_was_protected_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discarded before the bytes are read, and populated again before anybody asks why they could not be."""

    def too_late(*_: int) -> int:
        raise OSError(errno.EFAULT, "injected: another thread has discarded the block, and populates it again")

    monkeypatch.setattr(sys.modules["prefault._kernel.uio"], "process_vm_readv", too_late)
    with SparseMemory(4 * PAGE, unpopulated="fault") as memory:
        memory.populate()
        with pytest.raises(NotPopulatedError, match="at offset 4096 is not populated"):
            memory.read(PAGE, 8)


@pytest.mark.parametrize("shape", [513, (2, 300), 1 << 40])
def test_an_array_larger_than_the_memory(shape: int | tuple[int, ...]) -> None:
    with SparseMemory(2 * PAGE) as memory:
        assert memory.ndarray("float64", (2, 256), offset=PAGE).shape == (2, 256)
        assert memory.ndarray("float64", ()).shape == ()
        assert memory.ndarray("float64", numpy.int64(512)).shape == (512,)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="and 4096 are there from the offset on"):
            memory.ndarray("float64", shape, offset=PAGE)
