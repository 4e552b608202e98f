"""Shooting down: no client has an entry while pages are changed, no write is lost, and a failure changes nothing."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
import prefault.device
from prefault.errors import DeviceError, DeviceGoneError
from prefault.sizes import MIB, PAGE_SIZE
from support.children import Child
from support.commanded import Commanded, command
from support.oracle import present_bytes
from support.wardens import roles

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextlib.contextmanager
def mapped(**arguments: Any) -> Iterator[tuple[prefault.device.Area, memoryview]]:
    with prefault.device.map(Commanded(**arguments)) as area, area.memoryview() as view:
        yield area, view


def word(view: memoryview, page: int, size: int = PAGE_SIZE) -> int:
    return int.from_bytes(view[page * size : page * size + 8], "little")


@pytest.mark.parametrize("page_size", [PAGE_SIZE, 2 * MIB])
def test_new_content_takes_the_place_of_the_old_with_all_writes(page_size: int) -> None:
    with mapped(page_size=page_size) as (area, view):
        for page in (0, 1, 2, 5):
            assert word(view, page, page_size) == page + 1
        view[page_size + 8] = 99
        assert command(area, "shoot_down", 0, 8, add=100) == {"0": 1, "1": 2, "2": 3, "5": 6}
        assert [word(view, page, page_size) for page in (0, 1, 2, 5)] == [101, 102, 103, 106]
        assert view[page_size + 8] == 99
        assert word(view, 6, page_size) == 7, "a missing page stayed missing"
        assert [page for page, _ in command(area, "asked")] == [0, 1, 2, 5, 6]


def test_content_stays_where_nothing_is_written() -> None:
    with mapped() as (area, view):
        prefault.populate(area)
        view[3 * PAGE_SIZE + 8 : 3 * PAGE_SIZE + 16] = b"precious"
        before = bytes(view)
        command(area, "shoot_down", 0, 16)
        assert bytes(view) == before


def test_no_client_has_an_entry_meanwhile_and_a_touch_waits(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        prefault.device.serve(Commanded(workers=2), path),
        prefault.device.connect(path) as device,
        device.map() as area,
        Child(partial(_look_for_entries, path)) as child,
    ):
        prefault.populate(area)
        shooting = threading.Thread(target=command, args=(area, "shoot_down", 4, 12), kwargs={"sleep_s": 1.0, "add": 100})
        time.sleep(0.3)
        shooting.start()
        entries, first, seconds = child.result()
        shooting.join()
        assert entries == 0
        assert first == 105, "what a touch finds is the new content"
        assert seconds > 0.2


def _look_for_entries(path: str) -> tuple[int, int, float]:
    """Wait until the pages lose their entries; return how many there are then, and how long a touch took, and found."""
    with prefault.device.connect(path) as device, device.map() as area, area.memoryview() as view:
        prefault.populate(area, access="read")
        until = time.monotonic() + 10
        while time.monotonic() < until:
            entries = present_bytes(area.address + 4 * PAGE_SIZE, 8 * PAGE_SIZE) // PAGE_SIZE
            if entries < 8:
                break
        time.sleep(0.1)
        entries = present_bytes(area.address + 4 * PAGE_SIZE, 8 * PAGE_SIZE) // PAGE_SIZE
        began = time.monotonic()
        first = word(view, 4)
        return entries, first, time.monotonic() - began


def test_an_exception_restores_content_and_protection() -> None:
    with mapped() as (area, view):
        prefault.populate(area)
        view[8] = 77
        before = bytes(view)
        with pytest.raises(DeviceError, match="changed my mind") as caught:
            command(area, "shoot_down", 0, 16, add=100, access="read", drop=[3, 5], fail=True)
        assert caught.value.errno == errno.ECANCELED
        assert bytes(view) == before
        view[9] = 78
        assert command(area, "written") == []
        assert command(area, "ready", 0, 16) == [[0, 16]]


def test_the_protection_changes_with_the_commit() -> None:
    with mapped(allows=True) as (area, view):
        prefault.populate(area)
        command(area, "shoot_down", 0, 8, access="read")
        assert word(view, 2) == 3
        assert command(area, "written") == []
        view[2 * PAGE_SIZE + 8] = 5
        assert command(area, "written") == [2]
        command(area, "shoot_down", 0, 8, access="write")
        view[3 * PAGE_SIZE + 8] = 5
        assert command(area, "written") == [2]


def test_dropped_pages_are_asked_for_again() -> None:
    with mapped() as (area, view):
        prefault.populate(area)
        view[4 * PAGE_SIZE + 8] = 1
        asked = len(command(area, "asked"))
        command(area, "shoot_down", 0, 8, drop=[4, 6], add=100)
        assert command(area, "ready", 0, 16) == [[0, 4], [6, 16]]
        assert (word(view, 4), view[4 * PAGE_SIZE + 8]) == (5, 0)
        assert len(command(area, "asked")) == asked + 1
        assert word(view, 3) == 104


def test_a_server_killed_in_the_middle_leaves_the_content_as_it_was() -> None:
    with mapped() as (area, view):
        prefault.populate(area)
        view[3 * PAGE_SIZE + 8 : 3 * PAGE_SIZE + 16] = b"precious"
        before = bytes(view)
        server = roles()["server"]
        with pytest.raises(DeviceGoneError):
            command(area, "shoot_down", 0, 16, add=100, die=True)
        assert bytes(view) == before
        assert roles()["server"] != server
        view[3 * PAGE_SIZE + 8] = ord("P")
        assert command(area, "shoot_down", 0, 16, add=1)["3"] == 4
        assert bytes(view[3 * PAGE_SIZE + 8 : 3 * PAGE_SIZE + 16]) == b"Precious"


def test_a_device_that_cannot_be_restarted_keeps_the_content_as_well() -> None:
    device = Commanded()
    device.restartable = False
    device.recipe = lambda: None  # type: ignore[method-assign,assignment,return-value]
    with prefault.device.map(device) as area, area.memoryview() as view:
        prefault.populate(area)
        view[8] = 7
        before = bytes(view)
        with pytest.raises(DeviceGoneError):
            command(area, "shoot_down", 0, 16, add=100, die=True)
        assert bytes(view) == before


def test_a_thread_does_not_shoot_the_same_pages_down_twice() -> None:
    with mapped(timeout_s=5.0) as (area, view):
        prefault.populate(area)
        with pytest.raises(DeviceError, match="this thread shoots some of"):
            command(area, "shoot_down", 0, 16, nested=True)
        assert word(view, 3) == 4


@pytest.mark.parametrize("seconds", [0.5, pytest.param(8.0, marks=pytest.mark.stress)])
@pytest.mark.parametrize("how", ["shoot_down", "replace", "cancel", "evict", "writeback", "protect"])
@pytest.mark.parametrize("tracks_writes", [False, True])
def test_no_write_is_lost_while_pages_are_taken_away_again_and_again(
    how: str, tracks_writes: bool, seconds: float, tmp_path: Path
) -> None:
    """Processes and threads count in the same pages, each in words of its own, while the driver takes the pages."""
    path = str(tmp_path / "socket")
    device = Commanded(pages=8, workers=3, tracks_writes=tracks_writes, allows=True)
    with (
        prefault.device.serve(device, path),
        Child(partial(_count, path, 0, 1.3 * seconds)) as one,
        Child(partial(_count, path, 1, 1.3 * seconds)) as other,
        prefault.device.connect(path) as client,
        client.map() as area,
    ):
        rounds = command(area, "shake", 0, 8, seconds=seconds, how=how)
        rounds += command(area, "shake", 2, 5, seconds=0.3 * seconds, how="evict")
        counts = one.result() + other.result()
        found = area.ndarray("uint64").reshape(8, PAGE_SIZE // 8)
        assert rounds > 5
        assert min(counts) > 20
        assert [int(found[index % 8, 100 + index]) for index in range(16)] == counts
        del found


def _count(path: str, number: int, seconds: float) -> list[int]:
    """Increment eight words, in each page one, by two threads, for a while; return how often each was incremented."""
    counts = [0] * 8
    with prefault.device.connect(path) as client, client.map() as area:
        words = area.ndarray("uint64").reshape(8, PAGE_SIZE // 8)

        def increment(words: Any, pages: range) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for page in pages:
                    words[page, 100 + 8 * number + page] += numpy.uint64(1)
                    counts[page] += 1

        threads = [threading.Thread(target=increment, args=(words, range(first, first + 4))) for first in (0, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del words
    return counts


def test_without_room_for_the_copy_nothing_changes() -> None:
    """Beyond a limit on the size of files, the copy cannot be written."""
    with mapped() as (area, view):
        prefault.populate(area)
        view[8] = 7
        before = bytes(view)
        with pytest.raises(DeviceError) as caught:
            command(area, "shoot_down", 0, 16, add=1, largest_file=MIB)
        assert caught.value.errno == errno.EFBIG
        assert bytes(view) == before
        view[9] = 8
        assert command(area, "shoot_down", 0, 16, add=1)["3"] == 4
        assert (word(view, 3), view[8], view[9]) == (5, 7, 8)
