"""Exports of the buffer protocol of many objects at once, without a Python object for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice, repeat
from operator import length_hint
from typing import TYPE_CHECKING, Any

from prefault.memory.borrowing import Pin, PyBuffer, get_buffer, release_buffer

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from prefault.intervals import Numbers

_ANY_CONTIGUOUS = 0x0080 | 0x0010 | 0x0008
"""PyBUF_ANY_CONTIGUOUS and PyBUF_ND: an object with gaps refuses."""

_AT_ONCE = 1 << 16
"""Objects between two looks for Ctrl-C and other threads: some 20 ms."""

_SIZE = PyBuffer.internal.offset + PyBuffer.internal.size
_FIELDS = {"buf": "<i8", "obj": "<i8", "len": "<i8", "readonly": "<i4"}


class ManyExports(Pin):
    """Memory of the objects among some that export it without gaps, in place until released.

    The buffer protocol is called by ``map``, in C, and the answers are read as columns: 0.5 us an object, of which
    :func:`~prefault.memory.borrowing.borrow` takes several.

    Args:
        objects: of any type. Those that refuse are to be borrowed one by one.

    Attributes:
        exported: True for each object that exports its memory.
        readonly: True for each whose owner forbids writing through it.
        starts: address of each.
        lengths: of each, in bytes.
    """

    def __init__(self, objects: list[Any]) -> None:
        import numpy

        layout = {name: (kind, getattr(PyBuffer, name).offset) for name, kind in _FIELDS.items()}
        formats, offsets = zip(*layout.values(), strict=True)
        self._views = numpy.zeros(
            len(objects), {"names": list(layout), "formats": formats, "offsets": offsets, "itemsize": _SIZE}
        )
        base = self._views.ctypes.data
        self._places = range(base, base + len(objects) * _SIZE, _SIZE)  # addresses of the structures
        self._export(objects)
        self.exported: numpy.typing.NDArray[numpy.bool_] = self._views["obj"] != 0
        self.readonly: numpy.typing.NDArray[numpy.bool_] = self._views["readonly"] != 0
        self.starts: Numbers = self._views["buf"]
        self.lengths: Numbers = self._views["len"]

    def _export(self, objects: list[Any]) -> None:
        items = iter(objects)
        while left := length_hint(items):
            at = len(objects) - left
            try:
                _call(get_buffer, islice(items, _AT_ONCE), self._places[at : at + _AT_ONCE], repeat(_ANY_CONTIGUOUS))
            except (TypeError, ValueError, BufferError):
                continue  # the next one is that after the object that refused, whose `obj` is left 0
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """See :class:`~prefault.memory.borrowing.Pin`."""
        for at in range(0, len(self._views), _AT_ONCE):
            _call(release_buffer, self._places[at : at + _AT_ONCE])  # which does nothing where `obj` is 0

    def __del__(self) -> None:
        if "_places" in self.__dict__:
            self.release()


def _call(function: Callable[..., object], *arguments: Iterable[object]) -> None:
    """Call a function for each of some arguments, without a step of Python's in between."""
    deque(map(function, *arguments), maxlen=0)
