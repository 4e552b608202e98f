"""The directories and files of cgroups, v1 and v2 (Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst)."""

import os
import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from prefault._system.proc import Mount, read_mounts

if TYPE_CHECKING:
    from pathlib import Path

# What v1 reports for "no limit": the largest multiple of the page size in a signed long.
_V1_UNLIMITED = 1 << 62


def hierarchies(pid: int | str = "self") -> Iterator[tuple[frozenset[str], str]]:
    """Read ``/proc/pid/cgroup``: yield each line's controllers (empty for v2) and path inside the hierarchy."""
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        text = os.fsdecode(file.read())
    for line in text.removesuffix("\n").split("\n"):  # not splitlines(): other separators may be in a name
        _, controllers, path = line.split(":", 2)
        yield frozenset(filter(None, controllers.split(","))), path


class Governing(NamedTuple):
    """The cgroups that govern a controller for a process.

    Attributes:
        directories: of the process' own cgroup first, and then of each parent.
        version: 1 or 2; 0 where this process sees no hierarchy with that controller.
        options: the options of the hierarchy's mount, such as ``rw,memory_hugetlb_accounting``.
    """

    directories: tuple[str, ...]
    version: int
    options: str = ""


def governing(controller: str, pid: int | str = "self") -> Governing:
    """Find the cgroups that govern ``controller`` for a process.

    With v1 and v2 both mounted, a controller is in one of the two: the v1 hierarchy is taken where it has the controller.
    """
    mounts = read_mounts()
    for controllers, path in hierarchies(pid):
        for mount in mounts:
            if controllers:
                if controller not in controllers or not _is_v1_of(mount, controller):
                    continue
            elif mount.filesystem != "cgroup2" or not _has_controller(mount.directory, controller):
                continue
            inside = _below(mount.root, path)
            if inside is not None:
                return Governing(tuple(_upward(mount.directory, inside)), 1 if controllers else 2, mount.options)
    return Governing((), 0)


def directories(controller: str, pid: int | str = "self") -> "list[Path]":
    """Return the cgroup directories that govern ``controller`` for a process, its own first and then each parent's.

    The list is empty where no hierarchy with that controller is mounted.
    """
    from pathlib import Path  # takes longer to import than this whole module

    return [Path(directory) for directory in governing(controller, pid).directories]


def _is_v1_of(mount: Mount, controller: str) -> bool:
    return mount.filesystem == "cgroup" and controller in mount.options.split(",")


def _has_controller(directory: str, controller: str) -> bool:
    return controller in (read_text(posixpath.join(directory, "cgroup.controllers")) or "").split()


def _below(root: str, path: str) -> str | None:
    """Return ``path`` relative to the mount's root; None where the mount does not show it (a container's view)."""
    top, parts = _parts(root), _parts(path)
    inside = parts[len(top) :]
    # "/../x": this process is outside of its cgroup namespace's root, and the mount shows none of its parents.
    if parts[: len(top)] != top or ".." in inside:
        return None
    return "/".join(inside) or "."


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _upward(top: str, inside: str) -> Iterator[str]:
    names = [] if inside == "." else inside.split("/")
    for depth in range(len(names), -1, -1):
        directory = posixpath.join(top, *names[:depth])
        if os.path.isdir(directory):
            yield directory


def read_text(path: str | os.PathLike[str]) -> str | None:
    """Read a cgroup file and strip it; None where this cgroup has no such file (any more) or it may not be read."""
    try:
        with open(path) as file:
            return file.read().strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def read_bytes(path: str | os.PathLike[str]) -> int | None:
    """Read a size from a cgroup file; None where there is no such file, or no limit (``max``, or v1's huge number)."""
    text = read_text(path)
    if text is None or text == "max":
        return None
    return limited(int(text))


def limited(value: int) -> int | None:
    """Return a limit of v1 in bytes; None for the huge number that stands for no limit."""
    return None if value >= _V1_UNLIMITED else value
