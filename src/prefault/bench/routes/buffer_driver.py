"""Buffer objects without fault-around: what fault-around is compared with."""

from __future__ import annotations

from prefault.device.driver import FaultAround, Recipe
from prefault.drivers.buffers.buffer_device import BufferObjects
from prefault.sizes import PAGE_SIZE


class PageByPage(BufferObjects):
    """Buffer objects whose faults bring in one page."""

    fault_around = FaultAround(PAGE_SIZE, PAGE_SIZE)

    def recipe(self) -> Recipe:
        """Return a recipe: the server is a fresh process."""
        return Recipe(f"{__name__}:PageByPage", super().recipe().arguments)
