"""Which device this process serves, if it is a device's server: whatever would make it wait for itself is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefault.device.driver import Device

device: Device | None = None
"""Set by the server before it calls the driver."""
