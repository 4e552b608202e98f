"""Devices for tests of start, stop and kept memory, importable by recipe; each writes what is called to a file."""

from __future__ import annotations

import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import Device, DeviceArea, Recipe, Supplied
from prefault.sizes import PAGE_SIZE

_COUNT = struct.Struct("<Q")


class Lifecycle(Device):
    """Appends a line to a file for each call but faults.

    Args:
        path: of the file.
        fails: the name of a call that raises.
        hangs: the name of a call that does not return.
        by_recipe: served by a fresh process.
    """

    restartable = True

    def __init__(
        self,
        path: str,
        *,
        fails: str = "",
        hangs: str = "",
        by_recipe: bool = False,
        workers: int = 0,
        timeout_s: float = 30.0,
    ) -> None:
        self.length = 16 * PAGE_SIZE
        self.workers = workers
        self.timeout_s = timeout_s
        self._path = path
        self._fails = fails
        self._hangs = hangs
        self._by_recipe = by_recipe
        self._arguments = {"path": path, "fails": fails, "hangs": hangs, "workers": workers, "timeout_s": timeout_s}

    def recipe(self) -> Recipe | None:
        return Recipe("support.lifecycle_devices:Lifecycle", self._arguments) if self._by_recipe else None

    def _called(self, name: str) -> None:
        with open(self._path, "a") as file:
            file.write(f"{name}\n")
        if name == self._fails:
            raise ValueError(f"there is no {name} today")
        while name == self._hangs:
            time.sleep(60)

    def start(self, pool: DevicePool) -> None:
        assert (pool.pages, pool.page_size, pool.capacity) == (range(16), PAGE_SIZE, None)
        self._called("start")

    def stop(self) -> None:
        self._called("stop")

    def open(self, area: DeviceArea) -> None:
        self._called("open")

    def close(self, area: DeviceArea) -> None:
        self._called("close")

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = bytes((page + 1,)) * PAGE_SIZE
        return None


def calls(path: Path) -> list[str]:
    """Return the calls in the file of a :class:`Lifecycle`."""
    return path.read_text().split() if path.exists() else []


class Keeper(Device):
    """Counts in kept memory how often it was started, and how many faults it answered; pages hold both.

    Args:
        die_after: number of the fault after whose count in kept memory the server kills itself, once for each number.
        by_recipe: served by a fresh process, also after the death of the warden.
    """

    restartable = True
    writable = False

    def __init__(self, *, die_after: tuple[int, ...] = (), by_recipe: bool = True, pages: int = 64) -> None:
        self.length = pages * PAGE_SIZE
        self._die_after = die_after
        self._by_recipe = by_recipe
        self._arguments: dict[str, Any] = {"die_after": list(die_after), "pages": pages}
        self._starts = self._faults = memoryview(b"")

    def recipe(self) -> Recipe | None:
        return Recipe("support.lifecycle_devices:Keeper", self._arguments) if self._by_recipe else None

    def start(self, pool: DevicePool) -> None:
        self._starts = pool.keep("starts", _COUNT.size)
        _COUNT.pack_into(self._starts, 0, _COUNT.unpack_from(self._starts)[0] + 1)
        self._pool = pool

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        # Another name for each page: a piece that is kept just before the death of the server.
        starts = _COUNT.unpack_from(self._starts)[0]
        piece = self._pool.keep(f"page {page}", 5000 + page)
        before = _COUNT.unpack_from(piece, 4990)[0]
        _COUNT.pack_into(piece, 4990, before + 1)
        if page in self._die_after and not before:
            os.kill(os.getpid(), signal.SIGKILL)
        area.frame(page)[: 2 * _COUNT.size] = _COUNT.pack(starts) + _COUNT.pack(before + 1)
        return None


def counts(content: bytes) -> tuple[int, int]:
    """Return the numbers of starts, and of faults on this page, from the beginning of a page of a :class:`Keeper`."""
    return _COUNT.unpack_from(content)[0], _COUNT.unpack_from(content, _COUNT.size)[0]
