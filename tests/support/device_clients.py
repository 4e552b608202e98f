"""Functions of client processes, importable as the spawn method of multiprocessing needs them."""

from __future__ import annotations

import zlib
from typing import Any

import prefault
import prefault.device
from support.devices import Remade


def checksum_of_served(path: str, first: int, stop: int) -> int:
    """Connect, touch pages, and return the checksum of their bytes."""
    with prefault.device.connect(path) as client, client.map() as area:
        view = area.memoryview()
        found = zlib.crc32(view[first * client.page_size : stop * client.page_size])
        view.release()
        return found


def fill_served(path: str, page: int, byte: int) -> None:
    """Connect and fill a page."""
    with prefault.device.connect(path) as client, client.map() as area:
        array = area.ndarray("uint8")
        array[page * client.page_size : (page + 1) * client.page_size] = byte
        del array


def checksum_of_own(pages: int) -> int:
    """Map a device with a server of its own, and return the checksum of its bytes."""
    with prefault.device.map(Remade(pages), populate=True) as area:
        view = area.memoryview()
        found = zlib.crc32(view)
        view.release()
        return found


def touch(area: Any, page: int) -> bytes:
    """Read from an area that the parent process mapped."""
    view = area.memoryview()
    found = bytes(view[page * area.page_size : page * area.page_size + 8])
    view.release()
    return found
