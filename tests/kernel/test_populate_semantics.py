"""madvise(2)'s table of populating, row by row, through prefault.populate on the real kernel.

Each row says the class of the error, its errno, the first page that failed, what the call says it brought in, and what is
there afterwards by pagemap, which these tests read themselves. Every test runs twice: with MADV_POPULATE_*, and without it
on the fallbacks process_vm_readv (read) and futex_add (write).

What the fallbacks truly cannot do, each asserted below where it differs:

- *Poisoned page*: both see EFAULT where madvise says EHWPOISON, so it is a plain PopulateError (test_poisoned_page).
- *memfd_secret*: futex_add faults it in as a program would, where madvise refuses (test_secret_memory_for_writing).
- *userfaultfd with a handler*: futex_add cannot wait for one and gets EFAULT (test_userfaultfd_with_a_handler).
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import (
    BackingFullError,
    BeyondEndError,
    GuardPageError,
    HoleError,
    PoisonedPageError,
    PopulateError,
    ProtectionError,
    SpecialMappingError,
)
from prefault._kernel import mman
from prefault._kernel._call import INT, UINT, declare, declare_syscall
from prefault._system import capabilities
from prefault.engine.methods import Access
from support import needs, oracle, userfaultfd
from support.children import Child, in_child
from support.populate_modes import PopulateMode
from support.populating import assert_fails, assert_populated
from support.regions import EXEC, PAGE, READ, WRITE, Region, Span, file_of, special

HUGE = 2 << 20
PAGES = 8
EACH_ACCESS: tuple[Access, ...] = ("read", "write")

pytestmark = pytest.mark.usefixtures("way")
each_access = pytest.mark.parametrize("access", EACH_ACCESS)

# --- permissions ------------------------------------------------------------------------------------------------------


@each_access
@pytest.mark.parametrize("prot", [mman.PROT_NONE, EXEC], ids=["none", "exec"])
def test_neither_readable_nor_writable(access: Access, prot: int) -> None:
    with Region(PAGES, prot) as region:
        assert_fails(region, ProtectionError, errno.EINVAL, page=0, access=access)


def test_only_readable() -> None:
    with Region(PAGES, READ) as region:
        assert_populated(region, "read")
        mman.madvise(region.address, region.length, mman.MADV_DONTNEED)
        assert_fails(region, ProtectionError, errno.EINVAL, page=0, access="write")


def test_only_writable() -> None:
    with Region(PAGES, WRITE) as region:
        assert_fails(region, ProtectionError, errno.EINVAL, page=0, access="read")
        assert_populated(region, "write")


@each_access
def test_hole_in_the_middle(access: Access) -> None:
    with Region(PAGES) as region:
        region.punch(5, 1)
        assert_fails(region, HoleError, errno.ENOMEM, page=5, access=access)


@each_access
def test_hole_at_the_start(access: Access) -> None:
    with Region(PAGES) as region:
        region.punch(0, 2)
        assert_fails(region, HoleError, errno.ENOMEM, page=0, access=access)


@each_access
@pytest.mark.parametrize("address", [0, 1 << 62, 0xFFFF_8000_0000_0000, (1 << 64) - 2 * PAGE], ids=hex)
def test_addresses_that_no_process_has(access: Access, address: int) -> None:
    """The null page, which may not be mapped, and beyond the end of user space."""
    with pytest.raises(HoleError) as caught:
        prefault.populate(Span(address, PAGE), access=access)
    error = caught.value
    assert (error.errno, error.address, error.offset, error.populated_bytes) == (errno.ENOMEM, address, 0, 0)


@each_access
def test_forbidden_part_in_the_middle(access: Access) -> None:
    with Region(PAGES) as region:
        region.protect(3, 2, mman.PROT_NONE)
        assert_fails(region, ProtectionError, errno.EINVAL, page=3, access=access)


def test_read_only_part_in_the_middle() -> None:
    with Region(PAGES) as region:
        region.protect(3, 2, READ)
        assert_fails(region, ProtectionError, errno.EINVAL, page=3, access="write")
        assert_populated(region, "read")
        # Without being told, each part gets what it can have.
        mman.madvise(region.address, region.length, mman.MADV_DONTNEED)
        assert_populated(region)
        allocated = [oracle.smaps(region.page(index))["Anonymous"] for index in (0, 3, 5)]
        assert allocated == [3 * PAGE, 0, 3 * PAGE]


def test_what_was_there_before_is_not_counted() -> None:
    with Region(PAGES) as region:
        region.fill(0, b"x")
        region.fill(3, b"x")
        region.punch(6, 1)
        assert_fails(region, HoleError, errno.ENOMEM, page=6, access="write", before=(0, 3))
        region.fill(7, b"x")
        assert prefault.populate(region.part(0, 6)).bytes == 0
        assert prefault.populate(region.part(7, 1)).present_bytes == PAGE


# --- alignment and length ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advice", [mman.MADV_POPULATE_READ, mman.MADV_POPULATE_WRITE], ids=["read", "write"])
def test_the_kernels_own_rules_of_alignment(advice: int) -> None:
    needs.capability(capabilities.MADV_POPULATE)
    with Region(PAGES) as region:
        for address, length in ((region.address + 1, PAGE), (region.address, -PAGE), (region.address, -1)):
            with pytest.raises(OSError, match="madvise") as caught:
                mman.madvise(address, length, advice)
            assert caught.value.errno == errno.EINVAL
        mman.madvise(region.address, 0, advice)
        assert oracle.present_bytes(region.address, region.length) == 0
        mman.madvise(region.address, 1, advice)
        assert oracle.present(region.address, region.length) == [True] + [False] * (PAGES - 1)


@each_access
@pytest.mark.parametrize(
    ("offset", "length", "pages"),
    [
        (0, 1, [0]),
        (PAGE - 1, 2, [0, 1]),
        (PAGE + 1, 1, [1]),
        (2 * PAGE - 1, PAGE + 2, [1, 2, 3]),
        (PAGE, PAGE, [1]),
        (7, 0, []),
    ],
)
def test_populate_rounds_outward(access: Access, offset: int, length: int, pages: list[int]) -> None:
    with Region(PAGES) as region:
        result = prefault.populate(region, access=access, offset=offset, length=length)
        assert result.bytes == len(pages) * PAGE
        there = oracle.present(region.address, region.length)
        assert [index for index, present in enumerate(there) if present] == pages


def test_offset_of_the_failing_page_counts_from_the_buffer_not_from_the_page() -> None:
    with Region(PAGES) as region:
        region.punch(2, 1)
        with pytest.raises(HoleError) as caught:
            prefault.populate(Span(region.address + 100, 3 * PAGE))
        assert (caught.value.address, caught.value.offset) == (region.page(2), 2 * PAGE - 100)
        # A buffer that starts inside the page that fails: the page starts before it.
        with pytest.raises(HoleError) as caught:
            prefault.populate(Span(region.page(2) + 100, 10))
        assert (caught.value.address, caught.value.offset) == (region.page(2), -100)


# --- files and their ends ---------------------------------------------------------------------------------------------


def truncated(fd: int, pages: int) -> int:
    """Cut a file in the middle of a page; the number of pages that still hold a byte."""
    os.ftruncate(fd, pages * PAGE - 100)
    return pages


@each_access
@pytest.mark.parametrize("kind", ["memfd", "tmpfs", "disk"])
def test_beyond_the_end_of_a_mapped_file(access: Access, kind: str, disk: Path) -> None:
    """A Mapping whose file became shorter. The last page, of which the file holds only a part, is populated."""
    backing = "memfd" if kind == "memfd" else prefault.TemporaryFile("/dev/shm" if kind == "tmpfs" else disk)
    with prefault.Mapping(PAGES * PAGE, backing=backing) as mapping:
        assert mapping.fd is not None
        left = truncated(mapping.fd, 5)
        with pytest.raises(BeyondEndError) as caught:
            prefault.populate(mapping, access=access)
        error = caught.value
        assert (error.errno, error.offset, error.populated_bytes) == (errno.EFAULT, left * PAGE, left * PAGE)
        assert oracle.present(mapping.range.start, PAGES * PAGE) == [True] * left + [False] * (PAGES - left)
        assert os.fstat(mapping.fd).st_size == left * PAGE - 100


@each_access
@pytest.mark.parametrize("kind", ["memfd", "tmpfs", "disk"])
def test_beyond_the_end_of_a_file_that_others_mapped(access: Access, kind: str, disk: Path) -> None:
    """mmap.mmap, of which no descriptor is known."""
    if kind == "memfd":
        fd = os.memfd_create("prefault-test")
        os.ftruncate(fd, PAGES * PAGE)
        _beyond_the_end(fd, access)
        os.close(fd)
    else:
        with file_of("/dev/shm" if kind == "tmpfs" else disk, PAGES * PAGE) as (fd, _):
            _beyond_the_end(fd, access)


def _beyond_the_end(fd: int, access: Access) -> None:
    import numpy

    with mmap.mmap(fd, PAGES * PAGE) as memory:
        span = Span(numpy.frombuffer(memory, numpy.uint8).ctypes.data, PAGES * PAGE)
        left = truncated(fd, 3)
        assert_fails(span, BeyondEndError, errno.EFAULT, page=left, access=access)


@each_access
def test_beyond_the_end_of_a_private_file_mapping(access: Access, disk: Path) -> None:
    with file_of(disk, PAGES * PAGE) as (fd, _), Region(PAGES, fd=fd) as region:
        left = truncated(fd, 3)
        assert_fails(region, BeyondEndError, errno.EFAULT, page=left, access=access)


@each_access
def test_beyond_the_end_of_a_huge_page_file(access: Access, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with prefault.Mapping(2 * HUGE, backing=prefault.Memfd(page_size=HUGE)) as mapping:
        assert mapping.fd is not None
        os.ftruncate(mapping.fd, HUGE)
        with pytest.raises(BeyondEndError) as caught:
            prefault.populate(mapping, access=access)
        error = caught.value
        assert (error.errno, error.offset, error.populated_bytes) == (errno.EFAULT, HUGE, HUGE)
        assert oracle.present_bytes(mapping.range.start, 2 * HUGE) == HUGE


# --- backing memory that runs out -------------------------------------------------------------------------------------


@each_access
def test_tmpfs_full(access: Access, small_tmpfs: Callable[[str], Path]) -> None:
    """A read allocates too: a hole of shared memory has no zero page."""
    directory = small_tmpfs("16k")
    with file_of(directory, PAGES * PAGE) as (fd, _):
        with Region(PAGES, fd=fd, shared=True) as region:
            assert_fails(region, BackingFullError, errno.EFAULT, page=4, access=access)
        assert os.fstat(fd).st_blocks * 512 == 4 * PAGE
        with pytest.raises(OSError, match="No space left") as caught:
            os.posix_fallocate(fd, 0, PAGES * PAGE)
        assert caught.value.errno == errno.ENOSPC


def test_tmpfs_full_with_a_descriptor(small_tmpfs: Callable[[str], Path]) -> None:
    """fallocate says it first, and undoes its own part; what could be had stays."""
    directory = small_tmpfs("16k")
    with prefault.Mapping(PAGES * PAGE, backing=prefault.TemporaryFile(directory)) as mapping:
        assert prefault.plan(mapping).method.startswith("fallocate+")
        with pytest.raises(BackingFullError, match=r"16\.0 KiB") as caught:
            prefault.populate(mapping, headroom="ignore")
        error = caught.value
        assert (error.errno, error.offset, error.populated_bytes) == (errno.ENOSPC, 4 * PAGE, 4 * PAGE)
        assert oracle.present(mapping.range.start, PAGES * PAGE) == [True] * 4 + [False] * 4


def test_map_populate_hides_a_full_tmpfs(small_tmpfs: Callable[[str], Path]) -> None:
    """Why populate does not use it."""
    flags = mman.MAP_POPULATE
    with file_of(small_tmpfs("16k"), PAGES * PAGE) as (fd, _), Region(PAGES, fd=fd, shared=True, flags=flags) as region:
        assert oracle.present(region.address, region.length) == [True] * 4 + [False] * 4


@each_access
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_hugetlb_pool_empty(access: Access, shared: bool, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with prefault.Mapping(4 * HUGE, backing="hugetlb", shared=shared, noreserve=True) as mapping:
        with pytest.raises(BackingFullError, match=r"hugetlb pool of 2\.0 MiB pages leaves 0 bytes of 4\.0 MiB") as caught:
            prefault.populate(mapping, access=access, headroom="ignore")
        error = caught.value
        assert (error.errno, error.offset, error.populated_bytes) == (errno.EFAULT, 2 * HUGE, 2 * HUGE)
        assert oracle.present_bytes(mapping.range.start, 4 * HUGE) == 2 * HUGE
        assert oracle.present_bytes(mapping.range.start, 2 * HUGE) == 2 * HUGE


def test_hugetlb_pool_empty_with_a_descriptor(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with prefault.Mapping(4 * HUGE, backing="memfd-hugetlb", noreserve=True) as mapping:
        assert prefault.plan(mapping).method.startswith("fallocate+")
        with pytest.raises(BackingFullError) as caught:
            prefault.populate(mapping, headroom="ignore")
        error = caught.value
        assert (error.errno, error.offset, error.populated_bytes) == (errno.ENOSPC, 2 * HUGE, 2 * HUGE)
        assert oracle.present_bytes(mapping.range.start, 4 * HUGE) == 2 * HUGE


def test_map_populate_hides_an_empty_pool(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(1)
    flags = mman.MAP_HUGETLB | mman.MAP_NORESERVE | mman.MAP_POPULATE
    with Region(2, flags=flags, page_size=HUGE) as region:
        assert oracle.present_bytes(region.address, 2 * HUGE) == HUGE


@each_access
def test_a_small_part_of_a_huge_page_populates_all_of_it(access: Access, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with prefault.Mapping(2 * HUGE, backing="hugetlb") as mapping:
        result = prefault.populate(mapping, access=access, offset=HUGE + 3 * PAGE, length=PAGE)
        start = mapping.range.start
        assert (result.bytes, result.present_bytes) == (HUGE, 0)
        assert oracle.present_bytes(start, HUGE) == 0
        assert oracle.present_bytes(start + HUGE, HUGE) == HUGE
        with pytest.raises(OSError, match="madvise") as caught:
            mman.madvise(start + HUGE + PAGE, PAGE, mman.MADV_DONTNEED)
        assert caught.value.errno == errno.EINVAL


# --- memory that is not like other memory -----------------------------------------------------------------------------


@each_access
def test_guard_region(access: Access) -> None:
    needs.capability(capabilities.GUARD_REGIONS)
    needs.capability(capabilities.PAGE_IS_GUARD)
    with Region(PAGES) as region:
        mman.madvise(region.page(5), PAGE, mman.MADV_GUARD_INSTALL)
        assert_fails(region, GuardPageError, errno.EFAULT, page=5, access=access)
        mman.madvise(region.page(5), PAGE, mman.MADV_GUARD_REMOVE)
        assert_populated(region, access)


@each_access
def test_vvar_is_a_device_mapping(access: Access) -> None:
    """The kernel's clock data: VM_IO and VM_PFNMAP, as a driver's registers would be."""
    vvar = special("[vvar]")
    if vvar is None:
        needs.missing("this process has no [vvar]")
    before = oracle.present(vvar.address, vvar.length)
    with pytest.raises(SpecialMappingError, match=r"\[vvar\]") as caught:
        prefault.populate(vvar, access=access)
    error = caught.value
    assert (error.errno, error.offset, error.populated_bytes) == (errno.EINVAL, 0, 0)
    assert oracle.present(vvar.address, vvar.length) == before


def test_vdso_can_be_read() -> None:
    vdso = special("[vdso]")
    if vdso is None:
        needs.missing("this process has no [vdso]")
    assert_populated(vdso, "read")
    assert prefault.plan(vdso).access == "read"
    with pytest.raises(ProtectionError) as caught:
        prefault.populate(vdso, access="write")
    assert (caught.value.errno, caught.value.offset, caught.value.populated_bytes) == (errno.EINVAL, 0, 0)


NR_MEMFD_SECRET = 447
_memfd_secret = declare_syscall(NR_MEMFD_SECRET, UINT)


def secret_memory() -> int:
    fd = _memfd_secret(0)
    if fd < 0:
        needs.missing("memfd_secret is not available (secretmem.enable=0, or a kernel without CONFIG_SECRETMEM)")
    os.ftruncate(fd, PAGES * PAGE)
    return fd


def test_secret_memory_for_reading() -> None:
    fd = secret_memory()
    with Region(PAGES, fd=fd, shared=True) as region:
        assert_fails(region, SpecialMappingError, errno.EINVAL, page=0, access="read")
    os.close(fd)


def test_secret_memory_for_writing(way: PopulateMode) -> None:
    """The kernel's own lookup of pages (GUP) refuses it, and MADV_POPULATE_WRITE is made of that.

    futex_add is not: the kernel resolves its fault as it does a program's, and the pages come.
    """
    fd = secret_memory()
    with Region(PAGES, fd=fd, shared=True) as region:
        if way is PopulateMode.MADVISE:
            assert_fails(region, SpecialMappingError, errno.EINVAL, page=0, access="write")
        else:
            assert_populated(region, "write")
            assert region.read(0, PAGES) == bytes(PAGES * PAGE)
    os.close(fd)


@each_access
def test_poisoned_page(way: PopulateMode, access: Access) -> None:
    """What hardware would report of a broken page, put there by userfaultfd.

    The fallbacks get EFAULT for it and cannot tell it from swap that cannot be read; they say that much.
    """
    with Region(PAGES) as region, userfaultfd.opened(userfaultfd.UffdFeature.POISON) as watcher:
        # Only the page itself is registered: the other pages of registered memory would not be populated at all.
        watcher.register(region.page(5), PAGE)
        watcher.poison(region.page(5))
        if way is PopulateMode.MADVISE:
            error = assert_fails(region, PoisonedPageError, mman.EHWPOISON, page=5, access=access)
            assert "hardware-poisoned" in str(error)
        else:
            error = assert_fails(region, PopulateError, errno.EFAULT, page=5, access=access)
            assert "poisoned" in str(error)


@each_access
def test_userfaultfd_that_may_not_answer_the_kernel(access: Access) -> None:
    """UFFD_USER_MODE_ONLY: a fault that the kernel raises fails at once."""
    with Region(PAGES) as region, userfaultfd.opened(user_mode_only=True) as watcher:
        watcher.register(region.page(4), 2 * PAGE)
        error = assert_fails(region, PopulateError, errno.EFAULT, page=4, access=access)
        assert "userfaultfd" in str(error)


@each_access
def test_userfaultfd_with_a_handler(way: PopulateMode, access: Access) -> None:
    """The handler, another process, is asked for one page after the other.

    futex_add is refused: futex(2) gives the kernel no leave to wait for a page (its fault comes without
    FAULT_FLAG_ALLOW_RETRY).
    """
    userfaultfd.opened(user_mode_only=False).close()

    def populate() -> list[userfaultfd.Fault]:
        with Region(PAGES) as region, userfaultfd.opened(user_mode_only=False) as watcher:
            watcher.register(region.address, region.length)
            if way is PopulateMode.FALLBACKS and access == "write":
                assert_fails(region, PopulateError, errno.EFAULT, page=0, access=access)
                return []

            def serve() -> list[userfaultfd.Fault]:
                faults = []
                for _ in range(PAGES):
                    faults.append(watcher.wait())
                    watcher.zeropage(faults[-1].address)
                return faults

            with Child(serve) as handler:
                assert_populated(region, access)
                faults: list[userfaultfd.Fault] = handler.result()
            assert [fault.address for fault in faults] == [region.page(index) for index in range(PAGES)]
            return faults

    # In a child: waiting for a handler in vain cannot be interrupted, only killed.
    faults = in_child(populate)
    assert [fault.write for fault in faults] == ([access == "write"] * PAGES if faults else [])


# --- present is not allocated -----------------------------------------------------------------------------------------


def allocated_bytes(buffer: Any) -> int | None:
    """What the package says of it; None only where this kernel has no PAGEMAP_SCAN."""
    found = prefault.residency(buffer).allocated_bytes
    assert (found is None) == (not capabilities.PAGEMAP_SCAN.available)
    return found


def test_reading_private_memory_maps_the_zero_page() -> None:
    """Present, and no memory behind it."""
    with Region(PAGES) as region:
        result = assert_populated(region, "read")
        assert result.bytes == PAGES * PAGE
        smaps = oracle.smaps(region.address)
        assert smaps["Rss"] == smaps["Private_Dirty"] == smaps["Anonymous"] == 0
        assert allocated_bytes(region) in (0, None)
        assert_populated(region, "write")
        assert oracle.smaps(region.address)["Private_Dirty"] == PAGES * PAGE
        assert allocated_bytes(region) in (PAGES * PAGE, None)


def test_reading_a_hole_of_a_memfd_allocates() -> None:
    with prefault.Mapping(PAGES * PAGE, backing="memfd") as mapping:
        assert mapping.fd is not None
        prefault.populate(mapping, access="read", length=3 * PAGE)
        assert os.fstat(mapping.fd).st_blocks * 512 == 3 * PAGE
        assert allocated_bytes(mapping) in (3 * PAGE, None)


def test_reading_a_hole_of_a_disk_file_does_not_allocate(disk: Path) -> None:
    with prefault.Mapping(PAGES * PAGE, backing=prefault.TemporaryFile(disk)) as mapping:
        assert mapping.fd is not None
        prefault.populate(mapping, access="read")
        assert oracle.present_bytes(mapping.range.start, PAGES * PAGE) == PAGES * PAGE
        assert os.fstat(mapping.fd).st_blocks == 0
        assert os.lseek(mapping.fd, 0, os.SEEK_HOLE) == 0


# --- locked memory ----------------------------------------------------------------------------------------------------


@each_access
def test_mlock_on_fault_populates_and_locks(access: Access) -> None:
    needs.capability(capabilities.MLOCK_ONFAULT)
    with Region(PAGES) as region:
        mman.mlock2(region.address, region.length, mman.MLOCK_ONFAULT)
        assert oracle.smaps(region.address)["Locked"] == 0
        assert_populated(region, access)
        # The zero page is nobody's to lock.
        assert oracle.smaps(region.address)["Locked"] == (PAGES * PAGE if access == "write" else 0)
        assert "lo" in oracle.vma_flags(region.address)


@each_access
def test_mlock_on_fault_of_a_memfd(access: Access) -> None:
    needs.capability(capabilities.MLOCK_ONFAULT)
    with prefault.Mapping(PAGES * PAGE, backing="memfd") as mapping:
        mman.mlock2(mapping.range.start, PAGES * PAGE, mman.MLOCK_ONFAULT)
        assert oracle.smaps(mapping.range.start)["Locked"] == 0
        prefault.populate(mapping, access=access)
        assert oracle.smaps(mapping.range.start)["Locked"] == PAGES * PAGE


MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
_mlockall = declare("mlockall", INT)


def test_mlockall_on_fault() -> None:
    def locked() -> tuple[int, int]:
        # Only what is mapped from now on: locking all of Python would take more than a user may lock.
        assert _mlockall(MCL_FUTURE | MCL_ONFAULT) == 0
        with Region(PAGES) as region:
            before = oracle.smaps(region.address)["Locked"]
            assert_populated(region, "write")
            return before, oracle.smaps(region.address)["Locked"]

    assert in_child(locked) == (0, PAGES * PAGE)


# --- signals ----------------------------------------------------------------------------------------------------------


def test_signals_are_handled_and_do_not_end_it() -> None:
    """A timer that rings all the time: every handler runs, nothing is left out."""
    rings = []
    before = signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    try:
        with Region(32 * 256) as region:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            for _ in range(50):
                assert_populated(region, "write")
                if rings:
                    break
                mman.madvise(region.address, region.length, mman.MADV_DONTNEED)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert rings
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("rollback", [False, True], ids=["stays", "rollback"])
def test_control_c_says_what_was_populated(rollback: bool) -> None:
    with Region(32 * 256) as region:

        def press(done: int, total: int) -> None:
            if done >= total // 8:  # the first chunk; the second may be all the rest
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(prefault.PopulateInterrupted) as caught:
            prefault.populate(region, access="write", threads=1, progress=press, rollback=rollback)
        there = oracle.present_bytes(region.address, region.length)
        assert caught.value.populated_bytes == there
        assert there == 0 if rollback else region.length // 8 <= there < region.length
