"""The structures between driver and device: little endian, laid out as in ``include/uapi/linux/virtio_mem.h``.

Source: Virtual I/O Device (VIRTIO), version 1.2 and later, section 5.15. The names are the header's without ``VIRTIO_MEM_``.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple, TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview

_REQUEST = struct.Struct("<H6xQH6x")
_RESPONSE = struct.Struct("<H6xH")
_CONFIG = struct.Struct("<QH6xQQQQQ")

DEVICE_ID = 24
"""Number of the device type, which a transport shows to the driver: VIRTIO 1.2, section 5.15.1."""

VERSION_1 = 1 << 32
"""``VIRTIO_F_VERSION_1``, which each transport of this device must offer, as virtio-mem has no legacy interface."""

TRANSPORT_FEATURES = (1 << 50) - (1 << 24)
"""Mask of the feature bits 24 to 49, which belong to virtqueues and transports: VIRTIO 1.2, section 2.2."""

REQUEST_BYTES = _REQUEST.size
"""Bytes of a request of any type."""

RESPONSE_BYTES = _RESPONSE.size
"""Bytes of every response."""

CONFIG_BYTES = _CONFIG.size
"""Bytes of the configuration space."""

MAX_BLOCKS = (1 << 16) - 1
"""Maximum of blocks that one request can name."""

_ADDRESSES = 1 << 64


class Feature(enum.IntFlag):
    """The feature bits of this device type; the numbers in the header are bit numbers."""

    ACPI_PXM = 1 << 0
    """``node_id`` is valid, and an ACPI proximity domain."""
    UNPLUGGED_INACCESSIBLE = 1 << 1
    """The driver must not even read unplugged memory."""
    PERSISTENT_SUSPEND = 1 << 2
    """Plugged memory stays plugged while the guest is suspended."""


class RequestType(enum.IntEnum):
    """The requests of a driver."""

    PLUG = 0
    UNPLUG = 1
    UNPLUG_ALL = 2
    STATE = 3


class ResponseType(enum.IntEnum):
    """The answers of the device."""

    ACK = 0
    """Done."""
    NACK = 1
    """Denied: more than the device wants to be plugged."""
    BUSY = 2
    """Not now; nothing has changed, and the driver may ask again."""
    ERROR = 3
    """The request makes no sense."""


class BlockState(enum.IntEnum):
    """The state of a range of blocks, the answer to a STATE request."""

    PLUGGED = 0
    UNPLUGGED = 1
    MIXED = 2


class Request(NamedTuple):
    """``struct virtio_mem_req``.

    Attributes:
        type: a :class:`RequestType`, or another 16-bit number that a driver sent.
        addr: guest-physical address of the first block.
        nb_blocks: count of neighbouring blocks.
    """

    type: int
    addr: int = 0
    nb_blocks: int = 0

    def encode(self) -> bytes:
        """Return the 24 bytes of the request, padding zero.

        Raises:
            ValueError: a number does not fit into its field.
        """
        try:
            return _REQUEST.pack(self.type, self.addr, self.nb_blocks)
        except struct.error as error:
            raise ValueError(f"{self} does not fit into a request: the fields are of 16, 64 and 16 bits") from error

    @classmethod
    def decode(cls, data: Bytes) -> Request:
        """Parse the bytes that a driver sent. Padding is ignored, as specified; an unknown type is left to the device.

        Raises:
            ValueError: not 24 bytes.
        """
        _check_length("request", data, REQUEST_BYTES)
        return cls(*_REQUEST.unpack(data))


class Response(NamedTuple):
    """``struct virtio_mem_resp``.

    Attributes:
        type: the answer.
        state: state of the blocks, where a STATE request is acknowledged; else None, and zero on the wire.
    """

    type: ResponseType
    state: BlockState | None = None

    def encode(self) -> bytes:
        """Return the 10 bytes of the response."""
        return _RESPONSE.pack(self.type, 0 if self.state is None else self.state)

    @classmethod
    def decode(cls, data: Bytes, request: int) -> Response:
        """Parse the response to a request of type ``request``: the state counts only after the ACK of a STATE request.

        Raises:
            ValueError: not 10 bytes, or numbers that the specification does not know.
        """
        _check_length("response", data, RESPONSE_BYTES)
        number, state = _RESPONSE.unpack(data)
        answer = ResponseType(number)
        has_state = request == RequestType.STATE and answer is ResponseType.ACK
        return cls(answer, BlockState(state) if has_state else None)


class Config(NamedTuple):
    """``struct virtio_mem_config``, which the driver reads and never writes. All sizes in bytes.

    Attributes:
        block_size: size and alignment of a block.
        node_id: an ACPI proximity domain, with :attr:`Feature.ACPI_PXM`.
        addr: guest-physical address of the region.
        region_size: maximum of memory that the device can ever have.
        usable_region_size: the part of the region, from its start, in which blocks can be plugged now.
        plugged_size: bytes that are plugged.
        requested_size: bytes that the device wants to be plugged.
    """

    block_size: int
    node_id: int
    addr: int
    region_size: int
    usable_region_size: int
    plugged_size: int
    requested_size: int

    def check(self) -> Config:
        """Return the configuration itself if it satisfies section 5.15.4.2.

        Raises:
            ValueError: it does not; the message names the fields.
        """
        block = self.block_size
        if not 0 < block < _ADDRESSES or block & (block - 1):
            raise ValueError(f"block_size is a power of two, not {block}")
        if not 0 <= self.node_id < 1 << 16:
            raise ValueError(f"node_id is a number of 16 bits, not {self.node_id}")
        for name in ("addr", "region_size", "usable_region_size", "plugged_size", "requested_size"):
            value = getattr(self, name)
            if not 0 <= value < _ADDRESSES:
                raise ValueError(f"{name} is a number of 64 bits, not {value}")
            if value % block:
                raise ValueError(f"{name} ({value}) is not a multiple of the block size ({block})")
        if self.addr + self.region_size > _ADDRESSES:
            raise ValueError(f"the region of {self.region_size} bytes at {self.addr:#x} ends beyond 64-bit addresses")
        for small, large in (
            ("usable_region_size", "region_size"),
            ("requested_size", "usable_region_size"),
            ("plugged_size", "usable_region_size"),
        ):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(f"{small} ({getattr(self, small)}) is more than {large} ({getattr(self, large)})")
        return self

    def encode(self) -> bytes:
        """Return the 56 bytes of the configuration space, padding zero.

        Raises:
            ValueError: as :meth:`check`.
        """
        return _CONFIG.pack(*self.check())

    @classmethod
    def decode(cls, data: Bytes) -> Config:
        """Parse the configuration space of a device, its padding ignored.

        Raises:
            ValueError: not 56 bytes, or values that a device must not show.
        """
        _check_length("configuration space", data, CONFIG_BYTES)
        return cls(*_CONFIG.unpack(data)).check()


def _check_length(what: str, data: Bytes, wanted: int) -> None:
    size = memoryview(data).nbytes
    if size != wanted:
        raise ValueError(f"a virtio-mem {what} has {wanted} bytes, not {size}")
