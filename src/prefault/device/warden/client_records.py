"""Clients that a server admitted, as its messages tell the warden."""

from __future__ import annotations

import logging
import os

from prefault.device import handover, limit_messages
from prefault.device.registry import Registry

_log = logging.getLogger("prefault.device")


def admit(registry: Registry, message: handover.Admitted, descriptors: list[int]) -> bool:
    """Add a client to the registry; return False, and log it, if RLIMIT_NOFILE cut off some of its descriptors."""
    if len(descriptors) == len(message.descriptors):
        registry.clients[message.number] = handover.client_record(message, descriptors)
        return True
    for descriptor in descriptors:
        os.close(descriptor)
    _log.error(
        "device %s: process %d ends by SIGBUS if the server dies, as its warden takes no more descriptors: %s",
        registry.facts.name, message.pid, limit_messages.no_descriptor(),
    )  # fmt: skip
    return False


def remove(registry: Registry, message: handover.Left) -> None:
    """Remove a client that is gone, and close its descriptors."""
    left = registry.clients.pop(message.client, None)  # None: it could not be admitted
    if left is not None:
        left.close()
