from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from prefault.device.frames import HUGE_PAGE, SLOTS, Frames
from prefault.device.page_states import DevicePageState
from prefault.errors import DeviceError
from prefault.sizes import MIB

PAGE = mmap.PAGESIZE


@pytest.fixture
def frames(no_leaks: None) -> Iterator[Frames]:
    made = Frames.create(20 * PAGE - 100, PAGE)
    yield made
    made.close()
    made.close()


def _allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_it_is_sized_to_whole_pages_and_takes_nothing(frames: Frames) -> None:
    assert (frames.pages, frames.length, frames.tail, frames.unit) == (20, 20 * PAGE, 100, PAGE)
    assert os.fstat(frames.fd).st_size == 20 * PAGE
    assert _allocated(frames.fd) == 0
    assert not frames.huge
    assert frames.notes == ()


def test_no_memfd_can_shrink_and_the_frames_cannot_grow(frames: Frames) -> None:
    for fd, sizes in ((frames.fd, (0, PAGE, 1 << 30)), (frames.states_fd, (0, PAGE))):
        for size in sizes:
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_states_and_runs(frames: Frames) -> None:
    frames.mark(range(3, 7), DevicePageState.READY)
    frames.mark(range(7, 8), DevicePageState.EVICTING)
    frames.mark(range(12, 12), DevicePageState.READY)
    frames.mark(range(19, 20), DevicePageState.READY)
    everything = range(20)
    assert frames.runs(everything, DevicePageState.READY) == [range(3, 7), range(19, 20)]
    assert frames.runs(everything, DevicePageState.READY, DevicePageState.EVICTING) == [range(3, 8), range(19, 20)]
    assert frames.runs(range(4, 6), DevicePageState.READY) == [range(4, 6)]
    assert frames.runs(range(5, 5), DevicePageState.READY) == []
    assert frames.count(everything, DevicePageState.MISSING) == 14
    assert frames.run_at(3, 20) == (DevicePageState.READY, 7)
    assert frames.run_at(4, 6) == (DevicePageState.READY, 6)
    assert frames.run_at(8, 20) == (DevicePageState.MISSING, 19)
    assert frames.run_before(6, 0) == 3
    assert frames.run_before(6, 5) == 5
    assert frames.run_before(8, 0) == 8
    assert frames.run_before(2, 0) == 0


def test_runs_of_a_large_device_are_found_without_allocating_its_states(no_leaks: None) -> None:
    frames = Frames.create(1 << 40, PAGE)
    everything = range(frames.pages)
    assert frames.runs(everything, DevicePageState.MISSING) == [everything]
    expected = [range(3), range(4095, 8200), range(1 << 20, (1 << 20) + 1), range(frames.pages - 2, frames.pages)]
    for run in expected:
        frames.mark(run, DevicePageState.READY)
    frames.mark(range(5000, 5001), DevicePageState.MISSING)
    expected[1:2] = [range(4095, 5000), range(5001, 8200)]
    assert frames.runs(everything, DevicePageState.READY) == expected
    assert frames.runs(range(2, frames.pages - 1), DevicePageState.READY) == [
        range(2, 3), *expected[1:-1], range(frames.pages - 2, frames.pages - 1),
    ]  # fmt: skip
    between = [range(a.stop, b.start) for a, b in itertools.pairwise(expected)]
    assert frames.runs(everything, DevicePageState.MISSING) == between
    assert frames.runs(everything, DevicePageState.MISSING, DevicePageState.READY) == [everything]
    assert frames.count(everything, DevicePageState.MISSING) == frames.pages - sum(map(len, expected))
    frames.repair()
    assert _allocated(frames.states_fd) < MIB
    frames.close()


def test_all_processes_with_the_descriptors_see_the_same(frames: Frames) -> None:
    other = Frames(os.dup(frames.fd), os.dup(frames.states_fd), 20 * PAGE - 100, PAGE, False)
    frames.secure(range(1, 2))
    frames.view(range(1, 2))[:3] = b"abc"
    frames.mark(range(1, 2), DevicePageState.READY)
    frames.heartbeat[SLOTS - 1] = 12345
    assert other.states[1] == DevicePageState.READY
    assert bytes(other.view(range(1, 2))[:4]) == b"abc\0"
    assert other.heartbeat[SLOTS - 1] == 12345
    assert os.pread(frames.fd, 3, PAGE) == b"abc"
    other.close()


def test_secure_allocates_and_punch_gives_back(frames: Frames) -> None:
    frames.secure(range(2, 6))
    assert _allocated(frames.fd) == 4 * PAGE
    frames.view(range(3, 4))[:] = b"x" * PAGE
    assert [frames.has(page * PAGE) for page in range(8)] == [2 <= page < 6 for page in range(8)]
    frames.punch(range(3, 5))
    assert [frames.has(page * PAGE) for page in range(8)] == [page in (2, 5) for page in range(8)]
    assert _allocated(frames.fd) == 2 * PAGE
    assert bytes(frames.view(range(3, 4))) == bytes(PAGE)


