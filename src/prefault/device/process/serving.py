"""A device for many clients, at a path."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time

from prefault.device import handover
from prefault.device.driver import Device, Recipe
from prefault.device.process.launching import Launched, launch, launch_recipe
from prefault.errors import DeviceError
from prefault.ipc import socket_path

_SLACK_S = 10.0
"""Besides the time that a driver has for a call: for the end of a server and its warden."""


class DeviceServer:
    """A device that is served at a path, until :meth:`close`; made by :func:`serve`. A context manager.

    It ends with this process as well. Clients keep the pages that were supplied; others are SIGBUS from then on.

    Attributes:
        path: of the socket.
        pid: of the warden, which watches the server.
    """

    def __init__(self, launched: Launched, path: str, timeout_s: float) -> None:
        self.path = path
        self.pid = launched.pid
        self._launched = launched
        self._timeout_s = timeout_s
        self._owner = os.getpid()
        self._closed = False
        made = os.stat(path, follow_symlinks=False)
        self._place = socket_path.Place(path, made.st_dev, made.st_ino)

    def close(self) -> None:
        """Close all areas at the driver, end its processes, and remove the socket. Idempotent; a fork only forgets it.

        Raises:
            DeviceError: they do not end (ETIMEDOUT).
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
            socket_path.leave(self._place)  # where warden and server were killed at once
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
                    link.shutdown(socket.SHUT_RDWR)  # whereupon they end, also where a fork of ours has it

    def __repr__(self) -> str:
        return f"<Server at {self.path}, {'closed' if self._closed else f'warden {self.pid}'}>"


def _ends(link: socket.socket, timeout: float) -> bool:
    """Whether warden and server, who have the other end, both close it in time."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    give_up = time.monotonic() + timeout
    while poll.poll(max(0.0, give_up - time.monotonic()) * 1000):
        if handover.receive(link) is None:
            return True
    return False


def serve(device: Device | Recipe, path: str | os.PathLike[str]) -> DeviceServer:
    """Serve a device to many processes of the same user, who map it with :func:`prefault.device.connect`.

    Args:
        device: the driver, or a recipe; with a recipe nothing of the driver is made in this process.
        path: of the socket to make, which only its owner may connect to.

    Raises:
        TypeError, ValueError: an attribute of the device, or a recipe, is not what it should be.
        DeviceError: the device cannot be made, or the socket not be (EEXIST, EADDRINUSE: there is one already).
    """
    where = os.path.abspath(os.fsdecode(path))
    if isinstance(device, Recipe):
        return DeviceServer(launch_recipe(device, where), where, Device.timeout_s)
    return DeviceServer(launch(device, where), where, device.timeout_s)
