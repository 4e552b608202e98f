"""Names of the files that processes open, by fanotify(7), and of those that they have open or mapped, by /proc."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prefault._kernel import fanotify
from prefault._system.proc import read_maps, read_mounts
from prefault.limits.process_limits import start_thread

_WITHOUT_CACHE = frozenset(
    {
        "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs",
        "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "rootfs", "rpc_pipefs", "securityfs",
        "selinuxfs", "sysfs", "tmpfs", "tracefs",
    }
)  # fmt: skip
"""File systems whose files are made by the kernel, or are memory already."""

_SEVERAL_DEVICES = frozenset({"overlay", "btrfs", "bcachefs", "ecryptfs", "fuse"})
"""File systems whose files have another device in stat(2) than in events."""

_POLL_MS = 50
_MOST_STOP_S = 10.0
"""Seconds to wait at the end for names that are still to be read."""
_EVENTS_BYTES = 1 << 16
_DELETED = " (deleted)"


class NamedFile(NamedTuple):
    """A file that a process opened.

    Attributes:
        path: as a process of this mount namespace opens it.
        device, inode: as stat(2) tells them.
        is_stacked: True if events may have another device.
    """

    path: str
    device: int
    inode: int
    is_stacked: bool


class OpenedFiles:
    """Regular files that were opened while this object watches, and those that :meth:`look_at` found; each once.

    Args:
        notify: called for each new file, in the thread that found it.
    """

    def __init__(self, notify: Callable[[NamedFile], None] | None = None) -> None:
        self._notify = notify
        self._lock = threading.Lock()
        self._files: dict[tuple[int, int], NamedFile] = {}
        self._mounts = {mount.device: mount.filesystem for mount in read_mounts()}
        self._thread: threading.Thread | None = None
        self._fd = -1
        self._stopping = threading.Event()
        self.overflowed = False
        """True if fanotify dropped events."""

    def files(self) -> list[NamedFile]:
        """Return the files that were found so far."""
        with self._lock:
            return list(self._files.values())

    def find(self, device: int, inode: int) -> NamedFile | None:
        """Return the file of an event's device and inode; None if there is none, or more than one."""
        with self._lock:
            exact = self._files.get((device, inode))
            if exact is not None:
                return exact
            stacked = [file for file in self._files.values() if file.inode == inode and file.is_stacked]
        return stacked[0] if len(stacked) == 1 else None

    # --- fanotify

    def watch(self) -> None:
        """Start to watch all file systems that this process sees, until :meth:`stop`.

        Raises:
            OSError: EPERM without CAP_SYS_ADMIN; EAGAIN: no thread can be started.
        """
        self._fd = fanotify.fanotify_init(
            fanotify.FAN_CLASS_NOTIF | fanotify.FAN_CLOEXEC | fanotify.FAN_NONBLOCK | fanotify.FAN_UNLIMITED_QUEUE,
            os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOATIME | os.O_LARGEFILE,
        )
        refused: OSError | None = None
        watched = set()
        for mount in read_mounts():
            if mount.filesystem in _WITHOUT_CACHE or mount.device in watched:
                continue
            try:
                fanotify.fanotify_mark(
                    self._fd, fanotify.FAN_MARK_ADD | fanotify.FAN_MARK_FILESYSTEM, fanotify.FAN_OPEN, -1,
                    os.fsencode(mount.directory),
                )  # fmt: skip
                watched.add(mount.device)
            except OSError as error:  # hidden below another mount, or a file system that cannot be watched
                refused = error
        if not watched and refused is not None:
            os.close(self._fd)
            self._fd = -1
            raise refused
        thread = threading.Thread(target=self._read_events, name="prefault-opens", daemon=True)
        start_thread(thread)
        self._thread = thread

    def stop(self) -> None:
        """Read the events that are left, and end the watch. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_MOST_STOP_S)
            if self._thread.is_alive():  # the kernel opens a file for an event, and its server (FUSE, NFS) does not answer
                self.overflowed, self._fd = True, -1  # the thread has the descriptor
            self._thread = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_events(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while True:
            stopping = self._stopping.is_set()
            if not poll.poll(0 if stopping else _POLL_MS):
                if stopping:
                    return
                continue
            try:
                content = os.read(self._fd, _EVENTS_BYTES)
            except OSError:  # the file of an event cannot be opened again: it is gone, or its server does not answer
                continue
            for event in fanotify.parse_events(content):
                if event.mask & fanotify.FAN_Q_OVERFLOW:
                    self.overflowed = True
                if event.fd == fanotify.FAN_NOFD:
                    continue
                try:
                    self._take(event.fd)
                finally:
                    os.close(event.fd)

    def _take(self, fd: int) -> None:
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) not in self._files:
                path = os.readlink(f"/proc/self/fd/{fd}")
                # An overlay opens the file below through a mount without a place: its path would be another file's.
                if os.path.samestat(os.stat(path), found):
                    self.add(path, found)
        except OSError:  # the file is deleted, or its file system is gone
            return

    def add(self, path: str, found: os.stat_result) -> None:
        """Add a file that was found, unless it is known, or of a file system without a cache of its own."""
        kind = self._mounts.get(found.st_dev)
        if kind in _WITHOUT_CACHE:
            return
        file = NamedFile(path, found.st_dev, found.st_ino, kind is None or kind.partition(".")[0] in _SEVERAL_DEVICES)
        with self._lock:
            if (file.device, file.inode) in self._files:
                return
            self._files[file.device, file.inode] = file
        if self._notify is not None:
            self._notify(file)

    # --- /proc

    def look_at(self, pids: Iterable[int]) -> None:
        """Add the files that processes have open or mapped now."""
        for path in {path for pid in pids for path in _paths_of(pid)}:
            with contextlib.suppress(OSError):  # gone meanwhile
                found = os.stat(path)
                if stat.S_ISREG(found.st_mode):
                    self.add(path, found)


def _paths_of(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):  # the process is gone, or another user's
        for line in read_maps(pid):
            if line.inode and line.name.startswith("/"):
                yield line.name.removesuffix(_DELETED) if not os.path.exists(line.name) else line.name
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/{pid}/fd/{name}")
                if path.startswith("/"):
                    yield path


def descendants(pid: int) -> list[int]:
    """Return a process and all its children and their children that are alive."""
    found, at = [pid], 0
    while at < len(found):
        with contextlib.suppress(OSError):
            for tid in os.listdir(f"/proc/{found[at]}/task"):
                with open(f"/proc/{found[at]}/task/{tid}/children", "rb") as file:
                    found += [int(child) for child in file.read().split()]
        at += 1
    return found
