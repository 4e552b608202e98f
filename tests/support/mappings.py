"""Backings to map in tests, and what /proc/self/maps says of a mapping."""

from __future__ import annotations

from pathlib import Path

import prefault
from prefault import TemporaryFile

BACKINGS = ("anonymous", "memfd", "tmpfs", "disk")


def backing_in(name: str, directory: Path) -> prefault.BackingSource | str:
    return TemporaryFile(directory) if name == "disk" else name


def maps_line(address: int) -> str | None:
    """The line of /proc/self/maps that holds an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
        if start <= address < stop:
            return line
    return None
