"""The server's connection to its warden, which keeps all that a new server needs, and the start of another warden."""

from __future__ import annotations

import logging
import os
import socket

from prefault.device import handover, spawning
from prefault.device.registry import Registry
from prefault.errors import DeviceError
from prefault.ipc import socket_path

_log = logging.getLogger("prefault.device")

_SEND_S = 2.0
"""Time after which a warden that takes no messages counts as dead."""
_HAND_OVER_S = 20.0
"""Time that a fresh warden may take to start: only a handover of hundreds of clients waits for that."""
_WARDENS_MOST, _WARDENS_WINDOW_S = 5, 10.0


class WardenLink:
    """A connection to the warden, or to the one that replaced it.

    Args:
        link: to the warden.
        pidfd: of the warden, owned from now on.

    Attributes:
        pidfd: of the present warden; -1: there is none.
    """

    def __init__(self, link: socket.socket, pidfd: int) -> None:
        link.settimeout(_SEND_S)
        self._link = link
        self.pidfd = pidfd
        self._child: int | None = None
        self._restarts = handover.EventLimit(_WARDENS_MOST, _WARDENS_WINDOW_S)
        self._cpus = os.sched_getaffinity(0)

    def finished(self) -> None:
        """Notify the warden that the server ends in an orderly way."""
        try:
            self.notify(handover.HandoverDone())
        except OSError:
            self._end_warden()  # it has died just now

    def notify(self, message: handover.Message, descriptors: list[int] | None = None) -> None:
        """Send the warden a message, with duplicates of descriptors; return when the socket has it.

        OSError: the warden is gone; :meth:`replace_warden` is the next call.
        """
        try:
            handover.send(self._link, message, descriptors)
        except TimeoutError as error:
            raise OSError(error.errno, "the warden takes no messages") from error

    def replace_warden(self, registry: Registry) -> None:
        """Start another warden, and hand over all of ``registry``; if that fails, the server goes on alone."""
        while True:
            self._link.close()
            self._end_warden()
            if self._restarts.record():
                _log.error("device %s: its wardens keep dying; its server goes on without one", registry.facts.name)
                return
            try:
                self._start_warden(registry)
            except (BrokenPipeError, ConnectionResetError, ProcessLookupError):
                continue  # it died during the handover
            except (OSError, DeviceError) as error:
                _log.error("device %s: its warden has died, and there is no other: %s", registry.facts.name, error)
                self._link.close()
            return

    def _end_warden(self) -> None:
        """Kill the warden, and reap it if this process started it; the first one was the server's parent.

        It is dead, as a rule. One that only takes no messages would start a second server after the end of this one.
        """
        if self.pidfd >= 0:
            handover.kill(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        if self._child is not None:
            handover.reap(self._child, 1.0)
            self._child = None

    def _start_warden(self, registry: Registry) -> None:
        lingers = registry.listener is not None and registry.control is None
        if lingers and registry.listens_at is not None:
            # Its owner is gone: it goes on for the clients that use it, and another server may listen at the path.
            socket_path.leave(registry.listens_at)
        self._link, theirs = handover.pair()
        with theirs:
            self._child = spawning.spawn(theirs.fileno())
        # The server may have moved to a client's CPU.
        os.sched_setaffinity(self._child, self._cpus)
        self.pidfd = os.pidfd_open(self._child)
        try:
            self._link.settimeout(_HAND_OVER_S)
            self._hand_over(registry, lingers)
            self._link.settimeout(_SEND_S)
        except BaseException:
            self._end_warden()
            raise

    def _hand_over(self, registry: Registry, lingers: bool) -> None:
        frames = registry.frames
        myself = os.pidfd_open(os.getpid())
        recipe = registry.recipe
        arguments = handover.arguments_file(recipe.arguments if recipe is not None else {})
        try:
            given = {"frames": frames.fd, "states": frames.states_fd, "server": myself, "arguments": arguments}
            for name in handover.ENDS:
                end: socket.socket | None = getattr(registry, name)
                if end is not None:
                    given[name] = end.fileno()
            if registry.owner >= 0:
                given["owner"] = registry.owner
            self.notify(
                handover.Reattach(
                    handover.VERSION, registry.facts, registry.generation, None if recipe is None else recipe.factory,
                    handover.place_facts(registry.listens_at), lingers, tuple(given),
                ),
                list(given.values()),
            )  # fmt: skip
        finally:
            os.close(myself)
            os.close(arguments)
        for client in registry.clients.values():
            self.notify(*handover.admitted(client))
        self.notify(handover.HandoverDone())
