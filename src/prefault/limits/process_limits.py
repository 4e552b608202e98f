"""The limits that calls do not use up byte by byte: descriptors, open files, processes and threads, the size of a file.

A row of :data:`PROCESS_LIMITS` names the errno with which a system call fails at the limit.
"""

import errno
import os
import resource
import threading
from collections.abc import Callable
from typing import NamedTuple

from prefault._kernel._call import no_descriptor, no_open_file
from prefault._system import cgroups
from prefault.sizes import format_size


class ProcessLimit(NamedTuple):
    """One limit.

    Attributes:
        errno: of the system calls that fail at it.
        sentence: returns the limit with its number and what to do; None if it is not set.
    """

    errno: int
    sentence: Callable[[], str | None]


def explain_limit(number: int | None) -> str | None:
    """Return which limit an errno stands for, with its number and what to do; None if it stands for none."""
    rows = (row.sentence() for row in PROCESS_LIMITS if row.errno == number)
    return next((sentence for sentence in rows if sentence is not None), None)


def no_process() -> str:
    """Return the sentence for EAGAIN of fork(2) and of a new thread: the limit that is reached, or all candidates."""
    allowed: list[str] = []
    for directory in cgroups.governing("pids").directories:
        most, taken = cgroups.read_bytes(f"{directory}/pids.max"), cgroups.read_bytes(f"{directory}/pids.current")
        if most is not None and taken is not None:
            allowed.append(f"{directory}/pids.max allows {most} processes and threads, and there are {taken}")
            if taken >= most:
                return f"{allowed[-1]}: raise that, or end some"
    most = soft_limit("RLIMIT_NPROC")
    if most is not None:
        allowed.append(f"RLIMIT_NPROC allows user {os.getuid()} {most} processes and threads (ulimit -u)")
    allowed.append("kernel.threads-max and kernel.pid_max allow so many to the system")
    return f"there are as many processes and threads as there may be: raise the limit, or end some ({'; '.join(allowed)})"


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        OSError: EAGAIN: no more can be started; the message names the limit. Python's RuntimeError says less.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, no_process()) from error


def lock_refusal() -> str:
    """Return the sentence for a lock that the kernel refuses: ENOMEM, EPERM or EAGAIN of mlock(2)."""
    size = soft_limit("RLIMIT_MEMLOCK")
    allowed = "not limited" if size is None else format_size(size)
    return f"RLIMIT_MEMLOCK is {allowed} for all locked memory of this process (ulimit -l)"


def _no_file_size() -> str | None:
    size = soft_limit("RLIMIT_FSIZE")
    if size is None:
        return None
    return f"files of this process have at most {format_size(size)} (RLIMIT_FSIZE): raise that (ulimit -f)"


def _no_address_space() -> str | None:
    size = soft_limit("RLIMIT_AS")
    return None if size is None else f"this process may map {format_size(size)} in all (RLIMIT_AS): raise that (ulimit -v)"


def soft_limit(name: str) -> int | None:
    """Return the soft limit of a resource, such as ``"RLIMIT_NOFILE"``; None without a limit."""
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


PROCESS_LIMITS = (
    ProcessLimit(errno.EMFILE, no_descriptor),
    ProcessLimit(errno.ENFILE, no_open_file),
    ProcessLimit(errno.EAGAIN, no_process),
    ProcessLimit(errno.EFBIG, _no_file_size),
    ProcessLimit(errno.ENOMEM, _no_address_space),
    ProcessLimit(errno.ENOMEM, lambda: "the kernel has no memory left: free some, or raise the limit of the memory cgroup"),
)
"""Every such limit. Of several with one errno the first that is set explains it."""
