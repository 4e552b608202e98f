"""Remote files as arrays: ``prefault.open_remote(url)``."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import prefault.device
from prefault.drivers.remote.area_arrays import area_of, array_of
from prefault.drivers.remote.array_formats import ArrayLayout, read_npy_layout
from prefault.drivers.remote.locations import name_of
from prefault.drivers.remote.remote_file import Location, RemoteFile
from prefault.drivers.remote.safetensors_files import SafeTensors
from prefault.drivers.remote.sharded_safetensors import SUFFIX as INDEX_SUFFIX
from prefault.drivers.remote.sharded_safetensors import open_sharded
from prefault.drivers.remote.source import Patience
from prefault.sizes import Size, parse_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_groups = itertools.count()
"""Numbers of models, whose shards share a capacity."""
_PACKED = (".gz", ".gzip", ".zst", ".zstd")


def open_remote(
    source: Location | RemoteFile, *, dtype: numpy.typing.DTypeLike | None = None,
    shape: int | tuple[int, ...] | None = None, order: Literal["C", "F"] = "C", offset: Size = 0,
    format: Literal["infer", "npy", "raw", "safetensors"] = "infer",  # noqa: A002
    populate: bool = False, plan: str | os.PathLike[str] | None = None, **options: Any,
) -> numpy.ndarray[Any, Any] | Any:  # fmt: skip
    """Map a remote file as a read-only array, of which only the touched parts are downloaded.

    The array works like one in memory: slices, views, ``pyarrow.py_buffer(array)``, ``prefault.populate(array[a:b])``.
    Touching a part that cannot be read raises SIGBUS, as for any mapped file; ``prefault.populate`` raises an exception.

    Args:
        source: a URL, a path or a callable, see :class:`RemoteFile`; or an existing RemoteFile.
        dtype: the dtype of the array; default: bytes. Neither dtype, shape, order nor offset is given with ``.npy``.
        shape: the shape of the array; default: one dimension, as many items as fit.
        order: the order of the array, by rows (C) or columns (F).
        offset: the first byte of the array in the file.
        format: ``"npy"``: the file's header describes the array. ``"raw"``: the arguments do. ``"safetensors"``: return the
            tensors by name. ``"infer"``: ``"npy"`` if the name ends in ``.npy`` (compressed or not) and no dtype is given;
            ``"safetensors"`` if it ends in ``.safetensors.index.json``: the tensors of all shards that this index names.
        populate: download the whole file now, in parallel; of a model of several shards, all of them.
        plan: a file with the access log of an earlier run (``area_of(array).access_log().save(plan)``): its pages are
            populated first. A missing file is ignored.
        options: see :class:`RemoteFile`; with an index of shards, they are those of each shard, but ``capacity`` is that of
            all shards together.

    Returns:
        An array; with ``"safetensors"`` a mapping from names to arrays.

    Raises:
        SourceError: the file, or a shard, cannot be read; the shards do not fit their index.
        ValueError, TypeError, ImportError: see :class:`RemoteFile`; the array does not fit the file.
    """
    import numpy

    map_device = prefault.device.map  # first, because it names a missing package
    if _names_index(source, format, dtype):
        if shape is not None or order != "C" or offset or plan is not None:
            raise ValueError("shape, order, offset and plan are those of one array, and not of a model of several shards")
        return _open_model(os.fsdecode(source), populate=populate, **options)
    device = source if isinstance(source, RemoteFile) else RemoteFile(source, **options)
    if format == "safetensors":
        if dtype is not None or shape is not None or order != "C" or offset:
            raise ValueError("dtype, shape and order are read from the safetensors file; format='raw' maps its bytes")
        return SafeTensors(open_remote(device, format="raw", populate=populate, plan=plan))
    kind = _format(device, format, dtype)
    if kind == "npy" and (dtype is not None or shape is not None):
        raise ValueError("dtype and shape are read from the .npy file; format='raw' maps its bytes")
    area = map_device(device)
    try:
        if kind == "npy":
            place = read_npy_layout(area.read, device.length, str(device))
        else:
            place = _raw_layout(device.length, dtype, shape, order, parse_size(offset))
        if plan is not None and os.path.exists(plan):
            area.replay(prefault.device.AccessLog.load(plan))
        if populate:
            area.populate()
        content = array_of(area, device.length)
    except BaseException:
        area.close()
        raise
    return numpy.ndarray(place.shape, place.dtype, buffer=content, offset=place.offset, order=place.order)


def _names_index(source: Location | RemoteFile, given: str, dtype: object) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether a source is the index of a model of several shards, and to be mapped as such."""
    if isinstance(source, RemoteFile) or callable(source):
        return False
    wanted = given == "safetensors" or (given == "infer" and dtype is None)
    return wanted and name_of(os.fsdecode(source)).lower().endswith(INDEX_SUFFIX)


def _open_model(url: str, *, populate: bool, **options: Any) -> SafeTensors:
    for name in ("index", "version"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is that of one file, and not of a model of several shards")
    group = next(_groups)

    def open_shard(shard: str) -> numpy.ndarray[Any, Any]:
        file = RemoteFile(shard, **options)
        file.share_capacity(group)
        return open_remote(file, format="raw")

    model = open_sharded(
        url,
        open_shard,
        dict(options.get("headers") or {}),
        dict(options.get("storage_options") or {}),
        options.get("patience", Patience()),
    )
    if populate:
        for content in model.shards.values():
            area_of(content).populate()
    return model


def _format(device: RemoteFile, given: str, dtype: object) -> str:
    if given not in ("infer", "npy", "raw"):
        raise ValueError(f"format is 'infer', 'npy', 'raw' or 'safetensors', not {given!r}")
    if given != "infer":
        return given
    if dtype is not None or callable(device.source):
        return "raw"
    stem, suffix = os.path.splitext(name_of(device.source))
    if suffix.lower() in _PACKED:
        suffix = os.path.splitext(stem)[1]
    return "npy" if suffix.lower() == ".npy" else "raw"


def _raw_layout(
    length: int,
    dtype: numpy.typing.DTypeLike | None,
    shape: int | tuple[int, ...] | None,
    order: Literal["C", "F"],
    offset: int,
) -> ArrayLayout:
    import numpy

    kind = numpy.dtype("uint8" if dtype is None else dtype)
    if kind.hasobject:
        raise TypeError("a mapped array cannot hold Python objects")
    if not kind.itemsize:
        raise ValueError(f"items of the dtype {kind} have no bytes: give their number, as in 'S8'")
    if shape is None:
        extents: tuple[int, ...] = (max(0, length - offset) // kind.itemsize,)
    else:
        extents = (shape,) if isinstance(shape, int) else tuple(shape)
    place = ArrayLayout(offset, kind, extents, order)
    if place.stop > length:
        raise ValueError(f"{kind} of shape {extents} from byte {offset} on ends at byte {place.stop} of {length}")
    return place
