"""Shoot-downs beside other threads' work on the same pages, at the end of the device, and after a crash."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import DeviceArea, Supplied
from prefault.errors import DeviceError, DeviceGoneError, DriverError
from prefault.sizes import PAGE_SIZE
from support.commanded import Commanded, LocalCommanded, command
from support.wardens import roles

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextlib.contextmanager
def mapped(device: Commanded) -> Iterator[tuple[prefault.device.Area, memoryview]]:
    with prefault.device.map(device) as area, area.memoryview() as view:
        yield area, view


def word(view: memoryview, page: int) -> int:
    return int.from_bytes(view[page * PAGE_SIZE : page * PAGE_SIZE + 8], "little")


# --- shoot-downs beside faults and populates


class ShootsDownAllTheTime(LocalCommanded):
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


class SuppliesWhatItShootsDown(LocalCommanded):
    def do_supply_inside(self, pages: range) -> None:
        with self.pool.shoot_down(pages):
            self.pool.supply(pages)


def test_a_thread_that_shoots_pages_down_cannot_supply_them() -> None:
    with mapped(SuppliesWhatItShootsDown()) as (area, view):
        with pytest.raises(DeviceError, match="this thread shoots some of"):
            command(area, "supply_inside", 0, 8)
        assert word(view, 2) == 3


class MovesBackSlowly(LocalCommanded):
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


class Counts(LocalCommanded):
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
