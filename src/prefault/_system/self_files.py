"""Files of ``/proc/self`` that are asked often, kept open."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from ctypes import Structure
from typing import ClassVar

from prefault._kernel.quick import ioctl as quick_ioctl
from prefault._system import proc


class SelfFile:
    """An open ``/proc/self/<name>`` for ioctls. Opening it costs more than asking it: 4 us against 1."""

    _all: ClassVar[weakref.WeakSet[SelfFile]] = weakref.WeakSet()

    def __init__(self, name: str) -> None:
        self._path = f"/proc/self/{name}"
        self._fd = -1
        self._identity: tuple[int, int] | None = None
        self._lock = threading.RLock()  # reentrant: a signal handler may ask too
        SelfFile._all.add(self)

    def ioctl(self, request: int, argument: Structure, *, quick: bool = False) -> int:
        """ioctl(2) with a structure that the kernel may change; ``quick`` keeps the GIL, for what takes microseconds."""
        call = quick_ioctl if quick else _ioctl
        fd = self._fd
        try:
            return call(fd, request, argument)
        except OSError as error:
            # Somebody closed all descriptors (as daemons do at their start), and perhaps opened others since.
            if error.errno not in (errno.EBADF, errno.ENOTTY):
                raise
        with self._lock:
            if self._fd == fd:  # else another thread was faster
                opened = proc.open_proc(self._path)
                self._identity, self._fd = _identity(opened), opened
        return call(self._fd, request, argument)

    def _forget(self) -> None:
        fd, self._fd, self._lock = self._fd, -1, threading.RLock()
        with contextlib.suppress(OSError):
            # Not if somebody closed it and the number is another file's by now.
            if fd >= 0 and _identity(fd) == self._identity:
                os.close(fd)

    @classmethod
    def forget_all(cls) -> None:
        """After fork, in the child: the descriptors still show the parent's memory."""
        for file in cls._all:
            file._forget()


os.register_at_fork(after_in_child=SelfFile.forget_all)


def _ioctl(fd: int, request: int, argument: Structure) -> int:
    if fd < 0:
        raise OSError(errno.EBADF, "ioctl: not open yet")
    return int(fcntl.ioctl(fd, request, argument, True))


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
