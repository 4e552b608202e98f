"""Buffer objects of graphics memory, as the kernel's TTM and GEM have them: docs/design/buffers.md.

``BufferObjects`` is the device, ``Buffers`` its client.
"""

from prefault.drivers.buffers.buffer_client import Buffers, Reservation
from prefault.drivers.buffers.buffer_device import BufferObjects
from prefault.drivers.buffers.buffer_errors import BufferObjectError

__all__ = ["BufferObjectError", "BufferObjects", "Buffers", "Reservation"]
