"""Tensors of a mapped safetensors file, found by its header alone.

The header is read by :meth:`prefault.device.Area.read`, so that a source that fails raises an exception, and not SIGBUS.
"""

from __future__ import annotations

import difflib
import errno
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from prefault.drivers.remote.area_arrays import reader_of
from prefault.drivers.remote.safetensors_header import read_safetensors_header
from prefault.drivers.remote.source import SourceError, missing_package

if TYPE_CHECKING:
    import numpy

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


class TensorLayout(NamedTuple):
    """Place of a tensor.

    Attributes:
        kind: the dtype, as safetensors names it.
        shape: number of items in each dimension.
        content: the whole file, as bytes.
        start, stop: of the tensor in ``content``, in bytes.
    """

    kind: str
    shape: tuple[int, ...]
    content: numpy.ndarray[Any, Any]
    start: int
    stop: int


class SafeTensors(Mapping[str, "numpy.ndarray[Any, Any]"]):
    """The tensors of a mapped safetensors file, by name: arrays without a copy, read when they are touched.

    The readers of the safetensors library need a path, or the whole file as ``bytes``. The format is a header in JSON, and
    the numbers.

    Args:
        content: the whole file, as ``open_remote`` returns it.

    Attributes:
        content: the whole file, as an array of bytes.
        metadata: the texts of ``__metadata__`` in the header.

    Raises:
        ValueError: the content is not a safetensors file.
        SourceError: the file is shorter than its header says, or cannot be read.
    """

    _kind = "file"

    def __init__(self, content: numpy.ndarray[Any, Any]) -> None:
        import numpy

        self.content = content.reshape(-1).view(numpy.uint8)
        length = len(self.content)
        places, self.metadata = read_safetensors_header(reader_of(self.content), length)
        self._tensors = {
            name: TensorLayout(place.kind, place.shape, self.content, place.start, place.stop)
            for name, place in places.items()
        }  # fmt: skip
        stop = max((tensor.stop for tensor in self._tensors.values()), default=0)
        if stop > length:
            raise SourceError(errno.EIO, f"the file has {length} bytes and its header says {stop}: it was cut short")

    def __getitem__(self, name: str) -> numpy.ndarray[Any, Any]:
        import numpy

        tensor = self.layout(name)
        dtype = _dtype(tensor.kind, name)
        if math.prod(tensor.shape) * dtype.itemsize != tensor.stop - tensor.start:
            raise ValueError(
                f"{name}: {tensor.kind} of shape {tensor.shape} does not have {tensor.stop - tensor.start} bytes"
            )
        return numpy.ndarray(tensor.shape, dtype, buffer=tensor.content, offset=tensor.start)

    def raw(self, name: str) -> numpy.ndarray[Any, Any]:
        """Return the bytes of a tensor, as an array of uint8."""
        tensor = self.layout(name)
        return tensor.content[tensor.start : tensor.stop]

    def layout(self, name: str) -> TensorLayout:
        """Return the place of a tensor."""
        try:
            return self._tensors[name]
        except KeyError:
            nearest = ", ".join(difflib.get_close_matches(str(name), self._tensors, 3, 0.0)) or "none"
            raise KeyError(f"{name!r} is none of the {len(self)} tensors of the {self._kind}; nearest: {nearest}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<SafeTensors: {len(self)} tensors in {len(self.content)} bytes>"