def _there(frames: Frames) -> list[int]:
    return [page for page in range(frames.pages) if frames.has(page * PAGE)]


def test_pages_one_behind_the_other_are_secured_together(frames: Frames) -> None:
    found = []
    for page in (2, 3, 4, 5, 11, 9, 10, 17, 18, 19):
        frames.secure_one(page)
        found.append(_there(frames))
        assert page in found[-1]
    assert found[:4] == [[2], [2, 3, 4], [2, 3, 4], [2, 3, 4, 5, 6, 7, 8]]
    assert found[4:6] == [[*range(2, 9), 11], [*range(2, 10), 11]]
    assert found[-1] == [*range(2, 12), 17, 18, 19]


def test_pages_secured_ahead_and_punched_are_secured_again(frames: Frames) -> None:
    for page in (2, 3, 4, 5):
        frames.secure_one(page)
    frames.punch(range(6, 8))
    for page in (6, 7, 8):
        frames.secure_one(page)
        assert page in _there(frames)
    frames.secure_one(9)
    assert _there(frames) == list(range(2, 10))  # and none ahead any more


def test_large_pages_are_not_secured_ahead(no_leaks: None, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(0)
    frames = Frames.create(4 * HUGE_PAGE, HUGE_PAGE)
    frames.secure_one(0)
    frames.secure_one(1)
    assert _allocated(frames.fd) == 2 * HUGE_PAGE
    frames.close()


def test_bytes_behind_the_end_of_the_device_are_zeros(frames: Frames) -> None:
    frames.view(range(18, 20))[:] = b"x" * 2 * PAGE
    frames.clear_tail(range(18, 19))
    assert bytes(frames.view(range(19, 20))) == b"x" * PAGE
    frames.clear_tail(range(18, 20))
    assert bytes(frames.view(range(18, 20))) == b"x" * (2 * PAGE - 100) + bytes(100)


def test_repair_settles_unfinished_pages(frames: Frames) -> None:
    states = [
        DevicePageState.MISSING,
        DevicePageState.FILLING,
        DevicePageState.READY,
        DevicePageState.EVICTING,
        DevicePageState.PUNCHING,
    ]
    for page, state in enumerate(states):
        frames.view(range(page, page + 1))[:] = b"x" * PAGE
        frames.mark(range(page, page + 1), state)
    frames.heartbeat[3] = 99
    frames.repair()
    found = [DevicePageState(frames.states[page]) for page in range(5)]
    assert found == [
        DevicePageState.MISSING,
        DevicePageState.MISSING,
        DevicePageState.READY,
        DevicePageState.READY,
        DevicePageState.MISSING,
    ]
    kept = [os.pread(frames.fd, 1, page * PAGE) for page in range(1, 5)]
    assert kept == [b"\0", b"x", b"x", b"\0"]
    assert not any(frames.heartbeat)


@pytest.mark.parametrize(("length", "page_size"), [(0, PAGE), (-1, PAGE), (PAGE, 8192), (PAGE, 0)])
def test_sizes_that_make_no_sense(length: int, page_size: int) -> None:
    with pytest.raises(ValueError, match=r"a length of|the pages of a device"):
        Frames.create(length, page_size)


@pytest.mark.usefixtures("no_leaks")
def test_a_device_of_more_than_the_kernel_can_address() -> None:
    with pytest.raises(DeviceError) as caught:
        Frames.create(1 << 62, PAGE)
    assert caught.value.errno in (errno.EFBIG, errno.ENOMEM, errno.EINVAL)
    assert "cannot create frames" in str(caught.value)


def test_huge_pages_without_a_pool_are_ordinary_ones(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(0)
    frames = Frames.create(3 * MIB, HUGE_PAGE)
    assert (frames.huge, frames.unit, frames.pages, frames.length) == (False, PAGE, 2, 4 * MIB)
    assert any("hugetlb pool has 0 pages of 2 MiB left" in note for note in frames.notes)
    frames.close()


def test_huge_pages_of_an_empty_pool_are_no_sigbus(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    ordinary = Frames.create(8 * MIB, HUGE_PAGE)
    assert not ordinary.huge
    ordinary.close()
    frames = Frames.create(8 * MIB, HUGE_PAGE, 4 * MIB)
    assert (frames.huge, frames.unit, frames.pages) == (True, HUGE_PAGE, 4)
    frames.secure(range(2))
    frames.view(range(2))[: 4 * MIB : PAGE] = b"x" * 1024
    with pytest.raises(OSError, match="no huge pages") as caught:
        frames.secure(range(2, 3))
    assert caught.value.errno == errno.ENOSPC
    assert [frames.has(page * HUGE_PAGE) for page in (0, 1, 2)] == [True, True, False]
    frames.punch(range(1))
    assert not frames.has(0)
    frames.punch(range(1))  # asking takes it
    frames.secure(range(2, 3))
    frames.view(range(2, 3))[0] = 1
    frames.close()
