"""Mounts that no path shows: fsopen(2), fsconfig(2), fsmount(2), Linux 5.2. The last descriptor that is closed unmounts."""

from __future__ import annotations

from prefault._kernel._call import INT, POINTER, UINT, declare_syscall, fail

NR_FSOPEN = 430
NR_FSCONFIG = 431
NR_FSMOUNT = 432

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_CMD_CREATE = 6

_fsopen = declare_syscall(NR_FSOPEN, POINTER, UINT)
_fsconfig = declare_syscall(NR_FSCONFIG, INT, UINT, POINTER, POINTER, INT)
_fsmount = declare_syscall(NR_FSMOUNT, INT, UINT, UINT)


def fsopen(file_system: bytes, flags: int) -> int:
    """Open a context in which a file system of this type is configured; return its descriptor.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, ENODEV where the kernel has no such type, ENOSYS before Linux 5.2.
    """
    # ctypes keeps the bytes, which end in a NUL, during the call.
    fd = _fsopen(file_system, flags)
    if fd < 0:
        fail("fsopen")
    return fd


def fsconfig(fd: int, command: int) -> None:
    """Give a context a command that has neither a key nor a value."""
    if _fsconfig(fd, command, None, None, 0):
        fail("fsconfig")


def fsmount(fd: int, flags: int, attributes: int) -> int:
    """Mount the file system of a context, without a path; return a descriptor of its root directory."""
    mounted = _fsmount(fd, flags, attributes)
    if mounted < 0:
        fail("fsmount")
    return mounted
