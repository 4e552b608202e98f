"""A driver that makes room knows whether a fault or a populate needs it, and which pages the populate brings in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device import DeviceArea, DevicePool
from prefault.sizes import PAGE_SIZE
from support.devices import Enclave


class Writing(Enclave):
    """Writes into a file what it makes room for."""

    def __init__(self, path: Path) -> None:
        super().__init__(64, capacity_pages=16)
        self._path = path

    def start(self, pool: DevicePool) -> None:
        self._pool = pool

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        with open(self._path, "a") as file:
            file.write(f"{[(run.start, run.stop) for run in self._pool.reclaiming_for]}\n")
        super().reclaim(area, pages)


@pytest.mark.usefixtures("no_leaks")
def test_a_driver_knows_what_it_makes_room_for(tmp_path: Path) -> None:
    def seen() -> list[list[tuple[int, int]]]:
        path = tmp_path / "seen"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [ast.literal_eval(line) for line in lines]

    with prefault.device.map(Writing(tmp_path / "seen")) as area:
        prefault.populate(area, length=12 * PAGE_SIZE)
        assert seen() == []
        prefault.populate(area, offset=8 * PAGE_SIZE, length=16 * PAGE_SIZE)
        assert set(map(tuple, seen())) == {((8, 24),)}, "the whole call, with pages that are there"
        with area.memoryview() as memory:
            for page in range(30, 50):
                memory[page * PAGE_SIZE] = 1
        assert set(map(tuple, seen())) == {()}
        prefault.populate(area, offset=51 * PAGE_SIZE, length=PAGE_SIZE)
        assert set(map(tuple, seen())) == {((51, 52),)}
