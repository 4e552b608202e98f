"""userfaultfd(2): page faults answered by a process. Documentation/admin-guide/mm/userfaultfd.rst, ioctl_userfaultfd(2).

An argument is packed into a fresh ``bytearray`` and not into a ctypes structure: that takes a third of the time, and a fault
is answered in a few microseconds. ``tests/kernel/test_headers.py`` compares the formats field by field with the header.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from typing import NamedTuple, TypeAlias

from prefault._kernel._call import INT, MACHINE, declare_syscall, fail

NR_USERFAULTFD = 323 if MACHINE == "x86_64" else 282  # 282: asm-generic

UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1  # Linux 5.11

DEVICE = "/dev/userfaultfd"
USERFAULTFD_IOC_NEW = 0xAA00  # Linux 6.1


class UffdFeature(enum.IntFlag):
    """``UFFD_FEATURE_*``: the features that a kernel has, and that a userfaultfd is asked for."""

    PAGEFAULT_FLAG_WP = 1 << 0  # Linux 5.7
    EVENT_FORK = 1 << 1  # to ask for it: CAP_SYS_PTRACE
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9  # Linux 5.13
    MINOR_SHMEM = 1 << 10  # Linux 5.14
    EXACT_ADDRESS = 1 << 11  # Linux 5.18
    WP_HUGETLBFS_SHMEM = 1 << 12  # Linux 5.19
    WP_UNPOPULATED = 1 << 13  # Linux 6.4
    POISON = 1 << 14  # Linux 6.6
    WP_ASYNC = 1 << 15  # Linux 6.7
    MOVE = 1 << 16  # Linux 6.8


class UffdIoctl(enum.IntFlag):
    """``1 << _UFFDIO_*``: the ioctls that :func:`api` and :func:`register` say may be used."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    API = 1 << 0x3F


UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
UFFDIO_MOVE = 0xC028AA05
UFFDIO_WRITEPROTECT = 0xC018AA06
UFFDIO_CONTINUE = 0xC020AA07
UFFDIO_POISON = 0xC020AA08

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2

UFFDIO_COPY_MODE_DONTWAKE = 1 << 0
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1
UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0
UFFDIO_CONTINUE_MODE_WP = 1 << 1  # Linux 6.4
UFFDIO_POISON_MODE_DONTWAKE = 1 << 0
UFFDIO_MOVE_MODE_DONTWAKE = 1 << 0
UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_EVENT_FORK = 0x13
UFFD_EVENT_REMAP = 0x14
UFFD_EVENT_REMOVE = 0x15
UFFD_EVENT_UNMAP = 0x16

UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2

UFFDIO_API_ARGUMENT = struct.Struct("=QQQ")
"""``struct uffdio_api``: api, features, ioctls."""
UFFDIO_RANGE_ARGUMENT = struct.Struct("=QQ")
"""``struct uffdio_range``: start, len."""
UFFDIO_WRITEPROTECT_ARGUMENT = struct.Struct("=QQQ")
"""``struct uffdio_writeprotect``: range, mode."""
UFFDIO_RUN_ARGUMENT = struct.Struct("=QQQq")
"""``struct uffdio_register``, ``_zeropage``, ``_continue``, ``_poison``: range, mode, and the kernel's answer."""
UFFDIO_TRANSFER_ARGUMENT = struct.Struct("=QQQQq")
"""``struct uffdio_copy`` and ``_move``: dst, src, len, mode, and the kernel's answer."""

MESSAGE = struct.Struct("=B7xQQI4x")
"""``struct uffd_msg`` of a page fault: event, flags, address, thread id (0 without ``UffdFeature.THREAD_ID``)."""
MESSAGE_BYTES = MESSAGE.size
_FORK = struct.Struct("=B7xI20x")
_THREE = struct.Struct("=B7xQQQ")

_ANSWER = struct.Struct("=q")
_RUN_ANSWER_AT = UFFDIO_RUN_ARGUMENT.size - _ANSWER.size
_TRANSFER_ANSWER_AT = UFFDIO_TRANSFER_ARGUMENT.size - _ANSWER.size

_userfaultfd = declare_syscall(NR_USERFAULTFD, INT)


