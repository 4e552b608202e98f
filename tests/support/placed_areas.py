"""Areas of devices at chosen addresses: inside of sparse memory, or side by side."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefault._kernel import mman
from prefault.device import DeviceClient, opening
from prefault.device.client.page_provider import AreaPageProvider
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea
from prefault.memory.backings import OpenedBacking
from prefault.sizes import PAGE_SIZE
from support.devices import Failing

_RESERVED = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE


class Counted(Failing):
    """Writable :class:`Failing`, which counts its calls in memory that its server shares with us."""

    def __init__(self, pages: int = 32, *, bad: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(pages, bad=bad, writable=True, **options)
        self._counts = mmap.mmap(-1, PAGE_SIZE)

    def _count(self, at: int, by: int) -> None:
        (before,) = struct.unpack_from("Q", self._counts, at * 8)
        struct.pack_into("Q", self._counts, at * 8, before + by)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Calls of fault, calls of populate, pages asked of populate, pages discarded."""
        return struct.unpack_from("4Q", self._counts)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        self._count(0, 1)
        super().fault(area, page, access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        self._count(1, 1)
        self._count(2, len(pages))
        super().populate(area, pages, access)

    def discard(self, area: DeviceArea, pages: range) -> None:
        self._count(3, len(pages))


class _PlacedArea(AreaPageProvider):
    """An area that is mapped over whatever lies at ``place``."""

    place = 0

    def map(self, length: int, opened: OpenedBacking, *, shared: bool, prot: int, **_: Any) -> None:
        assert shared
        assert opened.fd is not None
        flags = opened.flags | mman.MAP_SHARED | mman.MAP_NORESERVE | mman.MAP_FIXED
        self.address = mman.mmap(self.place, length, prot, flags, opened.fd, opened.offset)
        self.mapped, self.file_offset = length, opened.offset

    def _unmap_now(self) -> None:
        if self.mapped:  # the addresses are those of other memory: nothing else may come there
            mman.mmap(self.address, self.mapped, mman.PROT_NONE, _RESERVED | mman.MAP_FIXED)
            self.mapped = 0
        super()._unmap_now()


@contextmanager
def placed(
    device: Device | DeviceClient, address: int, length: int, offset: int = 0, access: Access = "write"
) -> Iterator[AreaPageProvider]:
    """Map a part of a device at an address, over what lies there; the addresses stay reserved afterwards."""
    if isinstance(device, DeviceClient):
        connection = device._connection
        assert connection.acquire()
    else:
        connection = opening._acquire_private(device)
    area = _PlacedArea(connection, offset, access, track_dirty=False, at_end=connection.release)
    area.place = address
    try:
        area.attach(length, None)
        yield area
    finally:
        area.unmap()


@contextmanager
def room(pages: int) -> Iterator[int]:
    """Reserve addresses of private anonymous memory, readable and writable, and return the first."""
    address = mman.mmap(0, pages * PAGE_SIZE, mman.PROT_READ | mman.PROT_WRITE, _RESERVED)
    try:
        yield address
    finally:
        mman.munmap(address, pages * PAGE_SIZE)


def buffer_at(address: int, length: int) -> ctypes.Array[ctypes.c_char]:
    """Return a buffer of whatever memory lies at an address."""
    return (ctypes.c_char * length).from_address(address)
