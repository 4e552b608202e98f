"""The event loop of a device's server: one thread answers faults and requests, and runs the driver, itself or by workers."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from prefault.device import handover, limit_messages, protocol, this_server
from prefault.device.frames import RESULTS
from prefault.device.pages import fault_resolution
from prefault.device.pages.driver_pool import ServedPool
from prefault.device.pages.eviction import Eviction
from prefault.device.pages.fault_around import FaultAroundWindows
from prefault.device.pages.huge_pages import HugePages
from prefault.device.pages.isolation import Isolation
from prefault.device.pages.page_tables import PageTables
from prefault.device.pages.served_areas import ServedArea, ServedClient, ServerState
from prefault.device.server.client_connections import EPOLLIN, ClientConnection, ClientConnections
from prefault.device.server.discards import Discards
from prefault.device.server.driver_calls import DriverCalls
from prefault.device.server.fault_polling import FaultPolling
from prefault.device.server.faults import Faults
from prefault.device.server.populate_requests import PopulateRequests
from prefault.device.server.requests import Requests
from prefault.device.server.workers import Jobs, Workers
from prefault.device.server.write_requests import WriteRequests
from prefault.errors import DeviceError

if TYPE_CHECKING:
    from prefault.device.driver import Device
    from prefault.device.registry import ClientRecord, Registry
    from prefault.device.server.warden_link import WardenLink

_log = logging.getLogger("prefault.device")
_EVENTS = 64
_SWITCH_S = 0.0005
"""Switch interval, in seconds: how long a worker may keep the interpreter while the loop has a fault to answer."""
_ERRORS = select.EPOLLERR | select.EPOLLHUP


def run_server(device: Device, registry: Registry, warden_link: WardenLink) -> None:
    """Serve a device: a private server until its client is gone, one with a listener until SIGTERM.

    Call it in the main thread of a process of its own, whose handling of signals it takes over.

    Args:
        device: the driver.
        registry: the state that outlives a server. If it has clients, this server resumes them.
        warden_link: notified of changes in the registry.

    Raises:
        DeviceError: a limit is reached (of threads, of descriptors) before any request was answered, or the driver's
            ``start`` raised.
    """
    this_server.device = device
    sys.setswitchinterval(_SWITCH_S)
    with limit_messages.explained(f"the server of {type(device).__name__} cannot be started"):
        server = _EventLoop(device, registry, warden_link)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: server.stop())
        server.start()
    server.run()


class _EventLoop:
    def __init__(self, device: Device, registry: Registry, warden_link: WardenLink) -> None:
        self._device = device
        self._registry = registry
        self._warden_link = warden_link
        self._stopping = False
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended = False

        state = self._state = ServerState(device, registry, notify=self._wake)
        self._connections = ClientConnections(
            self._watch, self._forget, restarted=registry.generation > 0, greeted=self._admit_new, welcome=self._welcome,
            asked=lambda client, request: self._requests.handle(client, request), lost=self._connection_lost,
        )  # fmt: skip
        self._driver_calls = DriverCalls(state)
        self._workers = Workers(state, min(device.workers, RESULTS - 1), device.object_workers)
        self._jobs = Jobs(state, self._driver_calls, self._workers)
        huge = HugePages(state)
        self._page_tables = PageTables(state, huge)
        self._isolation = Isolation(state, huge)
        self._discards = Discards(state, self._page_tables, self._jobs)
        self._write_requests = WriteRequests(state, self._page_tables, self._jobs, self._isolation)
        self._faults = Faults(
            state, self._page_tables, self._driver_calls, self._jobs, self._discards, FaultAroundWindows(state),
            self._write_requests,
        )  # fmt: skip
        self._populate_requests = PopulateRequests(
            state, self._page_tables, self._jobs, self._discards, self._workers,
            write_requests=self._write_requests, page_by_page=self._driver_calls.page_by_page,
            reply=self._connections.reply,
        )  # fmt: skip
        self._fault_polling = FaultPolling()
        eviction = Eviction(state, self._isolation)
        self._driver_pool = ServedPool(state, eviction, self._isolation, self._page_tables, threaded=self._jobs.threaded)
        self._requests = Requests(
            state, self._jobs, self._populate_requests, self._discards, eviction, self._fault_polling,
            reply=self._connections.reply, lost=self._connection_lost,
        )  # fmt: skip

    # --- the start

    def start(self) -> None:
        """Start the driver, resume the clients of the last server, and accept others; DeviceError if the driver raises."""
        registry = self._registry
        self._watch(self._waker, EPOLLIN, self._woken)
        self._watch_warden()
        restored = self._restore_clients()
        # Not before all areas are known: a driver that evicts has to have all of them write-protected.
        failure = self._driver_calls.call(0, "start", self._driver_pool)
        if failure is not None:
            raise DeviceError(failure.number, failure.message)
        self._resume_clients(restored)
        listener = registry.listener
        if listener is not None:
            listener.setblocking(False)
            self._watch(listener.fileno(), EPOLLIN, lambda _: self._connections.accept(listener))
        if registry.first is not None:
            self._connections.admit(registry.first)

    # --- the loop

    def run(self) -> None:
        """Notify the warden that the server has its threads and descriptors, and run until the end of the server."""
        self._notify_warden(handover.ServerStarted(os.getpid()))
        self._loop()
        self._end()

    def _loop(self) -> None:
        poll, handlers, spin, faults = self._epoll.poll, self._handlers, self._fault_polling, self._faults
        populate_requests = self._populate_requests
        discards = self._discards
        parked = self._state.parked.by_page
        events: list[tuple[int, int]] = []
        more = False
        while True:
            if not events:
                events = poll(0 if more or self._state.gone_clients else self._timeout(), _EVENTS)
            arrived = time.monotonic_ns()
            for fd, mask, handler in [(fd, mask, handlers.get(fd)) for fd, mask in events]:
                # A handler may close a descriptor, and open another of that number: a later event is not about that one.
                if handler is not None and handlers.get(fd) is handler:
                    handler(mask)
            events = []
            if self._state.gone_clients:
                self._remove_gone_clients()
            if self._connections.unidentified:
                self._connections.expire()
            if (self._stopping or not self._state.clients) and self._is_over():
                return
            if discards.active:
                discards.step()
            if parked:
                self._expire_parked()
            more = bool(populate_requests) and populate_requests.step()
            client = faults.take_recent()
            if client is not None and not client.gone and spin.wanted(arrived) and not more and self._is_calm():
                expected = [(client.record.userfaultfd, EPOLLIN)]
                events = spin.wait(poll, expected, partial(faults.read, client), self._is_calm)

    def _timeout(self) -> float | None:
        """Return the seconds until something is to be done without an event; None: nothing."""
        if not self._state.parked.by_page and not self._populate_requests:
            return self._connections.hello_timeout()
        waits = [self._connections.hello_timeout()]
        parked, populates = self._state.parked.oldest_ns(), self._populate_requests.wait_until()
        if parked is not None:
            waits.append(max(0.0, parked / 1e9 + self._device.timeout_s - time.monotonic()))
        if populates is not None:
            waits.append(max(0.0, populates - time.monotonic()))
        return min((wait for wait in waits if wait is not None), default=None)

    def _expire_parked(self) -> None:
        """Poison the pages that the driver could not supply, and did not bring in afterwards in the time of a call."""
        with self._state.lock:
            for area, page, _, _ in self._state.parked.take_expired(self._device.timeout_s):
                if area.alive:
                    area.counters.errors += 1
                    self._page_tables.poison(area, page)
                    _log.error("device %s: page %d was not supplied after the driver answered RETRY", self._state.name, page)

    def _is_calm(self) -> bool:
        """Return whether there is nothing to do except answering faults."""
        return not self._state.gone_clients and not self._workers.busy

    def _is_over(self) -> bool:
        return self._stopping or (
            self._registry.listener is None
            and not self._connections.connections
            and not self._state.clients
            and not self._workers.busy
        )  # fmt: skip

    def _wait_for_workers(self) -> None:
        waker = select.poll()  # select(2) knows no descriptors above 1023, and clients have five each
        waker.register(self._waker, select.POLLIN)
        waker.poll()
        os.eventfd_read(self._waker)

    def stop(self) -> None:
        """End in an orderly way; to be called by a signal handler."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._waker, 1)

    def _woken(self, _: int) -> None:
        os.eventfd_read(self._waker)
        self._workers.collect()

    def _watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        if fd in self._handlers:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            # Before it is closed: other processes have the same open file, which epoll would go on watching.
            self._epoll.unregister(fd)

    # --- clients

    def _admit_new(self, link: ClientConnection, request: protocol.Hello, record: ClientRecord) -> None:
        record.number = self._state.next_client_number()
        client = ServedClient(record, link.socket)
        link.client = client
        try:
            self._admit(client)
        except OSError as error:  # fs.epoll.max_user_watches
            self._connections.send(
                link, protocol.Refused(request.id, "device", error.errno or 0, "the server cannot wait for one more client")
            )
            self._state.schedule_removal(client)
            return
        self._registry.first = None  # its connection is the client's now
        self._notify_warden(*handover.admitted(record))
        self._welcome(link, request)

    def _welcome(self, link: ClientConnection, request: protocol.Hello) -> None:
        state, device, facts = self._state, self._device, self._registry.facts
        self._connections.send(
            link,
            protocol.Welcome(
                request.id, facts.name[:1000], facts.length, facts.page_size, facts.writable, device.populates,
                device.evicts, device.huge_faults, facts.huge, facts.notes,
            ),
            (state.frames.fd,),
        )  # fmt: skip

    def _admit(self, client: ServedClient) -> None:
        """Watch the faults of a client, and its end."""
        record = client.record
        self._registry.clients[record.number] = record
        self._state.clients[record.number] = client
        self._watch(record.pidfd, EPOLLIN, lambda _: self._state.schedule_removal(client))
        faults = self._faults

        def faulted(mask: int) -> None:
            if mask & _ERRORS:  # the client made it blocking, for example: reading it would stop the loop
                return self._state.schedule_removal(client)
            return faults.read(client)

        self._watch(record.userfaultfd, EPOLLIN, faulted)

    def _connection_lost(self, client: ServedClient) -> None:
        """Remove a client whose connection ended if it is another program by now.

        Without areas it asks no more. With areas it lives, or its pidfd reports the end, except after execve(2), which
        keeps the pid and none of the areas.
        """
        if self._ended or client.gone:
            return  # its descriptors are closed, and the numbers may be another client's
        if client.opening:
            return  # checked again when the area is open
        if fault_resolution.is_another_program(client.record):
            fault_resolution.disarm(client.record.lifeline_read)
            self._state.schedule_removal(client)

    def _remove_gone_clients(self) -> None:
        gone_clients, self._state.gone_clients = self._state.gone_clients, []
        for client in gone_clients:
            record = client.record
            # It has no areas that the end of the server could hurt; or it called execve(2) meanwhile.
            if fault_resolution.is_another_program(record):
                fault_resolution.disarm(record.lifeline_read)
            areas = list(client.areas.values())
            for area in areas:
                self._requests.release_area(area)
            self._forget(record.userfaultfd)
            self._forget(record.pidfd)
            if client.connection is not None:
                self._connections.hang_up(self._connections.connections[client.connection.fileno()])
            del self._state.clients[record.number], self._registry.clients[record.number]
            with self._state.lock:  # an eviction may be at one of its areas
                for fd in (record.userfaultfd, record.pidfd, record.lifeline_write, record.lifeline_read):
                    os.close(fd)
            self._notify_warden(handover.Left(record.number))
            # Not before the warden knows: a driver that closed our descriptors makes clients look gone, and this may fail.
            for area_record in record.areas.values():
                self._registry.area_table.clear(area_record.row)
            for area in areas:
                self._requests.close_area(area)
            self._jobs.remove_client(client)

    # --- the warden

    def _notify_warden(self, message: handover.Message, descriptors: list[int] | None = None) -> None:
        try:
            self._warden_link.notify(message, descriptors)
        except OSError:
            self._warden_died(0)

    def _watch_warden(self) -> None:
        if self._warden_link.pidfd >= 0:
            self._watch(self._warden_link.pidfd, EPOLLIN, self._warden_died)

    def _warden_died(self, _: int) -> None:
        """Replace a warden that is gone, and hand over the whole registry."""
        self._forget(self._warden_link.pidfd)
        self._warden_link.replace_warden(self._registry)
        self._watch_warden()

    # --- after another server

    def _restore_clients(self) -> list[ServedArea]:
        """Serve the clients of the last server again; return their areas, which the driver does not know yet."""
        restored: list[ServedArea] = []
        for record in list(self._registry.clients.values()):
            connection = socket.socket(fileno=record.connection) if record.connection >= 0 else None
            client = ServedClient(record, connection)
            client.resumed = True
            for area in record.areas.values():
                served = self._requests.restore(client, area)
                restored.append(served)
                self._isolation.resume(served)
            self._admit(client)
            if connection is not None:
                connection.setblocking(False)
                self._connections.resume(client)
        return restored

    def _resume_clients(self, restored: list[ServedArea]) -> None:
        for served in restored:
            # A failure is logged; faults will show whether the driver can serve the area.
            self._driver_calls.call(0, "open", served)
        for client in list(self._state.clients.values()):
            for area in client.record.areas.values():
                fault_resolution.wake(client.record.userfaultfd, area.address, area.length)
            self._connections.reply(client, protocol.Restarted(0, self._registry.generation))

    # --- the end

    def _end(self) -> None:
        self._workers.stop(self._wait_for_workers)
        clients = list(self._state.clients.values())
        for client in clients:
            for area in list(client.areas.values()):
                self._driver_calls.call(0, "close", area)
            self._driver_calls.call(0, "disconnect", client.process)
        self._driver_calls.call(0, "stop")
        # A thread of the driver that evicts from now on would take pages that are never supplied again.
        self._isolation.stop()
        for client in clients:
            fault_resolution.resolve_all(self._state.frames, client.record)
            self._connections.reply(client, protocol.Gone(0, f"the server of device {self._state.name} was ended"))
            fault_resolution.disarm(client.record.lifeline_read)
        self._ended = True
        self._connections.close()
        for fd in list(self._handlers):
            self._forget(fd)
        self._epoll.close()
        # The eventfd ends with the process: a thread of the driver may be about to announce the end of an eviction.
