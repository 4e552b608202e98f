"""Limits of the system that the processes of a device meet: which one it is, its number, and what to do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from prefault._system import cgroups
from prefault.errors import DeviceError
from prefault.sizes import format_size


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise an error that stands for a limit as DeviceError: ``what`` failed, which limit is reached, and what to do.

    Errors that say more than the system's two words, and those that stand for no limit, are raised as they are.
    """
    try:
        yield
    except OSError as error:
        sentence = reason(error.errno)
        if sentence is None or not (error.strerror or "").endswith(os.strerror(error.errno or 0)):
            raise
        raise DeviceError(error.errno, f"{what}: {sentence}") from error


def reason(number: int | None) -> str | None:
    """Return which limit an errno stands for, with its number and what to do; None if it stands for none."""
    match number:
        case errno.EMFILE:
            return no_descriptor()
        case errno.ENFILE:
            return "the system has as many open files as it may have (fs.file-max): raise that, or close some"
        case errno.EAGAIN:
            return no_process()
        case errno.EFBIG if (size := _soft(resource.RLIMIT_FSIZE)) is not None:
            return f"files of this process have at most {format_size(size)} (RLIMIT_FSIZE): raise that (ulimit -f)"
        case errno.ENOMEM if (size := _soft(resource.RLIMIT_AS)) is not None:
            return f"this process may map {format_size(size)} in all (RLIMIT_AS): raise that (ulimit -v)"
        case errno.ENOMEM:
            return "the kernel has no memory left: free some, or raise the limit of the memory cgroup"
        case _:
            return None


def no_descriptor() -> str:
    """Return the sentence for EMFILE, and for descriptors that did not arrive."""
    return (
        f"process {os.getpid()} has as many descriptors open as it may have, {_soft(resource.RLIMIT_NOFILE)}"
        " (RLIMIT_NOFILE): raise that (ulimit -n), or close some"
    )


def no_process() -> str:
    """Return the sentence for EAGAIN of fork(2) and of a new thread: the limit that is reached, or all that may be."""
    allowed: list[str] = []
    for directory in cgroups.governing("pids").directories:
        most, taken = cgroups.read_bytes(f"{directory}/pids.max"), cgroups.read_bytes(f"{directory}/pids.current")
        if most is not None and taken is not None:
            allowed.append(f"{directory}/pids.max allows {most} processes and threads, and there are {taken}")
            if taken >= most:
                return f"{allowed[-1]}: raise that, or end some"
    most = _soft(resource.RLIMIT_NPROC)
    if most is not None:
        allowed.append(f"RLIMIT_NPROC allows user {os.getuid()} {most} processes and threads (ulimit -u)")
    allowed.append("kernel.threads-max and kernel.pid_max allow so many to the system")
    return f"there are as many processes and threads as there may be: raise the limit, or end some ({'; '.join(allowed)})"


def _soft(limit: int) -> int | None:
    soft, _ = resource.getrlimit(limit)
    return None if soft == resource.RLIM_INFINITY else soft
