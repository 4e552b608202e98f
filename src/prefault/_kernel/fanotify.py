"""fanotify(7): the kernel's notification of opened files, with a descriptor of each. Linux 4.20 for whole file systems."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from prefault._kernel._call import INT, UINT, declare, fail

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_CLASS_NOTIF = 0
FAN_UNLIMITED_QUEUE = 0x10
FAN_MARK_ADD = 0x1
FAN_MARK_FILESYSTEM = 0x100
FAN_OPEN = 0x20
FAN_Q_OVERFLOW = 0x4000
FAN_NOFD = -1

METADATA = struct.Struct("=IBBHQii")
"""``struct fanotify_event_metadata``."""

_init = declare("fanotify_init", UINT, UINT)
_mark = declare("fanotify_mark", INT, UINT, ctypes.c_uint64, INT, ctypes.c_char_p)


class FileEvent(NamedTuple):
    """An event of a file.

    Attributes:
        mask: the kinds of the event.
        fd: a descriptor of the file, which the reader closes; FAN_NOFD without one.
        pid: the process that caused it.
    """

    mask: int
    fd: int
    pid: int


def fanotify_init(flags: int, file_flags: int) -> int:
    """Make a group that receives events, whose descriptors are opened with ``file_flags``; return its descriptor.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, ENOSYS where the kernel is built without fanotify.
    """
    fd = _init(flags, file_flags)
    if fd < 0:
        fail("fanotify_init")
    return fd


def fanotify_mark(fd: int, flags: int, mask: int, directory: int, path: bytes) -> None:
    """Add or remove what a group is notified of.

    Raises:
        OSError: EINVAL, ENODEV, EOPNOTSUPP or EXDEV where this file system cannot be watched.
    """
    if _mark(fd, flags, mask, directory, path):
        fail("fanotify_mark")


def parse_events(content: bytes) -> list[FileEvent]:
    """Parse what read(2) returned from a group."""
    events, at = [], 0
    while at + METADATA.size <= len(content):
        length, _, _, _, mask, fd, pid = METADATA.unpack_from(content, at)
        events.append(FileEvent(mask, fd, pid))
        at += max(length, METADATA.size)
    return events
