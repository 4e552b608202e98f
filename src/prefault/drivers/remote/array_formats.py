"""Layout of the array in a mapped ``.npy`` file, read from its header alone.

The header is read by :meth:`prefault.device.Area.read`, so that a source that fails raises an exception, and not SIGBUS.
"""

from __future__ import annotations

import ast
import errno
import io
import math
import tokenize
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from prefault.drivers.remote.area_arrays import Read
from prefault.drivers.remote.source import SourceError

if TYPE_CHECKING:
    import numpy

_NPY_PREFIX_BYTES = 12
_MOST_NPY_HEADER = 1 << 20


class ArrayLayout(NamedTuple):
    """Offset of an array in a file, in bytes, its dtype, shape and order."""

    offset: int
    dtype: numpy.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    @property
    def stop(self) -> int:
        """Offset of the first byte after the array."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_npy_layout(read: Read, length: int, name: str) -> ArrayLayout:
    """Read the header of a ``.npy`` file (numpy.lib.format, versions 1 to 3).

    Raises:
        ValueError: the file is not a ``.npy`` file, or holds Python objects.
        SourceError: the file is shorter than its header says.
    """
    import numpy
    from numpy.lib import format as npy

    prefix = read(0, min(_NPY_PREFIX_BYTES, length))
    if prefix[:6] != npy.MAGIC_PREFIX or len(prefix) < _NPY_PREFIX_BYTES:
        raise ValueError(f"{name} is not a .npy file: it begins with {prefix[:6]!r}; format='raw' maps it as it is")
    version = (prefix[6], prefix[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name}: version {version[0]}.{version[1]} of the .npy format is unknown")
    size = int.from_bytes(prefix[8:10], "little") + 10 if version == (1, 0) else int.from_bytes(prefix[8:12], "little") + 12
    if size > min(length, _MOST_NPY_HEADER):
        raise ValueError(f"{name}: its .npy header would have {size} bytes")
    header = read(0, size)
    try:
        shape, fortran, dtype = _npy_header(header, version)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"{name}: its .npy header cannot be read: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which cannot be mapped")
    if any(extent < 0 for extent in shape):
        raise ValueError(f"{name}: a negative extent in its shape {shape}")
    place = ArrayLayout(size, numpy.dtype(dtype), shape, "F" if fortran else "C")
    if place.stop > length:
        raise SourceError(errno.EIO, f"{name} has {length} bytes and its header says {place.stop}: it was cut short")
    return place


def _npy_header(header: bytes, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, numpy.dtype[Any]]:
    from numpy.lib import format as npy

    if version == (3, 0):  # version 2 in UTF-8; numpy has no public reader for it alone
        found = ast.literal_eval(header[_NPY_PREFIX_BYTES:].decode())
        return tuple(map(int, found["shape"])), bool(found["fortran_order"]), npy.descr_to_dtype(found["descr"])
    file = io.BytesIO(header)
    npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=len(header))
    return shape, fortran, dtype
