"""What a driver does to its pages: supply, protect, poison, write back; and its answers READ_ONLY and RETRY."""

from __future__ import annotations

import contextlib
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
from prefault.errors import DeviceError, DriverError, PopulateInterrupted
from prefault.sizes import MIB, PAGE_SIZE
from support.children import TIMEOUT_S, Child
from support.commanded import Commanded, command
from support.device_server import ends_by
from support.pools import wait_until
from support.wardens import roles

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextlib.contextmanager
def mapped(**arguments: Any) -> Iterator[tuple[prefault.device.Area, memoryview]]:
    with prefault.device.map(Commanded(**arguments)) as area, area.memoryview() as view:
        yield area, view


def word(view: memoryview, page: int, size: int = PAGE_SIZE) -> int:
    return int.from_bytes(view[page * size : page * size + 8], "little")


def later(seconds: float, function: Any, *arguments: Any, **more: Any) -> threading.Thread:
    thread = threading.Timer(seconds, function, arguments, more)
    thread.start()
    return thread


def dies_by_a_touch(page: int, write: bool, **arguments: Any) -> tuple[str, int]:
    """Return what a child says that maps the device and touches a page, and how it ends."""

    def touch(say: Any) -> None:
        with mapped(**arguments) as (_, view):
            say("mapped")
            if write:
                view[page * PAGE_SIZE] = 1
            else:
                say(str(view[page * PAGE_SIZE]))
            say("alive")

    return ends_by(touch)


def kill_the_server(area: prefault.device.Area) -> None:
    """Kill the server, and wait for the next: it alone answers."""
    os.kill(roles()["server"], signal.SIGKILL)
    area.stats()


# --- supply


def test_pages_that_the_driver_supplies_unasked_cost_no_call_of_fault() -> None:
    with mapped() as (area, view):
        assert word(view, 3) == 4
        assert command(area, "supply", 0, 8, byte=7) == 7, "page 3 was there"
        assert [word(view, page) for page in (0, 3, 7)] == [0x0707070707070707, 4, 0x0707070707070707]
        assert command(area, "asked") == [[3, "read"]]
        assert command(area, "supply", 8, 9) == 1
        assert word(view, 8) == 0
        assert prefault.residency(area).present_bytes == 4 * PAGE_SIZE, "supplied, and mapped when it is touched"


def test_a_supply_that_fails_leaves_the_pages_missing() -> None:
    with mapped() as (area, view):
        with pytest.raises(DeviceError, match="no content today"):
            command(area, "supply", 0, 4, byte=7, fail=True)
        assert command(area, "ready", 0, 16) == []
        assert word(view, 2) == 3


def test_a_supply_beyond_the_capacity_is_refused_with_the_numbers() -> None:
    with mapped(capacity_pages=4) as (area, view):
        assert word(view, 9) == 10
        with pytest.raises(DeviceError, match="capacity of 4 pages has no room for 8 more: 1 are taken") as caught:
            command(area, "supply", 0, 8)
        assert caught.value.errno == errno.ENOSPC
        assert command(area, "ready", 0, 16) == [[9, 10]]


# --- RETRY


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["supply", "retry"])
def test_a_fault_that_is_to_be_retried_waits_and_the_server_does_not(how: str, workers: int, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        prefault.device.serve(Commanded(retries=[5], workers=workers), path),
        # The thread of a fault holds the GIL while it waits: another process touches the page.
        Child(partial(_read_word, path, 5)) as child,
        prefault.device.connect(path) as device,
        device.map() as area,
    ):
        wait_until(lambda: [5, "read"] in command(area, "asked"), "the driver is asked for page 5")
        with area.memoryview() as view:
            assert word(view, 4) == 5, "others are served"
        assert not child.ended()
        if how == "supply":
            command(area, "supply", 5, 6, byte=1)
        else:
            command(area, "retry", 5, 6, retries=[])
        assert child.result() == (0x0101010101010101 if how == "supply" else 6)


