"""One cell, measured in this process; the kernel's own counters are the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prefault.bench.grid import Cell, Sharing, full_grid
from prefault.bench.kinds import HUGE_PAGE_BYTES, KINDS, Places
from prefault.bench.measure import fresh_mapping, measure, target_of
from prefault.engine import methods
from prefault.mapping.mapping import Mapping
from support import needs, oracle

SIZE = 2 << 20
PAGES = SIZE // oracle.PAGE


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(file=str(tmp_path))


def _faults(cell: Cell, places: Places) -> int:
    """Minor faults of the method alone."""
    with fresh_mapping(cell, places, 4096) as mapping:
        _run(cell, mapping)  # imports
    with fresh_mapping(cell, places, cell.size_bytes) as mapping:
        assert oracle.present_bytes(mapping.range.start, SIZE) == 0
        before = oracle.minor_faults()
        _run(cell, mapping)
        faults = oracle.minor_faults() - before
        assert oracle.present_bytes(mapping.range.start, SIZE) == SIZE
        return faults


def _run(cell: Cell, mapping: Mapping) -> None:
    methods.METHODS[cell.method].run(mapping.range.start, mapping.range.length, target_of(mapping))


@pytest.mark.parametrize(
    ("sharing", "backing", "method", "faults_a_page"),
    [
        ("private", "Anon 4 KiB", "read", 1),
        ("private", "Anon 4 KiB", "write", 1),
        ("private", "Anon 4 KiB", "read/write", 2),  # the shared zero page first, then a page of its own
        ("shared", "Anon 4 KiB", "read", 1),
        ("shared", "Anon 4 KiB", "write", 1),
        ("shared", "Memfd 4 KiB", "read", 1),
        ("shared", "Memfd 4 KiB", "write", 1),
        ("shared", "tmpfs", "write", 1),
        ("private", "Memfd 4 KiB", "read/write", 2),
    ],
)
def test_by_hand_every_page_of_an_empty_mapping_faults(
    places: Places, sharing: Sharing, backing: str, method: str, faults_a_page: int
) -> None:
    faults = _faults(Cell(SIZE, sharing, backing, method), places)
    assert faults == pytest.approx(faults_a_page * PAGES, abs=20)


def test_pages_that_are_in_the_page_cache_are_mapped_around_a_read_fault(places: Places) -> None:
    empty = _faults(Cell(SIZE, "private", "Memfd 4 KiB", "read"), places)
    filled = _faults(Cell(SIZE, "private", "Memfd filled", "read"), places)
    assert filled * 4 < empty


@pytest.mark.parametrize("backing", [name for name, kind in KINDS.items() if kind.room != "pool" and not kind.filled])
@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_each_repetition_has_a_fresh_and_empty_mapping(places: Places, backing: str, sharing: Sharing) -> None:
    cell = Cell(SIZE, sharing, backing, "write")
    for _ in range(2):
        with fresh_mapping(cell, places, SIZE) as mapping:
            assert mapping.shared is (sharing == "shared")
            assert oracle.present_bytes(mapping.range.start, SIZE) == 0
            assert bytes(mapping.memoryview()[:1]) == b"\0"
            mapping.memoryview()[:] = b"x" * SIZE  # what a next mapping must not see


@pytest.mark.parametrize("backing", ["Anon 4 KiB", "Memfd 4 KiB", "tmpfs"])
@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_rows_of_4_kib_pages_forbid_huge_pages(places: Places, backing: str, sharing: Sharing) -> None:
    with fresh_mapping(Cell(SIZE, sharing, backing, "write"), places, SIZE) as mapping:
        assert "nh" in oracle.vma_flags(mapping.range.start)


def test_huge_pages_are_asked_for_where_the_row_says_so(places: Places) -> None:
    with fresh_mapping(Cell(SIZE, "private", "Anon THP", "write"), places, SIZE) as mapping:
        assert "hg" in oracle.vma_flags(mapping.range.start)


@pytest.mark.parametrize(
    "cell", [cell for cell in full_grid([SIZE]) if KINDS[cell.backing].room != "pool"], ids=lambda cell: str(cell)
)
@pytest.mark.usefixtures("no_leaks")
def test_every_cell_can_be_measured(places: Places, cell: Cell) -> None:
    values = [repetition.value_ns for repetition in measure(cell, 2, places)]
    assert len(values) == 2
    assert all(0 < value < 5_000_000_000 for value in values)


@pytest.mark.parametrize(
    "cell",
    [cell for cell in full_grid([2 * SIZE]) if cell.backing in ("Anon 2 MiB", "Memfd 2 MiB")],
    ids=lambda cell: str(cell),
)
def test_every_cell_in_huge_pages_can_be_measured(places: Places, cell: Cell, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(4)
    assert len([*measure(cell, 2, places)]) == 2


def test_the_page_size_is_the_kind_of_the_row(places: Places) -> None:
    needs.huge_pages(0)
    with fresh_mapping(Cell(SIZE, "private", "Memfd 4 KiB", "read"), places, SIZE) as mapping:
        assert mapping.page_size == oracle.PAGE < HUGE_PAGE_BYTES


def test_what_populate_decided_is_noted(places: Places) -> None:
    (repetition,) = measure(Cell(SIZE, "private", "Anon 4 KiB", "prefault"), 1, places)
    assert repetition.note is not None
    assert repetition.note.endswith("1 thread")


def test_pages_of_another_size_than_the_row_says_are_noted(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    # A row that says 4 KiB but, by a mistake of ours or the system's, gets huge pages.
    monkeypatch.setitem(
        KINDS, "Anon 4 KiB", KINDS["Anon THP"].__class__("Anon 4 KiB", KINDS["Anon THP"].source, huge="auto")
    )
    real = fresh_mapping

    def huge(cell: Cell, places: Places, size_bytes: int) -> object:
        return real(Cell(cell.size_bytes, "private", "Anon THP", cell.method), places, size_bytes)

    monkeypatch.setattr("prefault.bench.measure.fresh_mapping", huge)
    with real(Cell(SIZE, "private", "Anon THP", "write"), places, SIZE) as mapping:
        _run(Cell(SIZE, "private", "Anon THP", "write"), mapping)
        if oracle.smaps(mapping.range.start).get("AnonHugePages") != SIZE:
            needs.missing("this machine gives no transparent huge page when asked for one")
    (repetition,) = measure(Cell(SIZE, "private", "Anon 4 KiB", "write"), 1, places)
    assert repetition.note == "2.0 MiB of it came as huge pages, unasked"
