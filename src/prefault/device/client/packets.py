"""Packets on a client's connection, sent and received so that Ctrl-C loses none of them."""

from __future__ import annotations

import array
import errno
import select
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from prefault.device import protocol
from prefault.ipc.transport import ancillary_room

_DESCRIPTORS_ROOM = ancillary_room(protocol.MAX_DESCRIPTORS)

_ENDED = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)


class PacketSocket:
    """A socket of packets that does not block.

    Ctrl-C may strike between any two steps of the interpreter. Each system call and the record of its result are
    therefore one step: ``extend`` of a ``map``.

    Attributes:
        received: packets that came and are not dispatched yet, oldest first, each the result of recvmsg(2).
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._fd = connection.fileno()
        self.received: deque[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = deque()

    def send(self, data: bytes, descriptors: Sequence[int], sent: list[int]) -> bool:
        """Send a packet and append its length to ``sent``; return False if the socket has no room.

        A packet on a socket that has ended counts as sent: the end is found by receiving, which may tell a reason first.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            sent.extend(map(self._connection.sendmsg, ([data],), (rights,), (flags,)))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _ENDED:
                raise
        return True

    def receive(self) -> None:
        """Append the next packet to :attr:`received`; BlockingIOError without one."""
        self.received.extend(
            map(self._connection.recvmsg, (protocol.MAX_MESSAGE,), (_DESCRIPTORS_ROOM,), (socket.MSG_CMSG_CLOEXEC,))
        )

    def wait(self, events: int, timeout_s: float) -> int:
        """Wait for ``events`` of poll(2), or the end of the connection; return those that came, 0 after the timeout."""
        poll = select.poll()
        poll.register(self._fd, events)
        ready = poll.poll(max(0.0, timeout_s) * 1000)
        return ready[0][1] if ready else 0
