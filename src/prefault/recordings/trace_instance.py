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

_GET, _MAP, _FAULT = b"get_pages", b"map_pages", b"fault"
_ADD, _DELETE = b"add_to_page_cache", b"delete_from_page_cache"
_KINDS = (_GET, _MAP, _FAULT, _ADD, _DELETE)
EVENTS = tuple(f"mm_filemap_{kind.decode()}" for kind in _KINDS)
"""Accesses, of which the second is the window of a fault-around, and pages that come into the page cache and leave it."""

_EVENT = re.compile(
    rb": mm_filemap_(%b): dev[= ](\d+):(\d+) ino[= ]([0-9a-f]+)(?: pfn=0x[0-9a-f]+)? ofs=(\d+)(?:-(\d+))?(?: order=(\d+))?"
    % b"|".join(_KINDS)
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
        windows: pages that may have been touched, if they are cached: windows of fault-around, and large folios that came
            while the trace ran and of which a page was faulted in.
        came_first: pages that came into the page cache before they left it: they were not cached when the trace began.
        left_first: pages that left the page cache before they came back: they were cached when the trace began.
    """

    pages: RangeSet
    windows: RangeSet
    came_first: RangeSet
    left_first: RangeSet


class _Changes:
    """Pages of one inode that came into the page cache and left it, told in the order of the events."""

    def __init__(self) -> None:
        self.came_first = self.left_first = RangeSet()
        self._pending: list[tuple[int, int]] = []
        self._are_coming = True

    def tell(self, is_coming: bool, start: int, stop: int) -> None:
        """Note an event, in bytes."""
        if is_coming != self._are_coming or len(self._pending) >= _MOST_PENDING:
            self.settle()
            self._are_coming = is_coming
        self._pending.append((start, stop))

    def settle(self) -> None:
        """Count the events that were told, which are all of one kind."""
        pages, self._pending = _united(self._pending), []
        new = pages - self.came_first - self.left_first
        if self._are_coming:
            self.came_first |= new
        else:
            self.left_first |= new


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

    def __init__(self, tids: Iterable[int], events: Iterable[str] = EVENTS) -> None:
        self.lost_events = 0
        self._found: dict[InodeKey, dict[bytes | int, set[tuple[int, int]]]] = {}
        """Ranges by kind of access, and by order of the large folios that came."""
        self._united: dict[tuple[InodeKey, bytes | int], RangeSet] = {}
        self._changes: dict[InodeKey, _Changes] = {}
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
            # EBUSY: somebody looks into it. What was recorded is not to be lost for that; the next recording removes it.
            with contextlib.suppress(OSError):
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
        return {key: self._touched(key) for key in {**self._found, **self._changes}}

    def _touched(self, key: InodeKey) -> Touched:
        kinds, changes = self._found.setdefault(key, {}), self._changes.get(key, _Changes())
        for kind in kinds:
            self._unite(key, kind)
        changes.settle()
        read, windows, faulted = (self._united.get((key, kind), RangeSet()) for kind in (_GET, _MAP, _FAULT))
        mapped = windows | faulted
        for order in kinds:
            if isinstance(order, int):
                # Since Linux 6.18 a fault maps the whole large folio (commits 19773df031bc and 357b92761d94), and touches of
                # its other pages are no events. A folio lies at a multiple of its size.
                windows |= (self._united[key, order] & mapped).outward(PAGE_SIZE << order)
        return Touched(read | faulted, windows, changes.came_first, changes.left_first)

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
            if kind in (_ADD, _DELETE):
                self._changes.setdefault(key, _Changes()).tell(kind == _ADD, first, stop)
                if kind == _ADD and int(order or 0):
                    self._note(key, int(order), first, stop)
            else:
                self._note(key, kind, first, stop)

    def _note(self, key: InodeKey, kind: bytes | int, start: int, stop: int) -> None:
        pending = self._found.setdefault(key, {}).setdefault(kind, set())
        pending.add((start, stop))
        if len(pending) >= _MOST_PENDING:
            self._unite(key, kind)

    def _unite(self, key: InodeKey, kind: bytes | int) -> None:
        """Make one set of the ranges of a kind."""
        pending, self._found[key][kind] = self._found[key][kind], set()
        self._united[key, kind] = self._united.get((key, kind), RangeSet()) | _united(pending)


def _united(ranges: Iterable[tuple[int, int]]) -> RangeSet:
    return RangeSet(PageRange.outward(start, stop) for start, stop in ranges if start < stop)


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
