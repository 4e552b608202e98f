"""The processes of a device, as /proc shows them: for what they cost."""

from __future__ import annotations

import os
from pathlib import Path

from prefault.device.daemon import SERVER, WARDEN
from prefault.sizes import KIB


def stat(pid: int) -> tuple[str, int, int]:
    """Return name, parent pid and CPU ticks of a process: proc_pidstat(5)."""
    name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    fields = rest.split()
    return name, int(fields[1]), int(fields[11]) + int(fields[12])


def helpers() -> dict[str, int]:
    """Return the pids of warden and server, by role, of the device that this process opened last; empty without one."""
    found: dict[str, int] = {}
    parent = os.getpid()
    for role, process in (("warden", WARDEN), ("server", SERVER)):
        children = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and stat(int(entry.name))[:2] == (process, parent):
                    children.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        if not children:
            break
        found[role] = parent = max(children)
    return found


def cpu_ns(pid: int) -> int:
    """Return the CPU time of all threads of a process in ns, by the scheduler's count: ticks of 10 ms are coarse."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def anonymous_bytes(pid: int) -> int:
    """Return the resident anonymous memory of a process in bytes: proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("RssAnon:"))
