"""Rows of a heat map against a model that looks at every page."""

from __future__ import annotations

import random

import numpy
import pytest

import prefault
from prefault.files.file_status import FileStatus
from prefault.inspection.result import PageState
from prefault.inspection.scan import residency
from prefault.mapping.mapping import Mapping
from prefault.pictures.heat_rows import (
    ALL,
    HeatRow,
    Stretch,
    by_missing,
    level_of,
    levels,
    resampled,
    row_of_area,
    row_of_file,
    rows_of_tensors,
)
from prefault.ranges import PageRange, RangeSet
from support.devices import Pattern

_PAGE = 4096


def _random_ranges(numbers: random.Random, pages: int) -> RangeSet:
    cuts = sorted(numbers.sample(range(pages + 1), 2 * numbers.randrange(min(40, pages // 2 + 1))))
    return RangeSet(PageRange(a * _PAGE, b * _PAGE) for a, b in zip(cuts[::2], cuts[1::2], strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_levels_agree_with_a_model_of_bytes(seed: int) -> None:
    numbers = random.Random(seed)
    pages = numbers.randrange(1, 400)
    present = _random_ranges(numbers, pages)
    there = numpy.zeros(pages * _PAGE)
    for start, stop in present:
        there[start:stop] = 1
    cells = numbers.randrange(1, pages + 1)
    part = Stretch(0, pages * _PAGE, cells)
    below = numpy.concatenate(([0.0], numpy.cumsum(there)))
    bounds = numpy.linspace(0, pages * _PAGE, cells + 1)
    share = numpy.diff(numpy.interp(bounds, numpy.arange(len(below)), below)) / numpy.diff(bounds)
    found = numpy.frombuffer(levels(present, [part]), numpy.uint8)
    assert len(found) == cells
    assert numpy.abs(found / ALL - share).max() <= 1 / ALL
    assert ((found == 0) == (share < 1e-9)).all()
    assert ((found == ALL) == (share > 1 - 1e-9)).all()


def test_one_missing_page_of_a_tebibyte_shows() -> None:
    size = 1 << 40
    hole = RangeSet([PageRange(0, size)]) - RangeSet([PageRange(5 << 30, (5 << 30) + _PAGE)])
    row = row_of_file(FileStatus("large", size, size // _PAGE, size // _PAGE - 1, 0, ranges=hole))
    assert row.levels is not None
    assert len(row.levels) == 256
    assert [cell for cell, level in enumerate(row.levels) if level != ALL] == [1]
    assert row.missing_bytes == _PAGE
    assert level_of(row) == ALL - 1


def test_bytes_beyond_the_end_of_the_last_page_do_not_count() -> None:
    row = row_of_file(FileStatus("odd", 5000, 2, 2, 0, ranges=RangeSet([PageRange(0, 8192)])))
    assert (row.present_bytes, row.share, row.levels) == (5000, 1.0, bytes([ALL, ALL]))
    assert row_of_file(FileStatus("odd", 5000, 2, 2, 0)).present_bytes == 5000


def test_an_empty_file_is_all_present() -> None:
    row = row_of_file(FileStatus("empty", 0, 0, 0, 0, ranges=RangeSet()))
    assert (row.share, row.missing_bytes, row.levels) == (1.0, 0, bytes([ALL]))


def test_what_is_not_known_is_neither_none_nor_all() -> None:
    row = row_of_file(FileStatus("secret", 8192, 2, None, None, "not yours"))
    assert (row.present_bytes, row.share, row.levels, row.unknown) == (None, None, None, "not yours")
    assert level_of(row) is None
    other = row_of_file(FileStatus("b", 4096, 1, 0, 0, ranges=RangeSet()))
    assert by_missing([row, other]) == [other, row]


def test_tensors_are_cut_out_of_their_file() -> None:
    file = FileStatus("m", 10 * _PAGE, 10, 4, 0, ranges=RangeSet([PageRange(0, 4 * _PAGE)]))
    first, second = rows_of_tensors(file, {"a": (100, 100 + 2 * _PAGE), "b": (3 * _PAGE, 5 * _PAGE)})
    assert (first.present_bytes, first.share, first.group) == (2 * _PAGE, 1.0, "m")
    assert (second.present_bytes, second.start) == (_PAGE, 3 * _PAGE)


def test_long_gaps_of_an_area_are_left_out() -> None:
    with Mapping("1 GiB", backing="anonymous") as mapping:
        for offset in (0, 700 << 20, (700 << 20) + (8 << 20)):
            mapping.ndarray("u1")[offset] = 1
        found = residency(mapping)
        row = row_of_area("reservation", found)
    assert row.present_bytes == found.bytes_in(PageState.PRESENT)
    assert len(row.parts) == 2
    assert row.parts[0].start == 0
    assert row.parts[1].start <= 700 << 20 < row.parts[1].stop
    assert sum(part.stop - part.start for part in row.parts) < 64 << 20
    assert sum(part.cells for part in row.parts) == len(row.levels or b"")


def test_device_memory() -> None:
    with prefault.device.map(Pattern(64)) as area:
        prefault.populate(area, offset=8 * _PAGE, length=24 * _PAGE)
        row = row_of_area("device", area.residency())
    assert (row.kind, row.size_bytes, row.present_bytes) == ("area", 64 * _PAGE, 24 * _PAGE)
    assert row.levels == bytes([0] * 8 + [ALL] * 24 + [0] * 32)


@pytest.mark.parametrize("cells", [1, 7, 64, 300])
def test_resampling_keeps_none_and_all(cells: int) -> None:
    assert resampled(bytes(100), cells) == bytes(cells)
    assert resampled(bytes([ALL]) * 100, cells) == bytes([ALL]) * cells
    mixed = resampled(bytes([ALL] * 99 + [0]), cells)
    assert set(mixed) != {ALL}


def test_rows_of_most_missing_bytes_come_first() -> None:
    rows = [HeatRow(str(at), "file", "", 0, 100, present, None, ()) for at, present in enumerate((100, 0, 50, None))]
    assert [row.name for row in by_missing(rows)] == ["1", "2", "0", "3"]


def test_tensors_of_which_as_much_is_missing_stand_by_place() -> None:
    file = FileStatus("m", 12 * _PAGE, 12, 0, 0, ranges=RangeSet())
    tensors = {f"layers.{at}": (at * _PAGE, at * _PAGE + _PAGE) for at in (3, 10, 2)}
    assert [row.name for row in by_missing(rows_of_tensors(file, tensors))] == ["layers.2", "layers.3", "layers.10"]
