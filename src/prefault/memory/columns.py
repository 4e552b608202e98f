"""Memory of tables: Arrow, pandas and polars, by their public interfaces only.

A buffer counts only if it is proven to be the table's own and no copy: two requests for it give the same address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def columns_of(value: Any, name: str) -> Iterable[tuple[str, Any]] | None:
    """Return the named buffers of a table, column or array; None for anything else.

    Args:
        value: an Arrow table, record batch, chunked array or array; a pandas data frame or series; an object with an Arrow C
            stream, such as a polars data frame or series, where pyarrow is installed.
        name: how errors call it.

    Raises:
        TypeError: a column is copied on access, so populating it would change nothing.
    """
    if _is_arrow(value):
        return _of_arrow(value)
    if _has(value, "to_numpy", "items", "dtypes") and not hasattr(value, "array"):
        return ((f"[{key!r}]", column) for key, column in value.items())
    if _has(value, "to_numpy", "array", "dtype", "index"):
        return _of_series(value, name)
    if hasattr(value, "__arrow_c_stream__"):
        return _of_stream(value, name)
    return None


def _has(value: Any, *attributes: str) -> bool:
    return all(hasattr(value, attribute) for attribute in attributes)


# --- Arrow


def _is_arrow(value: Any) -> bool:
    return (
        (callable(getattr(value, "buffers", None)) and hasattr(value, "type"))
        or (hasattr(value, "chunks") and hasattr(value, "num_chunks"))
        or _has(value, "columns", "schema", "num_rows", "num_columns")
    )  # fmt: skip


def _of_arrow(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the buffers of a table, record batch, chunked array or array; those of slices in whole."""
    if hasattr(value, "num_columns"):
        for key, column in zip(value.schema.names, value.columns, strict=True):
            yield f"[{key!r}]", column
    elif hasattr(value, "num_chunks"):
        for index, chunk in enumerate(value.chunks):
            yield f".chunk({index})", chunk
    else:
        for index, buffer in enumerate(value.buffers()):
            if buffer is not None and buffer.size:  # absent: no value is null
                yield f".buffers()[{index}]", buffer
        dictionary = getattr(value, "dictionary", None)
        if dictionary is not None:
            yield ".dictionary", dictionary


def _of_stream(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the columns of an object with an Arrow C stream, imported by pyarrow without a copy."""
    kind = name or type(value).__name__
    try:
        from pyarrow import RecordBatchReader, chunked_array  # type: ignore[import-untyped]
    except ImportError:
        raise TypeError(
            f"{kind}: the memory of a {type(value).__name__} is found through its Arrow C stream, for which pyarrow must be"
            " installed"
        ) from None
    is_table = hasattr(value, "columns")

    def imported() -> Any:
        return RecordBatchReader.from_stream(value).read_all() if is_table else chunked_array(value)

    yield from _proven(imported(), imported(), kind)


# --- pandas


def _of_series(series: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the memory of a series without its index: its numpy array if that is a view, or the Arrow array behind it."""
    import numpy

    kind = name or type(series).__name__
    one, other = series.to_numpy(), series.to_numpy()
    if not one.size:
        return
    if one.dtype == getattr(series.dtype, "numpy_dtype", series.dtype) and numpy.shares_memory(one, other):
        yield "", one
        return
    convert = getattr(series.array, "__arrow_array__", None)
    if convert is None:
        raise TypeError(f"{kind} is copied on access ({series.dtype}): there is no memory of its own to work on")
    yield from _proven(convert(), convert(), kind)


# --- proof


def _proven(one: Any, other: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the buffers of an Arrow object of which a second export has the same addresses.

    Raises:
        TypeError: a buffer of more than a page is a copy.
    """
    for (key, mine), (_, again) in zip(_buffers("", one), _buffers("", other), strict=True):
        if mine.address == again.address:
            yield key, mine
        elif mine.size > _SMALL:
            raise TypeError(f"{name}{key} is copied on access: there is no memory of its own to work on")


_SMALL = 4096
"""Bytes of a buffer that may be a copy: exports make bitmaps and offsets anew, and a page of them matters to nobody."""


def _buffers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    for key, item in _of_arrow(value):
        if _is_arrow(item):
            yield from _buffers(f"{name}{key}", item)
        else:
            yield f"{name}{key}", item
