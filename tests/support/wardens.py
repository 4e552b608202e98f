"""Devices for tests of wardens, importable by recipe, and queries about a device's processes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import prefault.device
from prefault.device import spawning
from prefault.device.device_pool import Access
from prefault.device.driver import DeviceArea, Recipe, Supplied
from prefault.memory.borrowing import borrow
from prefault.sizes import PAGE_SIZE
from support import processes
from support.devices import Pattern, content

PAGES = 32


class Gated(Pattern):
    """Supplies page 4 once the file at ``gate`` exists; with ``deadly`` it ends its process then."""

    def __init__(
        self, gate: str, *, restartable: bool = False, deadly: bool = False, timeout_s: float = 30.0, by_recipe: bool = False
    ) -> None:
        super().__init__(PAGES, restartable=restartable, timeout_s=timeout_s)
        self._gate = Path(gate)
        self._deadly = deadly
        self._by_recipe = by_recipe
        self._arguments = {"gate": gate, "restartable": restartable, "deadly": deadly, "timeout_s": timeout_s}

    def recipe(self) -> Recipe | None:
        return Recipe("support.wardens:Gated", self._arguments) if self._by_recipe else None

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 4:
            area.frame(page)[:] = b"\xee" * PAGE_SIZE  # what nobody may ever see
            (self._gate.parent / "asked").touch()
            while not self._gate.exists():
                time.sleep(0.002)
            if self._deadly:
                os._exit(3)
        return super().fault(area, page, access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


class Forks(Pattern):
    """Starts a child of its own, which does nothing for a while."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        reader, writer = os.pipe()
        if not os.fork():
            Path("/proc/self/comm").write_text("a-child")
            os.write(writer, b".")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 1)  # by its name it could be taken for the server until then
        os.close(reader)
        os.close(writer)
        return super().fault(area, page, access)


class NeverCloses(Pattern):
    """Never returns from close()."""

    def close(self, area: DeviceArea) -> None:
        time.sleep(3600)


class Chatty(Pattern):
    """Prints at each fault."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        print("from the driver")
        print(sys.stdin.read(), end="")
        return super().fault(area, page, access)


def raising() -> Pattern:
    """A factory that raises."""
    raise LookupError("no such thing")


def leaving() -> Pattern:
    """A factory that calls exit."""
    sys.exit("enough")


def vanishing() -> Pattern:
    """A factory that ends its process."""
    os._exit(9)


def hanging() -> Pattern:
    """A factory that does not return."""
    while True:
        time.sleep(60)


def a_number() -> int:
    """A factory of something else than a device."""
    return 5


def lengthless() -> Pattern:
    """A device without a length."""
    device = Pattern(1)
    device.length = 0
    return device


def of_everything(**arguments: Any) -> Pattern:
    """A factory that checks that every type of argument arrives."""
    assert arguments == everything(), arguments
    return Pattern(2)


def everything() -> dict[str, Any]:
    """Return an argument of every type that a recipe can carry."""
    return {
        "none": None, "yes": True, "small": -(1 << 63), "large": (1 << 64) - 1, "half": 0.5, "text": "\N{SNOWMAN}",
        "bytes": b"\0\xff", "nested": [{"a": [1, [2]]}, []], "long": "x" * 1_000_000,
    }  # fmt: skip


def roles(pid: int | None = None) -> dict[str, int]:
    """Return the pids of the one warden and the one server that descend from a process, by role."""
    found = {}
    for other in processes.descendants(pid or os.getpid()):
        try:
            comm = Path(f"/proc/{other}/comm").read_text().strip()
        except FileNotFoundError:
            continue
        if comm.startswith("prefault-"):
            found[comm.removeprefix("prefault-")] = other
    return found


def _named() -> set[int]:
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if Path(f"/proc/{name}/comm").read_text().startswith("prefault-"):
                    found.add(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def frames_of(area: prefault.device.Area) -> int:
    """Return the inode of an area's frames, to find the processes that have them open."""
    with area.memoryview() as view, borrow(view) as memory:
        start = f"{memory.address:x}-"
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.startswith(start):
            assert "/memfd:prefault-frames" in line
            return int(line.split()[4])
    raise AssertionError("the area is not mapped")


class Unlucky(Pattern):
    """The first replacement warden that its server starts is killed before it receives a message."""

    def open(self, area: DeviceArea) -> None:
        start = spawning.spawn

        def start_in_vain(socket_fd: int) -> int:
            spawning.spawn = start
            pid = start(socket_fd)
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return pid

        spawning.spawn = start_in_vain


class DiesAtItsStart(Pattern):
    """Is killed in __init__, and leaves a child with all of its descriptors, whose pid is in the file."""

    def __init__(self, path: str) -> None:
        super().__init__(8)
        child = os.fork()
        if not child:
            time.sleep(10)
            Path(path).write_text("ended")
            os._exit(0)
        Path(path).write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)


def holders_of(inode: int) -> set[int]:
    """Return all device processes on this machine that have these frames open."""
    found = set()
    for pid in _named():
        try:
            if any(os.stat(f"/proc/{pid}/fd/{name}").st_ino == inode for name in os.listdir(f"/proc/{pid}/fd")):
                found.add(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last: another user's
            continue
    return found


def _peek(area: prefault.device.Area, page: int) -> bytes | None:
    reader, writer = os.pipe()
    try:
        with area.memoryview() as view:
            try:
                os.write(writer, view[page * area.page_size : page * area.page_size + 512])
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                return None
        return os.read(reader, 512)
    finally:
        os.close(reader)
        os.close(writer)


def right(page: int) -> bytes:
    """Return the expected result of :func:`peek`."""
    return content(page)[:512]


class Peek(threading.Thread):
    """A :func:`peek` in a thread."""

    def __init__(self, area: prefault.device.Area, page: int) -> None:
        super().__init__(daemon=True)
        self._area, self._page = area, page
        self._found: bytes | None = b"not yet"
        self.start()

    def run(self) -> None:
        self._found = _peek(self._area, self._page)

    def result(self, timeout_s: float = 20.0) -> bytes | None:
        self.join(timeout_s)
        assert not self.is_alive(), "a thread hangs"
        return self._found


def peek(area: prefault.device.Area, page: int) -> bytes | None:
    """Read a page by a system call, which fails (None) where a touch would raise SIGBUS."""
    return Peek(area, page).result()