def userfaultfd(flags: int) -> int:
    """Create a userfaultfd. ``flags``: os.O_CLOEXEC, os.O_NONBLOCK, UFFD_USER_MODE_ONLY. userfaultfd(2), Linux 4.3.

    poll(2) reports events only on a descriptor that is O_NONBLOCK.

    Raises:
        OSError: EPERM without CAP_SYS_PTRACE, UFFD_USER_MODE_ONLY or vm.unprivileged_userfaultfd = 1, or by seccomp.
            ENOSYS, or EINVAL for flags that the kernel does not know.
    """
    fd = _userfaultfd(flags)
    if fd < 0:
        fail("userfaultfd")
    return fd


def userfaultfd_from_device(flags: int) -> int:
    """Create a userfaultfd from /dev/userfaultfd: the right to open that file is enough. Linux 6.1."""
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def api(fd: int, features: int = 0) -> tuple[UffdFeature, UffdIoctl]:
    """Ask for ``features``, once and before any other ioctl; return what the kernel has. UFFDIO_API.

    Returns:
        All features of this kernel (not those asked for), and the ioctls of the descriptor itself.

    Raises:
        OSError: EINVAL for features that the kernel does not have. Since Linux 6.12 the descriptor may then be asked again;
            before, every further call fails with EINVAL. EPERM for EVENT_FORK without CAP_SYS_PTRACE.
    """
    argument = bytearray(UFFDIO_API_ARGUMENT.pack(UFFD_API, features, 0))
    fcntl.ioctl(fd, UFFDIO_API, argument, True)
    _, found, ioctls = UFFDIO_API_ARGUMENT.unpack(argument)
    return UffdFeature(found), UffdIoctl(ioctls)


def register(fd: int, start: int, length: int, mode: int) -> UffdIoctl:
    """Register the range, so that its faults are reported; return the ioctls that it takes. UFFDIO_REGISTER.

    Raises:
        OSError: EINVAL for memory or a mode that cannot be registered, EBUSY where another userfaultfd has it,
            EPERM for a shared mapping of a file that the caller may not write.
    """
    argument = bytearray(UFFDIO_RUN_ARGUMENT.pack(start, length, mode, 0))
    fcntl.ioctl(fd, UFFDIO_REGISTER, argument, True)
    return UffdIoctl(_ANSWER.unpack_from(argument, _RUN_ANSWER_AT)[0])


def unregister(fd: int, start: int, length: int) -> None:
    """Unregister the range. Threads that wait for its pages wake up and read zeros. UFFDIO_UNREGISTER."""
    fcntl.ioctl(fd, UFFDIO_UNREGISTER, UFFDIO_RANGE_ARGUMENT.pack(start, length))


def wake(fd: int, start: int, length: int) -> None:
    """Wake the threads that wait for pages of the range. A page that is still missing is reported again. UFFDIO_WAKE."""
    fcntl.ioctl(fd, UFFDIO_WAKE, UFFDIO_RANGE_ARGUMENT.pack(start, length))


def copy(fd: int, dst: int, src: int, length: int, mode: int = 0) -> int:
    """Supply missing pages at ``dst`` (in the registered process) from ``src`` (in the caller). UFFDIO_COPY.

    Returns:
        The bytes done: fewer than ``length`` where the kernel stopped, most often at a page that is present already.

    Raises:
        OSError: nothing was done. EEXIST: the first page is present already. ENOENT: the range is not registered. EAGAIN:
            the process is forking or remapping; call again after reading the event. ESRCH: the process is gone.
    """
    argument = bytearray(UFFDIO_TRANSFER_ARGUMENT.pack(dst, src, length, mode, 0))
    return _partial(fd, UFFDIO_COPY, argument, _TRANSFER_ANSWER_AT)


