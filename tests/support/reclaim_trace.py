"""Proof that the kernel took cached pages of a test's files away: a trace of its proactive reclaim (DAMON).

A machine that reclaims cold memory proactively drops pages of files that a test has just read, a few of ten thousand. A test
that counts cached pages then fails through no fault of the code, and runs again: but only if the trace names its files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from prefault._system.proactive_reclaim import proactive_reclaimers
from prefault.recordings import trace_instance

_DELETED = re.compile(r"-(\d+)\s+\[.*?\s(\d+\.\d+): mm_filemap_delete_from_page_cache: dev (\d+):(\d+) ino ([0-9a-f]+) ")


_NAME = "tests-of-prefault-"


class TakenAwayError(AssertionError):
    """A test failed, and the kernel's proactive reclaim had taken pages of its files away: it is run again."""


class ReclaimTrace:
    """Deletions from the page cache by some threads, while a test run lasts.

    Args:
        threads: their identifiers; None: those of proactive reclaim, which only root can trace.
    """

    def __init__(self, threads: Iterable[int] | None = None) -> None:
        if threads is None:
            threads = [reclaimer.thread for reclaimer in proactive_reclaimers()] if os.geteuid() == 0 else []
        self._threads = set(threads)
        self._path = Path()
        self._mount = -1
        if self._threads:
            tracefs, self._mount = trace_instance._open_tracefs()
            self._path = Path(tracefs, "instances", f"{_NAME}{os.getpid()}-{id(self):x}")
            _remove_stale(self._path.parent)
            self._path.mkdir()
            self._write("buffer_size_kb", "1024")
            self._write("trace_clock", "mono")
            event = "events/filemap/mm_filemap_delete_from_page_cache"
            self._write(f"{event}/filter", " || ".join(f"common_pid == {thread}" for thread in self._threads))
            self._write(f"{event}/enable", "1")

    def taken(self, directory: Path, since: float) -> int:
        """Count the deleted pages of files below a directory since a moment of :func:`time.monotonic`.

        Files of file systems without a disk (FUSE, overlay) count as well, whose mounts may be gone by now.
        """
        if not self._threads:
            return 0
        ours = {(found.st_dev, found.st_ino) for file in directory.rglob("*") if (found := _stat(file)) is not None}
        deleted = _DELETED.findall((self._path / "trace").read_text())
        return sum(
            float(moment) >= since and (major == "0" or (os.makedev(int(major), int(minor)), int(inode, 16)) in ours)
            for _, moment, major, minor, inode in deleted
        )

    def close(self) -> None:
        if self._threads:
            self._threads = set()
            self._path.rmdir()
            if self._mount >= 0:
                os.close(self._mount)

    def _write(self, name: str, text: str) -> None:
        (self._path / name).write_text(text)


def _remove_stale(instances: Path) -> None:
    """Remove the instances of test runs that were killed."""
    for instance in instances.glob(f"{_NAME}*"):
        if not Path("/proc", instance.name.removeprefix(_NAME).partition("-")[0]).exists():
            with contextlib.suppress(OSError):  # another run removed it first
                instance.rmdir()


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.lstat()
    except OSError:
        return None
