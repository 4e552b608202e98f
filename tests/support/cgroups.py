"""Memory cgroups of our own, for processes of our own."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from prefault._system import cgroups
from support import needs

Result = TypeVar("Result")


class Group:
    """A memory cgroup (v1)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def limit_file(self) -> Path:
        return self.directory / "memory.limit_in_bytes"

    def limit(self, size: int) -> None:
        self.limit_file.write_text(str(size))

    @property
    def usage(self) -> int:
        return int((self.directory / "memory.usage_in_bytes").read_text())

    @property
    def killed(self) -> int:
        """How many processes the OOM killer has ended here."""
        lines = (self.directory / "memory.oom_control").read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    def enter(self) -> None:
        """Put this process here. What it allocates from now on is charged here."""
        (self.directory / "cgroup.procs").write_text(str(os.getpid()))

    def inside(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """``function``, to be run in here by a child process."""

        def entered() -> Result:
            gc.disable()  # it would write to every object that the child shares with us, and so copy them all
            self.enter()
            return function()

        return entered


def leave() -> None:
    """Out of the group again: what looks at the outcome is no part of what is tested, and may need some memory."""
    found = cgroups.governing("memory").directories
    outside = next((directory for directory in found if _PREFIX not in directory), None)
    if outside is not None and outside != found[0]:
        (Path(outside) / "cgroup.procs").write_text(str(os.getpid()))


_PREFIX = "prefault-test-"


@contextmanager
def groups() -> Iterator[Callable[..., Group]]:
    """A function that makes a group below ours, or below another, with a limit; all are removed in the end."""
    needs.root("make a cgroup")
    found = cgroups.governing("memory")
    if found.version != 1:
        needs.missing("no v1 hierarchy of the memory controller is mounted")
    made: list[Path] = []

    def make(limit: int, parent: Group | None = None) -> Group:
        above = Path(found.directories[0]) if parent is None else parent.directory
        directory = above / f"{_PREFIX}{os.getpid()}-{len(made)}"
        directory.mkdir()
        made.append(directory)
        group = Group(directory)
        group.limit(limit)
        return group

    try:
        yield make
    finally:
        for directory in reversed(made):
            _remove(directory)


def _remove(directory: Path) -> None:
    for _ in range(100):
        try:
            directory.rmdir()
        except OSError:  # EBUSY: a process that was killed is not all gone
            time.sleep(0.02)
        else:
            return
    directory.rmdir()
