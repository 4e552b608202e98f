"""A populate is of all its pages: those that were there before are not evicted for the others."""

from __future__ import annotations

import pytest

import prefault
import prefault.device
from prefault.drivers import CompressedMemory
from prefault.errors import BackingFullError
from prefault.sizes import MIB, PAGE_SIZE

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_a_populate_beyond_the_capacity_is_refused_also_where_some_is_there() -> None:
    with prefault.device.map(CompressedMemory("64 MiB", frames="1 MiB")) as area:
        prefault.populate(area, length="1 MiB")
        with pytest.raises(BackingFullError, match="512 pages were asked for, and the device's capacity is 256"):
            prefault.populate(area, length="2 MiB")
        with pytest.raises(BackingFullError):
            prefault.lock(area, length="2 MiB")
        assert prefault.residency(area, length="1 MiB").present_bytes == MIB


def test_pages_of_the_same_call_are_spared() -> None:
    with prefault.device.map(CompressedMemory("64 MiB", frames="1 MiB")) as area:
        for start in ("8 MiB", "512 KiB", "0"):  # the hand comes to the pages of the last two before those of the first
            prefault.populate(area, offset=start, length="512 KiB")
        prefault.populate(area, length="1 MiB")
        assert prefault.residency(area, length="1 MiB").present_bytes == MIB


def test_locked_device_memory_can_be_discarded() -> None:
    with prefault.device.map(CompressedMemory("4 MiB", frames="1 MiB")) as area, area.memoryview() as view:
        view[0] = 7
        prefault.lock(area, length=PAGE_SIZE)
        prefault.discard(area, length=PAGE_SIZE)
        assert view[0] == 0
