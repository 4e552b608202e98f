"""Counters of ``/proc/vmstat``: events of the whole machine since it booted."""

from __future__ import annotations

from prefault._system.kept_files import KeptFile

_file = KeptFile("/proc/vmstat")


def read_vmstat(*names: str) -> tuple[int, ...]:
    """Read counters such as ``"compact_stall"``; 0 for one that this kernel does not have, or where there is no /proc."""
    try:
        text = b"\n" + _file.read()
    except OSError:
        return (0,) * len(names)
    return tuple(_counter(text, name.encode()) for name in names)


def _counter(text: bytes, name: bytes) -> int:
    at = text.find(b"\n" + name + b" ")
    return 0 if at < 0 else int(text[at + len(name) + 2 : text.index(b"\n", at + 1)])
