"""Start a warden, which starts the server of a device: a fork of this process, or a fresh process that follows a recipe."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import threading
from typing import NoReturn

from prefault._system import fork_hooks
from prefault.device import daemon, handover, limit_messages, recipes, spawning
from prefault.device.driver import Device, Recipe
from prefault.device.process import startup
from prefault.errors import DeviceError

_START_S = 60.0
"""Seconds for a fresh process to import the factory and create the device, besides its driver's time to start it."""
_SIGNAL_S = 2.0
"""Seconds for a warden to end after a signal."""

_unreaped: set[int] = set()
_lock = threading.RLock()  # reentrant: a finalizer reaps


class LaunchedWarden:
    """A warden that this process started.

    Attributes:
        connection: packet socket to the server of a private device; of a device at a path, the control connection to the
            warden, which ends when it is closed.
        pid: of the warden, a child of this process.
        server_pid: of the warden's first server.
    """

    def __init__(self, connection: socket.socket, pid: int, server_pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.server_pid = server_pid
        self._owner = os.getpid()
        with _lock:
            _unreaped.add(pid)

    def reap(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for the warden; return whether it ended. A later launch reaps it otherwise."""
        if os.getpid() != self._owner:
            return False
        return _reap(self.pid, timeout)

    def __repr__(self) -> str:
        return f"<LaunchedWarden {self.pid}>"


def _reap(pid: int, timeout: float) -> bool:
    with _lock:
        if pid not in _unreaped:  # reaped: the kernel may have given the pid to another process
            return True
    if handover.reap(pid, timeout) is None:
        return False
    with _lock:
        _unreaped.discard(pid)
    return True


def _forget() -> None:
    """Forget the wardens in a fork, whose children they are not."""
    global _lock  # another thread may have held it
    _lock = threading.RLock()
    _unreaped.clear()


fork_hooks.register(in_child=_forget)


def launch(device: Device | Recipe, path: str | None = None) -> LaunchedWarden:
    """Start the processes of a device.

    Args:
        device: to serve; or its recipe, so that this process does not create the device itself.
        path: of the socket at which clients connect. None: a private device, whose only client has the returned connection.

    Raises:
        TypeError, ValueError: an attribute of the device, or its recipe, is invalid.
        DeviceError: the device cannot be created in its process, there is no memory for its frames, or a limit is reached
            (of processes, of descriptors); the message says which.
    """
    recipe: Recipe | None
    if isinstance(device, Recipe):
        recipe = device
    else:
        recipes.check_device_attributes(device)
        recipe = device.recipe()
    if recipe is not None:
        recipes.check_recipe(recipe)
    with _lock:
        ended = list(_unreaped)
    for warden in ended:
        _reap(warden, 0)
    with limit_messages.explained("the processes of the device cannot be started"):
        return _start(device, recipe, path)


def _start(device: Device | Recipe, recipe: Recipe | None, path: str | None) -> LaunchedWarden:
    ours, theirs = handover.pair()
    pid: int | None = None
    owner = -1
    try:
        with theirs:
            owner = handover.above_stdio(os.pidfd_open(os.getpid()))
            if recipe is not None:
                pid = spawning.spawn(theirs.fileno())
            else:
                assert isinstance(device, Device)
                pid = _fork(device, ours, theirs, owner, path)
        if recipe is not None:
            _send_recipe(ours, recipe, owner, path)
        timeout_s = Device.timeout_s if isinstance(device, Recipe) else device.timeout_s
        return LaunchedWarden(ours, pid, _wait_for_start(ours, pid, _START_S + timeout_s))
    except BaseException:
        ours.close()
        if pid is not None:
            _abandon(pid)
        raise
    finally:
        if owner >= 0:
            os.close(owner)


def _fork(device: Device, ours: socket.socket, theirs: socket.socket, owner: int, path: str | None) -> int:
    # No signal handler of this program may run in the child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = daemon.fork()
        if not pid:
            _become_warden(device, ours, theirs, owner, path)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _become_warden(device: Device, ours: socket.socket, theirs: socket.socket, owner: int, path: str | None) -> NoReturn:
    try:
        try:
            daemon.detach_from_caller()
            ours.close()
            daemon.set_up_streams()
        except OSError as error:
            startup.report_not_started(theirs, error)
        startup.become_warden(lambda: device, None, theirs, owner, path)
    finally:
        os._exit(70)


def _send_recipe(link: socket.socket, recipe: Recipe, owner: int, path: str | None) -> None:
    arguments = handover.arguments_file(recipe.arguments)
    try:
        where = None if path is None else os.fsencode(path)
        handover.send(link, handover.Start(handover.VERSION, recipe.factory, where), [arguments, owner])
    except OSError as error:
        raise DeviceError(error.errno or errno.EPIPE, "the device's process ended at its start; see its output") from error
    finally:
        os.close(arguments)


def _wait_for_start(link: socket.socket, pid: int, patience_s: float) -> int:
    """Wait until the server runs; return its pid."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    # The link outlives the warden where its server, or a fork of this process, has the other end open: poll the pid too.
    ended = os.pidfd_open(pid)
    try:
        poll.register(ended, select.POLLIN)
        found = dict(poll.poll(patience_s * 1000))
    finally:
        os.close(ended)
    if not found:
        raise DeviceError(errno.ETIMEDOUT, f"the device was not made in its process (pid {pid}) within {patience_s:.0f} s")
    taken = handover.receive(link) if link.fileno() in found else None
    if taken is None:
        raise DeviceError(
            errno.ECONNRESET, f"the device's process (pid {pid}) ended while the device was made; its output is on stderr"
        )
    message, _ = taken
    if isinstance(message, handover.ServerNotStarted):
        raise DeviceError(message.number, message.message)
    assert isinstance(message, handover.ServerStarted)
    return message.server


def _abandon(pid: int) -> None:
    """End a warden whose start failed; it may be in the middle of an import and not notice that the caller is gone."""
    if handover.reap(pid, 0.2) is not None:
        return
    for number, patience_s in ((signal.SIGTERM, _SIGNAL_S), (signal.SIGKILL, _SIGNAL_S)):
        os.kill(pid, number)
        if handover.reap(pid, patience_s) is not None:
            return
    with _lock:
        _unreaped.add(pid)
