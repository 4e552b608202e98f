"""What both ends of a Unix socket need, whatever is said on it: bytes, descriptors, and who may talk."""

from __future__ import annotations

import array
import os
import socket


class ProtocolError(Exception):
    """The other side does not keep to the protocol."""


def receive(connection: socket.socket, most: int, descriptors_most: int = 1) -> tuple[bytes, list[int]]:
    """Return what has come, at most ``most`` bytes, and the descriptors with it: they are the caller's to close.

    They are fewer than were sent where this process may not have more (RLIMIT_NOFILE): see :func:`receive_all`.
    """
    data, descriptors, _ = receive_all(connection, most, descriptors_most)
    return data, descriptors


def receive_all(connection: socket.socket, most: int, descriptors_most: int) -> tuple[bytes, list[int], bool]:
    """Return the result of :func:`receive`, and whether there were descriptors for which this process had no room."""
    room = socket.CMSG_SPACE(descriptors_most * array.array("i").itemsize)
    data, ancillary, flags, _ = connection.recvmsg(most, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    # With as many as there is room for in the message, the sender sent too many.
    lost = bool(flags & socket.MSG_CTRUNC) and len(descriptors) < descriptors_most
    return data, descriptors.tolist(), lost


def receive_without_descriptors(connection: socket.socket, most: int) -> bytes:
    """What has come. The kernel drops descriptors that were sent with it: they never enter this process.

    Raises:
        ProtocolError: there were some.
    """
    data, _, flags, _ = connection.recvmsg(most, 0)
    if flags & socket.MSG_CTRUNC:
        raise ProtocolError("a client sends no descriptors")
    return data


def may_talk_to(uid: int) -> bool:
    """Whether the other side's user is ours, or root."""
    return uid in (os.geteuid(), 0)
