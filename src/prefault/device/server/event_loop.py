"""The server of a device: one thread that answers faults and requests, and runs the driver, itself or in workers."""

from __future__ import annotations

import errno
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

from prefault.device import limit_messages, protocol, this_server
from prefault.device.frames import RESULTS
from prefault.device.server import fault_resolution
from prefault.device.server.client_connections import EPOLLIN, ClientConnection, ClientConnections
from prefault.device.server.discards import Discards
from prefault.device.server.driver_calls import DriverCalls
from prefault.device.server.eviction import Eviction
from prefault.device.server.fault_around import FaultAroundWindows
from prefault.device.server.fault_polling import FaultPolling
from prefault.device.server.faults import Faults
from prefault.device.server.page_tables import PageTables
from prefault.device.server.populate_requests import PopulateRequests
from prefault.device.server.requests import Requests
from prefault.device.server.served_areas import ServedArea, ServedClient, ServerState
from prefault.device.server.workers import Jobs, Workers
from prefault.errors import DeviceError

if TYPE_CHECKING:
    from prefault.device.driver import Device
    from prefault.device.registry import ClientRecord, Registry
    from prefault.device.server.warden_notifier import WardenNotifier

_EVENTS = 64
_SWITCH_S = 0.0005
"""How long a worker may keep the interpreter while the loop has a fault to answer."""
_ERRORS = select.EPOLLERR | select.EPOLLHUP


def run_server(
    device: Device, registry: Registry, notary: WardenNotifier, listener: socket.socket | None, first: socket.socket | None,
    parent_pidfd: int,
) -> None:  # fmt: skip
    """Serve until all is over: a private server until its client is gone, one with a listener until SIGTERM.

    In a process of its own, in its main thread; it is the process' affair from then on how signals are handled.

    Args:
        device: the driver.
        registry: what outlives a server. If it has clients, this server goes on where another ended.
        notary: is told what changes in it.
        listener: where clients connect, for a server of many.
        first: the connection of a private server's client.
        parent_pidfd: of the warden, or -1.

    Raises:
        DeviceError: a limit is reached (of threads, of descriptors) before anything was answered.
    """
    this_server.device = device
    sys.setswitchinterval(_SWITCH_S)
    with limit_messages.explained(f"the server of {type(device).__name__} cannot be started"):
        server = _EventLoop(device, registry, notary, listener, first, parent_pidfd)
    server.tell_started()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.run()


