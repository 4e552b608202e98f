"""Run a command and put the page cache back as it was, as nocache does."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from prefault.files.cached_pages import cached_ranges
from prefault.files.open_file import OpenFile
from prefault.ranges import RangeSet
from prefault.recordings.held_command import HeldCommand
from prefault.recordings.opened_files import NamedFile, OpenedFiles, descendants
from prefault.recordings.replaying import evict_pages, read_pages
from prefault.recordings.trace_instance import Touched, TraceInstance

_LOOK_EVERY_S = 0.02


class KeptCache(NamedTuple):
    """Result of a command that leaves the page cache as it was.

    Attributes:
        status: exit status of the command; 128 and the signal's number after a death by signal.
        way: ``"trace"`` or ``"residency"``: how the pages were found.
        files: files that the command touched.
        evicted_bytes: bytes that the command brought into the page cache, and that were evicted.
        stayed_bytes: bytes that the command brought in and that the kernel kept: another process has them mapped or locked.
        restored_bytes: bytes that were cached before, were gone at the end, and were read again.
        lost_events: events that came faster than they were read; their pages are as the command left them.
    """

    status: int
    way: str
    files: int
    evicted_bytes: int
    stayed_bytes: int
    restored_bytes: int
    lost_events: int


def run_keeping_cache(command: Sequence[str | bytes]) -> KeptCache:
    """Run a command, then put the page cache of the files that it touched back as it was before.

    Args:
        command: program and arguments.

    Raises:
        OSError: the command cannot be run.
    """
    with HeldCommand(command) as held:
        keeper = _Keeper(held.pid)
        try:
            held.release()
            status = held.wait(lambda: keeper.look_at(held.pid), _LOOK_EVERY_S)
        finally:
            keeper.stop()
        return keeper.put_back(status)


class _Keeper:
    def __init__(self, pid: int) -> None:
        self._before: dict[tuple[int, int], RangeSet | None] = {}
        self._opened = OpenedFiles(self._note)
        self._trace: TraceInstance | None = None
        try:
            self._opened.watch()
            self._trace = TraceInstance([pid])
        except OSError:  # not root: by what /proc shows of the command
            self._opened.stop()

    def _note(self, file: NamedFile) -> None:
        self._before[file.device, file.inode] = None
        with contextlib.suppress(OSError), OpenFile(file.path) as opened:
            self._before[file.device, file.inode] = cached_ranges(opened)

    def look_at(self, pid: int) -> None:
        if self._trace is None:
            self._opened.look_at(descendants(pid))

    def stop(self) -> None:
        if self._trace is not None:
            self._trace.stop()
        self._opened.stop()

    def _touched(self) -> list[tuple[NamedFile, Touched | None]]:
        """Return the files that the command touched, with what the trace has of them."""
        if self._trace is None:
            return [(file, None) for file in self._opened.files()]
        found: list[tuple[NamedFile, Touched | None]] = []
        for key, touched in self._trace.touched().items():
            name = self._opened.find(key.device, key.inode)
            if name is not None:
                found.append((name, touched))
        return found

    def put_back(self, status: int) -> KeptCache:
        evicted = stayed = restored = 0
        files = self._touched()
        for name, touched in files:
            before = self._before.get((name.device, name.inode))
            with contextlib.suppress(OSError), OpenFile(name.path) as file:
                if file.identity != (name.device, name.inode):
                    continue  # another file has its name now
                if touched is not None:
                    # Noted a moment after the file was opened: by then the command had brought in pages, or evicted some.
                    before = ((before or RangeSet()) | touched.left_first) - touched.came_first
                if before is None:
                    continue
                restored += read_pages(file, before.clipped(0, file.pages().stop) - cached_ranges(file))
                came = cached_ranges(file) - before
                if touched is not None:
                    came &= touched.came_first  # others bring in pages as well
                done = evict_pages(file, came)
                evicted += done
                stayed += came.length - done
        lost = 0 if self._trace is None else self._trace.lost_events
        way = "residency" if self._trace is None else "trace"
        return KeptCache(status, way, len(files), evicted, stayed, restored, lost)
