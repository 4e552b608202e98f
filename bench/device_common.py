"""Shared parts of the measures of device memory: the driver, rows of the report, what a process holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from prefault.bench.routes.device_processes import anonymous_bytes
from prefault.device import Device, DeviceArea
from prefault.device.device_pool import Access
from prefault.sizes import KIB, PAGE_SIZE


class Trivial(Device):
    """A driver that copies the same 4 KiB into each page, as the handler in C does."""

    writable = False
    _content = b"\x5a" * PAGE_SIZE

    def __init__(self, length: int, page_size: int = PAGE_SIZE) -> None:
        self.length = length
        self.page_size = page_size
        self._page = self._content * (page_size // PAGE_SIZE)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:  # noqa: ARG002
        area.frame(page)[:] = self._page

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:  # noqa: ARG002
        area.frames(pages)[:] = self._page * len(pages)


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the report. ``met`` is None where nothing is demanded."""

    name: str
    limit: str
    figure: str
    met: bool | None
    detail: str

    def __str__(self) -> str:
        verdict = {None: "", True: "MET", False: "MISS"}[self.met]
        return f"| {self.name} | {self.limit} | {self.figure} | {verdict} | {self.detail} |"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much each measure does: rounds, bytes, loads per round, cycles of open and close, seconds of idleness, areas."""

    rounds: int
    length: int
    loads: int
    cycles: int
    seconds: float
    areas: int


@dataclass(frozen=True, slots=True)
class Holdings:
    """A process's open descriptors, mappings, and resident anonymous memory in KiB."""

    descriptors: int
    mappings: int
    rss_kib: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        maps = Path(f"/proc/{pid}/maps").read_text()
        return cls(len(os.listdir(f"/proc/{pid}/fd")), maps.count("\n"), anonymous_bytes(pid) // KIB)


def spread(values: list[int]) -> str:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1e3 for part in (0, 0.5, 0.9, 0.99)]
    return "{:.1f} us best, {:.1f} median, {:.1f} 90 %, {:.1f} 99 %".format(*at)