def zeropage(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Supply zeros for missing pages, with the result and errors of :func:`copy`. Not on hugetlb. UFFDIO_ZEROPAGE."""
    argument = bytearray(UFFDIO_RUN_ARGUMENT.pack(start, length, mode, 0))
    return _partial(fd, UFFDIO_ZEROPAGE, argument, _RUN_ANSWER_AT)


def continue_(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Map the pages that the file has in the range; return the bytes done. UFFDIO_CONTINUE, Linux 5.13 (shmem: 5.14).

    The call replaces poison and write-protection of pages that are not present: without UFFDIO_CONTINUE_MODE_WP they become
    writable.

    Raises:
        OSError: the errors of :func:`copy`, and EFAULT where the file has no page.
    """
    argument = bytearray(UFFDIO_RUN_ARGUMENT.pack(start, length, mode, 0))
    return _partial(fd, UFFDIO_CONTINUE, argument, _RUN_ANSWER_AT)


def poison(fd: int, start: int, length: int, mode: int = 0) -> int:
    """Poison missing pages; return the bytes done. UFFDIO_POISON, Linux 6.6.

    A thread that touches a poisoned page gets SIGBUS; a system call that is given one fails with EHWPOISON.
    """
    argument = bytearray(UFFDIO_RUN_ARGUMENT.pack(start, length, mode, 0))
    return _partial(fd, UFFDIO_POISON, argument, _RUN_ANSWER_AT)


def move(fd: int, dst: int, src: int, length: int, mode: int = 0) -> int:
    """Move anonymous pages to missing ones of the same process; return the bytes done. UFFDIO_MOVE, Linux 6.8.

    Raises:
        OSError: the errors of :func:`copy`; EBUSY for a page that is shared or pinned, ENOENT for a hole at ``src``.
    """
    argument = bytearray(UFFDIO_TRANSFER_ARGUMENT.pack(dst, src, length, mode, 0))
    return _partial(fd, UFFDIO_MOVE, argument, _TRANSFER_ANSWER_AT)


def writeprotect(fd: int, start: int, length: int, mode: int) -> None:
    """Write-protect the range (UFFDIO_WRITEPROTECT_MODE_WP), or remove the protection (0). Linux 5.7.

    Removing the protection wakes the threads that wait to write.
    """
    fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_ARGUMENT.pack(start, length, mode))


def _partial(fd: int, request: int, argument: bytearray, answer_at: int) -> int:
    try:
        fcntl.ioctl(fd, request, argument, True)
    except OSError as error:
        # EAGAIN stands for two things: "stopped after so many bytes", and "nothing done, the mappings are changing".
        if error.errno != errno.EAGAIN:
            raise
        done: int = _ANSWER.unpack_from(argument, answer_at)[0]
        if done <= 0:
            raise
        return done
    return _ANSWER.unpack_from(argument, answer_at)[0]  # type: ignore[no-any-return]


class PageFault(NamedTuple):
    """A thread waits for the page at ``address``. ``thread_id`` is 0 without ``UffdFeature.THREAD_ID``."""

    flags: int
    address: int
    thread_id: int


class ForkEvent(NamedTuple):
    """The process forked. ``descriptor`` is the userfaultfd of the child; the reader owns it."""

    descriptor: int


class RemapEvent(NamedTuple):
    """mremap(2) moved registered memory."""

    start: int
    to: int
    length: int


class RemoveEvent(NamedTuple):
    """MADV_DONTNEED or MADV_REMOVE in ``[start, end)``: the pages are missing again."""

    start: int
    end: int


class UnmapEvent(NamedTuple):
    """``[start, end)`` is not mapped any more."""

    start: int
    end: int


Event: TypeAlias = PageFault | ForkEvent | RemapEvent | RemoveEvent | UnmapEvent


def read_events(fd: int, most: int = 64) -> list[Event]:
    """Read the events that are queued, at most ``most``. BlockingIOError if there is none and ``fd`` is O_NONBLOCK."""
    data = os.read(fd, most * MESSAGE_BYTES)
    return [decode(data, at) for at in range(0, len(data), MESSAGE_BYTES)]


def decode(data: bytes | bytearray | memoryview, at: int = 0) -> Event:
    """Decode the message at ``at``. OSError (EPROTO) for an event that is unknown."""
    event, first, second, third = _THREE.unpack_from(data, at)
    if event == UFFD_EVENT_PAGEFAULT:
        return PageFault(*MESSAGE.unpack_from(data, at)[1:])
    if event == UFFD_EVENT_FORK:
        return ForkEvent(_FORK.unpack_from(data, at)[1])
    if event == UFFD_EVENT_REMAP:
        return RemapEvent(first, second, third)
    if event == UFFD_EVENT_REMOVE:
        return RemoveEvent(first, second)
    if event == UFFD_EVENT_UNMAP:
        return UnmapEvent(first, second)
    raise OSError(errno.EPROTO, f"unknown userfaultfd event {event:#x}")
