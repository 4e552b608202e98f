"""Arrays of device memory that keep their area alive, and the way from such an array back to its area."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import prefault.device

if TYPE_CHECKING:
    import numpy

Read = Callable[[int, int], bytes]
"""A function ``read(offset, length)``, both in bytes."""


class _AreaBase:
    """Base object of an array of device memory: it keeps the area alive as long as any view of the array.

    numpy takes the address from here. An array on the area's own view would keep the memory, but not the Area, which the
    access log and populate need.
    """

    def __init__(self, area: prefault.device.Area, length: int) -> None:
        import numpy

        self.area = area
        self._content = numpy.frombuffer(area.memoryview(), numpy.uint8, count=length)
        self.__array_interface__ = self._content.__array_interface__


def array_of(area: prefault.device.Area, length: int) -> numpy.ndarray[Any, Any]:
    """Return the first ``length`` bytes of an area, as an array that keeps the area alive."""
    import numpy

    return numpy.asarray(_AreaBase(area, length))


def area_of(array: Any) -> prefault.device.Area:
    """Return the area of an array of :func:`prefault.open_remote`, or of a view of one.

    Raises:
        TypeError: the array does not lie in such an area.
    """
    area = _area_of(array)
    if area is None:
        raise TypeError("the array is not one of open_remote, nor a view of one")
    return area


def _area_of(array: Any) -> prefault.device.Area | None:
    while array is not None:
        if isinstance(array, _AreaBase):
            return array.area
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return None


def reader_of(content: numpy.ndarray[Any, Any]) -> Read:
    """Return ``read(offset, length)`` for an array of bytes: it reads through the area, if any, so that failures raise."""
    area = _area_of(content)
    if area is None:
        return lambda offset, length: content[offset : offset + length].tobytes()
    start = address_of(content) - address_of(area.ndarray())
    return lambda offset, length: area.read(start + offset, length)


def address_of(array: numpy.ndarray[Any, Any]) -> int:
    """Return the address of the first byte of an array."""
    address: int = array.__array_interface__["data"][0]
    return address
