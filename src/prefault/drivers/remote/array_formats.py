"""Layout of arrays in a mapped file, read from its header alone: ``.npy`` and safetensors.

Headers are read by :meth:`prefault.device.Area.read`, so that a source that fails raises an exception, and not SIGBUS.
"""

from __future__ import annotations

import ast
import difflib
import errno
import io
import json
import math
import tokenize
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from prefault.drivers.remote.area_arrays import Read, reader_of
from prefault.drivers.remote.source import SourceError, missing_package

if TYPE_CHECKING:
    import numpy

_NPY_PREFIX_BYTES = 12
_MOST_NPY_HEADER = 1 << 20
_MOST_SAFETENSORS_HEADER = 100_000_000
"""Bytes: the limit of the safetensors library."""


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


# Names of dtypes in safetensors and numpy; ml_dtypes has those that numpy lacks.
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def _dtype(kind: str, name: str) -> numpy.dtype[Any]:
    import numpy

    if kind in _DTYPES:
        return numpy.dtype(_DTYPES[kind])
    if kind not in _ML_DTYPES:
        raise ValueError(f"{name} has the dtype {kind!r}, which is not known here; raw() returns its bytes")
    try:
        import ml_dtypes  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise missing_package(
            f"{name} has the dtype {kind}, which needs", "ml_dtypes", "ml_dtypes; raw() returns its bytes"
        ) from error
    found: numpy.dtype[Any] = numpy.dtype(getattr(ml_dtypes, _ML_DTYPES[kind]))
    return found


class _Tensor(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafeTensors(Mapping[str, "numpy.ndarray[Any, Any]"]):
    """The tensors of a mapped safetensors file, by name: arrays without a copy, read when they are touched.

    The readers of the safetensors library need a path, or the whole file as ``bytes``. The format is a header in JSON, and
    the numbers.

    Args:
        content: the whole file, as ``open_remote`` returns it.

    Attributes:
        metadata: the texts of ``__metadata__`` in the header.

    Raises:
        ValueError: the content is not a safetensors file.
        SourceError: the file is shorter than its header says, or cannot be read.
    """

    def __init__(self, content: numpy.ndarray[Any, Any]) -> None:
        import numpy

        self._content = content.reshape(-1).view(numpy.uint8)
        length = len(self._content)
        read = reader_of(self._content)
        size = int.from_bytes(read(0, 8), "little") if length >= 8 else length
        if size + 8 > length or size > _MOST_SAFETENSORS_HEADER:
            raise ValueError(f"not a safetensors file: its header would have {size} of {length} bytes")
        try:
            header = json.loads(read(8, size))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._tensors = {name: self._tensor(entry, 8 + size) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a safetensors file: its header cannot be read: {error}") from error
        stop = max((tensor.stop for tensor in self._tensors.values()), default=0)
        if stop > length:
            raise SourceError(errno.EIO, f"the file has {length} bytes and its header says {stop}: it was cut short")

    @staticmethod
    def _tensor(entry: dict[str, Any], base: int) -> _Tensor:
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (start, stop - start, *shape)):
            raise ValueError(f"an entry with the shape {shape} at {start} to {stop}")
        return _Tensor(str(entry["dtype"]), shape, base + start, base + stop)

    def __getitem__(self, name: str) -> numpy.ndarray[Any, Any]:
        import numpy

        tensor = self._find(name)
        dtype = _dtype(tensor.kind, name)
        if math.prod(tensor.shape) * dtype.itemsize != tensor.stop - tensor.start:
            raise ValueError(
                f"{name}: {tensor.kind} of shape {tensor.shape} does not have {tensor.stop - tensor.start} bytes"
            )
        return numpy.ndarray(tensor.shape, dtype, buffer=self._content, offset=tensor.start)

    def raw(self, name: str) -> numpy.ndarray[Any, Any]:
        """Return the bytes of a tensor, as an array of uint8."""
        tensor = self._find(name)
        return self._content[tensor.start : tensor.stop]

    def _find(self, name: str) -> _Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            nearest = ", ".join(difflib.get_close_matches(str(name), self._tensors, 3, 0.0)) or "none"
            raise KeyError(f"{name!r} is none of the {len(self)} tensors of the file; nearest: {nearest}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<SafeTensors: {len(self)} tensors in {len(self._content)} bytes>"
