"""A file behind a small pool of frames, as a page cache is: what is written comes back into the file.

The server's process has frames for 1 MiB of a file of 16. The driver makes room by a hand that goes round as in a clock, and
saves what clients wrote: when it takes pages back, and when a client gives its mapping up.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import prefault.device
from prefault.device import Device, DeviceArea, Recipe

PAGE = 4096


class Cache(Device):
    """Maps a file of whole pages."""

    capacity = 1 << 20  # bytes of frames
    evicts = True  # it is writable (the default), and takes pages back

    def __init__(self, path: str) -> None:
        self.path = path
        self.length = Path(path).stat().st_size
        self.file: Any = None
        self.hand = 0

    def recipe(self) -> Recipe | None:
        """A fresh process for the server, with nothing of ours in it; where it can import this module."""
        return None if __name__ == "__main__" else Recipe(f"{__name__}:Cache", {"path": self.path})

    def open(self, area: DeviceArea) -> None:  # noqa: ARG002
        """In the server, where work belongs, and not into __init__. For every area."""
        if self.file is None:
            self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  as long as the process

    def fault(self, area: DeviceArea, page: int, access: str) -> None:  # noqa: ARG002
        """Read a page."""
        self.file.seek(page * PAGE)
        self.file.readinto(area.frame(page))

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        """Before so many pages more would not fit: evict some, which the next ones will not have to."""
        everything = self.length // PAGE
        wanted = max(pages, 64)
        for _ in range(0, everything + 1024, 1024):  # the last is what lies before the first
            window = range(self.hand, min(self.hand + 1024, everything))
            for run in area.ready(window):
                some = run[:wanted]
                area.evict(some, self.save)  # write-protected, saved, gone: no write is lost
                wanted -= len(some)
                self.hand = some.stop % everything
                if not wanted:
                    return
            self.hand = window.stop % everything

    def save(self, run: range, content: memoryview) -> None:
        """Write pages."""
        self.file.seek(run.start * PAGE)
        self.file.write(content)

    def close(self, area: DeviceArea) -> None:
        """What is still in the pool goes into the file, or it would go with the server."""
        for run in area.ready(area.pages):
            area.evict(run, self.save)


def main() -> None:
    """Write everywhere, and look at the file."""
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data"
        path.write_bytes(bytes(16 << 20))
        written = {}
        with prefault.device.map(Cache(str(path))) as area, area.memoryview() as memory:
            for _ in range(20_000):
                at = chance.randrange(len(memory))
                memory[at] = written[at] = chance.randrange(256)
            faults = area.stats().faults
        content = path.read_bytes()
        lost = sum(content[at] != byte for at, byte in written.items())
        print(f"{len(written)} bytes written at random, {faults} page faults, {lost} lost")
        sys.exit(lost > 0)


if __name__ == "__main__":
    main()
