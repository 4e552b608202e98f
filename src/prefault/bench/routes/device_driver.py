"""The device that ``prefault bench device`` maps. Its pages cost little to supply, so that the times are the routes'."""

from __future__ import annotations

from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, Recipe, Supplied

CONTENT = 0xA5
"""The value of every byte of the device. Not 0: pages that were never supplied would look right."""


class BenchDevice(Device):
    """Read-only memory of one byte value."""

    writable = False

    def __init__(self, length: int, page_size: int) -> None:
        self.length = length
        self.page_size = page_size
        self._block = bytes([CONTENT]) * max(self.batch, page_size)

    def recipe(self) -> Recipe:
        """Ask for a fresh process, so that the server is no fork of the measuring process."""
        return Recipe(f"{__name__}:BenchDevice", {"length": self.length, "page_size": self.page_size})

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:  # noqa: ARG002
        """Fill one page."""
        frame = area.frame(page)
        frame[:] = self._block[: len(frame)]
        return None

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:  # noqa: ARG002
        """Fill many pages by one copy."""
        frames = area.frames(pages)
        frames[:] = self._block[: len(frames)]
