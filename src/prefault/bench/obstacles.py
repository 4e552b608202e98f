"""Reasons why a cell cannot run on this machine, checked before it is tried: a try could be fatal."""

from __future__ import annotations

import os

from prefault.bench.grid import PREFAULT, Cell
from prefault.bench.kinds import HUGE_PAGE_BYTES, KINDS, Places
from prefault.bench.machine import available_memory_bytes
from prefault.bench.places import MARGIN_BYTES, Hugetlbfs, TemporaryHugetlbPool, filesystem_of, in_memory
from prefault.engine.methods import METHODS
from prefault.sizes import format_size


def memory_bytes(cell: Cell) -> int:
    """Return the bytes of memory that a cell needs, with page tables and without the hugetlb pool."""
    kind = KINDS[cell.backing]
    if kind.room == "pool":
        return 0
    # A private mapping of a file copies its pages: the file's own are in memory as well.
    copies = 2 if kind.has_file and cell.sharing == "private" else 1
    return copies * cell.size_bytes + cell.size_bytes // 512


def pool_pages(cell: Cell) -> int:
    """Return the number of huge pages that a cell needs from the hugetlb pool."""
    return -(-cell.size_bytes // HUGE_PAGE_BYTES) if KINDS[cell.backing].room == "pool" else 0


def obstacle(cell: Cell, places: Places, pool: TemporaryHugetlbPool, mounted: Hugetlbfs) -> str | None:
    """Return why the cell cannot run now; None where it can."""
    needed = METHODS[cell.method].capability if cell.method != PREFAULT else None
    if needed is not None and not needed.available:
        return f"{cell.method} needs {needed.question} (Linux {needed.since}): {needed.refusal}"
    kind = KINDS[cell.backing]
    if kind.room == "pool":
        return _pool_obstacle(cell, pool, mounted)
    if kind.room == "tmpfs":
        found = _tmpfs_obstacle(cell, places.tmpfs)
    elif kind.room == "disk":
        found = _disk_obstacle(cell, places.file)
    else:
        found = None
    return found or memory_obstacle(memory_bytes(cell))


def _pool_obstacle(cell: Cell, pool: TemporaryHugetlbPool, mounted: Hugetlbfs) -> str | None:
    needed = pool_pages(cell)
    if pool.available_pages < needed:
        return f"the hugetlb pool has {pool.available_pages} free of {needed} pages: {pool.refusal}"
    return mounted.refusal if cell.backing == "hugetlbfs" else None


def _tmpfs_obstacle(cell: Cell, directory: str | None) -> str | None:
    if directory is None or filesystem_of(directory) != "tmpfs":
        return f"{directory} is not a tmpfs"
    return _room_obstacle(cell, directory)


def _disk_obstacle(cell: Cell, directory: str | None) -> str | None:
    if directory is None or not os.path.isdir(directory):
        return f"the file directory {directory} does not exist"
    if in_memory(directory):
        return (
            f"the file directory lies on {filesystem_of(directory)}, which is memory: name one on a disk (--file-directory)"
        )
    return _room_obstacle(cell, directory)


def _room_obstacle(cell: Cell, directory: str) -> str | None:
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"no file can be made in {directory}: permission denied"
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < cell.size_bytes:  # by hand, a page too many is a SIGBUS
        return f"{directory} has {format_size(free)} left of the {format_size(cell.size_bytes)} needed"
    return None


def memory_obstacle(size_bytes: int) -> str | None:
    """Return why this much memory, and the margin that stays free, is not available; None where it is."""
    needed, available = size_bytes + MARGIN_BYTES, available_memory_bytes()
    if available < needed:
        return f"it takes {format_size(needed)} of memory, a margin included, and {format_size(available)} are available"
    return None
