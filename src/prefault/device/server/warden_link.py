"""The server's connection to its warden, which keeps all that a new server needs, and the start of another warden."""

from __future__ import annotations

import logging
import os
import socket

from prefault.device import handover, spawning
from prefault.device.driver import Recipe
from prefault.device.registry import AreaRecord, ClientRecord, Registry
from prefault.errors import DeviceError
from prefault.ipc import socket_path

_log = logging.getLogger("prefault.device")

_SEND_S = 2.0
"""Time after which a warden that takes no messages counts as dead."""
_HAND_OVER_S = 20.0
"""Time that a fresh warden may take to start: only a handover of hundreds of clients waits for that."""
_WARDENS_MOST, _WARDENS_WINDOW_S = 5, 10.0


class WardenLink:
    """A connection to the warden, and all that another warden needs besides the registry.

    Each notification returns when the socket has it. OSError: the warden is gone; :meth:`replace_warden` is the next call.

    Args:
        link: to the warden.
        warden: its pidfd, which stays the caller's.
        recipe: how a fresh warden can make the device; None: it cannot, so that this server is the last one.
        listener, listens_at: where clients connect.
        first: the connection of a private server's client, until it has said Hello.
        control: connection to the process that started the warden, which sends ``End`` on it.
        owner: pidfd of a process with which the device ends; -1: there is none.
    """

    def __init__(
        self, link: socket.socket, warden: int, *, recipe: Recipe | None, listener: socket.socket | None,
        listens_at: socket_path.Place | None, first: socket.socket | None, control: socket.socket | None, owner: int,
    ) -> None:  # fmt: skip
        link.settimeout(_SEND_S)
        self._link = link
        self._warden = warden
        self._recipe = recipe
        self._listener = listener
        self._place = listens_at
        self._first = first
        self._control = control
        self._owner = owner
        self._child: int | None = None
        self._restarts = handover.RateLimit(_WARDENS_MOST, _WARDENS_WINDOW_S)
        self._cpus = os.sched_getaffinity(0)

    def started(self) -> None:
        """Notify the warden that the server is about to answer."""
        self._send(handover.ServerStarted(os.getpid()))

    def client_admitted(self, client: ClientRecord) -> None:
        """Notify the warden of a client, with duplicates of its descriptors."""
        self._first = None  # its connection is the client's now
        self._send(
            handover.Admitted(client.number, client.pid, client.uid, handover.descriptor_names(client)),
            handover.descriptors_of(client),
        )

    def area_added(self, client: ClientRecord, area: AreaRecord) -> None:
        """Notify the warden of an area."""
        self._send(handover.Areas(client.number, (area,)))

    def area_removed(self, client_number: int, area_number: int) -> None:
        """Notify the warden that a client unmapped an area."""
        self._send(handover.Removed(client_number, area_number))

    def client_left(self, client_number: int) -> None:
        """Notify the warden that a client is gone, with all of its areas."""
        self._send(handover.Left(client_number))

    def finished(self) -> None:
        """Notify the warden that the server ends in an orderly way."""
        try:
            self._send(handover.HandoverDone())
        except OSError:
            self._end_warden()  # it has died just now

    def _send(self, message: handover.Message, descriptors: list[int] | None = None) -> None:
        try:
            handover.send(self._link, message, descriptors)
        except TimeoutError as error:
            raise OSError(error.errno, "the warden takes no messages") from error

    def replace_warden(self, registry: Registry) -> int:
        """Start another warden, and hand over all of ``registry``.

        Returns:
            Its pidfd, the caller's to close; -1: there is none, and the server goes on alone.
        """
        while True:
            self._link.close()
            self._end_warden()
            if self._restarts.record():
                _log.error("device %s: its wardens keep dying; its server goes on without one", registry.facts.name)
                return -1
            try:
                return self._start_warden(registry)
            except (BrokenPipeError, ConnectionResetError, ProcessLookupError):
                continue  # it died during the handover
            except (OSError, DeviceError) as error:
                _log.error("device %s: its warden has died, and there is no other: %s", registry.facts.name, error)
                self._link.close()
                return -1

    def _end_warden(self) -> None:
        """Kill the warden, and reap it if this process started it; the first one was the server's parent.

        It is dead, as a rule. One that only takes no messages would start a second server after the end of this one.
        """
        if self._warden >= 0:
            handover.kill(self._warden)
            self._warden = -1
        if self._child is not None:
            handover.reap(self._child, 1.0)
            self._child = None

    def _start_warden(self, registry: Registry) -> int:
        lingers = self._listener is not None and self._control is None
        if lingers and self._place is not None:
            # Its owner is gone: it goes on for the clients that use it, and another server may listen at the path.
            socket_path.leave(self._place)
        self._link, theirs = handover.pair()
        with theirs:
            self._child = spawning.spawn(theirs.fileno())
        # The server may have moved to a client's CPU.
        os.sched_setaffinity(self._child, self._cpus)
        pidfd = os.pidfd_open(self._child)
        self._warden = pidfd
        try:
            self._link.settimeout(_HAND_OVER_S)
            self._hand_over(registry, lingers)
            self._link.settimeout(_SEND_S)
        except BaseException:
            self._end_warden()
            os.close(pidfd)
            raise
        return pidfd

    def _hand_over(self, registry: Registry, lingers: bool) -> None:
        frames = registry.frames
        myself = os.pidfd_open(os.getpid())
        arguments = handover.arguments_file(self._recipe.arguments if self._recipe is not None else {})
        try:
            given = {"frames": frames.fd, "states": frames.states_fd, "server": myself, "arguments": arguments}
            for name, end in (("listener", self._listener), ("first", self._first), ("control", self._control)):
                if end is not None:
                    given[name] = end.fileno()
            if self._owner >= 0:
                given["owner"] = self._owner
            handover.send(
                self._link,
                handover.Reattach(
                    handover.VERSION, registry.facts, registry.generation,
                    None if self._recipe is None else self._recipe.factory,
                    handover.place_facts(self._place), lingers, tuple(given),
                ),
                list(given.values()),
            )  # fmt: skip
        finally:
            os.close(myself)
            os.close(arguments)
        for client in registry.clients.values():
            areas = list(client.areas.values())
            for at in range(0, len(areas), handover.AREAS_A_PACKET):
                handover.send(self._link, handover.Areas(client.number, tuple(areas[at : at + handover.AREAS_A_PACKET])))
            handover.send(
                self._link,
                handover.Admitted(client.number, client.pid, client.uid, handover.descriptor_names(client)),
                handover.descriptors_of(client),
            )
        handover.send(self._link, handover.HandoverDone())
