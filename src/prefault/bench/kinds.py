"""The backings of the grid by their published names: what each maps, and what memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prefault.mapping.mapping import HugeAdvice
from prefault.memory.backings import Anonymous, BackingSource, Hugetlb, Memfd, TemporaryFile
from prefault.sizes import MIB

HUGE_PAGE_BYTES = 2 * MIB

Room: TypeAlias = Literal["memory", "tmpfs", "disk", "pool"]
"""The resource that must have room: memory, the tmpfs, the disk of the file directory (and memory), or the hugetlb pool."""


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of backings that are files; None where this machine has no such directory."""

    tmpfs: str | None = "/dev/shm"
    file: str | None = None
    hugetlbfs: str | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A backing of the grid.

    Attributes:
        name: the published name.
        source: makes the backing, a fresh and empty one for every mapping.
        room: the resource that must have room for it.
        huge: the advice on transparent huge pages. They must not creep into rows that say 4 KiB.
        has_file: pages of a private mapping are copies of the file's, so that both take memory.
        filled: the file's pages are in the page cache before the time is taken.
    """

    name: str
    source: Callable[[Places], BackingSource]
    room: Room = "memory"
    huge: HugeAdvice = "never"
    has_file: bool = True
    filled: bool = False


_ALL = (
    Kind("Anon 4 KiB", lambda _: Anonymous(), has_file=False),
    Kind("Anon THP", lambda _: Anonymous(), huge="advise", has_file=False),
    Kind("Anon 2 MiB", lambda _: Hugetlb(HUGE_PAGE_BYTES), room="pool", has_file=False),
    Kind("Memfd 4 KiB", lambda _: Memfd()),
    Kind("Memfd filled", lambda _: Memfd(), filled=True),
    Kind("Memfd 2 MiB", lambda _: Memfd(page_size=HUGE_PAGE_BYTES), room="pool"),
    Kind("tmpfs", lambda places: _in(places.tmpfs), room="tmpfs"),
    Kind("file", lambda places: _in(places.file), room="disk"),
    Kind("hugetlbfs", lambda places: _in(places.hugetlbfs), room="pool"),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
"""Every backing by its name."""


def _in(directory: str | None) -> TemporaryFile:
    if directory is None:
        raise ValueError("this machine has no place for such files")
    return TemporaryFile(directory)
