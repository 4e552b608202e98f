"""Arrays of device memory that keep their area, and the way back from such an array to the area."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import prefault.device

if TYPE_CHECKING:
    import numpy

Read = Callable[[int, int], bytes]
"""``read(offset, length)``."""


class _Held:
    """What an array of device memory hangs on: the area, for as long as any view of the array lives.

    numpy takes the address from here. An array on the area's own view would keep the memory, but not the Area, which the
    access log and populate need.
    """

    def __init__(self, area: prefault.device.Area, length: int) -> None:
        import numpy

        self.area = area
        self._content = numpy.frombuffer(area.memoryview(), numpy.uint8, count=length)
        self.__array_interface__ = self._content.__array_interface__


def array_of(area: prefault.device.Area, length: int) -> numpy.ndarray[Any, Any]:
    """The first bytes of an area, as an array that keeps it."""
    import numpy

    return numpy.asarray(_Held(area, length))


def area_of(array: Any) -> prefault.device.Area:
    """The area that an array of :func:`prefault.open_remote`, or a view of it, lies in.

    Raises:
        TypeError: it does not lie in one.
    """
    area = _area_of(array)
    if area is None:
        raise TypeError("the array is not one of open_remote, nor a view of one")
    return area


def _area_of(array: Any) -> prefault.device.Area | None:
    while array is not None:
        if isinstance(array, _Held):
            return array.area
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return None


def reader_of(content: numpy.ndarray[Any, Any]) -> Read:
    """``read(offset, length)`` for an array of bytes: through its area if it has one, so that failures are exceptions."""
    area = _area_of(content)
    if area is None:
        return lambda offset, length: content[offset : offset + length].tobytes()
    start = address_of(content) - address_of(area.ndarray())
    return lambda offset, length: area.read(start + offset, length)


def address_of(array: numpy.ndarray[Any, Any]) -> int:
    """Of its first byte."""
    address: int = array.__array_interface__["data"][0]
    return address
