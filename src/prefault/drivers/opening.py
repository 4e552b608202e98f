"""A remote file as an array: ``prefault.open_remote(url)``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import prefault.device
from prefault.drivers.formats import ArrayPlace, npy_place
from prefault.drivers.held import array_of
from prefault.drivers.remote import RemoteFile, Where, name_of
from prefault.sizes import Size, parse_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_PACKED = (".gz", ".gzip", ".zst", ".zstd")


def open_remote(
    source: Where | RemoteFile, *, dtype: numpy.typing.DTypeLike | None = None, shape: int | tuple[int, ...] | None = None,
    order: Literal["C", "F"] = "C", offset: Size = 0, format: Literal["infer", "npy", "raw"] = "infer",  # noqa: A002
    populate: bool = False, plan: str | os.PathLike[str] | None = None, **options: Any,
) -> numpy.ndarray[Any, Any]:  # fmt: skip
    """A remote file as a read-only array, of which only what is touched is downloaded.

    The array is as good as one in memory: slices, views, ``pyarrow.py_buffer(array)``, ``prefault.populate(array[a:b])``.
    Touching what cannot be read is SIGBUS, as for any mapped file; ``prefault.populate`` raises instead.

    Args:
        source: a URL, a path or a callable: see :class:`RemoteFile`; or such a device, made before.
        dtype: of the array; default: bytes. Not with ``.npy``, as what follows.
        shape: default: one dimension, as many items as fit.
        order: of the array, by rows (C) or columns (F).
        offset: where in the file it begins.
        format: ``"npy"``: the file's header says it. ``"infer"``: if the name ends in ``.npy`` (packed or not) and no
            dtype is given.
        populate: download all of it now, in parallel.
        plan: a file with the access log of an earlier run (``area_of(array).access_log().save(plan)``): what stands there
            is populated first. If the file is not there, nothing is.
        options: see :class:`RemoteFile`.

    Raises:
        SourceError: it cannot be read.
        ValueError, TypeError, ImportError: see :class:`RemoteFile`; the array does not fit the file.
    """
    import numpy

    map_device = prefault.device.map  # first of all, since it says what is not installed
    device = source if isinstance(source, RemoteFile) else RemoteFile(source, **options)
    kind = _kind(device, format, dtype)
    if kind == "npy" and (dtype is not None or shape is not None):
        raise ValueError("dtype and shape are what a .npy file says; format='raw' maps it as it is")
    area = map_device(device)
    try:
        if kind == "npy":
            place = npy_place(area.read, device.length, str(device))
        else:
            place = _raw_place(device.length, dtype, shape, order, parse_size(offset))
        if plan is not None and os.path.exists(plan):
            area.replay(prefault.device.AccessLog.load(plan))
        if populate:
            area.populate()
        content = array_of(area, device.length)
    except BaseException:
        area.close()
        raise
    return numpy.ndarray(place.shape, place.dtype, buffer=content, offset=place.offset, order=place.order)


def _kind(device: RemoteFile, given: str, dtype: object) -> str:
    if given not in ("infer", "npy", "raw"):
        raise ValueError(f"format is 'infer', 'npy' or 'raw', not {given!r}")
    if given != "infer":
        return given
    if dtype is not None or callable(device.source):
        return "raw"
    stem, suffix = os.path.splitext(name_of(device.source))
    if suffix.lower() in _PACKED:
        suffix = os.path.splitext(stem)[1]
    return "npy" if suffix.lower() == ".npy" else "raw"


def _raw_place(
    length: int,
    dtype: numpy.typing.DTypeLike | None,
    shape: int | tuple[int, ...] | None,
    order: Literal["C", "F"],
    offset: int,
) -> ArrayPlace:
    import numpy

    kind = numpy.dtype("uint8" if dtype is None else dtype)
    if kind.hasobject:
        raise TypeError("an array that is mapped cannot hold Python objects")
    if not kind.itemsize:
        raise ValueError(f"items of the dtype {kind} have no bytes: say how many, as in 'S8'")
    if shape is None:
        extents: tuple[int, ...] = (max(0, length - offset) // kind.itemsize,)
    else:
        extents = (shape,) if isinstance(shape, int) else tuple(shape)
    place = ArrayPlace(offset, kind, extents, order)
    if place.stop > length:
        raise ValueError(f"{kind} of shape {extents} from byte {offset} on ends at byte {place.stop} of {length}")
    return place
