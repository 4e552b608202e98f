"""Blocks from a device: the interface between sparse memory and device memory, which stands above it."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

from prefault.mapping.mapping import OwnedMemory


class DeviceRange(NamedTuple):
    """A mapped range of a device, whose pages the device supplies.

    Attributes:
        memory: owner of the mapping; its addresses have a page provider, and a child of fork does not inherit them.
        length: bytes that are mapped.
        huge: whether it is mapped in hugetlb pages, of which the kernel joins no neighbours (VM_DONTEXPAND).
        require_here: raises DeviceGoneError in a child of fork.
    """

    memory: OwnedMemory
    length: int
    huge: bool
    require_here: Callable[[], None]


class DeviceSource(abc.ABC):
    """A device that sparse memory may take its blocks from; :class:`~prefault.device.DeviceClient` is one.

    Attributes:
        name: of the device.
        page_size: bytes that one fault brings in.
        writable: whether clients may write.
    """

    name: str
    page_size: int
    writable: bool

    @abc.abstractmethod
    def map_range(self, length: int | None, offset: int, name: str | None) -> DeviceRange:
        """Map ``length`` bytes of the device, or of the object of that name, readable and writable; None: to its end.

        Raises:
            ValueError: the device has no such part.
            DeviceError, DeviceGoneError: it cannot be mapped, or its server is gone.
        """


def check_device(device: object, *, backing: object, shared: bool | None, huge: str) -> None:
    """Check that blocks can come from a device with these options of :class:`~prefault.SparseMemory`.

    Raises:
        TypeError: it is no connected device.
        ValueError: it is read-only, or the options contradict it.
    """
    if not isinstance(device, DeviceSource):
        raise TypeError(
            f"device is a connected device (prefault.device.open or prefault.device.connect), not {type(device).__name__}"
        )
    if not device.writable:
        raise ValueError(f"{device.name} is read-only: blocks of sparse memory are written")
    if backing != "anonymous" or shared is False or huge != "auto":
        raise ValueError(
            f"the blocks come from {device.name}, which decides about their backing and huge pages, and all clients share"
            " them: leave backing, shared and huge out"
        )
