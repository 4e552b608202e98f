"""Rows of a heat map: a file, a tensor, a mapping or an area, each as cells that say which share of them is present."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy

from prefault.files.file_status import FileStatus
from prefault.inspection.result import Residency
from prefault.intervals import Intervals
from prefault.processes import MappingStatus, ProcessStatus
from prefault.sizes import MIB, PAGE_SIZE

if TYPE_CHECKING:
    import numpy.typing

RowKind = Literal["file", "tensor", "mapping", "area"]

MOST_CELLS = 256
ALL = 255
"""Level of a cell of which every byte is present."""

_GAP_SHARE = 32
_SMALL = 16 * MIB
"""Bytes up to which a row is drawn whole."""

_ROUNDING = 1e-11
"""Error of a share by floating point; a page of a cell of 1 TiB is 4e-9."""


class Stretch(NamedTuple):
    """A stretch of a row that is drawn; between two parts lies a gap in which nothing is present.

    Attributes:
        start, stop: byte offsets from the start of the row.
        cells: how many of the row's cells it has.
    """

    start: int
    stop: int
    cells: int


class HeatRow(NamedTuple):
    """One row.

    Attributes:
        name: the path, mapping or tensor.
        kind: what it is.
        group: the file of a tensor, the process of a mapping; empty for files.
        start: address of a mapping, offset of a tensor in its file; tells rows of one name apart.
        size_bytes: its length.
        present_bytes: the part of it that is present; None: not known.
        levels: a level for each cell, 0 (nothing is present) to 255 (all is); None where only the sum is known, or nothing.
        parts: the stretches that the cells are of, in order; none where there are no levels.
        unknown: the reason why it is not known; empty where it is.
    """

    name: str
    kind: RowKind
    group: str
    start: int
    size_bytes: int
    present_bytes: int | None
    levels: bytes | None
    parts: tuple[Stretch, ...]
    unknown: str = ""

    @property
    def missing_bytes(self) -> int:
        """Bytes that are known to be missing."""
        return 0 if self.present_bytes is None else self.size_bytes - self.present_bytes

    @property
    def share(self) -> float | None:
        """The share that is present, 0 to 1; None: not known. All of an empty file is present."""
        if self.present_bytes is None:
            return None
        return self.present_bytes / self.size_bytes if self.size_bytes else 1.0

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Identity of the row in several frames."""
        return self.kind, self.group, self.name, self.start


def by_missing(rows: Iterable[HeatRow]) -> list[HeatRow]:
    """Return rows by missing bytes, the most first, then by place; rows that are not known come last."""

    def key(row: HeatRow) -> tuple[bool, int, int, str, int, str]:
        return row.present_bytes is None, -row.missing_bytes, -row.size_bytes, row.group, row.start, row.name

    return sorted(rows, key=key)


def row_of_file(file: FileStatus) -> HeatRow:
    """Make the row of a file, with cells where its cached ranges are known."""
    # The page cache has whole pages: of the last page only the bytes of the file count.
    present = None if file.cached_bytes is None else min(file.cached_bytes, file.size)
    if file.ranges is not None:
        inside = file.ranges.clipped(0, file.size)
        return _drawn(file.path, "file", "", 0, file.size, inside, ())
    return HeatRow(file.path, "file", "", 0, file.size, present, None, (), file.reason)


def rows_of_tensors(file: FileStatus, tensors: Mapping[str, tuple[int, int]]) -> Iterator[HeatRow]:
    """Yield a row for each tensor of a model file; the file's ranges must be known.

    Args:
        file: the file.
        tensors: byte offsets of each tensor in the file, start and stop.
    """
    assert file.ranges is not None
    for name, (start, stop) in tensors.items():
        inside = file.ranges.clipped(start, stop).shifted(-start)
        yield _drawn(name, "tensor", file.path, start, stop - start, inside, ())


def rows_of_process(process: ProcessStatus) -> Iterator[HeatRow]:
    """Yield a row for each mapping of a process."""
    for mapping in process.mappings:
        yield row_of_mapping(mapping, f"{process.pid} ({process.name})")


