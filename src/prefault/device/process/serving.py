"""Serve a device to many clients, at the path of a socket."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time

from prefault.device import handover
from prefault.device.driver import Device, Recipe
from prefault.device.process.launching import LaunchedWarden, launch
from prefault.errors import DeviceError
from prefault.ipc import socket_path

_SLACK_S = 10.0
"""Seconds for the end of a server and its warden, besides the timeout of a driver call."""


class DeviceServer:
    """A device that is served at a path until :meth:`close`; made by :func:`serve`. A context manager.

    The processes end with this process as well. From then on clients keep the pages that were supplied; other pages raise
    SIGBUS.

    Attributes:
        path: of the socket.
        pid: of the warden, which supervises the server.
    """

    def __init__(self, launched: LaunchedWarden, path: str, timeout_s: float) -> None:
        self.path = path
        self.pid = launched.pid
        self._launched = launched
        self._timeout_s = timeout_s
        self._owner = os.getpid()
        self._closed = False
        made = os.stat(path, follow_symlinks=False)
        self._place = socket_path.Place(path, made.st_dev, made.st_ino)

    def close(self) -> None:
        """Close all areas at the driver, end its processes, and remove the socket. Idempotent; does nothing in a fork.

        Raises:
            DeviceError: the processes do not end in time (ETIMEDOUT).
        """
        if self._closed:
            return
        self._closed = True
        with self._launched.connection as link:
            if os.getpid() != self._owner:
                return
            with contextlib.suppress(OSError):  # they have ended already
                handover.send(link, handover.End())
            ended = _ends(link, self._timeout_s + _SLACK_S)
        self._launched.reap(_SLACK_S if ended else 0.0)
        if ended:
            socket_path.leave(self._place)  # left there if warden and server were killed
        if not ended:
            raise DeviceError(
                errno.ETIMEDOUT, f"the processes of the device at {self.path} do not end (warden: pid {self.pid})"
            )

    def __enter__(self) -> DeviceServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            with self._launched.connection as link, contextlib.suppress(OSError):  # they have ended already
                if os.getpid() == self._owner:
                    link.shutdown(socket.SHUT_RDWR)  # ends them even if a fork has a copy of the socket

    def __repr__(self) -> str:
        return f"<DeviceServer at {self.path}, {'closed' if self._closed else f'warden {self.pid}'}>"


def _ends(link: socket.socket, timeout: float) -> bool:
    """Wait until warden and server have both closed the other end; return False after ``timeout`` seconds."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    give_up = time.monotonic() + timeout
    while poll.poll(max(0.0, give_up - time.monotonic()) * 1000):
        if handover.receive(link) is None:
            return True
    return False


def serve(device: Device | Recipe, path: str | os.PathLike[str]) -> DeviceServer:
    """Serve a device to many processes of the same user, which map it with :func:`prefault.device.connect`.

    Args:
        device: the driver; or a recipe, so that this process does not create the device itself.
        path: of the socket to create, which only its owner may connect to.

    Raises:
        TypeError, ValueError: an attribute of the device, or a recipe, is invalid.
        DeviceError: the device or the socket cannot be created (EEXIST, EADDRINUSE: the path is taken).
    """
    where = os.path.abspath(os.fsdecode(path))
    launched = launch(device, where)
    return DeviceServer(launched, where, Device.timeout_s if isinstance(device, Recipe) else device.timeout_s)
