"""The server's half of a connection: accept it, identify the process at the other end, or tell it why it is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from prefault._kernel.peer import peer_credentials, peer_pidfd
from prefault.ipc.transport import is_trusted

_READ = 1 << 16
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Peer(NamedTuple):
    """The process at the other end; ``pidfd`` is owned by the receiver of this tuple."""

    pid: int
    uid: int
    pidfd: int


class Acceptor:
    """Accepts connections of processes of this user or root, up to a number.

    Args:
        most: connections at a time.
        encode_refusal: encodes a reason as the message that a client gets before the hang-up.
        explain_exhaustion: returns the reason that is given when no descriptor is left.
    """

    def __init__(self, most: int, encode_refusal: Callable[[str], bytes], explain_exhaustion: Callable[[], str]) -> None:
        self._most = most
        self._encode_refusal = encode_refusal
        self._explain_exhaustion = explain_exhaustion
        self._reserve: int | None = _open_reserve()
        """A descriptor that is closed when no other is left, so that a client can be refused instead of left waiting."""

    def accept(self, listener: socket.socket, taken: int) -> socket.socket | None:
        """Accept a connection, which does not block; None when there is none, or when it was refused.

        Args:
            listener: does not block.
            taken: connections that the server has.
        """
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._refuse_on_reserve(listener)
            return None
        connection.setblocking(False)
        if taken >= self._most:
            self.refuse(connection, f"it has {self._most} connections, the most that it takes")
            return None
        return connection

    def identify(self, connection: socket.socket) -> Peer | None:
        """Identify the process at the other end of a connection; None when it was refused."""
        credentials = peer_credentials(connection)
        if not is_trusted(credentials.uid):
            self.refuse(connection, f"it serves user {os.geteuid()}, not user {credentials.uid}")
            return None
        try:
            return Peer(credentials.pid, credentials.uid, peer_pidfd(connection))
        except OSError as error:
            self.refuse(connection, f"it cannot see process {credentials.pid}: {error.strerror}")
            return None

    def refuse(self, connection: socket.socket, reason: str) -> None:
        """Send the reason, if that needs no waiting, and hang up."""
        with connection:
            connection.setblocking(False)
            send_last(connection, self._encode_refusal(reason))

    def close(self) -> None:
        """Close the reserve. Idempotent."""
        reserve, self._reserve = self._reserve, None
        if reserve is not None:
            os.close(reserve)

    def _refuse_on_reserve(self, listener: socket.socket) -> None:
        self.close()
        try:
            connection, _ = listener.accept()
            self.refuse(connection, self._explain_exhaustion())
        except OSError:
            time.sleep(0.01)  # another thread took the descriptor: the loop of the server must not spin
        with contextlib.suppress(OSError):
            self._reserve = _open_reserve()


def _open_reserve() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def send_last(connection: socket.socket, message: bytes) -> None:
    """Send the last message on a connection that does not block, if that needs no waiting; close it at once afterwards.

    What the peer sent is read and dropped first: if some of it were unread at the close, the peer would get ECONNRESET from
    the kernel, ahead of the message.
    """
    with contextlib.suppress(OSError):  # the peer is gone, or reads nothing
        connection.shutdown(socket.SHUT_RD)
        while connection.recv(_READ):  # without ancillary data: descriptors that were sent never enter this process
            pass
        connection.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
