"""The warden keeps what outlives a server, forks and supervises the server, and starts another or answers in its place."""

from __future__ import annotations

import errno
import logging
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from prefault._system import fork_hooks
from prefault.device import daemon, handover, limit_messages, protocol, recipes
from prefault.device.driver import Device
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution
from prefault.device.registry import Registry
from prefault.device.server.event_loop import run_server
from prefault.device.server.warden_link import WardenLink
from prefault.device.warden import client_records, fallback_server
from prefault.device.warden.hang_detection import HangDetector
from prefault.errors import DeviceError
from prefault.ipc import socket_path
from prefault.ipc.transport import ProtocolError

_log = logging.getLogger("prefault.device")

RESTARTS_MOST, RESTARTS_WINDOW_S = 5, 10.0
"""Deaths of servers, in a time in seconds, after which none is started again."""
_TIMEOUTS_MOST = 3
"""Timeouts of driver calls, in ten times the device's ``timeout_s``, after which no server is started again."""
_END_S = 5.0
"""Time that a server may take to end, in seconds, besides the time that its driver has for a call."""
_START_S = 60.0

_SOFTWARE = 70  # EX_SOFTWARE


class Warden:
    """Supervisor of one device, in a process that does nothing else.

    Args:
        registry: all that the warden keeps.
        device: to be served; None: the server makes it by the recipe.
        lingers: end with the last client.
    """

    def __init__(self, registry: Registry, device: Device | None, *, lingers: bool = False) -> None:
        self._registry = registry
        self._device = device
        self._lingers = lingers
        self._hang_detector = HangDetector(registry)
        self._fallback: fallback_server.FallbackServer | None = None
        self._over = self._ending = self._orderly = False
        self._overdue = ""
        """Reason why a server that made no progress was killed; else empty."""
        self._start_failure = ""
        """Message of a server that could not be started."""
        self.failed = ""
        """Reason why no other server was started; empty after an orderly end."""
        self._end_deadline: float | None = None
        self._deaths = handover.EventLimit(RESTARTS_MOST, RESTARTS_WINDOW_S)
        self._timeouts = handover.EventLimit(_TIMEOUTS_MOST, 10 * registry.facts.timeout_s)
        self._selector = selectors.DefaultSelector()
        self._signals, self._signal_writer = socket.socketpair()
        self._link: socket.socket
        self._server_pidfd = -1
        self.server_pid: int | None = None
        """None: the server is not a child of this process."""
        self._watch(self._signals.fileno(), self._receive_signal)
        if registry.control is not None:
            self._watch(registry.control.fileno(), partial(self._end_with, registry.control.fileno()))
        if registry.owner >= 0:
            self._watch(registry.owner, partial(self._end_with, registry.owner))

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, handler)

    # --- the loop

    def end_by(self, *signals: signal.Signals) -> None:
        """Have these signals end the device in an orderly way."""
        for end in (self._signals, self._signal_writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        for number in signals:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) does
                signal.signal(number, _wake_only)

    def run(self) -> None:
        """Run until the end of the device."""
        while not self._over:
            for key, _ in self._selector.select(self._timeout()):
                # An earlier event of the same round may have ended it, or the device.
                if not self._over and self._selector.get_map().get(key.fileobj) == key:
                    key.data()
            self._check_deadlines()
        self._selector.close()

    def _timeout(self) -> float | None:
        if self._fallback is not None:
            return None
        until = self._hang_detector.next_check
        if self._end_deadline is not None:
            until = min(until, self._end_deadline)
        return max(0.0, until - time.monotonic())

    def _check_deadlines(self) -> None:
        """Kill a server whose driver does not return from a call, that stays stopped, or that does not end."""
        if self._fallback is not None or self._over:
            self._over = self._over or (self._fallback is not None and self._fallback.over)
            return
        if self._end_deadline is not None and time.monotonic() >= self._end_deadline:
            _log.error("device %s: its server does not end, and is killed", self._registry.facts.name)
            self._kill_server()
        hang = self._hang_detector.check(self._server_pidfd)
        if hang:
            self._overdue = hang
            self._kill_server()

    def _kill_server(self) -> None:
        handover.kill(self._server_pidfd)
        self._end_deadline = None

    # --- its server

    def start_first_server(self) -> None:
        """Fork the server, and wait until it serves.

        Raises:
            DeviceError: it cannot be started, its driver refused to start or did not return in time (ETIMEDOUT), or it has
                ended; the message says why.
        """
        self.start_server()
        received = self._receive_first()
        if received is not None and isinstance(received[0], handover.ServerStarted):
            return
        assert self.server_pid is not None
        status = handover.reap(self.server_pid, _END_S)
        if received is not None and isinstance(received[0], handover.ServerNotStarted):
            raise DeviceError(received[0].number, received[0].message)
        raise DeviceError(errno.ETIMEDOUT if self._overdue else errno.ECONNRESET, self._describe_end(status))

    def _receive_first(self) -> tuple[handover.Message, list[int]] | None:
        """Return the first message of a new server; None if it ended, or made no progress and was killed."""
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        while not poll.poll(max(0.0, self._hang_detector.next_check - time.monotonic()) * 1000):
            self._overdue = self._hang_detector.check(self._server_pidfd)
            if self._overdue:
                self._kill_server()
                return None
        return handover.receive(self._link)

    def start_server(self) -> None:
        """Fork the server."""
        self._link, theirs = handover.pair()
        myself = os.pidfd_open(os.getpid())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = daemon.fork()
            if not pid:
                self._serve(theirs, myself)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(myself)
        self.watch_server(os.pidfd_open(pid), self._link, pid)

    def watch_server(self, pidfd: int, link: socket.socket, pid: int | None) -> None:
        """Supervise a running server; ``pid`` is None if it is not a child of this process."""
        self._server_pidfd, self._link, self.server_pid = pidfd, link, pid
        self._overdue = ""
        self._hang_detector.restart()
        self._watch(pidfd, self._reap_server)
        self._watch(link.fileno(), self._receive)

    def reattach(self, pidfd: int, link: socket.socket) -> None:
        """Supervise a server whose warden has died: it sends the registry of its clients."""
        link.settimeout(_START_S)
        # None: the server has died as well; the clients that are known by now are answered for.
        while (received := handover.receive(link)) is not None:
            if isinstance(received[0], handover.HandoverDone):
                break
            self._apply(*received)
        self.watch_server(pidfd, link, None)
        if self._lingers and not self._registry.clients:
            self.end()

    def _serve(self, link: socket.socket, warden: int) -> NoReturn:
        status = _SOFTWARE
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number in (signal.SIGINT, signal.SIGHUP):  # sent to the whole process group: the warden decides
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            daemon.set_process_name(daemon.SERVER)
            with limit_messages.explained(f"the server of {self._registry.facts.name} cannot be started"):
                daemon.set_up_streams()
            self._selector.close()
            for end in (self._signals, self._signal_writer, self._link):
                end.close()
            registry = self._registry
            if registry.clients:
                registry.first = None
            fork_hooks.register(in_child=partial(_close_inherited, registry, link, registry.listener, registry.control))
            warden_link = WardenLink(link, warden)
            if self._device is None:
                assert registry.recipe is not None
                # Clients wait already: the warden sees if it does not return. It has as long as at the first start.
                heartbeat = registry.frames.heartbeat
                heartbeat[0] = time.monotonic_ns() + int(max(0.0, _START_S - registry.facts.timeout_s) * 1e9)
                self._device = recipes.make_device(registry.recipe)
                heartbeat[0] = 0
            run_server(self._device, registry, warden_link)
            warden_link.finished()
            status = 0
        except DeviceError as error:
            why = handover.ServerNotStarted(error.errno or errno.EIO, error.strerror or str(error))
            try:
                handover.send(link, why)
            except OSError:  # the warden is gone
                _log.error("%s", error)
        except BaseException:  # noqa: BLE001  nothing of the warden may run in here
            _log.exception("device %s: its server failed", self._registry.facts.name)
        finally:
            try:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
            finally:
                os._exit(status)

    def _receive(self) -> None:
        """Apply the messages of the server."""
        self._link.setblocking(False)
        try:
            while (received := handover.receive(self._link)) is not None:
                self._apply(*received)
        except BlockingIOError:
            return
        except ProtocolError as error:  # the driver wrote into its descriptors, say
            _log.error("device %s: its server is killed: %s", self._registry.facts.name, error)
            self._kill_server()
        self._selector.unregister(self._link.fileno())

    def _apply(self, message: handover.Message, descriptors: list[int]) -> None:
        match message:
            case handover.HandoverDone():
                self._orderly = True
            case handover.ServerStarted():
                self._start_failure = ""
            case handover.ServerNotStarted():
                self._start_failure = message.message
            case handover.Admitted():
                first = self._registry.first
                if client_records.admit(self._registry, message, descriptors) and first is not None:
                    first.close()  # the client has a duplicate
                    self._registry.first = None
            case handover.Left():
                client_records.remove(self._registry, message)
                if self._lingers and not self._registry.clients:
                    self.end()
            case _:
                raise ProtocolError(f"a server does not send {type(message).__name__}")

    def _reap_server(self) -> None:
        registry = self._registry
        status = None if self.server_pid is None else handover.reap(self.server_pid, 1.0)
        # All messages of the dead server are in the socket.
        if self._link.fileno() in self._selector.get_map():
            self._receive()
        if self._link.fileno() in self._selector.get_map():
            self._selector.unregister(self._link.fileno())
        self._selector.unregister(self._server_pidfd)
        os.close(self._server_pidfd)
        self._link.close()
        self._server_pidfd = -1
        registry.area_table.load(registry.clients)
        if self._over:
            return
        if self._orderly or self._ending:
            self._finish()
            return
        reason = self._describe_end(status)
        if not registry.clients and registry.first is None and registry.listener is None:
            _log.warning("device %s: %s, after its last client", registry.facts.name, reason)
            self.failed = reason
            self._finish()
            return
        # A signal from outside is not the driver's fault.
        blame = bool(self._overdue) or (status is not None and status not in (-signal.SIGKILL, -signal.SIGTERM))
        filling = registry.frames.runs(range(registry.frames.pages), DevicePageState.FILLING)
        registry.frames.repair()
        if self._can_start_another():
            _log.warning("device %s: %s; another is started", registry.facts.name, reason)
            registry.generation += 1
            if blame:
                registry.blamed = {page: reason for run in filling for page in run}
            if registry.first is not None:  # Hello may have gone with the server
                message = protocol.Restarted(0, registry.generation)
                fallback_server.send_if_possible(registry.first.fileno(), message)
            try:
                self.start_server()
            except OSError as error:
                reason = f"{reason}; no other can be started: {limit_messages.reason(error.errno) or error.strerror}"
            else:
                registry.blamed = {}
                return
        self._fall_back(reason)

    def _describe_end(self, status: int | None) -> str:
        if self._overdue:
            return f"the driver {self._overdue} {self._registry.facts.timeout_s:g} s, and its process was killed"
        if self._start_failure:
            return f"the driver's process could not be started again: {self._start_failure}"
        if status is None:
            return "the driver's process ended"
        if status < 0:
            return f"the driver's process was ended by {signal.Signals(-status).name}"
        return f"the driver's process ended by itself, with exit status {status}"

    def _can_start_another(self) -> bool:
        if not self._registry.facts.restartable or (self._device is None and self._registry.recipe is None):
            return False
        too_often = self._timeouts.record() if self._overdue else self._deaths.record()
        return not too_often

    def _fall_back(self, reason: str) -> None:
        _log.error("device %s: %s; pages that were not supplied are SIGBUS from now on", self._registry.facts.name, reason)
        self.failed = reason
        self._stop_listening()
        self._fallback = fallback_server.FallbackServer(self._registry, self._selector, reason)
        self._over = self._fallback.over

    def _stop_listening(self) -> None:
        registry = self._registry
        if registry.listener is not None:
            registry.listener.close()
            registry.listener = None
        if registry.listens_at is not None:
            try:
                socket_path.leave(registry.listens_at)
            except OSError as error:
                _log.warning("%s cannot be removed: %s", registry.listens_at.path, error.strerror)
            registry.listens_at = None

    # --- the end

    def _receive_signal(self) -> None:
        self._signals.recv(64)
        if self._ending and self._server_pidfd >= 0:  # the second signal
            self._kill_server()
        self.end()

    def _end_with(self, fd: int) -> None:
        """End by the control connection, to which only End or its end comes, or with the owner."""
        self._selector.unregister(fd)
        self.end()

    def end(self) -> None:
        """End in an orderly way: the server first, which closes the areas at its driver."""
        if self._server_pidfd < 0:
            self._finish()
        elif not self._ending:
            self._ending = True
            self._end_deadline = time.monotonic() + self._registry.facts.timeout_s + _END_S
            handover.kill(self._server_pidfd, signal.SIGTERM)

    def _finish(self) -> None:
        """Resolve all faults for good: supplied pages stay, all others are SIGBUS."""
        self._over = True
        self._stop_listening()
        frames = self._registry.frames
        if not self._orderly:
            frames.repair()
        for client in self._registry.clients.values():
            if not self._orderly:
                fault_resolution.resolve_all(frames, client)
                fallback_server.send_if_possible(
                    client.connection, protocol.Gone(0, f"device {self._registry.facts.name} is not served any more")
                )
            fallback_server.release_client(client)
            client.close()


def _wake_only(*_: object) -> None:
    """Do nothing: the signal's number is in the socket that wakes the loop."""


def _close_inherited(registry: Registry, *ends: socket.socket | None) -> None:
    """Close the connections of clients in a process that the driver forked, where they would hide the server's death."""
    for client in registry.clients.values():
        client.close()
    for end in ends:
        if end is not None:
            end.close()
