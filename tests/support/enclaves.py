"""Enclave page caches for tests, and their sealed pages as anybody with access to ordinary memory finds them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import prefault.device
from prefault.device import DeviceClient
from prefault.drivers.enclave import EnclavePageCache, statistics
from prefault.sizes import MIB, PAGE_SIZE, Size
from support import processes
from support.device_server import ends_by
from support.wardens import roles

SPACE = 256 * MIB
"""Bytes of address space: no other mapping of a server is as large as its sealed pages."""


@contextlib.contextmanager
def cache_at(path: Path, capacity: Size = "1 MiB", space: int = SPACE) -> Iterator[DeviceClient]:
    """Serve a page cache at ``path``, and connect to it."""
    device = EnclavePageCache(capacity, address_space=space)
    with prefault.device.serve(device, path), prefault.device.connect(path) as client:
        yield client


def kill_server(client: DeviceClient) -> None:
    """Kill the server of this process with SIGKILL, and wait for the next one to answer."""
    before = roles()["server"]
    os.kill(before, signal.SIGKILL)
    assert processes.eventually(lambda: roles().get("server", before) != before)
    statistics(client)


def dies(path: Path, name: str, function: Callable[[memoryview], object]) -> bool:
    """Run ``function(memory)`` on an enclave in another process; return whether SIGBUS ended it."""

    def touch(say: Callable[[str], None]) -> None:
        with prefault.device.connect(path) as own, own.map(object=name) as area, area.memoryview() as memory:
            function(memory)

    _, status = ends_by(touch)
    assert status in (0, -signal.SIGBUS), status
    return status != 0


class OrdinaryMemory:
    """The memory in which a server keeps sealed pages, opened from outside by /proc, as root may."""

    def __init__(self, space: int = SPACE) -> None:
        self._path = ""
        self._tags = self._find(16 * space // PAGE_SIZE, "prefault-states")
        self._sealed = self._find(space, "prefault-states")

    def _find(self, length: int, name: str) -> tuple[int, int]:
        """Return the inode of the file, and the offset in it, of the mapping that has this length."""
        for line in Path(f"/proc/{roles()['server']}/maps").read_text().splitlines():
            found = re.match(rf"(\w+)-(\w+) rw-s (\w+) \S+ (\d+) +/memfd:{name}", line)
            if found and int(found[2], 16) - int(found[1], 16) == length:
                return int(found[4]), int(found[3], 16)
        raise AssertionError(f"no mapping of {length} bytes of {name}")

    def _open(self, inode: int) -> int:
        if not os.path.exists(self._path):  # the first time, and after the death of the server
            directory = f"/proc/{roles()['server']}/fd"
            found = (f"{directory}/{fd}" for fd in os.listdir(directory))
            self._path = next(path for path in found if os.path.exists(path) and os.stat(path).st_ino == inode)
        return os.open(self._path, os.O_RDWR)

    def read(self, page: int) -> bytes:
        """Return the sealed copy of a page of the device: the ciphertext and the tag."""
        fd = self._open(self._sealed[0])
        try:
            sealed = os.pread(fd, PAGE_SIZE, self._sealed[1] + page * PAGE_SIZE)
            return sealed + os.pread(fd, 16, self._tags[1] + page * 16)
        finally:
            os.close(fd)

    def write(self, page: int, copy: bytes) -> None:
        """Overwrite the sealed copy of a page."""
        fd = self._open(self._sealed[0])
        try:
            os.pwrite(fd, copy[:PAGE_SIZE], self._sealed[1] + page * PAGE_SIZE)
            os.pwrite(fd, copy[PAGE_SIZE:], self._tags[1] + page * 16)
        finally:
            os.close(fd)

    def allocated(self) -> int:
        """Return the bytes of memory behind the tables and sealed pages."""
        fd = self._open(self._sealed[0])
        try:
            return os.fstat(fd).st_blocks * 512
        finally:
            os.close(fd)

    def contains(self, text: bytes, length: int) -> bool:
        """Return whether the sealed pages contain a text, in the first bytes of the address space."""
        fd = self._open(self._sealed[0])
        try:
            at, stop = self._sealed[1], self._sealed[1] + length
            while at < stop:
                data = os.pread(fd, MIB, at)
                if text in data:
                    return True
                at += MIB
            return False
        finally:
            os.close(fd)
