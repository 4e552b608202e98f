"""What the kernel says of memory, read without the code under test: pagemap, smaps, minor faults, a second process."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
import struct
from pathlib import Path

PAGE = mmap.PAGESIZE
_PRESENT, _SWAPPED, _FILE = 1 << 63, 1 << 62, 1 << 61
_FRAME = (1 << 55) - 1


def entries(address: int, length: int, pid: int | str = "self") -> list[int]:
    """The pagemap entries of the pages of ``[address, address + length)``."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        pages = length // PAGE
        raw = os.pread(file.fileno(), pages * 8, address // PAGE * 8)
    assert len(raw) == pages * 8
    return list(struct.unpack(f"={pages}Q", raw))


def present(address: int, length: int, pid: int | str = "self") -> list[bool]:
    """Which pages have a page-table entry."""
    return [bool(entry & _PRESENT) for entry in entries(address, length, pid)]


def present_bytes(address: int, length: int, pid: int | str = "self") -> int:
    return sum(present(address, length, pid)) * PAGE


def file_pages(address: int, length: int) -> list[bool]:
    """Which pages are the file's or shared, not a private copy."""
    return [bool(entry & _FILE) for entry in entries(address, length)]


def frames(address: int, length: int) -> list[int]:
    """The physical frame numbers (root only: else all are 0)."""
    return [entry & _FRAME if entry & _PRESENT else -1 for entry in entries(address, length)]


def shows_frames() -> bool:
    """Whether pagemap shows frame numbers to this process: it needs CAP_SYS_ADMIN."""
    with mmap.mmap(-1, PAGE) as page:
        page[0] = 1
        byte = ctypes.c_char.from_buffer(page)
        (frame,) = frames(ctypes.addressof(byte), PAGE)
        del byte  # else the page could not be unmapped
    return frame > 0


def smaps(address: int) -> dict[str, int]:
    """The counters of the VMA at ``address``, in bytes."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            inside = int(head[1], 16) <= address < int(head[2], 16)
        elif inside and line.endswith(" kB"):
            key, _, value = line.partition(":")
            found[key] = int(value[:-3]) * 1024
    return found


def smaps_within(start: int, stop: int) -> list[dict[str, int]]:
    """The counters of all VMAs that begin in a range of addresses, in bytes."""
    heads = re.findall(r"^([0-9a-f]+)-[0-9a-f]+ ", Path("/proc/self/smaps").read_text(), re.MULTILINE)
    return [smaps(int(head, 16)) for head in heads if start <= int(head, 16) < stop]


def vma_flags(address: int) -> set[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            inside = int(head[1], 16) <= address < int(head[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    return set()


def minor_faults() -> int:
    """Page faults of this thread that needed no input."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def descriptors() -> set[str]:
    """The open descriptors with what they refer to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return found


def mappings() -> int:
    """Lines of /proc/self/maps."""
    return Path("/proc/self/maps").read_text().count("\n")
