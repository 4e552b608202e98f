"""Become a warden: in a fork of a client, a fresh process, a replacement of a dead warden, or the command."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from prefault.device import daemon, handover, limit_messages, recipes
from prefault.device.driver import Device, Recipe
from prefault.device.frames import Frames
from prefault.device.registry import DeviceFacts, Registry
from prefault.device.warden.supervisor import Warden
from prefault.errors import DeviceError
from prefault.ipc import socket_path

_log = logging.getLogger("prefault.device")

_START_S = 60.0
_SOFTWARE = 70  # EX_SOFTWARE


def create_registry(device: Device, recipe: Recipe | None = None, path: str | None = None) -> Registry:
    """Create the registry of a device without clients, and listen at a path; DeviceError if one of them is not to be had."""
    frames = Frames.create(device.length, device.page_size, device.capacity)
    registry = Registry(DeviceFacts.of(device, frames), frames, recipe)
    if path is not None:
        registry.listener, registry.listens_at = socket_path.listen_at(path, socket.SOCK_SEQPACKET)
    return registry


def _make_device(recipe: Recipe) -> Device:
    """Create the device of a recipe; turn any failure into DeviceError, also exceptions that cannot be printed."""
    try:
        return recipes.make_device(recipe)
    except (DeviceError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise DeviceError(
            errno.EINVAL, f"the device {recipe.factory} cannot be made: it raised {type(error).__name__}"
        ) from error


def serve_in_foreground(recipe: Recipe, path: str, started: Callable[[Device], None]) -> str:
    """Become the warden of a device for many clients, until SIGTERM, SIGINT or SIGHUP ends it in an orderly way.

    Args:
        recipe: of the device.
        path: of the socket to create.
        started: called with the device once clients can connect.

    Returns:
        ``""``, or the reason why the server could not go on.
    """
    recipes.check_recipe(recipe)
    device = _make_device(recipe)
    daemon.raise_descriptor_limit()
    registry = create_registry(device, recipe, path)
    try:
        daemon.set_process_name(daemon.WARDEN)
        daemon.log_to_stderr()
        with limit_messages.explained("the device cannot be served"):
            warden = Warden(registry, device)
            warden.end_by(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            warden.start_first_server()
        started(device)
        warden.run()
    finally:
        if registry.listens_at is not None:  # the warden did not get so far
            socket_path.leave(registry.listens_at)
    return warden.failed


def become_warden(
    make: Callable[[], Device], recipe: Recipe | None, link: socket.socket, owner: int, path: str | None
) -> NoReturn:
    """Create the device, start its server, report that on ``link``, and supervise it; call in a process made for this."""
    status = _SOFTWARE
    try:
        daemon.set_process_name(daemon.WARDEN)
        daemon.raise_descriptor_limit()
        registry = None
        try:
            device = make()
            registry = create_registry(device, recipe, path)
            registry.owner = owner
            if path is None:
                registry.first = link
            else:
                registry.control = link
            warden = Warden(registry, device)
            warden.end_by(signal.SIGTERM, signal.SIGHUP)
            warden.start_first_server()
        except (OSError, ValueError) as error:
            if registry is not None and registry.listens_at is not None:
                socket_path.leave(registry.listens_at)
            report_not_started(link, error)
        assert warden.server_pid is not None
        with contextlib.suppress(OSError):  # the client is gone, and the server will see that
            handover.send(link, handover.ServerStarted(warden.server_pid))
        warden.run()
        status = 0
    except BaseException:  # noqa: BLE001  no code of the caller's program may run in here
        _log.exception("a warden failed")
    finally:
        os._exit(status)


def report_not_started(link: socket.socket, error: OSError | ValueError) -> NoReturn:
    """Send the process that waits for the start the reason of the failure, and exit."""
    number, message = errno.EINVAL, str(error)
    if isinstance(error, OSError):
        number, message = error.errno or errno.EIO, error.strerror or str(error)
        if message.endswith(os.strerror(number)):  # lacks the remedy
            message = f"a process of the device cannot be started: {limit_messages.reason(number) or message}"
    with contextlib.suppress(OSError):  # the client is gone
        handover.send(link, handover.ServerNotStarted(number, message))
    os._exit(1)


def main(descriptor: int) -> NoReturn:
    """Run a fresh process, started by :func:`prefault.device.spawning.spawn`: make a device, or replace a dead warden."""
    link = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    sys.argv[:] = [daemon.WARDEN]
    daemon.set_up_streams()
    link.settimeout(_START_S)
    taken = handover.receive(link)
    if taken is None:
        os._exit(1)
    message, descriptors = taken
    assert isinstance(message, handover.Start | handover.Reattach), message
    if message.version != handover.VERSION:
        report_not_started(link, ValueError("prefault was replaced by another version on disk: start the program anew"))
    if isinstance(message, handover.Start):
        if len(descriptors) != 2:
            report_not_started(link, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        arguments, owner = descriptors
        recipe = handover.make_recipe(message.factory, arguments)
        assert recipe is not None
        os.close(arguments)
        link.settimeout(None)
        where = None if message.path is None else os.fsdecode(message.path)
        become_warden(lambda: _make_device(recipe), recipe, link, owner, where)
    _replace_warden(link, message, dict(zip(message.descriptors, descriptors, strict=True)))


def _replace_warden(link: socket.socket, message: handover.Reattach, given: dict[str, int]) -> NoReturn:
    status = _SOFTWARE
    try:
        daemon.set_process_name(daemon.WARDEN)
        daemon.raise_descriptor_limit()
        recipe = handover.make_recipe(message.factory, given["arguments"])
        os.close(given.pop("arguments"))
        device = message.device
        frames = Frames(given["frames"], given["states"], device.length, device.page_size, device.huge, device.notes)
        ends: dict[str, Any] = {name: socket.socket(fileno=given[name]) for name in handover.ENDS if name in given}
        registry = Registry(
            device, frames, recipe, listens_at=handover.make_place(message.place), owner=given.get("owner", -1),
            generation=message.generation, **ends,
        )  # fmt: skip
        warden = Warden(registry, None, lingers=message.lingers)
        warden.end_by(signal.SIGTERM, signal.SIGHUP)
        warden.reattach(given["server"], link)
        warden.run()
        status = 0
    except BaseException:  # noqa: BLE001  no caller to raise it to
        _log.exception("a warden failed")
    finally:
        os._exit(status)
