"""What a process becomes when it is made a warden or a server."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import stat
import sys
import warnings
from typing import Any

WARDEN = "prefault-warden"
SERVER = "prefault-server"

_kept: list[Any] = []
"""Streams of the process that we are a fork of: if they went away, what it had not flushed would come out twice."""


def fork() -> int:
    """os.fork(), whatever other threads there are."""
    with warnings.catch_warnings():
        # Python 3.12 warns that a lock held by another thread stays locked in the child. There, only modules that were
        # imported before are used, and streams and log handlers are new.
        warnings.filterwarnings("ignore", message=".*use of fork\\(\\) may lead to deadlocks", category=DeprecationWarning)
        return os.fork()


def leave_the_caller() -> None:
    """In a fork of somebody's program: nothing of it goes on here. To be called with all signals blocked.

    Its descriptors stay open, because the device may use some; but not the sockets at which it listens.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would reap the server before the warden can
    os.setsid()
    # Nothing of the caller's is finalized here: temporary files of its would be removed.
    gc.freeze()
    _give_up_ports()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _give_up_ports() -> None:
    """The program may end, and be started again, while a driver's call keeps us: its ports are to be free for it then.

    The numbers stay taken, by the null device: objects of the program that have them are still here.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)  # else each socket object makes its socket non-blocking, which the program shares
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
        except OSError as error:
            if error.errno != errno.EBADF:  # of the directory that was listed
                raise
            continue
        # Of which family it is does not matter, and asking fails for some (AF_ALG, AF_XDP).
        taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        listens = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        taken.detach()  # the number is still the program's
        if listens:
            os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)
    socket.setdefaulttimeout(before)


def settle() -> None:
    """Standard streams and the log of a process of our own.

    What a driver prints goes to stderr: the standard output is the user's, often a pipe that somebody reads to its end.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    if sys.__stderr__ is None:  # the number is that of something else, if anything
        os.dup2(nothing, 2)
    os.dup2(2, 1)
    if nothing > 2:
        os.close(nothing)
    _kept.extend((sys.stdin, sys.stdout, sys.stderr))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    log_to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the program's


def log_to_stderr() -> None:
    """Have ``prefault.device`` logged to stderr, and by no handler of the program's, which may rely on its threads."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log = logging.getLogger("prefault.device")
    log.handlers[:] = [handler]
    log.propagate = False
    log.disabled = False
    logging.raiseExceptions = False  # stderr may be a pipe that nobody reads any more


def raise_descriptor_limit() -> None:
    """Every client has five descriptors in a warden and in a server, and the usual limit of 1024 is meant for select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def be_called(name: str) -> None:
    """Name this process, as ps(1) shows it."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:  # it is only a name
        comm.write(name)
