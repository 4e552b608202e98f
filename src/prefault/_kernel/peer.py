"""The process at the other end of a Unix socket: SO_PEERCRED, SO_PEERPIDFD (unix(7))."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple

SO_PEERPIDFD = 77  # Linux 6.5; asm-generic's number, of which sparc and parisc differ

_UCRED = struct.Struct("=iII")


class Ucred(NamedTuple):
    """``struct ucred``: the process that called connect(2) or listen(2), as it was then."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> Ucred:
    """Return the peer's credentials. ``pid`` is 0 where the peer is not visible in this pid namespace."""
    return Ucred(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def peer_pidfd(connection: socket.socket) -> int:
    """Open a pidfd of the process at the other end. The pidfd becomes readable when that process ends.

    Raises:
        ProcessLookupError: the process has ended already.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ESRCH, errno.ENODATA):  # which of them depends on the kernel
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        if error.errno != errno.ENOPROTOOPT:
            raise
    # Before Linux 6.5 by pid. Another process may have got that number meanwhile: its end then ends the connection.
    return os.pidfd_open(peer_credentials(connection).pid)
