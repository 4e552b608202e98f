"""virtio-mem: the device side of section 5.15 of the VIRTIO specification, over sparse memory and without a transport.

:class:`VirtioMem` decides on requests and executes them; :mod:`prefault.virtio_mem.wire` has the structures on the wire.
"""

from prefault.virtio_mem.virtio_device import VirtioMem
from prefault.virtio_mem.wire import (
    CONFIG_BYTES,
    DEVICE_ID,
    REQUEST_BYTES,
    RESPONSE_BYTES,
    TRANSPORT_FEATURES,
    VERSION_1,
    BlockState,
    Config,
    Feature,
    Request,
    RequestType,
    Response,
    ResponseType,
)

__all__ = [
    "CONFIG_BYTES",
    "DEVICE_ID",
    "REQUEST_BYTES",
    "RESPONSE_BYTES",
    "TRANSPORT_FEATURES",
    "VERSION_1",
    "BlockState",
    "Config",
    "Feature",
    "Request",
    "RequestType",
    "Response",
    "ResponseType",
    "VirtioMem",
]
