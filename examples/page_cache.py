"""A page cache in user space: a file behind a small pool of frames, with writeback.

The server's process has frames for 1 MiB of a file of 16 MiB. The driver makes room with a clock hand, and writes pages back
when it evicts them and at its end, those that were written to only.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import prefault.device
from prefault.device import Device, DeviceArea, DevicePool, Recipe

PAGE = 4096


class Cache(Device):
    """A driver that maps a file of whole pages."""

    capacity = 1 << 20  # bytes of frames
    evicts = True  # a writable device (the default) that evicts has to say so
    tracks_writes = True  # evicting saves the pages that were written to only
    restartable = True  # after a crash another server goes on with the frames

    def __init__(self, path: str) -> None:
        self.path = path
        self.length = Path(path).stat().st_size
        self.hand = 0

    def recipe(self) -> Recipe | None:
        """Return how a fresh server process makes this device; None, for a fork, where it cannot import this module."""
        return None if __name__ == "__main__" else Recipe(f"{__name__}:Cache", {"path": self.path})

    def start(self, pool: DevicePool) -> None:
        """Open the file. Runs once, in the server, before anything else; work belongs here, not into __init__."""
        self.pool = pool
        self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  closed by stop()

    def fault(self, area: DeviceArea, page: int, access: str) -> None:  # noqa: ARG002
        """Read a page."""
        self.file.seek(page * PAGE)
        self.file.readinto(area.frame(page))

    def reclaim(self, area: DeviceArea, pages: int) -> None:  # noqa: ARG002
        """Evict pages to make room for `pages` more, and some in advance for the next faults."""
        everything = len(self.pool.pages)
        wanted = max(pages, 64)
        for _ in range(0, everything + 1024, 1024):  # the last window ends where the first began
            window = range(self.hand, min(self.hand + 1024, everything))
            for run in self.pool.ready(window):
                some = run[:wanted]
                self.pool.evict(some, self.save)  # write-protected, saved, punched: no write is lost
                wanted -= len(some)
                self.hand = some.stop % everything
                if not wanted:
                    return
            self.hand = window.stop % everything

    def save(self, run: range, content: memoryview) -> None:
        """Write pages back."""
        self.file.seek(run.start * PAGE)
        self.file.write(content)

    def stop(self) -> None:
        """Write the rest of the pool back: the frames vanish with the server."""
        self.pool.evict(self.pool.pages, self.save)
        self.file.close()


def main() -> None:
    """Write all over the mapping, and compare the file."""
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
