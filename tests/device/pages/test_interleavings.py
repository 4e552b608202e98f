"""What happens in the middle of the pool's operations: other threads, other operations, and the death of the server."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
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
from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import DeviceArea, Supplied
from prefault.errors import DeviceError, DeviceGoneError, DriverError
from prefault.sizes import PAGE_SIZE
from support.children import Child
from support.commanded import Commanded, command
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


class Local(Commanded):
    """A commanded device of the test's own: its server is a fork, which needs no recipe."""

    def recipe(self) -> None:  # type: ignore[override]
        return None


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


# --- poison


class PoisonsInTheMiddle(Local):
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


class PoisonsWhatItSupplies(Local):
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


class Partial(Local):
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


class ProtectsMeanwhile(Local):
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


class DiesInTheMiddleOfProtecting(Local):
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


class RefusesSlowly(Local):
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


# --- shoot-downs beside faults and populates


class ShootsDownAllTheTime(Local):
    """Shoots its pages down, and drops them, again and again; notes pages that it is asked for meanwhile."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inside = self.over = False
        self.asked_inside: list[int] = []
        self.rounds = 0

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        self.thread = threading.Thread(target=self._shoot, daemon=True)
        self.thread.start()

    def _shoot(self) -> None:
        while not self.over:
            with contextlib.suppress(OSError), self.pool.shoot_down(self.pool.pages) as move:
                self.inside = True
                time.sleep(0.001)
                move.drop(self.pool.pages)
                self.rounds += 1
                self.inside = False
            time.sleep(0.0005)

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if self.inside:
            self.asked_inside.append(page)
        return super().fault(area, page, access)

    def do_asked_inside(self, pages: range) -> Any:
        return [self.rounds, self.asked_inside]

    def stop(self) -> None:
        self.over = True
        self.thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_driver_is_not_asked_for_pages_that_are_shot_down(workers: int) -> None:
    with mapped(ShootsDownAllTheTime(pages=4, workers=workers)) as (area, view):
        until = time.monotonic() + 3
        while time.monotonic() < until:
            prefault.populate(area)
            assert word(view, 2) in (0, 3)
        rounds, asked = command(area, "asked_inside")
        assert rounds > 20
        assert asked == []


def test_pages_are_not_supplied_while_another_thread_shoots_them_down() -> None:
    with mapped(Commanded(workers=2)) as (area, view):
        assert word(view, 2) == 3
        shooting = threading.Thread(target=command, args=(area, "shoot_down", 0, 8), kwargs={"sleep_s": 1.0})
        shooting.start()
        time.sleep(0.4)
        began = time.monotonic()
        assert command(area, "supply", 4, 5, byte=1) == 1
        assert time.monotonic() - began > 0.2
        shooting.join()
        assert word(view, 4) == 0x0101010101010101


class SuppliesWhatItShootsDown(Local):
    def do_supply_inside(self, pages: range) -> None:
        with self.pool.shoot_down(pages):
            self.pool.supply(pages)


def test_a_thread_that_shoots_pages_down_cannot_supply_them() -> None:
    with mapped(SuppliesWhatItShootsDown()) as (area, view):
        with pytest.raises(DeviceError, match="this thread shoots some of"):
            command(area, "supply_inside", 0, 8)
        assert word(view, 2) == 3


class MovesBackSlowly(Local):
    """Another thread of the driver is in the middle of copying content back while the device ends."""

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        frames = pool._frames  # type: ignore[attr-defined]
        copy_back, forget_aside = frames.copy_back, frames.forget_aside
        main = threading.main_thread()
        self.copying, self.forgotten = threading.Event(), threading.Event()

        def slowly(pages: range) -> None:
            if threading.current_thread() is not main:
                self.copying.set()
                self.forgotten.wait(1.0)
            copy_back(pages)

        def forget(pages: range) -> None:
            forget_aside(pages)
            if threading.current_thread() is main:
                self.forgotten.set()
                time.sleep(0.3)

        frames.copy_back, frames.forget_aside = slowly, forget

    def do_shoot_down_in_a_thread(self, pages: range) -> None:
        def shoot() -> None:
            with self.pool.shoot_down(pages):
                pass

        threading.Thread(target=shoot, daemon=True).start()
        self.copying.wait()


def test_the_end_of_a_device_waits_for_content_that_is_being_put_back(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = prefault.device.serve(MovesBackSlowly(), path)
    with prefault.device.connect(path) as device, device.map() as area, area.memoryview() as view:
        prefault.populate(area)
        view[2 * PAGE_SIZE + 8] = 77
        command(area, "shoot_down_in_a_thread", 0, 16)
        server.close()
        view[3 * PAGE_SIZE + 8] = 78
        assert [word(view, page) for page in range(16)] == list(range(1, 17))
        assert (view[2 * PAGE_SIZE + 8], view[3 * PAGE_SIZE + 8]) == (77, 78)


# --- many pages


class Counts(Local):
    def do_memory_of_flags(self, pages: range) -> int:
        return os.fstat(self.pool._frames.states_fd).st_blocks * 512  # type: ignore[attr-defined]


def test_flags_of_pages_that_were_never_touched_take_no_memory() -> None:
    with mapped(Counts(pages=1 << 28, tracks_writes=True)) as (area, view):
        view[8] = 1
        command(area, "poison", 5, 6)
        before = command(area, "memory_of_flags")
        prefault.discard(area)
        command(area, "protect", 0, 1 << 28, access="write")
        assert command(area, "memory_of_flags") <= before
        assert word(view, 0) == 1


# --- a warden without memory


def test_pages_for_which_there_is_no_memory_after_a_crash_are_poisoned_and_all_else_goes_on() -> None:
    with mapped(Commanded()) as (area, view):
        prefault.populate(area)
        view[9 * PAGE_SIZE + 8] = 77
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(roles()["warden"], resource.RLIMIT_FSIZE, (PAGE_SIZE, most))
        with pytest.raises(DeviceGoneError):
            command(area, "shoot_down", 4, 8, die=True)
        assert command(area, "ready", 0, 16) == [[0, 4], [8, 16]]
        assert (word(view, 9), view[9 * PAGE_SIZE + 8]) == (10, 77)
        with pytest.raises(DriverError, match="page 4 is poisoned"):
            prefault.populate(area)
