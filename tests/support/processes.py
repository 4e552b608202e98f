"""Processes as /proc shows them: their relations, names and open descriptors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def _fields(pid: int) -> list[str]:
    """Read the fields of /proc/pid/stat from the state on; empty where there is no such process."""
    try:
        # Bytes: another test's process may have a name that is no UTF-8.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pid: int) -> bool:
    """Return whether a process runs, and is not a zombie."""
    fields = _fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def parent(pid: int) -> int:
    """Return the pid of the parent; 0 where there is no such process."""
    fields = _fields(pid)
    return int(fields[1]) if fields else 0


def name(pid: int) -> str:
    """Return the name (comm) of a process; empty where there is no such process."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes()).strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children(pid: int) -> set[int]:
    """Return the children of a process that run."""
    found = set()
    for other in _all_pids():
        fields = _fields(other)
        if fields and int(fields[1]) == pid and fields[0] not in "ZX":
            found.add(other)
    return found


def descendants(pid: int) -> set[int]:
    """Return children, grandchildren and so on, as far as they and all processes between them run."""
    found: set[int] = set()
    pending = [pid]
    while pending:
        new = children(pending.pop()) - found
        found |= new
        pending += new
    return found


def with_environment(entry: str) -> set[int]:
    """The processes that were started with an entry (``"NAME=value"``) in their environment, and their forks."""
    found = set()
    for pid in _all_pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if entry.encode() in environment and alive(pid):
            found.add(pid)
    return found


def descriptors(pid: int) -> list[str]:
    """What a process holds open, without the files of /proc and of cgroups that are opened once and kept."""
    found = []
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return []
    for name in names:
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return sorted(name for name in found if not name.startswith(("/proc/", "/sys/fs/cgroup/")))


def mappings(pid: int) -> int:
    """Lines of its maps."""
    return Path(f"/proc/{pid}/maps").read_text().count("\n")


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether it becomes true in that time."""
    give_up = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True
