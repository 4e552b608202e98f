"""The grid is the published one, and what was published is read right."""

from __future__ import annotations

import csv
from importlib import resources

import pytest

from prefault.bench import grid, published
from prefault.bench.grid import Cell
from prefault.bench.kinds import KINDS
from prefault.engine import methods

MIB = 1 << 20


def _published_keys() -> list[tuple[int, str, str, str]]:
    text = resources.files("prefault.bench").joinpath("hildenbrand_2021.csv").read_text()
    rows = list(csv.reader(text.splitlines()))[1:]
    return [(int(row[0]) * MIB, row[1], row[2], row[3]) for row in rows]


def test_the_grid_is_the_published_cells_and_the_unpublished_rows() -> None:
    cells = [(cell.size_bytes, cell.sharing, cell.backing, cell.method) for cell in grid.full_grid()]
    keys = _published_keys()
    assert len(keys) == len(set(keys)) == 190
    assert len(cells) == len(set(cells))
    assert set(keys) <= set(cells)
    for _, _, backing, method in set(cells) - set(keys):
        assert method == "prefault" or backing in ("Anon THP", "Memfd filled")


def test_every_cell_names_a_known_backing_and_the_very_methods_of_the_package() -> None:
    for cell in grid.full_grid() + grid.quick_grid():
        assert cell.backing in KINDS
        assert cell.method in grid.METHODS
        assert cell.method == grid.PREFAULT or cell.method in methods.METHODS


def test_the_quick_grid_is_a_part_of_the_full_one() -> None:
    assert set(grid.quick_grid()) <= set(grid.full_grid([256 * MIB]))


def test_select_takes_what_all_filters_take() -> None:
    cells = grid.select(grid.full_grid(), methods=["write"], backings=["tmpfs", "file"], sharings=["shared"])
    assert [(cell.size_bytes // MIB, cell.backing) for cell in cells] == [
        (2, "tmpfs"),
        (2, "file"),
        (4096, "tmpfs"),
        (4096, "file"),
    ]


def test_figures() -> None:
    assert published.figure_ms(Cell(4096 * MIB, "private", "Anon 4 KiB", "populate_write")) == 572.582
    assert published.figure_ms(Cell(2 * MIB, "shared", "file", "fallocate")) == 0.004
    assert published.figure_ms(Cell(256 * MIB, "shared", "file", "fallocate")) is None
    assert len(published.figures()) == 190


@pytest.mark.parametrize(("size_mib", "reference_mib"), [(2, 2), (32, 2), (64, 4096), (256, 4096), (4096, 4096)])
def test_other_sizes_are_set_beside_the_nearest_published_one(size_mib: int, reference_mib: int) -> None:
    assert published.reference_size(size_mib * MIB) == reference_mib * MIB


def test_published_ratios() -> None:
    ratio = published.ratio_to_write(Cell(256 * MIB, "private", "Anon 4 KiB", "populate_write"))
    assert ratio == pytest.approx(572.582 / 708.409)
    assert published.ratio_to_write(Cell(256 * MIB, "private", "Anon THP", "populate_write")) is None
