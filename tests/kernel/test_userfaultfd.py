"""userfaultfd(2) for real: what each ioctl does to missing, mapped, poisoned and protected pages, and which events come.

The oracle is pagemap, the bytes, and a thread that waits or does not. The server of ``prefault.device`` relies on all this.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy  # noqa: F401  which Region imports: its threads and mappings are no leak of the first test
import pytest

from prefault._kernel import fallocate, mman, pagemap
from prefault._kernel import userfaultfd as u
from prefault._kernel.userfaultfd import PageFault, RemapEvent, RemoveEvent, UffdFeature, UffdIoctl, UnmapEvent
from prefault._system import capabilities, hugetlb
from prefault._system.capabilities import UFFD_KERNEL_FAULTS
from support import needs, oracle
from support.children import Child
from support.regions import PAGE, Region
from support.userfaultfd import Toucher, Userfaultfd, opened

MISSING, WP, MINOR = u.UFFDIO_REGISTER_MODE_MISSING, u.UFFDIO_REGISTER_MODE_WP, u.UFFDIO_REGISTER_MODE_MINOR
ALL_MODES = MISSING | WP | MINOR
WRITE = u.UFFD_PAGEFAULT_FLAG_WRITE
PAGES = 8
MARKED = pagemap.PM_UFFD_WP
PRESENT = pagemap.PM_PRESENT

pytestmark = pytest.mark.usefixtures("no_leaks")


class Shared(NamedTuple):
    """Pages of a memfd, seen twice: registered at ``address``, and at ``frames`` as a server sees them."""

    fd: int
    address: int
    frames: int
    size: int
    watcher: Userfaultfd

    def at(self, page: int) -> int:
        return self.address + page * self.size

    def fill(self, page: int, byte: bytes) -> None:
        ctypes.memset(self.frames + page * self.size, byte[0], self.size)

    def go_on(self, page: int, pages: int = 1, mode: int = 0) -> int:
        """UFFDIO_CONTINUE; the pages done."""
        done = u.continue_(self.watcher.fd, self.at(page), pages * self.size, mode)
        assert done % self.size == 0
        return done // self.size

    def poison(self, page: int) -> None:
        self.watcher.poison(self.at(page), self.size)

    def protect(self, page: int, *, on: bool) -> None:
        self.watcher.write_protect(self.at(page), self.size, protect=on)

    def punch(self, page: int) -> None:
        fallocate.fallocate(self.fd, PUNCH, page * self.size, self.size)

    def entry(self, page: int) -> int:
        """pagemap: whether it is present, and write-protected."""
        return oracle.entries(self.at(page), PAGE)[0] & (PRESENT | MARKED)


PUNCH = fallocate.FALLOC_FL_KEEP_SIZE | fallocate.FALLOC_FL_PUNCH_HOLE


@pytest.fixture(params=["shmem", pytest.param("hugetlb", marks=pytest.mark.alone)])
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    """Eight pages, none of which the file has yet, registered for everything."""
    if request.param == "hugetlb":
        request.getfixturevalue("hugetlb_pool")(PAGES)
    yield from _shared(
        request.param == "hugetlb", UffdFeature.THREAD_ID | UffdFeature.POISON | UffdFeature.WP_HUGETLBFS_SHMEM
    )


@pytest.fixture
def shmem() -> Iterator[Shared]:
    yield from _shared(False, UffdFeature.THREAD_ID | UffdFeature.POISON | UffdFeature.WP_HUGETLBFS_SHMEM)


def _shared(huge: bool, features: int, mode: int = ALL_MODES) -> Iterator[Shared]:
    size = needs.HUGE if huge else PAGE
    fd = os.memfd_create("test", os.MFD_CLOEXEC | (os.MFD_HUGETLB if huge else 0))
    os.ftruncate(fd, PAGES * size)
    flags = mman.MAP_NORESERVE
    # The userfaultfd is closed first: a thread that still waits, in a test that fails, comes free before the unmapping.
    with (
        Region(PAGES, fd=fd, shared=True, page_size=size, flags=flags) as seen,
        Region(PAGES, fd=fd, shared=True, page_size=size, flags=flags) as frames,
        opened(features) as watcher,
    ):
        watcher.register(seen.address, seen.length, mode)
        yield Shared(fd, seen.address, frames.address, size, watcher)
    os.close(fd)


def refused(number: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  the number is what is looked at
        call(*arguments)
    assert caught.value.errno == number, errno.errorcode.get(caught.value.errno or 0)


# --- the descriptor


def test_api_tells_features_and_may_be_asked_again_after_a_refusal() -> None:
    fd = u.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | u.UFFD_USER_MODE_ONLY)
    try:
        refused(errno.EINVAL, u.register, fd, 0, PAGE, MISSING)  # before the handshake
        refused(errno.EINVAL, u.read_events, fd)
        refused(errno.EINVAL, u.api, fd, 1 << 40)
        features, ioctls = u.api(fd)
        assert UffdFeature.MISSING_SHMEM in features
        assert ioctls == UffdIoctl.API | UffdIoctl.REGISTER | UffdIoctl.UNREGISTER
        refused(errno.EINVAL, u.api, fd)  # twice
        with pytest.raises(BlockingIOError):
            u.read_events(fd)
        refused(errno.EINVAL, os.read, fd, u.MESSAGE_BYTES - 1)
    finally:
        os.close(fd)


def test_userfaultfd_refuses_unknown_flags() -> None:
    needs.capability(UFFD_KERNEL_FAULTS)  # without the privilege the kernel looks at nothing else
    refused(errno.EINVAL, u.userfaultfd, 1 << 5)


def test_from_the_device_it_needs_no_privilege_of_its_own() -> None:
    if not os.access(u.DEVICE, os.R_OK | os.W_OK):
        needs.missing(f"{u.DEVICE} cannot be opened by this user")

    def without_privilege() -> bool:
        device = os.open(u.DEVICE, os.O_RDWR)
        if os.geteuid() == 0:
            os.setuid(65534)
            refused(errno.EPERM, u.userfaultfd, 0)
            refused(errno.EACCES, u.userfaultfd_from_device, 0)
        os.close(fcntl.ioctl(device, u.USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
        return True

    fd = u.userfaultfd_from_device(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        u.api(fd)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    with Child(without_privilege) as child:
        assert child.result()


def test_register_tells_what_may_be_done() -> None:
    with opened() as watcher, Region(2) as region:
        found = watcher.register(region.address, region.length)
        assert found >= UffdIoctl.COPY | UffdIoctl.ZEROPAGE | UffdIoctl.WAKE
        assert not found & UffdIoctl.CONTINUE
        refused(errno.EINVAL, u.register, watcher.fd, region.address, region.length, MINOR)  # private memory
        refused(errno.EINVAL, u.register, watcher.fd, region.address, region.length, 0)
        refused(errno.EINVAL, u.register, watcher.fd, region.address + 1, PAGE, MISSING)
        refused(errno.EINVAL, u.register, watcher.fd, region.address, 0, MISSING)
        with opened() as other:
            refused(errno.EBUSY, u.register, other.fd, region.address, PAGE, MISSING)


def test_a_mapping_of_a_descriptor_that_cannot_write_is_not_registered(shmem: Shared) -> None:
    fd = os.open(f"/proc/self/fd/{shmem.fd}", os.O_RDONLY | os.O_CLOEXEC)
    with Region(1, mman.PROT_READ, fd=fd, shared=True) as region:
        refused(errno.EPERM, u.register, shmem.watcher.fd, region.address, PAGE, MISSING)
    with Region(1, mman.PROT_READ, fd=shmem.fd, shared=True) as region:
        u.register(shmem.watcher.fd, region.address, PAGE, MISSING | MINOR)
        shmem.fill(0, b"r")
        assert u.continue_(shmem.watcher.fd, region.address, PAGE) == PAGE
        assert region.read(0, 1) == b"r" * PAGE
    os.close(fd)


# --- faults


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_missing_and_minor_faults(shared: Shared, filled: bool, write: bool) -> None:
    if filled:
        shared.fill(1, b"f")
    toucher = Toucher(shared.at(1) + 5, write=write)
    flags = (u.UFFD_PAGEFAULT_FLAG_MINOR if filled else 0) | (WRITE if write else 0)
    assert shared.watcher.events() == [PageFault(flags, shared.at(1), toucher.thread.native_id or 0)]
    shared.fill(1, b"f")
    assert toucher.waits, "a page that is only filled is not supplied"
    assert shared.go_on(1) == 1
    assert toucher.finish() == (b"w" if write else b"f")


def test_a_message_is_told_once_until_the_page_is_woken(shared: Shared) -> None:
    toucher = Toucher(shared.at(2), write=True)
    (told,) = shared.watcher.events()
    assert shared.watcher.silent()
    u.wake(shared.watcher.fd, shared.address, PAGES * shared.size)
    assert shared.watcher.events() == [told]
    shared.fill(2, b"f")
    shared.go_on(2)
    toucher.finish()


def test_two_threads_at_one_page_are_two_messages_and_one_answer(shared: Shared) -> None:
    touchers = [Toucher(shared.at(0)), Toucher(shared.at(0))]
    seen: list[Any] = []
    while len(seen) < 2:
        seen += shared.watcher.events()
    assert {event.thread_id for event in seen} == {toucher.thread.native_id for toucher in touchers}
    shared.fill(0, b"f")
    shared.go_on(0)
    assert [toucher.finish() for toucher in touchers] == [b"f", b"f"]


def test_a_fault_answered_before_its_message_is_read_leaves_none(shared: Shared) -> None:
    toucher = Toucher(shared.at(0))
    assert not shared.watcher.silent(30)
    shared.fill(0, b"f")
    shared.go_on(0)
    assert toucher.finish() == b"f"
    assert shared.watcher.silent(0)


def test_neither_filling_nor_a_page_that_is_there_already_wakes(shared: Shared) -> None:
    toucher = Toucher(shared.at(3))
    shared.watcher.events()
    shared.fill(3, b"f")
    assert shared.go_on(3, mode=u.UFFDIO_CONTINUE_MODE_DONTWAKE) == 1
    refused(errno.EEXIST, shared.go_on, 3)
    toucher.thread.join(0.05)
    assert toucher.waits
    u.wake(shared.watcher.fd, shared.at(3), shared.size)
    assert toucher.finish() == b"f"


def test_minor_mode_alone_lets_the_kernel_fill_holes_with_zeros() -> None:
    for shared in _shared(False, UffdFeature.MINOR_SHMEM, MINOR):
        assert Toucher(shared.at(0)).finish() == b"\0"
        assert shared.watcher.silent(0)


def test_unregister_and_the_last_close_wake_into_zeros(shared: Shared) -> None:
    toucher = Toucher(shared.at(0))
    shared.watcher.events()
    u.unregister(shared.watcher.fd, shared.at(0), shared.size)
    assert toucher.finish() == b"\0"
    toucher = Toucher(shared.at(1))
    shared.watcher.events()
    shared.watcher.close()
    assert toucher.finish() == b"\0"


# --- CONTINUE, and partial progress


def test_continue_stops_at_what_is_mapped_and_at_holes(shared: Shared) -> None:
    for page in range(6):
        shared.fill(page, b"%d" % page)
    assert shared.go_on(2) == 1
    refused(errno.EEXIST, shared.go_on, 2)
    refused(errno.EEXIST, shared.go_on, 2, 4)
    assert shared.go_on(0, 4) == 2  # up to the mapped page 2
    assert shared.go_on(3, 5) == 3  # up to the hole 6
    refused(errno.EFAULT, shared.go_on, 6)
    assert [shared.entry(page) for page in range(PAGES)] == [PRESENT] * 6 + [0, 0]
    assert ctypes.string_at(shared.at(5), 2) == b"55"


def test_continue_of_wrong_ranges(shared: Shared) -> None:
    fd, size = shared.watcher.fd, shared.size
    shared.fill(0, b"f")
    refused(errno.ENOENT, u.continue_, fd, shared.frames, size)  # not registered
    refused(errno.EINVAL, u.continue_, fd, shared.address + 1, size)
    refused(errno.EINVAL, u.continue_, fd, shared.address, 0)
    refused(errno.EINVAL, u.continue_, fd, shared.address, size, 1 << 20)
    refused(errno.ENOENT, u.writeprotect, fd, shared.frames, size, u.UFFDIO_WRITEPROTECT_MODE_WP)
    u.wake(fd, shared.frames, size)  # not an error
    if size > PAGE:
        refused(errno.EINVAL, u.continue_, fd, shared.address, PAGE)


def test_eagain_with_nothing_done_is_an_error_and_not_zero_bytes() -> None:
    """While the process changes its mappings nothing is done: the caller must read the event first."""
    for shared in _shared(False, UffdFeature.EVENT_REMOVE | UffdFeature.MINOR_SHMEM):
        shared.fill(0, b"f")
        discarder = threading.Thread(target=mman.madvise, args=(shared.at(0), PAGE, mman.MADV_DONTNEED), daemon=True)
        discarder.start()
        assert not shared.watcher.silent(30)
        refused(errno.EAGAIN, shared.go_on, 0)
        assert shared.watcher.events() == [RemoveEvent(shared.at(0), shared.at(1))]
        discarder.join(30)
        assert shared.go_on(0) == 1


# --- POISON


def test_continue_replaces_poison_and_copy_does_not(shared: Shared) -> None:
    needs.capability(capabilities.UFFD_POISON)
    shared.poison(0)
    refused(errno.EEXIST, shared.poison, 0)
    shared.fill(0, b"f")
    refused(errno.EEXIST, u.copy, shared.watcher.fd, shared.at(0), shared.frames, shared.size)
    shared.punch(0)
    # The poison is in the page table, and stays; hugetlb clears the entry nevertheless: the page is missing again.
    still = mman.EHWPOISON if shared.size == PAGE else errno.EFAULT
    refused(still, mman.madvise, shared.at(0), PAGE, mman.MADV_POPULATE_READ)
    shared.fill(0, b"g")
    assert shared.go_on(0) == 1
    assert ctypes.string_at(shared.at(0), 1) == b"g"
    refused(errno.EEXIST, shared.poison, 0)  # nor does poison replace a page


def test_poison_goes_with_madv_dontneed_and_outlives_unregister(shared: Shared) -> None:
    needs.capability(capabilities.UFFD_POISON)
    shared.poison(0)
    mman.madvise(shared.at(0), shared.size, mman.MADV_DONTNEED)
    shared.fill(0, b"f")
    assert shared.go_on(0) == 1
    shared.poison(1)
    u.unregister(shared.watcher.fd, shared.address, PAGES * shared.size)
    refused(mman.EHWPOISON, mman.madvise, shared.at(1), PAGE, mman.MADV_POPULATE_READ)


def test_poison_answers_a_thread_that_waits() -> None:
    """In a system call, which fails; a load would be answered with SIGBUS and end the process."""
    needs.capability(capabilities.UFFD_POISON)
    with Region(1) as region, opened(UffdFeature.POISON, user_mode_only=False) as watcher:
        watcher.register(region.address, PAGE)
        reader, writer = os.pipe()
        got: list[int | None] = []
        thread = threading.Thread(target=lambda: got.append(_errno(os.write, writer, region.view())), daemon=True)
        thread.start()
        watcher.events()
        watcher.poison(region.address)
        thread.join(30)
        os.close(reader)
        os.close(writer)
        assert got == [errno.EFAULT]


def _errno(call: Callable[..., object], *arguments: object) -> int | None:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


# --- WRITEPROTECT


def test_a_write_to_a_protected_page_waits(shared: Shared) -> None:
    shared.fill(0, b"f")
    shared.go_on(0)
    shared.protect(0, on=True)
    assert shared.entry(0) == PRESENT | MARKED
    assert Toucher(shared.at(0)).finish() == b"f"  # reading goes on
    toucher = Toucher(shared.at(0), write=True)
    assert shared.watcher.events() == [
        PageFault(WRITE | u.UFFD_PAGEFAULT_FLAG_WP, shared.at(0), toucher.thread.native_id or 0)
    ]
    shared.protect(0, on=False)
    toucher.finish()
    assert ctypes.string_at(shared.frames, 1) == b"w"


def test_protecting_a_page_that_is_not_there_leaves_a_marker(shared: Shared) -> None:
    shared.protect(0, on=True)
    assert shared.entry(0) == MARKED
    toucher = Toucher(shared.at(0), write=True)
    assert [event.flags for event in shared.watcher.events() if isinstance(event, PageFault)] == [WRITE]  # missing: no WP
    shared.fill(0, b"f")
    shared.go_on(0, mode=u.UFFDIO_CONTINUE_MODE_WP)
    assert [event.flags for event in shared.watcher.events() if isinstance(event, PageFault)] == [
        WRITE | u.UFFD_PAGEFAULT_FLAG_WP
    ]
    shared.protect(0, on=False)
    toucher.finish()
    shared.protect(1, on=True)
    shared.protect(1, on=False)
    assert shared.entry(1) == 0


def test_continue_drops_the_protection_of_a_page_that_is_not_there(shared: Shared) -> None:
    """So the server must not map a page that is being evicted."""
    shared.protect(0, on=True)
    shared.fill(0, b"f")
    assert shared.go_on(0) == 1
    assert shared.entry(0) == PRESENT
    assert Toucher(shared.at(0), write=True).finish() == b"w"
    shared.fill(1, b"f")
    assert shared.go_on(1, mode=u.UFFDIO_CONTINUE_MODE_WP) == 1
    assert shared.entry(1) == PRESENT | MARKED
    shared.punch(1)
    assert shared.entry(1) == MARKED, "the marker stays when the page goes"
    shared.fill(1, b"g")
    assert shared.go_on(1) == 1
    assert shared.entry(1) == PRESENT


def test_the_steps_of_an_eviction(shared: Shared) -> None:
    """Protect, read, punch, unprotect: a writer that came meanwhile waits all along, and then asks for the page anew."""
    shared.fill(0, b"f")
    shared.go_on(0)
    shared.protect(0, on=True)
    toucher = Toucher(shared.at(0), write=True)
    shared.watcher.events()
    shared.punch(0)
    assert shared.watcher.silent(), "punching wakes nobody"
    shared.protect(0, on=False)
    assert [event.flags for event in shared.watcher.events() if isinstance(event, PageFault)] == [WRITE]
    shared.fill(0, b"n")
    shared.go_on(0)
    toucher.finish()
    assert ctypes.string_at(shared.frames, 2) == b"wn"


def test_protection_leaves_poison_alone(shared: Shared) -> None:
    needs.capability(capabilities.UFFD_POISON)
    shared.poison(0)
    shared.protect(0, on=True)
    shared.protect(0, on=False)
    refused(mman.EHWPOISON, mman.madvise, shared.at(0), PAGE, mman.MADV_POPULATE_READ)


def test_asynchronous_write_protection_needs_no_answer() -> None:
    needs.capability(capabilities.UFFD_WP_ASYNC)
    for shared in _shared(False, UffdFeature.WP_ASYNC | UffdFeature.MINOR_SHMEM):
        shared.fill(0, b"f")
        shared.go_on(0, mode=u.UFFDIO_CONTINUE_MODE_WP)
        assert shared.entry(0) == PRESENT | MARKED
        assert Toucher(shared.at(0), write=True).finish() == b"w"
        assert shared.entry(0) == PRESENT
        toucher = Toucher(shared.at(1), write=True)  # missing pages are still told
        assert [event.flags for event in shared.watcher.events() if isinstance(event, PageFault)] == [WRITE]
        shared.fill(1, b"f")
        shared.go_on(1, mode=u.UFFDIO_CONTINUE_MODE_WP)
        toucher.finish()


# --- COPY, ZEROPAGE, MOVE


def test_copy_and_zeropage_on_anonymous_memory() -> None:
    with Region(6) as region, Region(6) as source, opened() as watcher:
        watcher.register(region.address, region.length)
        source.fill(0, b"c" * source.length)
        fd = watcher.fd
        assert u.copy(fd, region.page(1), source.address, PAGE) == PAGE
        refused(errno.EEXIST, u.copy, fd, region.page(1), source.address, PAGE)
        assert u.copy(fd, region.page(0), source.address, 3 * PAGE) == PAGE  # stops at page 1
        assert u.zeropage(fd, region.page(3), 2 * PAGE) == 2 * PAGE
        refused(errno.EEXIST, u.zeropage, fd, region.page(3), PAGE)
        assert u.zeropage(fd, region.page(2), 2 * PAGE) == PAGE
        toucher = Toucher(region.page(5))
        watcher.events()
        assert u.copy(fd, region.page(5), source.address, PAGE, u.UFFDIO_COPY_MODE_DONTWAKE) == PAGE
        toucher.thread.join(0.05)
        assert toucher.waits
        u.wake(fd, region.page(5), PAGE)
        assert toucher.finish() == b"c"
        assert region.read(0, 6) == b"c" * 2 * PAGE + b"\0" * 3 * PAGE + b"c" * PAGE


def test_copy_onto_shared_memory(shared: Shared) -> None:
    shared.fill(7, b"c")
    source = shared.frames + 7 * shared.size
    assert u.copy(shared.watcher.fd, shared.at(0), source, shared.size) == shared.size
    assert ctypes.string_at(shared.frames, 1) == b"c", "it is in the file, too"
    if shared.size == PAGE:
        assert u.zeropage(shared.watcher.fd, shared.at(1), PAGE) == PAGE
    else:
        refused(errno.EINVAL, u.zeropage, shared.watcher.fd, shared.at(1), shared.size)


def test_move_takes_the_pages_away() -> None:
    with Region(6) as region, Region(6) as source, opened(UffdFeature.MOVE) as watcher:
        watcher.register(region.address, region.length)
        fd = watcher.fd
        source.fill(0, b"m" * 2 * PAGE)
        frames = oracle.entries(source.address, 2 * PAGE)
        assert u.move(fd, region.address, source.address, 2 * PAGE) == 2 * PAGE
        assert oracle.present(source.address, 2 * PAGE) == [False, False]
        assert region.read(0, 2) == b"m" * 2 * PAGE
        mask = pagemap.PM_PFRAME_MASK
        assert [entry & mask for entry in oracle.entries(region.address, 2 * PAGE)] == [entry & mask for entry in frames]
        refused(errno.ENOENT, u.move, fd, region.page(2), source.address, PAGE)
        assert u.move(fd, region.page(2), source.address, PAGE, u.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES) == PAGE
        source.fill(0, b"n" * PAGE)
        refused(errno.EEXIST, u.move, fd, region.address, source.address, PAGE)
        assert u.move(fd, region.page(3), source.address, 2 * PAGE) == PAGE  # stops at the hole


# --- populate, and faults that the kernel raises


def test_madv_populate_asks_for_one_page_after_the_other(shared: Shared) -> None:
    needs.capability(capabilities.MADV_POPULATE)
    with opened(user_mode_only=False) as watcher:
        u.unregister(shared.watcher.fd, shared.address, PAGES * shared.size)
        u.register(watcher.fd, shared.address, PAGES * shared.size, MISSING | MINOR)
        arguments = (shared.address, 3 * shared.size, mman.MADV_POPULATE_READ)
        thread = threading.Thread(target=mman.madvise, args=arguments, daemon=True)
        thread.start()
        for page in range(3):
            assert [event.address for event in watcher.events() if isinstance(event, PageFault)] == [shared.at(page)]
            assert watcher.silent(0)
            shared.fill(page, b"f")
            u.continue_(watcher.fd, shared.at(page), shared.size)
        thread.join(30)
        assert not thread.is_alive()


def test_user_mode_only_fails_the_kernel_at_once(shared: Shared) -> None:
    needs.capability(capabilities.MADV_POPULATE)
    refused(errno.EFAULT, mman.madvise, shared.address, shared.size, mman.MADV_POPULATE_READ)
    with open(os.devnull, "wb", buffering=0), open(f"/proc/self/fd/{shared.fd}", "r+b", buffering=0) as file:
        view = (ctypes.c_char * 8).from_address(shared.address)
        refused(errno.EFAULT, file.readinto, view)
    assert shared.watcher.silent(0)


# --- events other than faults


def test_remap_and_unmap_events() -> None:
    features = UffdFeature.EVENT_REMAP | UffdFeature.EVENT_UNMAP | UffdFeature.EVENT_REMOVE
    libc = ctypes.CDLL(None)
    libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    # Closed first: nobody would read the events of the unmapping.
    with Region(4) as region, Region(1) as target, opened(features) as watcher:
        watcher.register(region.address, region.length)

        def during(call: Callable[..., object], *arguments: object) -> list[u.Event]:
            thread = threading.Thread(target=call, args=arguments, daemon=True)
            thread.start()
            seen = watcher.events()
            while thread.is_alive():
                thread.join(0.01)
                if not watcher.silent(0):
                    seen += watcher.events()
            return seen

        may_move_fixed = 3
        moved = during(libc.mremap, region.page(1), PAGE, PAGE, may_move_fixed, target.address)
        assert RemapEvent(region.page(1), target.address, PAGE) in moved
        toucher = Toucher(target.address)
        assert watcher.wait().address == target.address, "it is registered at its new place"
        watcher.zeropage(target.address)
        toucher.finish()
        assert during(mman.munmap, region.page(3), PAGE) == [UnmapEvent(region.page(3), region.page(4))]
        assert during(mman.madvise, region.page(2), PAGE, mman.MADV_DONTNEED) == [
            RemoveEvent(region.page(2), region.page(3))
        ]


def test_fork_event_brings_a_descriptor_for_the_child() -> None:
    """In processes of their own: fork(2) holds the GIL until the event is read."""
    needs.root("be told of forks (CAP_SYS_PTRACE)")

    def client() -> bool:
        with Region(2) as region, Userfaultfd(UffdFeature.EVENT_FORK, user_mode_only=False) as watcher:

            def handle() -> list[Any]:
                (event,) = watcher.events()
                assert isinstance(event, u.ForkEvent)
                child = Userfaultfd.__new__(Userfaultfd)
                child.fd = event.descriptor
                fault = child.wait()
                child.zeropage(fault.address)
                os.read(child_gone, 1)
                gone = [
                    _errno(u.zeropage, child.fd, region.address, PAGE),
                    _errno(u.poison, child.fd, region.address, PAGE),
                    _errno(u.wake, child.fd, region.address, PAGE),
                ]
                return [fault.address == region.page(1), gone]

            child_gone, say_gone = os.pipe()
            with Child(handle) as handler:
                watcher.register(region.address, region.length)
                with Child(lambda: region.read(1, 1)) as grandchild:
                    assert grandchild.result() == bytes(PAGE)
                os.write(say_gone, b"x")
                # A process that is gone cannot be woken, and WAKE does not say so.
                assert handler.result() == [True, [errno.ESRCH, errno.ESRCH, None]]
        return True

    with Child(client) as process:
        assert process.result()


def test_decode_refuses_what_it_does_not_know() -> None:
    refused(errno.EPROTO, u.decode, bytes(u.MESSAGE_BYTES))


def test_hugetlb_needs_whole_pages(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(1)
    assert needs.HUGE in hugetlb.page_sizes()
    with opened() as watcher, Region(1, page_size=needs.HUGE, flags=mman.MAP_HUGETLB) as region:
        refused(errno.EINVAL, u.register, watcher.fd, region.address, PAGE, MISSING)
