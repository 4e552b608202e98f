"""A device area without a server: frames in an anonymous mmap, for testing a driver by itself."""

from __future__ import annotations

import mmap
import os
from typing import Any

from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea


class FakeArea(DeviceArea):
    """An area over a whole device, whose pages :meth:`fill` and :meth:`get` have the driver supply, as the server would."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.offset = 0
        self.length = device.length
        self.access: Access = "read"
        self.pid, self.uid = os.getpid(), os.getuid()
        self._unit = device.page_size
        self._pages = -(-device.length // self._unit)
        self._memory = mmap.mmap(-1, self._pages * self._unit)

    @property
    def pages(self) -> range:
        return range(self._pages)

    def frame(self, page: int) -> memoryview:
        return self.frames(range(page, page + 1))

    def frames(self, pages: range) -> memoryview:
        assert 0 <= pages.start < pages.stop <= self._pages
        return memoryview(self._memory)[pages.start * self._unit : pages.stop * self._unit]

    def ready(self, pages: range) -> list[range]:
        return [pages]

    def evict(self, pages: range, save: Any = None) -> bytes:
        raise NotImplementedError

    def fill(self, pages: range | None = None) -> None:
        """Have the driver populate these pages, in one call."""
        self.device.populate(self, self.pages if pages is None else pages, "read")

    def content(self, start: int, stop: int) -> bytes:
        """Return bytes of the frames as they are."""
        return self._memory[start:stop]

    def get(self, start: int, stop: int) -> bytes:
        """Fill the pages of ``[start, stop)``, and return their bytes."""
        self.fill(range(start // self._unit, -(-stop // self._unit)))
        return self.content(start, stop)

    def __enter__(self) -> FakeArea:
        self.device.open(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close(self)
        self.device.stop()
        self._memory.close()  # refuses if the driver kept a view
