"""discard: the bytes afterwards, the memory that is really given back, and everything that must stay as it is."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefault
from prefault import PAGE_SIZE, DiscardError, Mapping
from prefault._kernel import mman
from prefault._kernel._call import declare_syscall
from prefault._system import capabilities, hugetlb
from prefault.testing import without
from support import needs, oracle
from support.children import in_child
from support.regions import READ, WRITE, Region, Span, file_of, special

_HUGE = needs.HUGE
_PAGES = 16
_memfd_secret = declare_syscall(447, ctypes.c_uint)


class _Case(NamedTuple):
    """Memory that is full of ``b"m"``, over a file full of ``b"f"`` where it has one."""

    region: Region
    fd: int | None
    after: bytes
    """What a page holds when it is discarded."""


_CASES = (
    "private anonymous", "shared anonymous", "private memfd", "shared memfd", "private tmpfs", "shared tmpfs",
    "private disk", "shared disk",
)  # fmt: skip


@contextmanager
def _case(name: str, directory: Path, pages: int = _PAGES) -> Iterator[_Case]:
    sharing, kind = name.split()
    with ExitStack() as stack:
        fd: int | None = None
        if kind == "memfd":
            fd = os.memfd_create("prefault-test")
            stack.callback(os.close, fd)
        elif kind != "anonymous":
            fd, _ = stack.enter_context(file_of("/dev/shm" if kind == "tmpfs" else directory, 0))
        if fd is not None:
            os.pwrite(fd, b"f" * pages * PAGE_SIZE, 0)
        region = stack.enter_context(Region(pages, fd=-1 if fd is None else fd, shared=sharing == "shared"))
        region.fill(0, b"m" * pages * PAGE_SIZE)
        keeps = name == "shared disk"
        after = b"m" if keeps else b"f" if sharing == "private" and fd is not None else b"\0"
        yield _Case(region, fd, after * PAGE_SIZE)


def _page_bytes(region: Region) -> list[bytes]:
    return [region.read(page, 1) for page in range(region.length // PAGE_SIZE)]


# --- the bytes afterwards


@pytest.mark.parametrize("name", _CASES)
def test_what_is_read_afterwards(tmp_path: Path, name: str) -> None:
    with _case(name, tmp_path) as case:
        result = prefault.discard(case.region, offset=4 * PAGE_SIZE, length=3 * PAGE_SIZE)
        assert result.bytes == result.freed_bytes == 3 * PAGE_SIZE
        assert oracle.present(case.region.address, case.region.length) == [not 4 <= page < 7 for page in range(_PAGES)]
        assert _page_bytes(case.region) == [
            case.after if 4 <= page < 7 else b"m" * PAGE_SIZE for page in range(_PAGES)
        ]  # fmt: skip
        if case.fd is not None and name.startswith("private"):
            assert os.pread(case.fd, _PAGES * PAGE_SIZE, 0) == b"f" * _PAGES * PAGE_SIZE
        case.region.fill(5, b"again")
        assert case.region.read(5, 1).startswith(b"again")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(("private anonymous", "shared anonymous", "shared memfd", "private memfd")),
    st.lists(st.tuples(st.integers(0, _PAGES * PAGE_SIZE), st.integers(0, _PAGES * PAGE_SIZE)), min_size=1, max_size=4),
)
def test_no_neighbour_loses_a_byte(name: str, cuts: list[tuple[int, int]]) -> None:
    with _case(name, Path("/dev/shm")) as case:
        model = bytearray(b"m" * _PAGES * PAGE_SIZE)
        for a, b in cuts:
            offset, stop = min(a, b), max(a, b)
            result = prefault.discard(case.region, offset=offset, length=stop - offset)
            whole = [page for page in range(_PAGES) if offset <= page * PAGE_SIZE and (page + 1) * PAGE_SIZE <= stop]
            for page in whole:
                model[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = case.after
            assert result.bytes == len(whole) * PAGE_SIZE
            assert case.region.read(0, _PAGES) == bytes(model)
            if not whole:
                assert str(result) == "nothing to discard: no whole page lies in the range"


def test_an_array_that_is_not_page_aligned() -> None:
    owner = bytearray(b"o" * 10 * PAGE_SIZE)
    part = numpy.frombuffer(owner, "u1")[100 : 7 * PAGE_SIZE + 200]
    shift = -part.ctypes.data % PAGE_SIZE
    result = prefault.discard(part)
    last = shift + result.bytes
    assert result.bytes in (6 * PAGE_SIZE, 7 * PAGE_SIZE)
    assert (part[:shift] == ord("o")).all()
    assert (part[shift:last] == 0).all()
    assert (part[last:] == ord("o")).all()
    assert owner[:100] == b"o" * 100
    assert owner[7 * PAGE_SIZE + 200 :] == b"o" * (3 * PAGE_SIZE - 200)


# --- the memory is given back


@pytest.mark.parametrize("name", _CASES)
def test_resident_memory_goes_down(tmp_path: Path, name: str) -> None:
    with _case(name, tmp_path, 64) as case:
        assert oracle.smaps(case.region.address)["Rss"] == 64 * PAGE_SIZE
        prefault.discard(case.region, length=48 * PAGE_SIZE)
        assert oracle.smaps(case.region.address)["Rss"] == 16 * PAGE_SIZE


def test_a_memfd_gives_its_memory_back() -> None:
    with Mapping("4 MiB", backing="memfd") as mapping:
        assert mapping.fd is not None
        prefault.populate(mapping)
        assert os.fstat(mapping.fd).st_blocks * 512 == 4 << 20
        assert prefault.discard(mapping, offset="1 MiB").method == "FALLOC_FL_PUNCH_HOLE"
        assert os.fstat(mapping.fd).st_blocks * 512 == 1 << 20
        assert os.fstat(mapping.fd).st_size == 4 << 20


def test_a_memfd_without_its_descriptor_does_too() -> None:
    with _case("shared memfd", Path("/dev/shm")) as case:
        assert case.fd is not None
        assert prefault.discard(case.region, length=10 * PAGE_SIZE).method == "MADV_REMOVE"
        assert os.fstat(case.fd).st_blocks * 512 == 6 * PAGE_SIZE


def test_a_tmpfs_gets_its_space_back(small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("1m")
    with Mapping("1 MiB", backing=prefault.TemporaryFile(directory)) as mapping:
        prefault.populate(mapping)
        assert os.statvfs(directory).f_bavail == 0
        prefault.discard(mapping, length="512 KiB")
        assert os.statvfs(directory).f_bavail * PAGE_SIZE == 512 << 10


@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("own", [True, False], ids=["mapping", "buffer"])
def test_huge_pages_go_back_to_the_pool(hugetlb_pool: Callable[[int], None], backing: str, shared: bool, own: bool) -> None:
    hugetlb_pool(4)
    with Mapping("6 MiB", backing=backing, shared=shared) as mapping:
        mapping.ndarray()[:] = 7
        free = hugetlb.read_pool(_HUGE).free
        memory: object = mapping if own else Span(mapping.range.start, len(mapping))
        assert prefault.discard(memory, offset=PAGE_SIZE, length="1 MiB").bytes == 0
        assert prefault.discard(memory, offset=1, length=2 * _HUGE - 2).bytes == 0  # two pages, neither of them whole
        assert mapping.memoryview().tobytes() == b"\7" * len(mapping)
        result = prefault.discard(memory, offset="1 MiB", length="4 MiB")  # one whole page inside
        assert result.bytes == result.freed_bytes == _HUGE
        assert hugetlb.read_pool(_HUGE).free == free + 1
        view = mapping.memoryview()
        assert view[:_HUGE].tobytes() + view[2 * _HUGE :].tobytes() == b"\7" * 2 * _HUGE
        assert view[_HUGE : 2 * _HUGE].tobytes() == bytes(_HUGE)
        del view


def test_a_shared_page_is_taken_from_every_process() -> None:
    with Region(2, shared=True) as region:
        region.fill(0, b"shared")
        in_child(lambda: prefault.discard(region).bytes)
        assert region.read(0, 2) == bytes(2 * PAGE_SIZE)


def test_a_private_page_only_from_this_one() -> None:
    with Region(2) as region:
        region.fill(0, b"mine")
        assert in_child(lambda: (prefault.discard(region).bytes, region.read(0, 1)[:4])) == (2 * PAGE_SIZE, bytes(4))
        assert region.read(0, 1)[:4] == b"mine"


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_a_file_on_a_disk_never_changes(tmp_path: Path, sharing: str) -> None:
    with _case(f"{sharing} disk", tmp_path) as case:
        assert case.fd is not None
        expected = (b"m" if sharing == "shared" else b"f") * _PAGES * PAGE_SIZE
        os.fsync(case.fd)
        before = os.fstat(case.fd)
        result = prefault.discard(case.region)
        os.fsync(case.fd)
        after = os.fstat(case.fd)
        assert os.pread(case.fd, _PAGES * PAGE_SIZE, 0) == expected
        assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
        assert result.method == "MADV_DONTNEED"
        assert bool(result.notes) == (sharing == "shared")
    path = tmp_path / "file"
    path.write_bytes(b"f" * 4 * PAGE_SIZE)
    for shared in (True, False):
        with Mapping(backing=prefault.File(path), shared=shared) as mapping:  # with a descriptor that is open for writing
            prefault.discard(mapping)
            assert path.read_bytes() == b"f" * 4 * PAGE_SIZE


def test_many_chunks() -> None:
    with Mapping("200 MiB", noreserve=True) as mapping:
        for offset in range(0, len(mapping), 20 << 20):
            mapping.ndarray()[offset] = 1
        assert prefault.discard(mapping).bytes == len(mapping)
        assert not any(oracle.present(mapping.range.start, len(mapping)))


# --- what the result says


def test_the_result() -> None:
    with Mapping(8 * PAGE_SIZE, huge="never") as mapping:
        prefault.populate(mapping, length=2 * PAGE_SIZE, access="read")
        prefault.populate(mapping, offset=2 * PAGE_SIZE, length=3 * PAGE_SIZE)
        result = prefault.discard(mapping)
        assert (result.bytes, result.freed_bytes, result.method) == (8 * PAGE_SIZE, 3 * PAGE_SIZE, "MADV_DONTNEED")
        assert result.seconds > 0
        assert str(result).startswith("32.0 KiB discarded in ")
        assert str(result).endswith("(MADV_DONTNEED, 12.0 KiB of it were allocated)")
        assert prefault.discard(mapping).freed_bytes == 0
        with without("pagemap_scan"):
            result = prefault.discard(mapping)
            assert result.freed_bytes is None
            assert str(result).endswith("(MADV_DONTNEED)")


def test_nothing_to_discard() -> None:
    for nothing in (bytearray(), bytearray(10), numpy.zeros((0, 5))):
        result = prefault.discard(nothing)
        assert (result.bytes, result.freed_bytes, result.method) == (0, 0, "none")


# --- what is refused


@pytest.mark.parametrize("name", ["private anonymous", "shared anonymous", "shared memfd", "shared tmpfs", "private disk"])
def test_a_read_only_buffer(tmp_path: Path, name: str) -> None:
    # The memory is writable: it is the buffer that promises not to change it.
    with _case(name, tmp_path) as case:
        readonly = Span(case.region.address, case.region.length, readonly=True)
        with pytest.raises(ValueError, match="the buffer is read-only: its owner does not expect its bytes to change"):
            prefault.discard(readonly)
        assert case.region.read(0, _PAGES) == b"m" * _PAGES * PAGE_SIZE


def test_read_only_objects() -> None:
    for readonly in (bytes(4 * PAGE_SIZE), memoryview(bytearray(4 * PAGE_SIZE)).toreadonly()):
        with pytest.raises(ValueError, match="the buffer is read-only"):
            prefault.discard(readonly)


@pytest.mark.parametrize("name", ["shared anonymous", "shared memfd", "shared tmpfs"])
def test_a_read_only_mapping_of_memory_files(tmp_path: Path, name: str) -> None:
    with _case(name, tmp_path) as case:
        case.region.protect(0, _PAGES, READ)
        with pytest.raises(ValueError, match=r"the mapping is read-only: discarding .* would take its bytes from all"):
            prefault.discard(case.region)
        assert case.region.read(0, _PAGES) == b"m" * _PAGES * PAGE_SIZE


@pytest.mark.parametrize("shared", [False, True])
def test_a_read_only_mapping_of_a_disk_file_loses_nothing(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"f" * 4 * PAGE_SIZE)
    with Mapping(backing=prefault.File(path), writable=False, shared=shared) as mapping:
        prefault.populate(mapping)
        assert prefault.discard(mapping).bytes == 4 * PAGE_SIZE
        assert not any(oracle.present(mapping.range.start, len(mapping)))
        assert mapping.memoryview().tobytes() == b"f" * 4 * PAGE_SIZE


def test_an_array_with_gaps() -> None:
    owner = numpy.full((8, 2 * PAGE_SIZE), 5, "u1")
    for view in (owner[::2], owner[:, :PAGE_SIZE], owner[:, ::3]):
        with pytest.raises(ValueError, match="not contiguous: discarding the pages it spans would lose bytes between"):
            prefault.discard(view)
    assert (owner == 5).all()
    assert prefault.discard(owner[::-1]).bytes >= 15 * PAGE_SIZE  # backwards, but without a gap


def test_everything_is_looked_at_before_anything_is_discarded() -> None:
    with Region(8, shared=True) as region:
        region.fill(0, b"m" * 8 * PAGE_SIZE)
        region.protect(5, 1, READ)
        with pytest.raises(ValueError, match="the mapping is read-only"):
            prefault.discard(region)
        assert region.read(0, 8) == b"m" * 8 * PAGE_SIZE


def test_special_mappings() -> None:
    mapped = special("[vvar]")
    if mapped is None:
        needs.missing("this process has no [vvar]")
    with pytest.raises(DiscardError, match=r"\[vvar\]") as caught:
        prefault.discard(mapped)
    assert (caught.value.errno, caught.value.address) == (errno.EINVAL, mapped.address)


def test_secret_memory_is_not_given_back() -> None:
    # MADV_DONTNEED_LOCKED would succeed on it, and give nothing back.
    fd = _memfd_secret(0)
    if fd < 0:
        needs.missing("memfd_secret(2) is not available (Linux 5.14)")
    try:
        os.ftruncate(fd, PAGE_SIZE)
        with Region(1, READ | WRITE, fd=fd, shared=True) as region:
            region.fill(0, b"secret")
            with pytest.raises(DiscardError, match=r"/secretmem.*only its driver can take it back") as caught:
                prefault.discard(region)
            assert caught.value.errno == errno.EINVAL
            assert region.read(0, 1).startswith(b"secret")
    finally:
        os.close(fd)


# --- locked memory


@pytest.mark.parametrize("flags", [0, mman.MLOCK_ONFAULT])
def test_locked_private_memory(flags: int) -> None:
    needs.capability(capabilities.DONTNEED_LOCKED)
    with Region(4) as region:
        region.fill(0, b"m" * 4 * PAGE_SIZE)
        mman.mlock2(region.address, region.length, flags)
        assert prefault.discard(region, length=2 * PAGE_SIZE).method == "MADV_DONTNEED_LOCKED"
        assert oracle.present(region.address, region.length) == [False, False, True, True]
        assert region.read(0, 2) == bytes(2 * PAGE_SIZE)
        with without("madv_dontneed_locked"), pytest.raises(DiscardError, match="the memory is locked: munlock it first"):
            prefault.discard(region, offset=2 * PAGE_SIZE)
        assert region.read(2, 2) == b"m" * 2 * PAGE_SIZE


@pytest.mark.parametrize("name", ["shared anonymous", "shared memfd", "shared tmpfs"])
def test_locked_shared_memory_without_a_descriptor(tmp_path: Path, name: str) -> None:
    with _case(name, tmp_path) as case:
        mman.mlock2(case.region.address, case.region.length)
        with pytest.raises(DiscardError, match="the memory is locked: munlock it first") as caught:
            prefault.discard(case.region, offset=PAGE_SIZE)
        assert (caught.value.errno, caught.value.address) == (errno.EINVAL, case.region.page(1))
        assert case.region.read(0, _PAGES) == b"m" * _PAGES * PAGE_SIZE
        mman.munlock(case.region.address, case.region.length)
        assert prefault.discard(case.region).bytes == _PAGES * PAGE_SIZE


@pytest.mark.parametrize("backing", ["memfd", "tmpfs"])
def test_locked_shared_memory_with_its_descriptor(backing: str) -> None:
    with Mapping(4 * PAGE_SIZE, backing=backing) as mapping:
        mapping.memoryview()[:] = b"m" * len(mapping)
        mman.mlock2(mapping.range.start, len(mapping))
        assert prefault.discard(mapping).bytes == len(mapping)
        assert mapping.memoryview().tobytes() == bytes(len(mapping))


# --- more than one mapping under the range


def test_a_hole_in_the_middle() -> None:
    with Region(9) as region:
        region.fill(0, b"m" * 9 * PAGE_SIZE)
        region.punch(3, 2)
        result = prefault.discard(region, offset=PAGE_SIZE, length=7 * PAGE_SIZE)
        assert result.bytes == 5 * PAGE_SIZE
        assert region.read(0, 3) == b"m" * PAGE_SIZE + bytes(2 * PAGE_SIZE)
        assert region.read(5, 4) == bytes(3 * PAGE_SIZE) + b"m" * PAGE_SIZE
        region.punch(5, 4)
        assert prefault.discard(region.part(3, 6)).bytes == 0


def test_neighbours_of_different_kinds(tmp_path: Path) -> None:
    with Region(8) as region, file_of(tmp_path, 2 * PAGE_SIZE) as (fd, _):
        os.pwrite(fd, b"f" * 2 * PAGE_SIZE, 0)
        fixed = mman.MAP_FIXED | mman.MAP_SHARED
        mman.mmap(region.page(2), 2 * PAGE_SIZE, READ | WRITE, fixed | mman.MAP_ANONYMOUS)
        mman.mmap(region.page(4), 2 * PAGE_SIZE, READ | WRITE, fixed, fd)
        region.fill(0, b"m" * 4 * PAGE_SIZE)
        region.fill(6, b"m" * 2 * PAGE_SIZE)
        result = prefault.discard(region)
        assert result.bytes == 8 * PAGE_SIZE
        assert result.method == "MADV_DONTNEED, MADV_REMOVE"
        assert region.read(0, 8) == bytes(4 * PAGE_SIZE) + b"f" * 2 * PAGE_SIZE + bytes(2 * PAGE_SIZE)


def test_an_offset_into_the_file(tmp_path: Path) -> None:
    # The hole must be punched where the mapping shows it, not at the start of the file.
    path = Path("/dev/shm") / f"prefault-test-{os.getpid()}"
    try:
        path.write_bytes(b"f" * 8 * PAGE_SIZE)
        with Mapping(4 * PAGE_SIZE, backing=prefault.File(path, 3 * PAGE_SIZE)) as mapping:
            prefault.discard(mapping, offset=PAGE_SIZE, length=2 * PAGE_SIZE)
        expected = b"f" * 4 * PAGE_SIZE + bytes(2 * PAGE_SIZE) + b"f" * 2 * PAGE_SIZE
        assert path.read_bytes() == expected
    finally:
        path.unlink()


def test_a_mmap_of_python() -> None:
    with mmap.mmap(-1, 4 * PAGE_SIZE) as memory:  # shared anonymous
        memory[:] = b"m" * 4 * PAGE_SIZE
        assert prefault.discard(memory, offset=PAGE_SIZE).bytes == 3 * PAGE_SIZE
        assert memory[:] == b"m" * PAGE_SIZE + bytes(3 * PAGE_SIZE)


def test_private_copies_that_became_read_only_are_not_lost(tmp_path: Path) -> None:
    """Like the relocated data of a program: written, then protected."""
    path = tmp_path / "data"
    path.write_bytes(b"A" * 4 * PAGE_SIZE)
    with prefault.Mapping(backing=prefault.File(path), shared=False) as mapping:
        start = mapping.range.start
        mapping.memoryview()[:4] = b"MINE"
        mman.mprotect(start, 4 * PAGE_SIZE, mman.PROT_READ)
        with pytest.raises(ValueError, match="read-only"):
            prefault.discard(Span(start, 4 * PAGE_SIZE, readonly=True))
        assert bytes(mapping.memoryview()[:4]) == b"MINE"
        assert prefault.discard(Span(start + PAGE_SIZE, 3 * PAGE_SIZE, readonly=True)).bytes == 3 * PAGE_SIZE


def test_a_hole_in_the_range_is_named() -> None:
    with Region(8) as region:
        mman.munmap(region.page(2), 2 * PAGE_SIZE)
        result = prefault.discard(region)
        assert result.bytes == 6 * PAGE_SIZE
        assert "not mapped" in str(result)
