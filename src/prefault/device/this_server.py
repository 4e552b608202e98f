"""The device that this process serves, if it is a server: mapping that device here would deadlock and is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefault.device.driver import Device

device: Device | None = None
"""Device that this process serves; set by the server before it calls the driver. None in other processes."""
