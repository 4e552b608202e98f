"""Processes, as /proc has them: who descends from whom, and what they hold open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def _fields(pid: int) -> list[str]:
    """Of /proc/pid/stat, from the state on; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pid: int) -> bool:
    """Whether it runs: neither gone nor waiting to be reaped."""
    fields = _fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def parent(pid: int) -> int:
    """Of a process; 0 where there is no such process."""
    fields = _fields(pid)
    return int(fields[1]) if fields else 0


def name(pid: int) -> str:
    """Of a process (comm); empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _everybody() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children(pid: int) -> set[int]:
    """The children of a process that run."""
    found = set()
    for other in _everybody():
        fields = _fields(other)
        if fields and int(fields[1]) == pid and fields[0] not in "ZX":
            found.add(other)
    return found


def descendants(pid: int) -> set[int]:
    """Children, grandchildren and so on, as far as they run and none of them between has ended."""
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
    for pid in _everybody():
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
