"""Devices that sparse memory takes its blocks from."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy

import prefault.device
from prefault.device import opening
from prefault.device.device_pool import Access
from prefault.device.driver import ZERO, Device, DeviceArea, Supplied
from prefault.device.process import launching, serving
from prefault.sizes import PAGE_SIZE

LOADED = (numpy, opening, launching, serving)
"""What device memory loads lazily is loaded before tests count mappings."""


class Blocks(Device):
    """Blocks of zeros from a pool of ``capacity_blocks``; counts its calls in memory that its server shares with us."""

    restartable = True

    def __init__(
        self, blocks: int = 64, *, page_size: int = PAGE_SIZE, capacity_blocks: int | None = None, bad: tuple[int, ...] = ()
    ) -> None:  # fmt: skip
        self.length = blocks * page_size
        self.page_size = page_size
        self.capacity = None if capacity_blocks is None else capacity_blocks * page_size
        self.bad = bad
        self._counts = mmap.mmap(-1, PAGE_SIZE)

    def _count(self, at: int, by: int) -> None:
        (before,) = struct.unpack_from("Q", self._counts, at * 8)
        struct.pack_into("Q", self._counts, at * 8, before + by)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Calls of fault, calls of populate, blocks asked of populate, blocks discarded."""
        return struct.unpack_from("4Q", self._counts)

    def _check(self, pages: range) -> None:
        for page in pages:
            if page in self.bad:
                raise ValueError(f"block {page} is worn out")

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        self._count(0, 1)
        self._check(range(page, page + 1))
        return ZERO

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        self._count(1, 1)
        self._count(2, len(pages))
        self._check(pages)

    def discard(self, area: DeviceArea, pages: range) -> None:
        self._count(3, len(pages))


@contextmanager
def opened(device: Device, directory: Path) -> Iterator[prefault.device.DeviceClient]:
    """Serve a device, and connect to it."""
    with prefault.device.serve(device, directory / "device") as server, prefault.device.connect(server.path) as client:
        yield client


def frames_of(client: object) -> int:
    """Return the descriptor of the frames of a connected device."""
    assert isinstance(client, prefault.device.DeviceClient)
    return client._connection.frames
