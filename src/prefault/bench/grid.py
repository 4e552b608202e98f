"""The grid: which cells are measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

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

# As published: private mappings of files were not preceded by fallocate, which allocates for the file and not for them.
_PUBLISHED: dict[Sharing, dict[str, tuple[str, ...]]] = {
    "private": {
        "Anon 4 KiB": TOUCHING,
        "Memfd 4 KiB": TOUCHING,
        "Memfd 2 MiB": TOUCHING,
        "tmpfs": TOUCHING,
        "file": TOUCHING,
        "hugetlbfs": TOUCHING,
    },
    "shared": {
        "Anon 4 KiB": TOUCHING,
        "Anon 2 MiB": TOUCHING,
        "Memfd 4 KiB": TOUCHING + ALLOCATING,
        "Memfd 2 MiB": TOUCHING + ALLOCATING,
        "tmpfs": TOUCHING + ALLOCATING,
        "file": TOUCHING + ALLOCATING,
        "hugetlbfs": TOUCHING + ALLOCATING,
    },
}

# Rows that were not published: what the package itself does, huge pages without a pool, and private memory over a file in
# the page cache (docs/bench-json.md says why).
_OURS: dict[Sharing, dict[str, tuple[str, ...]]] = {
    "private": {
        "Anon 4 KiB": (PREFAULT,),
        "Anon THP": ("write", "populate_write", PREFAULT),
        "Memfd filled": TOUCHING,
    },
    "shared": {"Memfd 4 KiB": (PREFAULT,), "file": (PREFAULT,)},
}

_QUICK: dict[Sharing, dict[str, tuple[str, ...]]] = {
    "private": {
        "Anon 4 KiB": (*TOUCHING, PREFAULT),
        "Anon THP": ("write", "populate_write", PREFAULT),
    },
    "shared": {
        "Memfd 4 KiB": ("write", "populate_write", "fallocate+populate_write", PREFAULT),
        "Memfd 2 MiB": ("write", "populate_write", "fallocate+populate_write"),
        "tmpfs": ("write", "populate_write"),
        "file": ("write", "populate_read", "populate_write", "fallocate+populate_read"),
    },
}


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
        Cell(size, sharing, backing, method)
        for size in sizes
        for sharing, published in _PUBLISHED.items()
        for backing, methods in _joined(published, _OURS[sharing])
        for method in methods
    ]


def quick_grid(size: int = QUICK_SIZE) -> list[Cell]:
    """Return the main rows."""
    return [
        Cell(size, sharing, backing, method)
        for sharing, backings in _QUICK.items()
        for backing, methods in backings.items()
        for method in methods
    ]


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


def _joined(
    published: dict[str, tuple[str, ...]], ours: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for backing, methods in published.items():
        yield backing, methods + ours.get(backing, ())
    for backing, methods in ours.items():
        if backing not in published:
            yield backing, methods