def _read_word(path: str, page: int) -> int:
    with prefault.device.connect(path) as device, device.map() as area, area.memoryview() as view:
        return word(view, page)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["supply", "retry"])
def test_a_populate_waits_for_pages_that_are_to_be_retried(how: str, workers: int) -> None:
    with mapped(retries=[5, 6], workers=workers) as (area, view):
        if how == "supply":
            timer = later(0.2, command, area, "supply", 5, 7, byte=9)
        else:
            timer = later(0.2, command, area, "retry", 5, 7, retries=[])
        began = time.monotonic()
        assert prefault.populate(area, headroom="ignore").bytes == 16 * PAGE_SIZE
        assert time.monotonic() - began >= 0.15
        timer.join()
        assert (word(view, 5), word(view, 6)) == ((0x0909090909090909,) * 2 if how == "supply" else (6, 7))
        assert word(view, 7) == 8


def test_a_retry_that_is_never_supplied_fails_in_the_time_of_a_call() -> None:
    with mapped(retries=[5], timeout_s=0.5) as (area, _):
        with pytest.raises(
            DriverError, match=r"page 5 was not supplied in 0\.5 s after the driver answered RETRY"
        ) as caught:
            prefault.populate(area)
        assert caught.value.errno == errno.ETIMEDOUT
        assert command(area, "ready", 0, 16), "the others were supplied"
    said, status = dies_by_a_touch(5, False, retries=[5], timeout_s=0.5)
    assert said == "mapped"
    assert -status == signal.SIGBUS


def test_a_populate_that_waits_for_a_retry_is_interrupted() -> None:
    with mapped(retries=[5]) as (area, _):
        later(0.3, os.kill, os.getpid(), signal.SIGINT)
        began = time.monotonic()
        with pytest.raises((PopulateInterrupted, KeyboardInterrupt)):
            prefault.populate(area)
        assert time.monotonic() - began < TIMEOUT_S / 3
        command(area, "retry", 0, 16, retries=[])
        assert prefault.populate(area).bytes


# --- READ_ONLY, mkwrite and protect


def test_read_only_pages_are_read_and_a_store_asks_the_driver() -> None:
    with mapped(read_only=[2], allows=True) as (area, view):
        assert word(view, 2) == 3
        assert command(area, "written") == []
        view[2 * PAGE_SIZE + 100] = 77
        assert (word(view, 2), view[2 * PAGE_SIZE + 100]) == (3, 77)
        assert command(area, "written") == [2]
        view[2 * PAGE_SIZE + 101] = 78
        view[3 * PAGE_SIZE] = 1
        assert command(area, "written") == [2], "asked once, and not for other pages"


def test_a_first_touch_that_writes_to_a_read_only_page_asks_as_well() -> None:
    with mapped(read_only=[2], allows=True) as (area, view):
        view[2 * PAGE_SIZE + 100] = 77
        assert word(view, 2) == 3
        assert command(area, "written") == [2]


@pytest.mark.parametrize("how", ["READ_ONLY", "protect", "protected before it is supplied"])
def test_a_refused_store_is_sigbus_and_others_still_read_the_page(how: str) -> None:
    def store(say: Any) -> None:
        with mapped(read_only=[2] if how == "READ_ONLY" else []) as (area, view):
            if how == "protect":
                assert word(view, 2) == 3
            if how != "READ_ONLY":
                command(area, "protect", 2, 3, access="read")
            assert word(view, 2) == 3
            command(area, "allow", allows=False)
            with prefault.device.map(area_device(area)) as other, other.memoryview() as seen:
                assert word(seen, 2) == 3
            say("reads")
            view[2 * PAGE_SIZE] = 9
            say("wrote")

    said, status = ends_by(store)
    assert said == "reads"
    assert -status == signal.SIGBUS


