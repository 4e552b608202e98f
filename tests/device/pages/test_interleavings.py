"""What happens in the middle of the pool's operations: other threads, other operations, and the death of the server."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device.device_pool import Access
from prefault.device.driver import RETRY, DeviceArea, Supplied
from prefault.errors import DeviceError, DeviceGoneError, DriverError
from prefault.sizes import PAGE_SIZE
from support.children import Child
from support.commanded import Commanded, LocalCommanded, command
from support.device_server import ends_by
from support.pools import wait_until
from support.wardens import roles

pytestmark = pytest.mark.usefixtures("no_leaks")


libc = ctypes.CDLL(None, use_errno=True)
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.mremap.restype = ctypes.c_void_p


def remap_last_page(address: int) -> None:
    """Move a page of an area elsewhere, by mremap(2)."""
    libc.mremap(address, PAGE_SIZE, 2 * PAGE_SIZE, 1)  # MREMAP_MAYMOVE; it has no room to grow where it is


@contextlib.contextmanager
def mapped(device: Commanded) -> Iterator[tuple[prefault.device.Area, memoryview]]:
    with prefault.device.map(device) as area, area.memoryview() as view:
        yield area, view


def word(view: memoryview, page: int) -> int:
    return int.from_bytes(view[page * PAGE_SIZE : page * PAGE_SIZE + 8], "little")


def read_word(path: str, page: int) -> int:
    with prefault.device.connect(path) as device, device.map() as area, area.memoryview() as view:
        return word(view, page)


# --- RETRY


def test_a_driver_that_answers_retry_is_asked_once_also_after_other_pages_were_retried(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        prefault.device.serve(Commanded(retries=[5]), path),
        prefault.device.connect(path) as device,
        device.map() as area,
    ):
        command(area, "retry", 0, 1, retries=[5])
        with Child(partial(read_word, path, 5)) as child:
            wait_until(lambda: [5, "read"] in command(area, "asked"), "the driver is asked for page 5")
            time.sleep(0.2)
            assert command(area, "asked").count([5, "read"]) == 1
            command(area, "supply", 5, 6, byte=1)
            assert child.result() == 0x0101010101010101


class AsksInTurn(LocalCommanded):
    """Page 130 can be supplied after page 5, which is ready when page 70 is asked for; each is of another batch."""

    ready = False

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 5:
            self.ready = self.asked.count((5, access)) > 0
            self.pool.retry(range(130, 131))
        if page == 70:
            self.pool.retry(range(5, 6))
        answer = super().fault(area, page, access)
        return RETRY if page in (5, 130) and not self.ready else answer


def test_a_populate_that_waits_for_several_batches_misses_no_retry() -> None:
    with mapped(AsksInTurn(pages=192, timeout_s=3.0)) as (area, view):
        assert prefault.populate(area, headroom="ignore").bytes == 192 * PAGE_SIZE
        assert (word(view, 5), word(view, 130)) == (6, 131)


# --- poison


class PoisonsInTheMiddle(LocalCommanded):
    """Poisons a page where its client says, and dies there if it is told to."""

    def do_poison_while_shot_down(self, pages: range, die: bool) -> None:
        with self.pool.shoot_down(pages):
            self.pool.poison(pages)
            if die:
                os.kill(os.getpid(), signal.SIGKILL)

    def do_poison_while_evicted(self, pages: range, die: bool) -> None:
        def save(run: range, content: memoryview) -> None:
            self.pool.poison(run)
            if die:
                os.kill(os.getpid(), signal.SIGKILL)

        self.pool.writeback(pages, save)


@pytest.mark.parametrize("die", [False, True])
@pytest.mark.parametrize("what", ["poison_while_shot_down", "poison_while_evicted"])
def test_pages_that_are_poisoned_while_they_are_taken_stay_poisoned(what: str, die: bool) -> None:
    with mapped(PoisonsInTheMiddle()) as (area, view):
        assert word(view, 2) == 3
        with contextlib.suppress(DeviceGoneError):
            command(area, what, 2, 3, die=die)
        assert command(area, "ready", 0, 16) == []
        with pytest.raises(DriverError, match="page 2 is poisoned"):
            prefault.populate(area)


class PoisonsWhatItSupplies(LocalCommanded):
    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        answer = super().fault(area, page, access)
        if page == 2:
            other = threading.Thread(target=self.pool.poison, args=(range(2, 3),))
            other.start()
            other.join()
        return answer


@pytest.mark.parametrize("workers", [0, 1])
def test_a_page_that_is_poisoned_while_it_is_supplied_is_not_served(workers: int) -> None:
    def touch(say: Any) -> None:
        with mapped(PoisonsWhatItSupplies(workers=workers)) as (_, view):
            say(f"page 1 begins with {word(view, 1)}")
            say(f"page 2 begins with {word(view, 2)}")

    said, status = ends_by(touch)
    assert said == "page 1 begins with 2"
    assert -status == signal.SIGBUS


def test_the_reason_of_poison_is_the_latest() -> None:
    with mapped(Commanded()) as (area, _):
        command(area, "poison", 0, 8, reason="the first")
        command(area, "supply", 0, 8)
        command(area, "poison", 3, 4, reason="the second")
        with pytest.raises(DriverError, match="page 3 is poisoned: the second"):
            prefault.populate(area)


def test_a_supply_that_fails_leaves_poison() -> None:
    with mapped(Commanded()) as (area, _):
        command(area, "poison", 2, 3, reason="forged")
        with pytest.raises(DeviceError, match="no content today"):
            command(area, "supply", 0, 4, byte=7, fail=True)
        with pytest.raises(DriverError, match="page 2 is poisoned: forged"):
            prefault.populate(area)


# --- the device's partial last page


class Partial(LocalCommanded):
    def __init__(self) -> None:
        super().__init__(pages=4)
        self.length = 3 * PAGE_SIZE + 100

    def do_fill_last(self, pages: range) -> None:
        with self.pool.shoot_down(pages) as move:
            frames = move.frames(pages)
            frames[:] = b"x" * len(frames)


def test_the_rest_of_the_last_page_stays_zeros_when_it_is_shot_down() -> None:
    with mapped(Partial()) as (area, view):
        assert word(view, 3) == 4
        command(area, "fill_last", 3, 4)
        assert view[3 * PAGE_SIZE] == ord("x")
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(area.address + 3 * PAGE_SIZE)
            assert memory.read(PAGE_SIZE) == b"x" * 100 + bytes(PAGE_SIZE - 100)


# --- mkwrite


class ProtectsMeanwhile(LocalCommanded):
    def mkwrite(self, area: DeviceArea, page: int) -> None:
        super().mkwrite(area, page)
        if len(self.written) == 1:
            other = threading.Thread(target=self.pool.protect, args=(range(page, page + 1), "read"))
            other.start()
            other.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_protection_that_comes_while_a_store_is_allowed_counts(workers: int) -> None:
    with mapped(ProtectsMeanwhile(read_only=[2], allows=True, workers=workers)) as (area, view):
        view[2 * PAGE_SIZE + 100] = 77
        assert command(area, "written") == [2, 2]
        assert (word(view, 2), view[2 * PAGE_SIZE + 100]) == (3, 77)


class DiesInTheMiddleOfProtecting(LocalCommanded):
    def do_protect_and_die(self, pages: range) -> None:
        self.pool._isolation.write_protect = lambda run: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]
        self.pool.protect(pages, "read")


def test_a_server_killed_while_it_protects_leaves_pages_whose_protection_holds() -> None:
    with mapped(DiesInTheMiddleOfProtecting(allows=True)) as (area, view):
        view[2 * PAGE_SIZE + 100] = 77
        with pytest.raises(DeviceGoneError):
            command(area, "protect_and_die", 2, 3)
        view[2 * PAGE_SIZE + 100] = 78
        assert command(area, "written") == [2]


# --- clients that change their mappings


class RefusesSlowly(LocalCommanded):
    def mkwrite(self, area: DeviceArea, page: int) -> None:
        time.sleep(0.5)
        self.written.append(page)
        if len(self.written) == 1:
            raise PermissionError(errno.EACCES, "not yet")


def test_a_refusal_while_the_client_moves_its_memory_does_not_end_the_server() -> None:
    def store(say: Any) -> None:
        with mapped(RefusesSlowly(read_only=[2])) as (area, view):
            assert word(view, 2) == 3
            server = roles()["server"]
            # The kernel lets nobody change the page tables of the process until the server has read of the move.
            mover = threading.Timer(0.2, remap_last_page, (area.address + 15 * PAGE_SIZE,))
            mover.start()
            libc.memset(area.address + 2 * PAGE_SIZE + 100, 7, 1)  # without the GIL, unlike a store by Python
            mover.join()
            say(f"{view[2 * PAGE_SIZE + 100]} {roles()['server'] == server} {command(area, 'written')}")

    said, _ = ends_by(store)
    assert said == "7 True [2, 2]"


class ProtectsSlowly(LocalCommanded):
    def do_protect_slowly(self, pages: range) -> None:
        time.sleep(0.5)
        self.pool.protect(pages, "read")


def test_a_protection_that_fails_since_a_client_moves_its_memory_changes_nothing() -> None:
    def store(say: Any) -> None:
        with mapped(ProtectsSlowly()) as (area, view):
            prefault.populate(area)
            mover = threading.Timer(0.2, remap_last_page, (area.address + 15 * PAGE_SIZE,))
            mover.start()
            with pytest.raises(DeviceError, match="keeps changing its mappings") as caught:
                command(area, "protect_slowly", 0, 8)
            mover.join()
            command(area, "evict", 2, 3)  # its entry is made anew, with the protection that the page has
            view[2 * PAGE_SIZE + 100] = 7
            say(f"{caught.value.errno == errno.EBUSY} {view[2 * PAGE_SIZE + 100]} {command(area, 'written')}")

    said, _ = ends_by(store)
    assert said == "True 7 []"
