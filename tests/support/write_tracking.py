"""userfaultfd write-protection in asynchronous mode (Linux 6.7): the kernel notes which pages are written, on its own."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from support import needs
from support.userfaultfd import (
    NR_USERFAULTFD,
    UFFD_API,
    UFFD_USER_MODE_ONLY,
    UFFDIO_API,
    UFFDIO_REGISTER,
    UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT,
    UFFDIO_WRITEPROTECT_MODE_WP,
    UffdioApi,
    UffdioRange,
    UffdioRegister,
)

UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15

_libc = ctypes.CDLL(None, use_errno=True)


class _UffdioWriteprotect(ctypes.Structure):
    """``struct uffdio_writeprotect``."""

    _fields_ = (("range", UffdioRange), ("mode", ctypes.c_uint64))


@contextmanager
def tracking(address: int, length: int) -> Iterator[None]:
    """From here on the kernel tracks writes to ``[address, address + length)``; no page counts as written at first."""
    fd = _libc.syscall(NR_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    if fd < 0:
        needs.missing(f"userfaultfd(2) is not available: {os.strerror(ctypes.get_errno())}")
    try:
        try:
            fcntl.ioctl(fd, UFFDIO_API, UffdioApi(UFFD_API, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED, 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            needs.missing("userfaultfd has no asynchronous write-protection (Linux 6.7)")
        pages = UffdioRange(address, length)
        fcntl.ioctl(fd, UFFDIO_REGISTER, UffdioRegister(pages, UFFDIO_REGISTER_MODE_WP, 0))
        fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, _UffdioWriteprotect(pages, UFFDIO_WRITEPROTECT_MODE_WP))
        yield
    finally:
        os.close(fd)