def area_device(area: prefault.device.Area) -> Any:
    device = area._connection.device
    assert device is not None
    return device


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("supplied", [False, True])
def test_a_populate_for_writing_asks_for_read_only_pages(supplied: bool, workers: int) -> None:
    device = Commanded(read_only=[2, 3, 9], allows=True, workers=workers)
    with prefault.device.map(device) as other, prefault.device.map(device) as area, area.memoryview() as view:
        if supplied:
            prefault.populate(other, access="read")
        assert command(area, "written") == []
        prefault.populate(area, access="write")
        assert sorted(command(area, "written")) == [2, 3, 9]
        faults = area.stats().faults
        for page in range(16):
            view[page * PAGE_SIZE + 8] = page
        assert area.stats().faults == faults, "every page is writable without a fault"


def test_a_populate_for_writing_fails_where_the_driver_refuses() -> None:
    with mapped(read_only=[2]) as (area, view):
        with pytest.raises(DriverError, match="page 2 is read-only"):
            prefault.populate(area, access="write")
        assert word(view, 2) == 3
        prefault.populate(area, access="read")


def test_protection_applies_to_entries_that_exist_and_ends_again() -> None:
    with mapped(allows=True) as (area, view):
        view[0] = 50
        command(area, "protect", 0, 4, access="read")
        view[1] = 51
        assert command(area, "written") == [0], "an entry that could be written was protected"
        command(area, "protect", 0, 4, access="read")
        command(area, "protect", 0, 4, access="write")
        view[2] = 52
        view[PAGE_SIZE] = 53
        assert command(area, "written") == [0]
        assert bytes(view[:3]) == bytes([50, 51, 52])


def test_protection_survives_eviction_and_the_server() -> None:
    with mapped(allows=True) as (area, view):
        assert word(view, 1) == 2
        command(area, "protect", 0, 2, access="read")
        command(area, "evict", 0, 2)
        assert word(view, 1) == 2
        kill_the_server(area)
        view[PAGE_SIZE + 9] = 9
        view[9] = 9
        assert command(area, "written") == [1, 0]


# --- dirty pages and writeback


def test_pages_are_dirty_after_a_write_and_clean_after_writeback() -> None:
    with mapped(tracks_writes=True) as (area, view):
        prefault.populate(area)
        assert command(area, "dirty", 0, 16) == []
        view[5 * PAGE_SIZE] = 1
        view[6 * PAGE_SIZE] = 1
        view[9 * PAGE_SIZE] = 1
        assert command(area, "dirty", 0, 16) == [[5, 7], [9, 10]]
        assert command(area, "writeback", 0, 9) == 2
        assert command(area, "saved") == [5, 6]
        assert command(area, "dirty", 0, 16) == [[9, 10]]
        view[5 * PAGE_SIZE] = 2
        assert command(area, "dirty", 0, 16) == [[5, 6], [9, 10]], "written again, without having been taken away"
        assert command(area, "ready", 0, 16) == [[0, 16]]


def test_a_first_touch_that_writes_makes_a_page_dirty() -> None:
    with mapped(tracks_writes=True) as (area, view):
        assert word(view, 1) == 2
        view[2 * PAGE_SIZE] = 1
        assert command(area, "dirty", 0, 16) == [[2, 3]]


def test_eviction_saves_dirty_pages_only_where_writes_are_tracked() -> None:
    with mapped(tracks_writes=True) as (area, view):
        prefault.populate(area)
        view[5 * PAGE_SIZE + 8] = 1
        command(area, "evict", 0, 16)
        assert command(area, "saved") == [5]
        assert command(area, "ready", 0, 16) == []
        assert view[5 * PAGE_SIZE + 8] == 1
        assert command(area, "dirty", 0, 16) == []


