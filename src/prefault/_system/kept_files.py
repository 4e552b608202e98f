"""Small files of /proc and of cgroups that are asked often, kept open: pread(2) takes 1 us, opening the file first 8 us.

They are asked without giving up the GIL: a check of the limits reads some 30 of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from ctypes import Structure
from typing import ClassVar

from prefault._kernel import quick as quick_calls
from prefault._system import fork_hooks
from prefault._system.proc import open_proc

_BYTES = 16384
"""More than any of these files holds; a read of one is not cut into parts."""


class KeptFile:
    """A file whose content the kernel makes when it is asked.

    The program may close all descriptors, as daemons do at their start, and the number then be another file's. The file is
    opened again in that case, and the other file left alone.
    """

    _all: ClassVar[weakref.WeakSet[KeptFile]]

    __slots__ = ("__weakref__", "_fd", "_identity", "_lock", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._identity: tuple[int, int, int] | None = None
        self._lock = threading.RLock()  # reentrant: a signal handler may ask too
        KeptFile._all.add(self)

    def read(self) -> bytes:
        """Read all of it, as it is now.

        Raises:
            OSError: the file does not exist (any more), or may not be read.
        """
        with self._lock:
            if self._is_ours():
                with contextlib.suppress(OSError):  # ENODEV: its cgroup was removed, and perhaps made again
                    return quick_calls.pread(self._fd, _BYTES)
                self.close()
            return quick_calls.pread(self._open(), _BYTES)

    def ioctl(self, request: int, argument: Structure, *, quick: bool = False) -> int:
        """Call ioctl(2) with a structure that the kernel may change.

        Args:
            request: a request that no other kind of file knows: the answer of another file is ENOTTY.
            argument: the structure.
            quick: keep the GIL, for requests that take microseconds.
        """
        call = quick_calls.ioctl if quick else _ioctl
        fd = self._fd
        if fd >= 0:
            # Not checked before, which would double the cost.
            try:
                return call(fd, request, argument)
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.ENOTTY):
                    raise
        with self._lock:
            if self._fd == fd:  # else another thread was faster
                self._open()
        return call(self._fd, request, argument)

    def close(self) -> None:
        """Forget the descriptor; the next call opens the file again."""
        with self._lock:
            if self._is_ours():
                os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        opened = open_proc(self.path)
        self._identity, self._fd = quick_calls.identity(opened), opened
        return opened

    def _is_ours(self) -> bool:
        if self._fd < 0:
            return False
        try:
            return quick_calls.identity(self._fd) == self._identity
        except OSError:
            return False

    def _after_fork(self) -> None:
        """Close it in the child: files of /proc/self are still the parent's, and a lock may be a lost thread's."""
        self._lock = threading.RLock()
        self.close()

    def __del__(self) -> None:
        # At interpreter exit the functions may be gone.
        with contextlib.suppress(TypeError, AttributeError):
            self.close()


KeptFile._all = fork_hooks.instances(KeptFile._after_fork)


def _ioctl(fd: int, request: int, argument: Structure) -> int:
    return int(fcntl.ioctl(fd, request, argument, True))
