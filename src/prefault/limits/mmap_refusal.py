"""Explain ENOMEM of mmap(2): the limits that it checks, compared with the request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefault._system.meminfo import read_meminfo
from prefault.limits.memory_use import MemoryUse
from prefault.limits.table import shortfall_of
from prefault.sizes import format_size


def why_no_room(length: int, room: int, *, data: bool, noreserve: bool) -> str:
    """Return why ``length`` bytes cannot be mapped, and what to do.

    Args:
        length: bytes of the mapping.
        room: bytes of address space that it takes, more than ``length`` where an alignment was asked for.
        data: True if it is private and writable, which RLIMIT_DATA bounds.
        noreserve: True if MAP_NORESERVE was asked for.
    """
    with contextlib.suppress(OSError, KeyError, MemoryError):  # nothing can be compared: no /proc, or no memory for Python
        for reason in _reasons(length, room, data, noreserve):
            return reason
    return "the kernel found no room for it, and no limit of this process says why"


def _reasons(length: int, room: int, data: bool, noreserve: bool) -> Iterator[str]:
    """Yield the limits that the request exceeds, in the order in which the kernel checks them (do_mmap, mm/mmap.c)."""
    count = gap = at = 0
    with open("/proc/self/maps", "rb") as file:
        for line in file:  # line by line: at vm.max_map_count Python cannot allocate the megabytes that all of it takes
            if line.endswith(b"[vsyscall]\n"):  # in the kernel's half, above the stack
                continue
            start, _, stop = line.partition(b" ")[0].partition(b"-")
            gap, at, count = max(gap, int(start, 16) - at), int(stop, 16), count + 1
    with open("/proc/sys/vm/max_map_count") as file:
        most = int(file.read())
    if count > most:
        yield f"this process has {count} mappings, and vm.max_map_count allows {most}: raise it (sysctl), or unmap some"
    if room > gap:
        yield (
            f"it is beyond the address space: {format_size(room)} are needed in one piece, and the largest gap between the"
            f" mappings of this process is {format_size(gap)}"
        )
    with open("/proc/sys/vm/overcommit_memory") as file:
        mode = file.read().strip()
    requests = [(room, "RLIMIT_AS"), (length, "RLIMIT_DATA")]
    if mode == "2":
        requests.append((length, "CommitLimit"))
    for needed, name in requests:
        short = shortfall_of(MemoryUse(shared=not data, mapped=False), needed, name)
        if short is not None:
            yield f"it takes {format_size(needed)}, and {short.limit.advice}, or map less"
    total = sum(read_meminfo("MemTotal", "SwapTotal"))
    if mode == "0" and not noreserve and length > total:
        yield (
            f"memory and swap are {format_size(total)} together, and"
            " vm.overcommit_memory=0 refuses a mapping of more: map with noreserve=True, or set it to 1"
        )
