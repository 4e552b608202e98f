"""The state of a page of a device: a byte in memory that the warden and all servers share."""

from __future__ import annotations

import enum


class DevicePageState(enum.IntEnum):
    """State of a page of a device: MISSING, FILLING, READY, EVICTING and PUNCHING, in the order of its life."""

    MISSING = 0
    FILLING = 1
    """The driver writes into the frame, which no client has mapped. After a crash: MISSING, and the frame is punched."""
    READY = 2
    """Supplied."""
    EVICTING = 3
    """Write-protected everywhere, and being saved. After a crash: READY."""
    PUNCHING = 4
    """Saved; its frame goes. After a crash: it is punched again, and MISSING."""
