"""A FUSE file system of read-only files, in a process of its own, whose requests are as slow as a test says, or fail.

The server counts its requests and logs each one: what was read, and how often, is known without a look at the page cache.
Word ``n`` of a file is the number ``n`` (8 bytes, little endian), so that each page tells where it belongs.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HANG_LIMIT_S = 60.0
_START_LIMIT_S = 20.0

_SLOTS = (
    "latency_us",
    "read_bytes",
    "requests",
    "in_flight",
    "most_in_flight",
    "fail_start",
    "fail_stop",
    "hang_start",
    "hang_stop",
    "size_limit",
)


class _State:
    """Numbers that the server and the test share."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def get(self, name: str) -> int:
        (value,) = struct.unpack_from("q", self._memory, 8 * _SLOTS.index(name))
        return int(value)

    def set(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * _SLOTS.index(name), value)

    def add(self, name: str, by: int) -> int:
        value = self.get(name) + by
        self.set(name, value)
        return value


def content(start: int, size: int) -> bytes:
    """Return ``size`` bytes of any file from ``start`` on."""
    import numpy

    first, last = start // 8, -(-(start + size) // 8)
    return numpy.arange(first, last, dtype="<u8").tobytes()[start - 8 * first :][:size]


class FuseFiles:
    """A mounted file system, seen from the test.

    Attributes:
        directory: the mount point.
    """

    def __init__(self, directory: Path, state: _State, log: Path) -> None:
        self.directory = directory
        self._state = state
        self._log = log

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    def set_latency(self, seconds: float) -> None:
        """Have each read request take this long from now on."""
        self._state.set("latency_us", round(seconds * 1e6))

    def fail(self, start: int, stop: int) -> None:
        """Answer EIO to each request for a byte of ``[start, stop)``."""
        self._state.set("fail_stop", stop)
        self._state.set("fail_start", start)

    def hang(self, start: int, stop: int) -> None:
        """Let each request for a byte of ``[start, stop)`` wait until this is called again, 60 s at most."""
        self._state.set("hang_stop", stop)
        self._state.set("hang_start", start)

    def shrink(self, size: int) -> None:
        """Have no file any bytes beyond ``size``."""
        self._state.set("size_limit", size)

    def forget(self) -> None:
        """Count from zero again."""
        self._log.write_bytes(b"")
        for name in ("read_bytes", "requests", "most_in_flight"):
            self._state.set(name, 0)

    @property
    def read_bytes(self) -> int:
        """Bytes that the server was asked for since the last :meth:`forget`."""
        return self._state.get("read_bytes")

    @property
    def requests(self) -> int:
        return self._state.get("requests")

    @property
    def most_in_flight(self) -> int:
        """Requests that the server worked on at one time."""
        return self._state.get("most_in_flight")

    @property
    def in_flight(self) -> int:
        return self._state.get("in_flight")

    def asked(self) -> list[tuple[int, int]]:
        """Return the requests in order of arrival: offset and bytes."""
        return list(struct.iter_unpack("=qq", self._log.read_bytes()))

    def read_twice(self) -> list[tuple[int, int]]:
        """Return the ranges of which bytes were asked for more than once."""
        found, reached = [], 0
        for start, size in sorted(self.asked()):
            if start < reached:
                found.append((start, min(reached, start + size)))
            reached = max(reached, start + size)
        return found


@contextmanager
def mounted(directory: Path, files: dict[str, int], *, latency_s: float = 0.0, **options: Any) -> Iterator[FuseFiles]:
    """Mount files of the given sizes at a new directory; unmounted, and its server ended, afterwards.

    Args:
        directory: made, with two files of the server beside it.
        files: sizes in bytes by name.
        latency_s: seconds that each read request takes.
        options: further mount options of libfuse, such as ``direct_io=True``.
    """
    directory.mkdir()
    state_file, log = directory.with_suffix(".state"), directory.with_suffix(".log")
    state_file.write_bytes(bytes(mmap.PAGESIZE))
    log.touch()
    state = _State(state_file)
    state.set("size_limit", 1 << 62)
    bed = FuseFiles(directory, state, log)
    bed.set_latency(latency_s)
    asked = json.dumps({"directory": str(directory), "state": str(state_file), "log": str(log), "files": files, **options})
    server = subprocess.Popen([sys.executable, __file__, asked], stderr=subprocess.PIPE)
    try:
        _wait_for_mount(directory, server)
        yield bed
    finally:
        bed.hang(0, 0)
        subprocess.run(["umount", "--lazy", directory], check=False, capture_output=True)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.send_signal(signal.SIGKILL)
            server.wait()
        if server.stderr is not None:
            server.stderr.close()


def _wait_for_mount(directory: Path, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_LIMIT_S
    while not os.path.ismount(directory):
        if server.poll() is not None:
            assert server.stderr is not None
            raise RuntimeError(f"the FUSE server ended: {server.stderr.read().decode()}")
        if time.monotonic() > end:
            raise TimeoutError(f"nothing is mounted at {directory} after {_START_LIMIT_S} s")
        time.sleep(0.01)


# --- the server's process -----------------------------------------------------------------------------------------


def _serve(asked: dict[str, Any]) -> None:
    import mfusepy  # type: ignore[import-untyped]
    import numpy  # noqa: F401  before the first request

    state = _State(Path(asked.pop("state")))
    log = os.open(asked.pop("log"), os.O_WRONLY | os.O_APPEND)
    files: dict[str, int] = asked.pop("files")
    lock = threading.Lock()

    class ReadOnlyFiles(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
            if path[1:] not in files:
                raise mfusepy.FuseOSError(errno.ENOENT)
            size = min(files[path[1:]], state.get("size_limit"))
            return {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1, "st_size": size, "st_blocks": -(-size // 512)}

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *files]

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            with lock:
                state.add("requests", 1)
                state.add("read_bytes", size)
                state.set("most_in_flight", max(state.get("most_in_flight"), state.add("in_flight", 1)))
                os.write(log, struct.pack("=qq", offset, size))
            try:
                return answer(path, size, offset)
            finally:
                with lock:
                    state.add("in_flight", -1)

    def answer(path: str, size: int, offset: int) -> bytes:
        end = time.monotonic() + HANG_LIMIT_S
        while state.get("hang_start") < offset + size and offset < state.get("hang_stop") and time.monotonic() < end:
            time.sleep(0.005)
        if latency := state.get("latency_us"):
            time.sleep(latency / 1e6)
        if state.get("fail_start") < offset + size and offset < state.get("fail_stop"):
            raise mfusepy.FuseOSError(errno.EIO)
        limit = min(files[path[1:]], state.get("size_limit"))
        return content(offset, max(0, min(size, limit - offset)))

    options = {"kernel_cache": True, "max_threads": 64, "max_idle_threads": 64, **asked}
    mfusepy.FUSE(ReadOnlyFiles(), options.pop("directory"), foreground=True, ro=True, **options)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
