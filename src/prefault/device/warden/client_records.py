"""The warden's records of clients and areas, kept up to date by the messages of the server."""

from __future__ import annotations

import logging
import os

from prefault.device import handover, limit_messages
from prefault.device.registry import AreaRecord, Registry
from prefault.ipc.transport import ProtocolError

_log = logging.getLogger("prefault.device")


class ClientRecords:
    """Applies a server's messages about clients and areas to the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._unadmitted_areas: dict[int, dict[int, AreaRecord]] = {}
        """Areas of clients that are not admitted yet, by number."""

    def apply(self, message: handover.Message, descriptors: list[int]) -> None:
        """Apply a message; ProtocolError: it is none that a server sends."""
        clients = self._registry.clients
        match message:
            case handover.Admitted():
                if len(descriptors) != len(message.descriptors):
                    self._refuse(message, descriptors)
                    return
                client = handover.client_record(message, descriptors)
                client.areas = self._unadmitted_areas.pop(client.number, {})
                clients[client.number] = client
            case handover.Areas(client=number):
                areas = clients[number].areas if number in clients else self._unadmitted_areas.setdefault(number, {})
                areas.update((area.number, area) for area in message.areas)
            case handover.Removed():
                if message.client in clients:
                    clients[message.client].areas.pop(message.area, None)
            case handover.Left():
                # Also a client that could not be admitted: its number will be another's.
                self._unadmitted_areas.pop(message.client, None)
                left = clients.pop(message.client, None)
                if left is not None:
                    handover.close_client(left)
            case _:
                raise ProtocolError(f"a server does not send {type(message).__name__}")

    def _refuse(self, message: handover.Admitted, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        _log.error(
            "device %s: process %d ends by SIGBUS if the server dies, as its warden takes no more descriptors: %s",
            self._registry.facts.name,
            message.pid,
            limit_messages.no_descriptor(),
        )
