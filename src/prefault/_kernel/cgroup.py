"""The directories and files of cgroups, v1 and v2 (Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from prefault._kernel.proc import Mount, read_mounts

# What v1 reports for "no limit": the largest multiple of the page size in a signed long.
_V1_UNLIMITED = 1 << 62


def hierarchies(pid: int | str = "self") -> Iterator[tuple[frozenset[str], str]]:
    """The lines of ``/proc/pid/cgroup``: the controllers (empty for v2), and the path inside the hierarchy."""
    text = os.fsdecode(Path(f"/proc/{pid}/cgroup").read_bytes())
    for line in text.removesuffix("\n").split("\n"):  # not splitlines(): other separators may be in a name
        _, controllers, path = line.split(":", 2)
        yield frozenset(filter(None, controllers.split(","))), path


def directories(controller: str, pid: int | str = "self") -> list[Path]:
    """The cgroup directories that govern ``controller`` for a process, its own first and then each parent's.

    Empty where no hierarchy with that controller is mounted. With v1 and v2 both mounted, the v1 hierarchy that holds the
    controller is the one; a controller lives in one of the two.
    """
    mounts = read_mounts()
    for controllers, path in hierarchies(pid):
        for mount in mounts:
            if controllers:
                if controller not in controllers or not _is_v1_of(mount, controller):
                    continue
            elif mount.filesystem != "cgroup2" or not _has_controller(Path(mount.directory), controller):
                continue
            inside = _below(mount.root, path)
            if inside is not None:
                return _upward(Path(mount.directory), inside)
    return []


def _is_v1_of(mount: Mount, controller: str) -> bool:
    return mount.filesystem == "cgroup" and controller in mount.options.split(",")


def _has_controller(directory: Path, controller: str) -> bool:
    return controller in (read_text(directory / "cgroup.controllers") or "").split()


def _below(root: str, path: str) -> PurePosixPath | None:
    """``path`` seen from the mount's root; None where the mount does not show it (a container's view)."""
    try:
        inside = PurePosixPath(path).relative_to(root)
    except ValueError:
        return None
    # "/../x": we are outside of our cgroup namespace's root, and what the mount shows is not above us.
    return None if ".." in inside.parts else inside


def _upward(top: Path, inside: PurePosixPath) -> list[Path]:
    directory = top / inside
    found = []
    while True:
        if directory.is_dir():
            found.append(directory)
        if directory == top:
            return found
        directory = directory.parent


def read_text(path: Path) -> str | None:
    """A cgroup file, stripped; None where this cgroup has no such file (or it went away)."""
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def read_bytes(path: Path) -> int | None:
    """A size in a cgroup file; None where there is no such file, or no limit (``max``, or v1's huge number)."""
    text = read_text(path)
    if text is None or text == "max":
        return None
    value = int(text)
    return None if value >= _V1_UNLIMITED else value
