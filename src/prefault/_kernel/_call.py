"""Call the C library so that the GIL is released and errors become ``OSError``."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Callable
from typing import Any, NoReturn

# CDLL, not PyDLL: the GIL is released while the kernel works, so other Python threads go on.
libc = ctypes.CDLL(None, use_errno=True)

_keeping_gil = ctypes.PyDLL(None, use_errno=True)

POINTER = ctypes.c_void_p
SIZE = ctypes.c_size_t
INT = ctypes.c_int
UINT = ctypes.c_uint
LONG = ctypes.c_long
ULONG = ctypes.c_ulong
OFFSET = ctypes.c_int64


def declare(name: str, *arguments: Any, result: Any = ctypes.c_int) -> Callable[..., int]:
    """Return the C library's function ``name``, typed. When it returns -1, :func:`fail` raises the error."""
    function = getattr(libc, name)
    function.argtypes = arguments
    function.restype = result
    return function  # type: ignore[no-any-return]


def declare_quick(name: str, *arguments: Any, result: Any = ctypes.c_int) -> Callable[..., int]:
    """Declare a function of the C library that is called without giving up the GIL.

    For calls of about a microsecond that never sleep. A thread that gives up the GIL beside busy threads waits for it
    through one switch interval (5 ms) or several.
    """
    function = getattr(_keeping_gil, name)
    function.argtypes = arguments
    function.restype = result
    return function  # type: ignore[no-any-return]


def declare_syscall(number: int, *arguments: Any) -> Callable[..., int]:
    """Return a function that makes the system call ``number``, for calls without a function in the C library."""
    # A function object of its own: argtypes of the shared `libc.syscall` would be overwritten by the next declaration.
    function = libc["syscall"]
    function.argtypes = (LONG, *arguments)
    function.restype = LONG
    return lambda *values: function(number, *values)


def no_descriptor() -> str:
    """Return the sentence for EMFILE, and for descriptors that did not arrive."""
    return (
        f"process {os.getpid()} has as many descriptors open as it may have, {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
        " (RLIMIT_NOFILE): raise that (ulimit -n), or close some"
    )


def no_open_file() -> str:
    """Return the sentence for ENFILE."""
    return "the system has as many open files as it may have (fs.file-max): raise that (sysctl), or close some"


def explain(number: int) -> str:
    """Return what errno ``number`` means and, where descriptors ran out, which limit that is and what to do."""
    limit = {errno.EMFILE: no_descriptor, errno.ENFILE: no_open_file}.get(number)
    return os.strerror(number) if limit is None else f"{os.strerror(number)}: {limit()}"


def fail(call: str) -> NoReturn:
    """Raise OSError with errno for the system call named ``call``."""
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {explain(number)}")


MACHINE = os.uname().machine
"""The architecture, as uname(2) names it. System call numbers below 424 depend on it."""
