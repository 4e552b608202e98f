"""The grid: which cells are measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from prefault.sizes import GIB, MIB

Sharing: TypeAlias = Literal["private", "shared"]

PUBLISHED_SIZES = (2 * MIB, 4 * GIB)
"""The sizes of the published measurement, in bytes."""

QUICK_SIZE = 256 * MIB
"""Bytes in a mapping of the quick grid."""

PREFAULT = "prefault"
"""The method name of rows that time :func:`prefault.populate`, with its own choice of method and threads."""

TOUCHING = ("read", "write", "read/write", "populate_read", "populate_write")
ALLOCATING = ("fallocate", *(f"fallocate+{method}" for method in TOUCHING))
METHODS = (*TOUCHING, *ALLOCATING, PREFAULT)
_QUICK_SHARED = ("write", "populate_write", "fallocate+populate_write")
_QUICK_FILE = ("write", "populate_read", "populate_write", "fallocate+populate_read")


class Row(NamedTuple):
    """The methods that are measured over one backing, mapped private or shared.

    Attributes:
        sharing, backing: properties of the mapping; the backing is a name in :data:`prefault.bench.kinds.KINDS`.
        published: methods of the published measurement.
        unpublished: methods beside it: the package itself, and backings that were not published.
        quick: methods of the quick grid.
    """

    sharing: Sharing
    backing: str
    published: tuple[str, ...] = ()
    unpublished: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


# Private mappings of files were published without fallocate, which allocates for the file and not for them. Huge pages
# without a pool, and private memory over a file in the page cache, were not published (docs/bench-json.md says why).
_ROWS = (
    Row("private", "Anon 4 KiB", TOUCHING, (PREFAULT,), quick=(*TOUCHING, PREFAULT)),
    Row("private", "Memfd 4 KiB", TOUCHING),
    Row("private", "Memfd 2 MiB", TOUCHING),
    Row("private", "tmpfs", TOUCHING),
    Row("private", "file", TOUCHING),
    Row("private", "hugetlbfs", TOUCHING),
    Row("private", "Anon THP", (), ("write", "populate_write", PREFAULT), quick=("write", "populate_write", PREFAULT)),
    Row("private", "Memfd filled", (), TOUCHING),
    Row("shared", "Anon 4 KiB", TOUCHING),
    Row("shared", "Anon 2 MiB", TOUCHING),
    Row("shared", "Memfd 4 KiB", TOUCHING + ALLOCATING, (PREFAULT,), quick=(*_QUICK_SHARED, PREFAULT)),
    Row("shared", "Memfd 2 MiB", TOUCHING + ALLOCATING, quick=_QUICK_SHARED),
    Row("shared", "tmpfs", TOUCHING + ALLOCATING, quick=("write", "populate_write")),
    Row("shared", "file", TOUCHING + ALLOCATING, (PREFAULT,), quick=_QUICK_FILE),
    Row("shared", "hugetlbfs", TOUCHING + ALLOCATING),
)
"""The grid; a row more is a backing more."""


@dataclass(frozen=True, slots=True)
class Group:
    """The key of cells that differ only in their method."""

    size_bytes: int
    sharing: Sharing
    backing: str

    def __str__(self) -> str:
        return f"{self.size_bytes // MIB} MiB {self.sharing} {self.backing}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: a mapping of ``size_bytes``, and the method that populates it."""

    size_bytes: int
    sharing: Sharing
    backing: str
    method: str

    @property
    def group(self) -> Group:
        """The group of cells that this cell is compared with."""
        return Group(self.size_bytes, self.sharing, self.backing)

    def __str__(self) -> str:
        return f"{self.group}, {self.method}"


def full_grid(sizes: Sequence[int] = PUBLISHED_SIZES) -> list[Cell]:
    """Return the published cells and, beside them, the rows that were not published."""
    return [
        Cell(size, row.sharing, row.backing, method)
        for size in sizes
        for row in _ROWS
        for method in row.published + row.unpublished
    ]


def quick_grid(size: int = QUICK_SIZE) -> list[Cell]:
    """Return the main rows."""
    return [Cell(size, row.sharing, row.backing, method) for row in _ROWS for method in row.quick]


def select(
    cells: Sequence[Cell],
    *,
    methods: Collection[str] = (),
    backings: Collection[str] = (),
    sharings: Collection[str] = (),
) -> list[Cell]:
    """Return the cells with one of the ``methods``, ``backings`` and ``sharings``; an empty filter takes all."""
    return [
        cell
        for cell in cells
        if (not methods or cell.method in methods)
        and (not backings or cell.backing in backings)
        and (not sharings or cell.sharing in sharings)
    ]
