"""The device that ``prefault bench device`` maps: its pages cost little to supply, so that the routes are what is seen."""

from __future__ import annotations

from prefault.device.driver import Access, Device, DeviceArea, Recipe, Supplied

CONTENT = 0xA5
"""Every byte of the device. Not 0: pages that nobody supplied would look right."""


class BenchDevice(Device):
    """Read-only memory of one byte value."""

    writable = False

    def __init__(self, length: int, page_size: int) -> None:
        self.length = length
        self.page_size = page_size
        self._block = bytes([CONTENT]) * max(self.batch, page_size)

    def recipe(self) -> Recipe:
        """A fresh process: the server is then no copy of the one that measures."""
        return Recipe(f"{__name__}:BenchDevice", {"length": self.length, "page_size": self.page_size})

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:  # noqa: ARG002
        """One page."""
        frame = area.frame(page)
        frame[:] = self._block[: len(frame)]
        return None

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:  # noqa: ARG002
        """Many pages, by one copy."""
        frames = area.frames(pages)
        frames[:] = self._block[: len(frames)]
