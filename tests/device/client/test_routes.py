"""Requirement C3: every route that asks for population reaches the one hook, and no route faults pages in one by one."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import Area, DeviceArea
from prefault.device.device_pool import Access
from prefault.sizes import PAGE_SIZE
from support import oracle
from support.devices import Pattern, expected

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES = 32


class Counting(Pattern):
    """Counts what is asked of it, in memory that its server shares with us."""

    def __init__(self) -> None:
        super().__init__(PAGES, writable=True)
        self._counts = mmap.mmap(-1, PAGE_SIZE)

    def _count(self, at: int, by: int) -> None:
        (before,) = struct.unpack_from("Q", self._counts, at * 8)
        struct.pack_into("Q", self._counts, at * 8, before + by)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Calls of fault, calls of populate, pages that populate supplied."""
        return struct.unpack_from("3Q", self._counts)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        self._count(0, 1)
        super().fault(area, page, access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        self._count(1, 1)
        self._count(2, len(pages))
        super().populate(area, pages, access)


def _of_view(area: Area) -> None:
    prefault.populate(area.ndarray("uint32"))


def _of_view_without_area(area: Area) -> None:
    prefault.populate(area.memoryview()[1:-1])


ROUTES: dict[str, Callable[[Area], Any]] = {
    "area.populate": lambda area: area.populate(),
    "prefault.populate of the area": prefault.populate,
    "prefault.populate readable": lambda area: prefault.populate(area, access="read"),
    "prefault.populate of an array": _of_view,
    "prefault.populate of a part of a view": _of_view_without_area,
    "area.protect": lambda area: area.protect("read", populate=True),
    "area.lock": lambda area: area.lock(),
    "prefault.lock": lambda area: prefault.lock(area),  # type: ignore[attr-defined,unused-ignore]
    "area.read": lambda area: area.read(),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_one_call_of_the_hook(route: str) -> None:
    device = Counting()
    with prefault.device.map(device) as area:
        ROUTES[route](area)
        assert device.counts == (0, 1, PAGES)
        assert all(oracle.present(area.address, len(area)))
        assert area.stats().faults == 0
        assert bytes(area.memoryview()) == b"".join(expected(device, page) for page in range(PAGES))


def test_at_map_time() -> None:
    device = Counting()
    with prefault.device.map(device, populate=True) as area:
        assert device.counts == (0, 1, PAGES)
        assert area.stats().faults == 0
        assert all(oracle.present(area.address, len(area)))


def test_without_populate_a_touch_supplies_one_page() -> None:
    device = Counting()
    with prefault.device.map(device) as area:
        assert device.counts == (0, 0, 0)
        assert area.memoryview()[5 * PAGE_SIZE] == expected(device, 5)[0]
        assert device.counts == (1, 0, 0)
        assert oracle.present(area.address, len(area)) == [page == 5 for page in range(PAGES)]


def test_populate_requests_absent_pages_only() -> None:
    device = Counting()
    with prefault.device.map(device) as area:
        for page in (0, 7, 8, 31):
            assert area.memoryview()[page * PAGE_SIZE] == expected(device, page)[0]
        result = prefault.populate(area)
        assert (result.bytes, result.present_bytes) == ((PAGES - 4) * PAGE_SIZE, 4 * PAGE_SIZE)
        faults, _, pages = device.counts
        assert (faults, pages) == (4, PAGES - 4)
        assert prefault.populate(area).bytes == 0
        assert device.counts[2] == PAGES - 4


def test_a_view_reaches_the_hook_when_the_area_is_forgotten() -> None:
    device = Counting()
    array = prefault.device.map(device).ndarray()
    result = prefault.populate(array, offset=PAGE_SIZE, length=PAGE_SIZE)
    assert result.method == "device"
    assert device.counts == (0, 1, 1)
    del array


def test_what_another_area_brought_in_is_only_mapped() -> None:
    device = Counting()
    with prefault.device.map(device, populate=True), prefault.device.map(device, populate=True) as other:
        assert device.counts == (0, 1, PAGES)
        assert all(oracle.present(other.address, len(other)))


def test_discarding_everything_takes_a_last_page_that_is_only_partly_there() -> None:
    device = Pattern(4, tail=1000)
    with prefault.device.map(device, populate=True) as area:
        result = area.discard()
        assert (result.bytes, result.freed_bytes) == (4 * PAGE_SIZE, 4 * PAGE_SIZE)
        assert not any(oracle.present(area.address, 4 * PAGE_SIZE))
        assert area.discard(length=PAGE_SIZE - 1).bytes == 0


def test_discard_gives_back_and_the_next_touch_asks_again() -> None:
    device = Counting()
    with prefault.device.map(device, populate=True) as area, prefault.device.map(device, populate=True) as other:
        result = prefault.discard(area, offset=PAGE_SIZE + 1, length=3 * PAGE_SIZE)  # inward: two pages
        assert (result.bytes, result.freed_bytes) == (2 * PAGE_SIZE, 2 * PAGE_SIZE)
        lost = [page in (2, 3) for page in range(PAGES)]
        assert oracle.present(area.address, len(area)) == [not gone for gone in lost]
        assert oracle.present(other.address, len(other)) == [not gone for gone in lost]
        assert bytes(other.memoryview()) == b"".join(expected(device, page) for page in range(PAGES))
        assert device.counts[0] == 2
