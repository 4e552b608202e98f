"""mmap(2), munmap(2), mprotect(2), madvise(2), process_madvise(2), mlock2(2), munlock(2), mincore(2)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from prefault._kernel._call import INT, OFFSET, POINTER, SIZE, UINT, declare, declare_syscall, fail
from prefault.sizes import PAGE_SIZE

PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4

MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MAP_HUGETLB = 0x40000
MAP_FIXED_NOREPLACE = 0x100000  # Linux 4.17
MAP_HUGE_SHIFT = 26

MADV_NORMAL = 0
MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_DONTNEED = 4
MADV_WILLNEED = 3
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_COLD = 20  # Linux 5.4
MADV_PAGEOUT = 21  # Linux 5.4
MADV_POPULATE_READ = 22  # Linux 5.14
MADV_POPULATE_WRITE = 23  # Linux 5.14
MADV_DONTNEED_LOCKED = 24  # Linux 5.18
MADV_COLLAPSE = 25  # Linux 6.1
MADV_GUARD_INSTALL = 102  # Linux 6.13
MADV_GUARD_REMOVE = 103  # Linux 6.13

MLOCK_ONFAULT = 1

EHWPOISON = 133
"""The errno of a hardware-poisoned page, which Python's errno module does not have. 168 on MIPS, 257 on PA-RISC."""

NR_PROCESS_MADVISE = 440  # the same number on every architecture, as for all calls since 424
IOV_MAX = 1024
"""Ranges that one process_madvise or process_vm_readv call takes (UIO_MAXIOV)."""


PIDFD_SELF_THREAD_GROUP = -10001
"""The number that stands for a pidfd of the calling process (Linux 6.15)."""


class IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_mmap = declare("mmap", POINTER, SIZE, INT, INT, INT, OFFSET, result=POINTER)
_munmap = declare("munmap", POINTER, SIZE)
_mprotect = declare("mprotect", POINTER, SIZE, INT)
_madvise = declare("madvise", POINTER, SIZE, INT)
_mlock2 = declare("mlock2", POINTER, SIZE, UINT)
_munlock = declare("munlock", POINTER, SIZE)
_mincore = declare("mincore", POINTER, SIZE, POINTER)
_process_madvise = declare_syscall(NR_PROCESS_MADVISE, INT, POINTER, SIZE, INT, UINT)

_MAP_FAILED = ctypes.c_void_p(-1).value


def mmap(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map ``length`` bytes and return the address of the mapping. mmap(2)."""
    result = _mmap(address, length, prot, flags, fd, offset)
    if result == _MAP_FAILED:
        fail("mmap")
    return result


def munmap(address: int, length: int) -> None:
    """Unmap ``length`` bytes at ``address``. munmap(2)."""
    if _munmap(address, length):
        fail("munmap")


def mprotect(address: int, length: int, prot: int) -> None:
    """Set the protection of ``length`` bytes at ``address`` to ``prot``. mprotect(2)."""
    if _mprotect(address, length, prot):
        fail("mprotect")


def madvise(address: int, length: int, advice: int) -> None:
    """Give ``advice`` on ``length`` bytes at ``address`` without the GIL, which ``mmap.mmap.madvise`` keeps. madvise(2)."""
    if _madvise(address, length, advice):
        fail("madvise")


def process_madvise(pidfd: int, ranges: Sequence[tuple[int, int]], advice: int) -> int:
    """Give ``advice`` on up to 1024 ``(address, length)`` ranges of the process ``pidfd``. process_madvise(2), Linux 5.10.

    Returns:
        The bytes advised. A range that fails ends the call, with a short count and no errno unless it is the first.
    """
    vector = (IoVec * len(ranges))(*(IoVec(*pair) for pair in ranges))
    return process_madvise_vector(pidfd, ctypes.addressof(vector), len(ranges), advice)


def process_madvise_vector(pidfd: int, vector: int, count: int, advice: int) -> int:
    """Give ``advice`` on the ``count`` (at most 1024) ranges of a ``struct iovec`` array at the address ``vector``."""
    result = _process_madvise(pidfd, vector, count, advice, 0)
    if result < 0:
        fail("process_madvise")
    return result


def mlock2(address: int, length: int, flags: int = 0) -> None:
    """Lock ``length`` bytes at ``address``; ``flags`` is 0 or MLOCK_ONFAULT. mlock2(2), Linux 4.4."""
    if _mlock2(address, length, flags):
        fail("mlock2")


def munlock(address: int, length: int) -> None:
    """Unlock ``length`` bytes at ``address``. munlock(2)."""
    if _munlock(address, length):
        fail("munlock")


def mincore(address: int, length: int) -> bytearray:
    """Return one byte per base page, with bit 0 set where the page is resident. mincore(2).

    Since Linux 5.2 the kernel reports every page of a file as resident when the caller may not write the file.
    """
    vector = bytearray(-(-length // PAGE_SIZE))
    if not vector:
        return vector
    if _mincore(address, length, ctypes.addressof(ctypes.c_char.from_buffer(vector))):
        fail("mincore")
    return vector
