"""Turn a process into a daemon, as wardens and servers are: signals, streams, log, descriptors, name."""

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
"""Streams of the forked program, kept alive: a collected stream would flush the program's buffered output a second time."""


def fork() -> int:
    """Call os.fork(), and silence the warning about other threads."""
    with warnings.catch_warnings():
        # Python 3.12 warns that a lock held by another thread stays locked in the child. The child imports nothing new, and
        # replaces streams and log handlers.
        warnings.filterwarnings("ignore", message=".*use of fork\\(\\) may lead to deadlocks", category=DeprecationWarning)
        return os.fork()


def detach_from_caller() -> None:
    """Stop everything of the user's program in a fork of it; call with all signals blocked.

    The program's descriptors stay open, because the device may use some, except for its listening sockets.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # SIG_IGN would reap the server before the warden can
    os.setsid()
    # No finalizer of the program may run here: it would remove the program's temporary files.
    gc.freeze()
    _close_listening_sockets()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _close_listening_sockets() -> None:
    """Free the program's ports, so that it can be restarted while this process is still in a driver's call.

    The descriptor numbers stay taken, by the null device: objects of the program still refer to them.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)  # else a new socket object sets O_NONBLOCK, which the program shares
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
        except OSError as error:
            if error.errno != errno.EBADF:  # of the directory that was listed
                raise
            continue
        # The family does not matter here, and querying it fails for some (AF_ALG, AF_XDP).
        taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        listens = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        taken.detach()  # the descriptor is still the program's
        if listens:
            os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)
    socket.setdefaulttimeout(before)


def set_up_streams() -> None:
    """Replace the standard streams and the log handlers, and ignore SIGINT.

    A driver's output goes to stderr: stdout is the user's, often a pipe that its reader drains to the end of file.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    if sys.__stderr__ is None:  # another file may have descriptor 2
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
    """Log ``prefault.device`` to stderr only: handlers of the program may rely on threads that do not exist here."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log = logging.getLogger("prefault.device")
    log.handlers[:] = [handler]
    log.propagate = False
    log.disabled = False
    logging.raiseExceptions = False  # stderr may be a pipe without a reader


def raise_descriptor_limit() -> None:
    """Raise RLIMIT_NOFILE to the hard limit: a client takes five descriptors, and the usual 1024 is meant for select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def set_process_name(name: str) -> None:
    """Set the name of this process that ps(1) shows."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:  # only cosmetic
        comm.write(name)
