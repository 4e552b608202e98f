"""Files of /proc: maps and smaps of a process, mounts, open descriptors."""

import errno
import functools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from prefault._kernel._call import explain
from prefault._system.descriptors import opened


class MapsLine(NamedTuple):
    """A line of ``/proc/pid/maps``, and with smaps its fields."""

    start: int
    end: int
    permissions: str
    """Four letters, such as ``rw-p``; the last is ``p``rivate or ``s``hared."""
    offset: int
    device: int
    inode: int
    name: str
    fields: dict[str, int]
    """smaps only: the counters, in bytes."""
    vm_flags: frozenset[str]
    """smaps only: the two-letter VmFlags."""


@functools.cache
def _line() -> re.Pattern[bytes]:
    """Return the pattern of a mapping's line, which takes 0.4 ms to compile: a program that only imports does not."""
    return re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)\s*(.*)")


def read_maps(pid: int | str = "self") -> Iterator[MapsLine]:
    """Read the lines of ``/proc/pid/maps``."""
    return _parse(_read(f"/proc/{pid}/maps"))


def read_smaps(pid: int | str = "self") -> Iterator[MapsLine]:
    """Read the entries of ``/proc/pid/smaps``. This is slow: the kernel walks the page tables of every mapping."""
    return _parse(_read(f"/proc/{pid}/smaps"))


def open_proc(path: str) -> int:
    """Open a file of /proc for reading.

    Raises:
        OSError: its message says what to do where descriptors ran out or /proc is not mounted.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _refusal(path, error) from error


@contextmanager
def opened_proc(path: str) -> Iterator[int]:
    """Open a file of /proc for reading, for the length of a block. Ctrl-C leaks no descriptor."""
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(opened(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise _refusal(path, error) from error
        yield fd


def own_descriptors() -> list[int]:
    """Return the numbers of the open descriptors of this process, ascending. Errors are those of :func:`open_proc`."""
    try:
        return sorted(map(int, os.listdir("/proc/self/fd")))
    except OSError as error:
        raise _refusal("/proc/self/fd", error) from error


def _refusal(path: str, error: OSError) -> OSError:
    number = error.errno or 0
    if number == errno.ENOENT and not os.path.isdir("/proc/self"):
        reason = "no /proc is mounted there, and only /proc tells what is mapped where; mount it (mount -t proc proc /proc)"
    else:
        reason = explain(number)
    return OSError(number, f"{path} cannot be opened: {reason}")


def mappings_with_flag(flag: str) -> Iterator[tuple[int, int]]:
    """Yield the addresses of the mappings of this process whose VmFlags in smaps have ``flag``, two letters.

    Only their lines are parsed: with hundreds of mappings, parsing all takes longer than the kernel needs to write them.
    """
    text = _read("/proc/self/smaps")
    for match in re.finditer(rb"^VmFlags:.* %b(?: |$)" % flag.encode(), text, re.MULTILINE):
        before = text.rfind(b"\nVmFlags:", 0, match.start())
        head = _line().match(text, 0 if before < 0 else text.index(b"\n", before + 1) + 1)
        if head is not None:
            yield int(head[1], 16), int(head[2], 16)


def _read(path: str) -> bytes:
    with open(open_proc(path), "rb") as file:
        return file.read()


def _parse(text: bytes) -> Iterator[MapsLine]:
    head: re.Match[bytes] | None = None
    fields: dict[str, int] = {}
    flags: frozenset[str] = frozenset()
    fullmatch = _line().fullmatch
    for line in text.split(b"\n"):
        match = fullmatch(line)
        if match is None:
            key, _, value = line.partition(b":")
            if key == b"VmFlags":
                flags = frozenset(value.decode().split())
            elif value.endswith(b" kB"):
                fields[key.decode()] = int(value[:-3]) * 1024
            continue
        if head is not None:
            yield _maps_line(head, fields, flags)
        head, fields, flags = match, {}, frozenset()
    if head is not None:
        yield _maps_line(head, fields, flags)


def _maps_line(head: re.Match[bytes], fields: dict[str, int], flags: frozenset[str]) -> MapsLine:
    start, end, permissions, offset, major, minor, inode, name = head.groups()
    return MapsLine(
        int(start, 16),
        int(end, 16),
        permissions.decode(),
        int(offset, 16),
        os.makedev(int(major, 16), int(minor, 16)),
        int(inode),
        os.fsdecode(name.replace(rb"\012", b"\n")),  # the one character that maps escapes
        fields,
        flags,
    )


class Mount(NamedTuple):
    """A line of ``/proc/pid/mountinfo``."""

    device: int
    root: str
    directory: str
    filesystem: str
    options: str
    """The options of the file system (not of the mount), such as ``rw,size=64k`` or ``rw,memory``."""


def read_mounts(pid: int | str = "self") -> list[Mount]:
    """Read the mounts that a process sees from ``/proc/pid/mountinfo``."""
    mounts = []
    # Not splitlines(): the kernel escapes no line separator but the newline.
    for line in os.fsdecode(_read(f"/proc/{pid}/mountinfo")).removesuffix("\n").split("\n"):
        left, _, right = line.partition(" - ")
        _, _, device, root, directory, *_ = left.split(" ")
        filesystem, _, options = right.split(" ", 2)
        major, _, minor = device.partition(":")
        mounts.append(Mount(os.makedev(int(major), int(minor)), root, _unescape(directory), filesystem, options))
    return mounts


def _unescape(path: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)
