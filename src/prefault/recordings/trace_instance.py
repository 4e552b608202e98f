"""Trace of page cache accesses by the kernel's tracepoints, in a private instance of tracefs.

Needs root: see ``docs/design/recordings.md``. Events are of processes that are given, and of all their later children.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterable
from typing import NamedTuple

from prefault._kernel import mount
from prefault.limits.process_limits import start_thread
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE

_TRACEFS = "/sys/kernel/tracing"
_PREFIX = "prefault-"
_BUFFER_KIB = 8192
"""Size of the ring buffer of each CPU: some 80 000 events."""
_PAUSE_S = 0.02
_READ_BYTES = 1 << 20
_MOST_PENDING = 1 << 16
"""Ranges of one file that are kept apart before they are united."""

TOUCHES = ("mm_filemap_get_pages", "mm_filemap_map_pages", "mm_filemap_fault")
"""Events of accesses. The second one is the window of a fault-around, of which only cached pages were mapped."""
ADDITIONS = ("mm_filemap_add_to_page_cache",)
"""Events of pages that come into the page cache, read-ahead included."""

_EVENT = re.compile(
    rb": mm_filemap_(get_pages|map_pages|fault|add_to_page_cache): dev[= ](\d+):(\d+) ino[= ]([0-9a-f]+)"
    rb"(?: pfn=0x[0-9a-f]+)? ofs=(\d+)(?:-(\d+))?(?: order=(\d+))?"
)
_LOST = re.compile(rb"\[LOST (\d+) EVENTS\]")


class TraceRefusedError(OSError):
    """The kernel does not let this process trace; the message says why."""


class InodeKey(NamedTuple):
    """Device of a file system and inode, as events have them."""

    device: int
    inode: int


class Touched(NamedTuple):
    """Pages of one inode that events named, in bytes.

    Attributes:
        pages: read, or faulted in.
        windows: windows of fault-around; what was not cached in them was not touched.
        added: pages that came into the page cache.
    """

    pages: RangeSet
    windows: RangeSet
    added: RangeSet


class TraceInstance:
    """Collects events of processes until :meth:`stop`; a context manager that removes the instance of tracefs.

    Args:
        tids: threads whose events are collected, and those of all their later children.
        events: names of tracepoints of the group ``filemap``.

    Attributes:
        lost_events: events that the kernel dropped because they came faster than they were read.

    Raises:
        TraceRefusedError: no permission, or no such tracepoints.
        OSError: EAGAIN: no thread can be started.
    """

    def __init__(self, tids: Iterable[int], events: Iterable[str] = TOUCHES) -> None:
        self.lost_events = 0
        self._found: dict[InodeKey, dict[bytes, set[tuple[int, int]]]] = {}
        self._united: dict[tuple[InodeKey, bytes], RangeSet] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._pipe = -1
        self._path = ""
        self._tracefs, self._mounted = _open_tracefs()
        try:
            instances = os.path.join(self._tracefs, "instances")
            remove_stale_instances(instances)
            name = f"{_PREFIX}{os.getpid()}-{_start_time(os.getpid())}-{id(self):x}"
            path = os.path.join(instances, name)
            try:
                os.mkdir(path)
                self._path = path
                self._set_up(tids, events)
            except OSError as error:
                raise TraceRefusedError(
                    error.errno,
                    f"the kernel's tracepoints filemap:mm_filemap_* (Linux 6.12) cannot be used: {error.strerror}",
                ) from error
            thread = threading.Thread(target=self._collect, name="prefault-trace", daemon=True)
            start_thread(thread)
            self._thread = thread
        except BaseException:
            self.stop()
            raise

    def _set_up(self, tids: Iterable[int], events: Iterable[str]) -> None:
        self._write("buffer_size_kb", str(_BUFFER_KIB))
        self._write("options/event-fork", "1")
        self._write("set_event_pid", " ".join(map(str, tids)))
        for event in events:
            self._write(f"events/filemap/{event}/enable", "1")
        self._pipe = os.open(os.path.join(self._path, "trace_pipe"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def _write(self, name: str, text: str) -> None:
        with open(os.path.join(self._path, name), "w") as file:
            file.write(text)

    def stop(self) -> None:
        """End the trace, collect what the kernel still has, and remove the instance. Idempotent."""
        if self._path:
            with contextlib.suppress(OSError):
                self._write("tracing_on", "0")
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._path:
            os.rmdir(self._path)
            self._path = ""
        if self._mounted >= 0:
            os.close(self._mounted)
            self._mounted = -1

    def __enter__(self) -> TraceInstance:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def touched(self) -> dict[InodeKey, Touched]:
        """Return the pages that were named so far, by inode. After :meth:`stop` they are all."""
        found = {}
        for key, kinds in self._found.items():
            for kind in kinds:
                self._unite(key, kind)
            pages = [
                self._united.get((key, kind), RangeSet())
                for kind in (b"get_pages", b"fault", b"map_pages", b"add_to_page_cache")
            ]
            found[key] = Touched(pages[0] | pages[1], pages[2], pages[3])
        return found

    # --- the thread that reads

    def _collect(self) -> None:
        rest = b""
        while True:
            stopping = self._stopping.is_set()  # looked at before the read: afterwards nothing more comes
            try:
                content = os.read(self._pipe, _READ_BYTES)
            except BlockingIOError:
                if stopping:
                    return
                self._stopping.wait(_PAUSE_S)
                continue
            except InterruptedError:
                continue
            if not content and stopping:
                return
            whole, newline, rest = (rest + content).rpartition(b"\n")
            self._parse(whole + newline)

    def _parse(self, text: bytes) -> None:
        self.lost_events += sum(int(match[1]) for match in _LOST.finditer(text))
        for kind, major, minor, inode, start, last, order in _EVENT.findall(text):
            key = InodeKey(os.makedev(int(major), int(minor)), int(inode, 16))
            first = int(start)
            stop = int(last) + 1 if last else first + (PAGE_SIZE << int(order or 0))
            pending = self._found.setdefault(key, {}).setdefault(kind, set())
            pending.add((first, stop))
            if len(pending) >= _MOST_PENDING:
                self._unite(key, kind)

    def _unite(self, key: InodeKey, kind: bytes) -> None:
        """Make one set of the ranges of a kind."""
        pending, self._found[key][kind] = self._found[key][kind], set()
        pages = RangeSet(PageRange.outward(start, stop) for start, stop in pending if start < stop)
        self._united[key, kind] = self._united.get((key, kind), RangeSet()) | pages


def _open_tracefs() -> tuple[str, int]:
    """Return a path to tracefs, and the descriptor of a mount of our own that it goes by (-1: the machine's)."""
    if os.path.isdir(f"{_TRACEFS}/instances"):
        return _TRACEFS, -1
    try:
        context = mount.fsopen(b"tracefs", mount.FSOPEN_CLOEXEC)
        try:
            mount.fsconfig(context, mount.FSCONFIG_CMD_CREATE)
            mounted = mount.fsmount(context, mount.FSMOUNT_CLOEXEC, 0)
        finally:
            os.close(context)
    except OSError as error:
        raise TraceRefusedError(error.errno, f"tracefs cannot be mounted: {error.strerror}") from error
    return f"/proc/{os.getpid()}/fd/{mounted}", mounted


def remove_stale_instances(instances: str) -> None:
    """Remove the instances of tracefs whose process is gone: it was killed before it could."""
    with contextlib.suppress(OSError):
        for name in os.listdir(instances):
            match = re.fullmatch(rf"{_PREFIX}(\d+)-(\d+)-[0-9a-f]+", name)
            if match and _start_time(int(match[1])) != int(match[2]):
                with contextlib.suppress(OSError):  # another one removed it first
                    os.rmdir(os.path.join(instances, name))


def _start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; -1 where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH):
            raise
        return -1