class _EventLoop:
    def __init__(
        self, device: Device, registry: Registry, notary: WardenNotifier, listener: socket.socket | None,
        first: socket.socket | None, parent_pidfd: int,
    ) -> None:  # fmt: skip
        self._device = device
        self._registry = registry
        self._notary = notary
        self._listener = listener
        self._stopping = False
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._leaving: list[ServedClient] = []
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._parent = -1

        books = self._books = ServerState(device, registry)
        books.notify = self._wake
        evictor = Eviction(books)
        self._calls = DriverCalls(books, evictor)
        self._workers = _workers(books, min(device.workers, RESULTS - 1))
        self._jobs = Jobs(books, self._calls, self._workers)
        self._entries = PageTables(books, evictor)
        self._entries.gone = self._leave_soon
        self._discards = Discards(books, self._entries, evictor, self._jobs)
        self._faults = Faults(books, self._entries, self._calls, self._jobs, self._discards, FaultAroundWindows(books))
        self._faults.broken = self._leave_soon
        self._populates = PopulateRequests(
            books, self._entries, evictor, self._jobs, self._discards, self._workers, page_by_page=self._calls.page_by_page
        )
        self._requests = Requests(books, self._jobs, self._populates, self._discards)
        self._connections = ClientConnections(self._watch, self._forget)
        self._connections.greeted, self._connections.welcome = self._greet, self._welcome
        self._connections.restarted = registry.generation > 0
        self._connections.asked = self._requests.handle
        self._connections.lost = self._lost
        self._populates.say = self._requests.say = self._connections.say
        self._requests.added, self._requests.removed = self._added, self._removed
        self._requests.lost = self._lost
        self._spin = FaultPolling()

        self._watch(self._waker, EPOLLIN, self._woken)
        self._watch_parent(parent_pidfd)
        if registry.clients:
            self._resume()
        if listener is not None:
            listener.setblocking(False)
            self._watch(listener.fileno(), EPOLLIN, lambda _: self._connections.accept(listener))
        if first is not None:
            self._connections.admit(first)

    def tell_started(self) -> None:
        """Tell the warden that all is there that can be missing."""
        self._tell(self._notary.started)

    # --- the loop

    def run(self) -> None:
        """Until all is over."""
        self._loop()
        self._end()

    def _loop(self) -> None:
        poll, handlers, populates, spin, faults = self._epoll.poll, self._handlers, self._populates, self._spin, self._faults
        discards = self._discards
        events: list[tuple[int, int]] = []
        more = False
        while True:
            if not events:
                events = poll(0 if more or self._leaving else self._connections.patience(), _EVENTS)
            arrived = time.monotonic_ns()
            for fd, mask, handler in [(fd, mask, handlers.get(fd)) for fd, mask in events]:
                # What one handler closes and opens may have the number of what a later event is about.
                if handler is not None and handlers.get(fd) is handler:
                    handler(mask)
            events = []
            if self._leaving:
                self._leave_now()
            if self._connections.strangers:
                self._connections.expire()
            if (self._stopping or not self._books.clients) and self._over():
                return
            if discards.active:
                discards.step()
            more = bool(populates) and populates.step()
            client = faults.take_recent()
            if client is not None and not client.gone and spin.wanted(arrived) and not more and self._calm():
                expected = [(client.record.userfaultfd, EPOLLIN)]
                events = spin.wait(poll, expected, partial(faults.read, client), self._calm)

    def _calm(self) -> bool:
        """Whether there is nothing to do but to answer faults."""
        return not self._leaving and not self._workers.busy

    def _over(self) -> bool:
        if self._stopping:
            return True
        return (
            self._listener is None
            and not self._connections.links
            and not self._books.clients
            and not self._workers.busy
        )  # fmt: skip

    def _wait_for_workers(self) -> None:
        waker = select.poll()  # select(2) knows no descriptors above 1023, and clients have five each
        waker.register(self._waker, select.POLLIN)
        waker.poll()
        os.eventfd_read(self._waker)

    def stop(self) -> None:
        """End in an orderly way; from a signal handler."""
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
            # Before it is closed: others have the same open file, and closing ours would not end it.
            self._epoll.unregister(fd)

    # --- clients

    def _greet(self, link: ClientConnection, request: protocol.Hello, record: ClientRecord) -> None:
        record.number = max(self._registry.clients, default=0) + 1
        client = ServedClient(record, link.connection)
        link.client = client
        try:
            self._admit(client)
        except OSError as error:  # fs.epoll.max_user_watches
            self._connections.send(
                link, protocol.Refused(request.id, "device", error.errno or 0, "the server cannot wait for one more client")
            )
            self._leave_soon(client)
            return
        self._tell(lambda: self._notary.admitted(record))
        self._welcome(link, request)

    def _welcome(self, link: ClientConnection, request: protocol.Hello) -> None:
        books, device = self._books, self._device
        self._connections.send(
            link,
            protocol.Welcome(
                request.id, books.name[:1000], self._registry.length, books.page_size, device.writable, device.populates,
                device.evicts, books.frames.huge, books.frames.notes,
            ),
            (books.frames.fd,),
        )  # fmt: skip

    def _admit(self, client: ServedClient) -> None:
        """Listen to its faults, and to its end."""
        record = client.record
        self._registry.clients[record.number] = record
        self._books.clients[record.number] = client
        self._watch(record.pidfd, EPOLLIN, lambda _: self._leave_soon(client))
        faults = self._faults

        def faulted(mask: int) -> None:
            if mask & _ERRORS:  # it was made blocking, say: reading it would stop us
                return self._leave_soon(client)
            return faults.read(client)

        self._watch(record.userfaultfd, EPOLLIN, faulted)

    def _lost(self, client: ServedClient) -> None:
        """Its connection is over. Without areas it has no more to ask of us; with some it lives, or its pidfd will say.

        Unless it has become another program by exec: that has the same pid, and none of the areas.
        """
        if client.gone:
            return  # its descriptors are closed, and the numbers may be another client's
        if client.opening:
            return  # asked again when that is done
        if fault_resolution.is_another_program(client.record):
            fault_resolution.disarm(client.record.lifeline_read)
            self._leave_soon(client)

    def _leave_soon(self, client: ServedClient) -> None:
        """It is gone. Not at once, as who finds out may be in the middle of its areas."""
        if not client.gone:
            client.gone = True
            self._leaving.append(client)

    def _leave_now(self) -> None:
        leaving, self._leaving = self._leaving, []
        for client in leaving:
            record = client.record
            # It has nothing left to fear from our end; or it called exec while it was answered.
            if fault_resolution.is_another_program(record):
                fault_resolution.disarm(record.lifeline_read)
            for area in list(client.areas.values()):
                self._requests.give_up(area, quietly=True)
            self._forget(record.userfaultfd)
            self._forget(record.pidfd)
            if client.connection is not None:
                self._connections.hang_up(self._connections.links[client.connection.fileno()])
            del self._books.clients[record.number], self._registry.clients[record.number]
            with self._books.lock:  # an eviction may be at one of its areas
                for fd in (record.userfaultfd, record.pidfd, record.lifeline_write, record.lifeline_read):
                    os.close(fd)
            self._tell(partial(self._notary.left, record.number))

    # --- the warden

    def _added(self, area: ServedArea, cpu: int | None) -> None:
        self._tell(lambda: self._notary.added(area.client.record, area.record))
        if cpu is not None:
            self._spin.colocate(area.number, cpu)

    def _removed(self, area: ServedArea, quietly: bool) -> None:
        self._spin.separate(area.number)
        if not quietly:
            self._tell(lambda: self._notary.removed(area.client.record.number, area.number))

    def _tell(self, what: Callable[[], None]) -> None:
        try:
            what()
        except OSError:
            self._orphaned(0)

    def _watch_parent(self, pidfd: int) -> None:
        self._parent = pidfd
        if pidfd >= 0:
            self._watch(pidfd, EPOLLIN, self._orphaned)

    def _orphaned(self, _: int) -> None:
        """The warden is gone: a new one gets all that there is."""
        former, self._parent = self._parent, -1
        self._forget(former)
        pidfd = self._notary.orphaned(self._registry)
        if former >= 0:
            os.close(former)
        self._watch_parent(pidfd)

    # --- after another server

    def _resume(self) -> None:
        restored: list[ServedArea] = []
        for record in list(self._registry.clients.values()):
            connection = socket.socket(fileno=record.connection) if record.connection >= 0 else None
            client = ServedClient(record, connection)
            client.resumed = True
            for area in record.areas.values():
                # The last server may have died between protecting and unprotecting. Threads that wait ask again, and what
                # was read by it, and not answered, as well.
                fault_resolution.unprotect(record.userfaultfd, area.address, area.length)
                restored.append(self._requests.restore(client, area))
            self._admit(client)
            if connection is not None:
                connection.setblocking(False)
                self._connections.resume(client)
        # Not before all areas are known: a driver that evicts in open() has to have all of them write-protected.
        for served in restored:
            self._open(served)
        for client in list(self._books.clients.values()):
            for area in client.record.areas.values():
                fault_resolution.wake(client.record.userfaultfd, area.address, area.length)
            self._connections.say(client, protocol.Restarted(0, self._registry.generation))

    def _open(self, area: ServedArea) -> None:
        """At a new driver. What it raises is logged; faults will show whether it can serve the area."""
        self._calls.call(0, "open", self._device.open, area)

    # --- the end

    def _end(self) -> None:
        self._workers.stop(self._wait_for_workers)
        clients = list(self._books.clients.values())
        for client in clients:
            for area in list(client.areas.values()):
                self._calls.call(0, "close", self._device.close, area)
        # For good: a thread of the driver that evicts from now on would take pages that nobody supplies again.
        self._books.lock.acquire()
        for client in clients:
            fault_resolution.give_up(self._books.frames, client.record)
            self._connections.say(client, protocol.Gone(0, f"the server of device {self._books.name} was ended"))
            fault_resolution.disarm(client.record.lifeline_read)
        self._connections.lost = _nothing
        self._connections.close()
        for fd in list(self._handlers):
            self._forget(fd)
        self._epoll.close()
        # The eventfd ends with the process: a thread of the driver may be about to tell of an eviction.
        if self._parent >= 0:
            os.close(self._parent)


def _workers(books: ServerState, count: int) -> Workers:
    try:
        return Workers(books, count)
    except RuntimeError as error:  # as the interpreter calls EAGAIN
        raise DeviceError(
            errno.EAGAIN, f"the {count} workers of {books.name} cannot be started: {limit_messages.no_process()}"
        ) from error


def _nothing(client: ServedClient) -> None:
    """At the end nobody is told."""
