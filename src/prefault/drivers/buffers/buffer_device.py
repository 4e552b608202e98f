"""The device of buffer objects."""

from __future__ import annotations

import os

from prefault.device import ClientProcess, Recipe
from prefault.drivers.buffers.buffer_manager import BufferManager
from prefault.drivers.buffers.buffer_requests import BufferRequests
from prefault.ipc.messages import encode
from prefault.sizes import Size, parse_size


class BufferObjects(BufferManager):
    """Device of buffer objects with a small VRAM, for :class:`~prefault.drivers.buffers.Buffers`.

    Args:
        vram: capacity of VRAM, bytes or text; 0: there is none.
        system: capacity of SYSTEM.
        swap_file: path of a file for objects that are swapped out; made if it does not exist. None: nothing is swapped out.
        swap: capacity of the swap file.
        space: address space for objects, each of which takes whole units of 2 MiB of it.

    Raises:
        ValueError: a capacity is not whole pages; VRAM and SYSTEM have none; a swap file without a capacity, or the reverse.
    """

    def __init__(
        self, *, vram: Size, system: Size, swap_file: str | None = None, swap: Size = 0, space: Size = "64 GiB"
    ) -> None:
        capacities = {
            "vram": parse_size(vram), "system": parse_size(system), "swap": parse_size(swap), "space": parse_size(space)
        }  # fmt: skip
        if (swap_file is None) != (capacities["swap"] == 0):
            raise ValueError("swapping out takes both: the path of a swap file, and its capacity")
        path = None if swap_file is None else os.path.abspath(swap_file)
        super().__init__(swap_file=path, **capacities)
        self._arguments = {**capacities, "swap_file": path}

    def recipe(self) -> Recipe:
        """Return a recipe: the server is a fresh process."""
        return Recipe("prefault.drivers.buffers.buffer_device:BufferObjects", self._arguments)

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        """Carry out a request of :mod:`prefault.drivers.buffers.buffer_messages`."""
        return encode(BufferRequests(self).handle(client.number, request))
