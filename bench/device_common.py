"""Shared parts of the measures of device memory: the driver, rows of the report, figures of processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import prefault
from prefault.device import Device, DeviceArea
from prefault.device.device_pool import Access
from prefault.sizes import MIB, PAGE_SIZE


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


# --- processes


def stat(pid: int) -> tuple[str, int, int]:
    """Return name, parent pid and CPU ticks of a process: proc_pidstat(5)."""
    name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    fields = rest.split()
    return name, int(fields[1]), int(fields[11]) + int(fields[12])


def helpers() -> dict[str, int]:
    """Return the pids of warden and server, by role, of the device that was mapped last."""
    found: dict[str, int] = {}
    parent = os.getpid()
    for role in ("warden", "server"):
        children = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and stat(int(entry.name))[:2] == (f"prefault-{role}", parent):
                    children.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        found[role] = parent = max(children)
    return found


def cpu_ns(pid: int) -> int:
    """Return CPU ns of all threads by the scheduler's count, since ticks of 10 ms are coarse."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


@dataclass(frozen=True, slots=True)
class Holdings:
    """A process's open descriptors, mappings, and resident anonymous memory in KiB."""

    descriptors: int
    mappings: int
    rss_kib: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        rss = next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))
        maps = Path(f"/proc/{pid}/maps").read_text()
        return cls(len(os.listdir(f"/proc/{pid}/fd")), maps.count("\n"), rss)


def warm(length: int = 256 * MIB) -> None:
    """Make the host back free memory: the first touch of a page that the host took back costs 9 us more here."""
    with prefault.Mapping(length) as memory:
        prefault.populate(memory)


def spread(values: list[int]) -> str:
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1e3 for part in (0, 0.5, 0.9, 0.99)]
    return "{:.1f} us best, {:.1f} median, {:.1f} 90 %, {:.1f} 99 %".format(*at)
