"""Memory that outlives a server, in tests without one: ``keep`` of a directory of sparse memfds, inherited by forks."""

from __future__ import annotations

import mmap
import os


class KeptMemory:
    """Callable as ``DevicePool.keep``."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self._fds: dict[str, int] = {}

    def __call__(self, name: str, length: int) -> memoryview:
        if name not in self._maps:
            self._fds[name] = os.memfd_create(name)
            os.ftruncate(self._fds[name], length)
            self._maps[name] = mmap.mmap(self._fds[name], length, mmap.MAP_SHARED)
        return memoryview(self._maps[name])

    def allocated(self) -> int:
        """Bytes of memory behind all of it."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._fds.values())

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._maps.clear()  # unmapped with the last view
