"""The warden in place of a server that is gone: supplied pages are mapped, all others are SIGBUS."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
from collections.abc import Callable

from prefault._kernel import userfaultfd
from prefault.device import protocol
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution
from prefault.device.registry import ClientRecord, Registry
from prefault.interval_index import IntervalIndex
from prefault.ipc.transport import ProtocolError, receive

_WP = userfaultfd.UFFD_PAGEFAULT_FLAG_WP


def send_if_possible(connection: int, message: protocol.Reply) -> None:
    """Send a message on a connection if that needs no waiting and the other side is there."""
    if connection < 0:
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection)) as link:
        link.send(protocol.encode(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def release_client(client: ClientRecord) -> None:
    """Unregister the areas of a client whose pages are all mapped or poisoned, and disarm its lifeline.

    The kernel reports no more faults: otherwise a supplied page whose entry it drops, for swap, would wait for ever.
    """
    for area in client.areas.values():
        with contextlib.suppress(OSError):  # unmapped, or its process is gone
            userfaultfd.unregister(client.userfaultfd, area.address, area.length)
    fault_resolution.disarm(client.lifeline_read)


class FallbackServer:
    """Answers faults and refuses requests after the last server.

    Args:
        registry: clients and frames, repaired; and a connection that has no client yet.
        selector: whose data are functions without arguments.
        reason: why there is no server, for people.
    """

    def __init__(self, registry: Registry, selector: selectors.BaseSelector, reason: str) -> None:
        self._registry = registry
        self._selector = selector
        self._refusal = f"the device's server is gone: {reason}"
        self._areas: dict[int, IntervalIndex[int]] = {}
        """Numbers of the areas of each client, by address."""
        first = registry.first
        for client in registry.clients.values():
            self._take_over(client, reason)
        if first is not None:
            send_if_possible(first.fileno(), protocol.Gone(0, reason))
            self._watch(first.fileno(), lambda: self._receive_first(first))

    @property
    def over(self) -> bool:
        """True once no client is left."""
        return not self._registry.clients and self._registry.first is None

    def _take_over(self, client: ClientRecord, reason: str) -> None:
        os.set_blocking(client.userfaultfd, False)
        self._watch(client.userfaultfd, lambda: self._answer(client))
        self._watch(client.pidfd, lambda: self._remove_client(client))
        if client.connection >= 0:
            self._watch(client.connection, lambda: self._receive(client))
        index: IntervalIndex[int] = IntervalIndex()
        self._areas[client.number] = index
        for area in client.areas.values():
            index.add(area.address, area.address + area.length, area.number)
            # Waiting threads fault again: faults that the server had read and not answered are lost.
            fault_resolution.unprotect(client.userfaultfd, area.address, area.length)
            fault_resolution.wake(client.userfaultfd, area.address, area.length)
        send_if_possible(client.connection, protocol.Gone(0, reason))

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, handler)

    def _forget(self, fd: int) -> None:
        # Before it is closed: the client has the same open file, which epoll would go on watching.
        if fd >= 0:
            with contextlib.suppress(KeyError):
                self._selector.unregister(fd)

    def _remove_client(self, client: ClientRecord) -> None:
        if self._registry.clients.pop(client.number, None) is not None:
            del self._areas[client.number]
            if fault_resolution.is_another_program(client):
                fault_resolution.disarm(client.lifeline_read)
            for fd in client.descriptors.values():
                self._forget(fd)
            client.close()

    # --- faults

    def _answer(self, client: ClientRecord) -> None:
        try:
            events = userfaultfd.read_events(client.userfaultfd)
        except BlockingIOError:
            return
        except OSError:
            self._remove_client(client)
            return
        faults = {(event.address, event.flags & _WP) for event in events if isinstance(event, userfaultfd.PageFault)}
        for address, protected in sorted(faults):
            if not self._resolve(client, address, bool(protected)):
                self._remove_client(client)
                return

    def _resolve(self, client: ClientRecord, address: int, protected: bool) -> bool:
        """Answer a fault; return False if the process is gone."""
        frames, fd = self._registry.frames, client.userfaultfd
        number = self._areas[client.number].at(address)
        area = None if number is None else client.areas[number]
        if area is None:  # unmapped, or mapped after the last message of the server
            start = address - address % frames.unit
            return not fault_resolution.poison_run(fd, start, frames.unit, frames.unit).gone
        page = (address - area.address + area.offset) // frames.page_size
        start = area.address + page * frames.page_size - area.offset
        if protected:
            return fault_resolution.unprotect(fd, start, frames.page_size)
        if frames.states[page] == DevicePageState.READY:
            result = fault_resolution.map_run(fd, start, frames.page_size, frames.unit, False)
            if not result.holes:
                return not result.gone
        return not fault_resolution.poison_run(fd, start, frames.page_size, frames.unit).gone

    # --- requests

    def _receive(self, client: ClientRecord) -> None:
        request = self._request(client.connection)
        if request is None:
            self._forget(client.connection)
            with contextlib.suppress(OSError), socket.socket(fileno=client.connection) as link:
                link.shutdown(socket.SHUT_RDWR)
            client.connection = -1
            # With areas it lives, and its pidfd reports the end, except after execve(2), which the ioctl reports.
            if fault_resolution.is_another_program(client):
                self._remove_client(client)
        elif isinstance(request, protocol.Unmap):
            area = client.areas.pop(request.area, None)
            if area is not None:
                self._areas[client.number].remove(area.address, area.address + area.length, area.number)
            send_if_possible(client.connection, protocol.Done(request.id))
        elif not isinstance(request, protocol.Cancel):
            send_if_possible(client.connection, protocol.Refused(request.id, "gone", errno.ECONNRESET, self._refusal))

    def _receive_first(self, first: socket.socket) -> None:
        request = self._request(first.fileno())
        if request is None:
            self._forget(first.fileno())
            first.close()
            self._registry.first = None
        else:
            send_if_possible(first.fileno(), protocol.Refused(request.id, "gone", errno.ECONNRESET, self._refusal))

    def _request(self, connection: int) -> protocol.Request | None:
        """Return the next request; None at the end of the connection, or after an invalid message."""
        descriptors: list[int] = []
        try:
            with socket.socket(fileno=os.dup(connection)) as link:
                link.setblocking(False)
                packet, descriptors = receive(link, protocol.MAX_MESSAGE, protocol.MAX_DESCRIPTORS)
            return protocol.decode_request(packet) if packet else None
        except (OSError, ProtocolError):
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
