"""The state of a page of a device, and its flags: a byte each, in memory that the warden and all servers share."""

from __future__ import annotations

import enum
from typing import Final


class DevicePageState(enum.IntEnum):
    """State of a page of a device: MISSING, FILLING, READY, and what takes it away from clients again."""

    MISSING = 0
    FILLING = 1
    """The driver writes into the frame, which no client has mapped. After a crash: MISSING, and the frame is punched."""
    READY = 2
    """Supplied."""
    EVICTING = 3
    """Write-protected everywhere and being saved, or being discarded at the driver. After a crash: READY."""
    PUNCHING = 4
    """Saved; its frame goes. After a crash: it is punched again, and MISSING."""
    ASIDE = 5
    """Shot down: its content is in the copy aside, and no client has an entry. After a crash it is copied back: READY."""


UNSETTLED: Final = (DevicePageState.FILLING, DevicePageState.EVICTING, DevicePageState.PUNCHING, DevicePageState.ASIDE)
"""States of pages that some call is working on: neither supplied nor missing before it ends."""


class PageFlag(enum.IntFlag):
    """Flags of a page of a device, in any state; they survive the server."""

    READ_ONLY = 1
    """Clients get entries without write permission; a store asks the driver (``Device.mkwrite``)."""
    DIRTY = 2
    """A client may have written to the page since it was supplied or written back; for ``Device.tracks_writes``."""
    POISONED = 4
    """The driver poisoned it: touching it is SIGBUS until it is supplied or discarded."""