def test_dirty_pages_are_known_to_the_next_server() -> None:
    with mapped(tracks_writes=True) as (area, view):
        prefault.populate(area)
        view[5 * PAGE_SIZE] = 1
        kill_the_server(area)
        assert command(area, "dirty", 0, 16) == [[5, 6]]
        view[6 * PAGE_SIZE] = 1
        assert command(area, "dirty", 0, 16) == [[5, 7]]


def test_without_tracking_all_supplied_pages_count_as_dirty() -> None:
    with mapped() as (area, view):
        assert word(view, 1) == 2
        assert command(area, "dirty", 0, 16) == [[1, 2]]
        assert command(area, "writeback", 0, 16) == 1


# --- poison


def test_poisoned_pages_are_errors_with_the_reason_until_they_are_supplied() -> None:
    with mapped() as (area, view):
        assert word(view, 2) == 3
        command(area, "poison", 2, 4, reason="the MAC of the page is wrong")
        for page in (2, 3):
            with pytest.raises(DriverError, match=f"page {page} is poisoned: the MAC of the page is wrong") as caught:
                prefault.populate(area, offset=page * PAGE_SIZE, length=PAGE_SIZE)
            assert caught.value.errno == 133
        assert word(view, 4) == 5
        assert command(area, "asked") == [[2, "read"], [4, "read"]]
        assert command(area, "supply", 2, 3, byte=1) == 1
        assert word(view, 2) == 0x0101010101010101


def test_poison_survives_the_server() -> None:
    with mapped() as (area, view):
        assert word(view, 2) == 3
        command(area, "poison", 2, 3)
        os.kill(roles()["server"], signal.SIGKILL)
        with pytest.raises(DriverError, match="page 2 is poisoned"):
            prefault.populate(area)


def test_a_discard_ends_the_poison_also_where_the_page_was_touched() -> None:
    with mapped() as (area, view), a_pipe() as (reader, writer):
        page = view[2 * PAGE_SIZE : 2 * PAGE_SIZE + 8]
        assert word(view, 2) == 3
        command(area, "poison", 2, 3)
        with pytest.raises(OSError, match="Bad address"):  # the kernel touches the page for us, and nobody dies
            os.write(writer, page)
        prefault.discard(area, offset=2 * PAGE_SIZE, length=PAGE_SIZE)
        os.write(writer, page)
        assert os.read(reader, 8) == (3).to_bytes(8, "little")
        page.release()


@contextlib.contextmanager
def a_pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_a_touch_of_a_poisoned_page_is_sigbus() -> None:
    def touch(say: Any) -> None:
        with mapped() as (area, view):
            assert word(view, 2) == 3
            command(area, "poison", 2, 3)
            say("poisoned")
            say(str(word(view, 2)))

    said, status = ends_by(touch)
    assert said == "poisoned"
    assert -status == signal.SIGBUS


def test_pages_of_two_mib_are_protected_and_poisoned_whole() -> None:
    with mapped(pages=4, page_size=2 * MIB, allows=True) as (area, view):
        view[2 * MIB + 12345] = 1
        command(area, "protect", 1, 2, access="read")
        view[2 * MIB + PAGE_SIZE] = 2
        assert command(area, "written") == [1]
        assert view[2 * MIB + 12345] == 1
        command(area, "poison", 1, 2)
        with pytest.raises(DriverError, match="page 1 is poisoned"):
            prefault.populate(area)


@pytest.mark.parametrize("what", ["protect", "writeback", "shoot_down"])
def test_a_writable_device_that_does_not_evict_may_not_act_on_pages(what: str) -> None:
    device = Commanded()
    device.evicts = False
    device.recipe = lambda: None  # type: ignore[method-assign,assignment,return-value]
    more = {"access": "read"} if what == "protect" else {}
    with prefault.device.map(device) as area, area.memoryview() as view:
        assert word(view, 1) == 2
        with pytest.raises(DeviceError, match="declare evicts = True"):
            command(area, what, 0, 16, **more)
        assert word(view, 1) == 2
