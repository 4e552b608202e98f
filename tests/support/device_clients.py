"""What clients of a device do in processes of their own: importable, as the spawn method of multiprocessing wants it."""

from __future__ import annotations

import zlib
from typing import Any

import prefault
import prefault.device
from support.devices import Remade


def checksum_of_served(path: str, first: int, stop: int) -> int:
    """Connects, touches pages, and says what they hold."""
    with prefault.device.connect(path) as client, client.map() as area:
        view = area.memoryview()
        found = zlib.crc32(view[first * client.page_size : stop * client.page_size])
        view.release()
        return found


def fill_served(path: str, page: int, byte: int) -> None:
    """Connects and fills a page."""
    with prefault.device.connect(path) as client, client.map() as area:
        array = area.ndarray("uint8")
        array[page * client.page_size : (page + 1) * client.page_size] = byte
        del array


def checksum_of_own(pages: int) -> int:
    """Maps a device of its own, with a server of its own."""
    with prefault.device.map(Remade(pages), populate=True) as area:
        view = area.memoryview()
        found = zlib.crc32(view)
        view.release()
        return found


def touch(area: Any, page: int) -> bytes:
    """Reads from an area that somebody else mapped."""
    view = area.memoryview()
    found = bytes(view[page * area.page_size : page * area.page_size + 8])
    view.release()
    return found