def row_of_mapping(mapping: MappingStatus, process: str) -> HeatRow:
    """Make the row of a mapping, long empty stretches left out."""
    if mapping.present is None:
        return HeatRow(mapping.label, "mapping", process, mapping.start, mapping.size_bytes, None, None, (), mapping.unknown)
    return _drawn(mapping.label, "mapping", process, mapping.start, mapping.size_bytes, mapping.present, mapping.present)


def row_of_area(name: str, found: Residency) -> HeatRow:
    """Make the row of an area or any other memory of this process, long empty stretches left out."""
    present = found.ranges()
    size = found.range.length
    return _drawn(name, "area", "", found.range.start, size, present, present)


def _drawn(
    name: str,
    kind: RowKind,
    group: str,
    start: int,
    size: int,
    present: Intervals,
    clusters: Iterable[tuple[int, int]],
) -> HeatRow:
    parts = _parts(size, clusters)
    return HeatRow(name, kind, group, start, size, present.length, levels(present, parts), parts)


def _parts(size: int, ranges: Iterable[tuple[int, int]]) -> tuple[Stretch, ...]:
    """Cut a large row at gaps longer than a thirty-second of it; without ranges it is one part."""
    stretches: list[tuple[int, int]] = []
    for start, stop in ranges if size > _SMALL else ():
        if stretches and start - stretches[-1][1] <= size // _GAP_SHARE:
            stretches[-1] = stretches[-1][0], stop
        else:
            stretches.append((start, stop))
    if stretches and stretches[0][0] <= size // _GAP_SHARE:
        stretches[0] = 0, stretches[0][1]
    if stretches and size - stretches[-1][1] <= size // _GAP_SHARE:
        stretches[-1] = stretches[-1][0], size
    if not stretches:
        stretches = [(0, size)]
    drawn = sum(stop - start for start, stop in stretches)
    return tuple(Stretch(start, stop, _cells(stop - start, drawn)) for start, stop in stretches)


def _cells(length: int, drawn: int) -> int:
    """Return the number of cells of a part, in proportion to all that is drawn; none smaller than a page."""
    pages = -(-length // PAGE_SIZE)
    return max(1, min(pages, MOST_CELLS * length // max(drawn, 1)))


def levels(present: Intervals, parts: Iterable[Stretch]) -> bytes:
    """Return the level of each cell of the parts."""
    return b"".join(_levels_of(present, part) for part in parts)


def _levels_of(present: Intervals, part: Stretch) -> bytes:
    if part.start == part.stop:  # all of an empty file
        return bytes([ALL]) * part.cells
    if len(present) == 0:
        return bytes(part.cells)
    bounds = numpy.linspace(part.start, part.stop, part.cells + 1)
    edges = present.to_numpy()
    lengths = edges[1::2] - edges[::2]
    # Bytes present below each edge: a function that is linear in between, and so can be asked at any cell's bound.
    below = numpy.zeros(len(edges))
    numpy.cumsum(lengths, out=below[1::2])
    below[2::2] = below[1:-1:2]
    held = numpy.diff(numpy.interp(bounds, edges.astype(numpy.float64), below))
    return _as_levels(held / numpy.diff(bounds))


def _as_levels(share: numpy.typing.NDArray[numpy.float64]) -> bytes:
    """Return shares from 0 to 1 as levels; rounding makes neither nothing nor all of what is not."""
    level = numpy.clip(numpy.rint(share * ALL), 1, ALL - 1).astype(numpy.uint8)
    level[share <= _ROUNDING] = 0
    level[share >= 1 - _ROUNDING] = ALL
    return bytes(level.tobytes())


def resampled(found: bytes, cells: int) -> bytes:
    """Return levels as so many cells: each the mean of those that it covers."""
    share = numpy.frombuffer(found, numpy.uint8).astype(numpy.float64) / ALL
    bounds = numpy.linspace(0, len(found), cells + 1)
    below = numpy.concatenate(([0.0], numpy.cumsum(share)))
    return _as_levels(numpy.diff(numpy.interp(bounds, numpy.arange(len(found) + 1), below)) / numpy.diff(bounds))


def level_of(row: HeatRow) -> int | None:
    """Return the level of a row as a whole; None where it is not known."""
    share = row.share
    if share is None:
        return None
    if share <= _ROUNDING or share >= 1 - _ROUNDING:
        return ALL if share > _ROUNDING else 0
    return min(max(round(share * ALL), 1), ALL - 1)
