"""userfaultfd(2), as far as the tests need it: memory whose missing pages another process supplies, poisons or withholds.

Numbers and layouts are proven by ``tests/kernel/test_headers.py``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from typing import NamedTuple

from prefault._kernel._call import INT, MACHINE, declare_syscall, fail
from prefault.sizes import PAGE_SIZE
from support import needs

NR_USERFAULTFD = 323 if MACHINE == "x86_64" else 282  # 282: asm-generic

UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1
UFFD_EVENT_PAGEFAULT = 0x12
UFFD_PAGEFAULT_FLAG_WRITE = 1
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
UFFD_FEATURE_POISON = 1 << 14

UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_ZEROPAGE = 0xC020AA04
UFFDIO_WRITEPROTECT = 0xC018AA06
UFFDIO_POISON = 0xC020AA08

UFFDIO_REGISTER_MODE_MISSING = 1
UFFDIO_REGISTER_MODE_WP = 2
UFFDIO_WRITEPROTECT_MODE_WP = 1

UFFD_MSG_BYTES = 32
_PAGEFAULT = struct.Struct("=B7xQQ8x")  # event, arg.pagefault.flags, arg.pagefault.address


class UffdioApi(ctypes.Structure):
    """``struct uffdio_api``."""

    _fields_ = (("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class UffdioRange(ctypes.Structure):
    """``struct uffdio_range``."""

    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class UffdioRegister(ctypes.Structure):
    """``struct uffdio_register``."""

    _fields_ = (("range", UffdioRange), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class UffdioZeropage(ctypes.Structure):
    """``struct uffdio_zeropage``."""

    _fields_ = (("range", UffdioRange), ("mode", ctypes.c_uint64), ("zeropage", ctypes.c_int64))


class UffdioWriteprotect(ctypes.Structure):
    """``struct uffdio_writeprotect``."""

    _fields_ = (("range", UffdioRange), ("mode", ctypes.c_uint64))


class UffdioPoison(ctypes.Structure):
    """``struct uffdio_poison``."""

    _fields_ = (("range", UffdioRange), ("mode", ctypes.c_uint64), ("updated", ctypes.c_int64))


class Fault(NamedTuple):
    """A page fault that waits for an answer."""

    address: int
    write: bool


_userfaultfd = declare_syscall(NR_USERFAULTFD, INT)


class Userfaultfd:
    """A userfaultfd that a fork shares: whoever holds it may answer the faults of the process that made it."""

    def __init__(self, features: int = 0, *, user_mode_only: bool = True) -> None:
        """``user_mode_only``: faults that the kernel raises fail instead of waiting. Without it: CAP_SYS_PTRACE."""
        # Not blocking: only then does poll(2) say whether there is a fault.
        self.fd = _userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | (UFFD_USER_MODE_ONLY if user_mode_only else 0))
        if self.fd < 0:
            fail("userfaultfd")
        try:
            fcntl.ioctl(self.fd, UFFDIO_API, UffdioApi(UFFD_API, features, 0), True)
        except OSError:
            os.close(self.fd)
            raise

    def register(self, address: int, length: int, mode: int = UFFDIO_REGISTER_MODE_MISSING) -> None:
        fcntl.ioctl(self.fd, UFFDIO_REGISTER, UffdioRegister(UffdioRange(address, length), mode, 0), True)

    def poison(self, address: int, length: int = PAGE_SIZE) -> None:
        """Whoever touches these pages gets SIGBUS, and the kernel EHWPOISON. Linux 6.6."""
        fcntl.ioctl(self.fd, UFFDIO_POISON, UffdioPoison(UffdioRange(address, length), 0, 0), True)

    def zeropage(self, address: int, length: int = PAGE_SIZE) -> None:
        """Supply zeros, and wake who waits for them."""
        fcntl.ioctl(self.fd, UFFDIO_ZEROPAGE, UffdioZeropage(UffdioRange(address, length), 0, 0), True)

    def write_protect(self, address: int, length: int, *, protect: bool) -> None:
        """Protect pages against writing; or unprotect them, and wake who waits."""
        mode = UFFDIO_WRITEPROTECT_MODE_WP if protect else 0
        fcntl.ioctl(self.fd, UFFDIO_WRITEPROTECT, UffdioWriteprotect(UffdioRange(address, length), mode), True)

    def wait(self, timeout_s: float = 30.0) -> Fault:
        """The next fault. TimeoutError if there is none for so long."""
        ready, _, _ = select.select([self.fd], [], [], timeout_s)
        if not ready:
            raise TimeoutError("no page fault came")
        event, flags, address = _PAGEFAULT.unpack(os.read(self.fd, UFFD_MSG_BYTES))
        if event != UFFD_EVENT_PAGEFAULT:
            raise OSError(errno.EPROTO, f"not a page fault: event {event:#x}")
        return Fault(address, bool(flags & UFFD_PAGEFAULT_FLAG_WRITE))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(features: int = 0, *, user_mode_only: bool = True) -> Userfaultfd:
    """A :class:`Userfaultfd`, or a skip where the kernel or our privileges do not give one."""
    found: Userfaultfd | OSError
    try:
        found = Userfaultfd(features, user_mode_only=user_mode_only)
    except OSError as refusal:
        found = refusal
    if isinstance(found, OSError):
        what = "userfaultfd" if user_mode_only else "userfaultfd for faults raised by the kernel (CAP_SYS_PTRACE)"
        needs.missing(f"{what} with features {features:#x} cannot be had: {found}")
    return found
