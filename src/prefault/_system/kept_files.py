"""Small files of /proc and of cgroups that are read often, kept open: pread takes 1 us, opening the file first 8 us.

They are read without giving up the GIL: a look at the limits reads some 30 of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import ClassVar

from prefault._kernel.quick import identity, pread

_BYTES = 16384
"""More than any of these files holds; a read of one is not cut into parts."""


class KeptFile:
    """A file whose content the kernel makes when it is read."""

    _all: ClassVar[weakref.WeakSet[KeptFile]] = weakref.WeakSet()

    __slots__ = ("__weakref__", "_fd", "_identity", "_lock", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._identity: tuple[int, int, int] | None = None
        self._lock = threading.RLock()  # reentrant: a signal handler may read too
        KeptFile._all.add(self)

    def read(self) -> bytes:
        """All of it, as it is now.

        Raises:
            OSError: it is not there (any more), or may not be read.
        """
        with self._lock:
            if self._is_ours():
                with contextlib.suppress(OSError):  # ENODEV: its cgroup was removed, and perhaps made again
                    return pread(self._fd, _BYTES)
                self.close()
            opened = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._identity, self._fd = identity(opened), opened
            return pread(opened, _BYTES)

    def close(self) -> None:
        """Forget the descriptor; the next read opens the file again."""
        with self._lock:
            if self._is_ours():
                os.close(self._fd)
            self._fd = -1

    def _is_ours(self) -> bool:
        """Not so if somebody closed all descriptors, as daemons do at their start; the number may be another file's then."""
        if self._fd < 0:
            return False
        try:
            return identity(self._fd) == self._identity
        except OSError:
            return False

    def __del__(self) -> None:
        # At interpreter exit the functions may be gone.
        with contextlib.suppress(TypeError, AttributeError):
            self.close()

    @classmethod
    def forget_all(cls) -> None:
        """After fork, in the child: files of /proc/self are still the parent's, and a lock may be a lost thread's."""
        for file in cls._all:
            file._lock = threading.RLock()
            file.close()


os.register_at_fork(after_in_child=KeptFile.forget_all)
