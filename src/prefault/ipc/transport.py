"""Bytes and descriptors on a Unix socket, and which users a process exchanges them with."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable


class ProtocolError(Exception):
    """The other side does not keep to the protocol."""


def receive(connection: socket.socket, most: int, descriptors_most: int = 1) -> tuple[bytes, list[int]]:
    """Receive at most ``most`` bytes and the descriptors that come with them, which the caller owns and closes.

    The descriptors are fewer than were sent where RLIMIT_NOFILE allows no more: see :func:`receive_all`.
    """
    data, descriptors, _ = receive_all(connection, most, descriptors_most)
    return data, descriptors


def receive_all(connection: socket.socket, most: int, descriptors_most: int) -> tuple[bytes, list[int], bool]:
    """Return the result of :func:`receive`, and whether descriptors were lost because RLIMIT_NOFILE allows no more."""
    data, ancillary, flags, _ = connection.recvmsg(most, ancillary_room(descriptors_most), socket.MSG_CMSG_CLOEXEC)
    descriptors = descriptors_in(ancillary)
    # With as many as there is room for in the message, the sender sent too many.
    lost = bool(flags & socket.MSG_CTRUNC) and len(descriptors) < descriptors_most
    return data, descriptors, lost


def ancillary_room(descriptors: int) -> int:
    """Return the size in bytes of ancillary data with so many descriptors."""
    return socket.CMSG_SPACE(descriptors * array.array("i").itemsize)


def descriptors_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in the ancillary data of recvmsg(2) (SCM_RIGHTS)."""
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return descriptors.tolist()


def receive_without_descriptors(connection: socket.socket, most: int) -> bytes:
    """Receive at most ``most`` bytes. The kernel drops descriptors that were sent along: they never enter this process.

    Raises:
        ProtocolError: there were some.
    """
    data, _, flags, _ = connection.recvmsg(most, 0)
    if flags & socket.MSG_CTRUNC:
        raise ProtocolError("a client sends no descriptors")
    return data


def is_trusted(uid: int) -> bool:
    """Return whether the user of the other side is the user of this process, or root."""
    return uid in (os.geteuid(), 0)
