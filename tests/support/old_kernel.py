"""A process whose kernel refuses MADV_POPULATE_* as kernels before 5.14 do: EINVAL, by a seccomp filter."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from support import needs

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_ARGUMENTS = 16  # of struct seccomp_data: number, architecture, instruction pointer, six arguments of 8 bytes
_MADVISE = {"x86_64": 28, "aarch64": 233}
_PROCESS_MADVISE = 440
_POPULATE_READ, _POPULATE_WRITE = 22, 23


def pretend() -> None:
    """Have the kernel refuse MADV_POPULATE_READ and MADV_POPULATE_WRITE to this process from now on."""
    number = _MADVISE.get(platform.machine())
    if number is None:
        needs.missing(f"the number of madvise on {platform.machine()} is not in this test")
    # code, jump if true, jump if false, value
    program = [
        (_LOAD, 0, 0, 0),
        (_EQUAL, 2, 0, number),
        (_EQUAL, 3, 0, _PROCESS_MADVISE),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _ARGUMENTS + 2 * 8),  # madvise: the advice is the third argument
        (_EQUAL, 3, 2, _POPULATE_READ),
        (_LOAD, 0, 0, _ARGUMENTS + 3 * 8),  # process_madvise: the fourth
        (_EQUAL, 1, 0, _POPULATE_READ),
        (_EQUAL, 0, 1, _POPULATE_WRITE),
        (_RETURN, 0, 0, _ERRNO | errno.EINVAL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0):
        needs.missing(f"no seccomp filter can be installed: errno {ctypes.get_errno()}")
