"""empty, zeros and full: ndarrays on memory that is populated when they are returned."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from prefault._system import thp
from prefault.engine.locking import lock
from prefault.engine.planning import Threads
from prefault.engine.populating import HeadroomChoice, populate
from prefault.engine.progress import Progress
from prefault.mapping.mapping import HugeAdvice, Mapping
from prefault.memory.backings import BackingSource, parse_backing
from prefault.sizes import MIB

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_HUGE_FROM = 4 * MIB
"""Size from which on huge pages are asked for by default: numpy's own threshold for the same advice."""


def empty(
    shape: SupportsIndex | Iterable[SupportsIndex],
    dtype: numpy.typing.DTypeLike = "float64",
    order: Literal["C", "F"] = "C",
    *,
    huge: HugeAdvice = "auto",
    shared: bool = False,
    backing: BackingSource | str | None = None,
    locked: bool = False,
    node: int | None = None,
    threads: Threads = None,
    progress: Progress | bool = False,
    headroom: HeadroomChoice = "check",
) -> numpy.ndarray[Any, Any]:
    """Return a new array whose memory is there: no page fault when it is used, no SIGBUS, no OOM killer. It holds zeros.

    The memory is unmapped when the array and its last view are gone. The array is an ordinary ``ndarray``: copies and
    pickles have memory of their own.

    Args:
        shape: one number, or one for each dimension.
        dtype: anything that numpy takes for one, but no Python objects.
        order: ``"C"`` (rows together) or ``"F"`` (columns together).
        huge: transparent huge pages. ``"auto"`` asks for them from 4 MiB on, as numpy does for its arrays, for private
            memory, and until compaction makes that slow; ``"advise"`` always, ``"never"`` forbids them.
        shared: the memory is shared with processes that are forked from now on (a memfd), and not copied on write.
        backing: the source of new memory, as for :class:`~prefault.Mapping`; None: anonymous memory, or a memfd if
            ``shared``.
        locked: lock it, so that it is never swapped out (RLIMIT_MEMLOCK).
        node: number of the NUMA node that all pages come from; None: the kernel's choice.
        threads: how many populate at once; None: chosen by size, affinity and CPU quota.
        progress: True draws a bar on stderr; a function is called with the bytes done and in all.
        headroom: ``"check"`` checks the limits before and while the memory is taken; ``"ignore"`` leaves that to the kernel.

    Raises:
        HeadroomError: a limit leaves less than is needed; no memory was taken.
        PopulateError: the kernel found no memory: one of its subclasses.
        MappingError: the addresses or the backing are not available; :class:`~prefault.HugePagesError` of a hugetlb pool.
        TypeError, ValueError: a wrong shape, dtype, order or option.
    """
    import numpy

    dimensions = _dimensions(shape)
    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise TypeError("populated memory cannot hold Python objects: use numpy.empty for dtype object")
    if order not in ("C", "F"):
        raise ValueError(f"order is 'C' or 'F', not {order!r}")
    size = kind.itemsize * math.prod(dimensions)
    if not size:
        return numpy.empty(dimensions, kind, order)
    asks = huge == "auto" and size >= _HUGE_FROM
    if asks and locked and thp.pmd_size() is not None:
        huge = "advise"  # lock(), which checks RLIMIT_MEMLOCK before it takes memory, has no huge=
    source = parse_backing(backing if backing is not None else "memfd" if shared else "anonymous")
    if source.is_given:
        raise ValueError(f"{source!r} has content of its own: prefault.Mapping(backing=...).ndarray() shows that")
    mapping = Mapping(size, backing=source, shared=True if shared else None, huge=huge, node=node)
    if locked:
        lock(mapping, progress=progress, headroom=headroom)
    else:
        wish: Literal["auto"] | None = "auto" if asks else None
        populate(mapping, access="write", threads=threads, huge=wish, progress=progress, headroom=headroom)
    # The array's base keeps the memory, not the Mapping: it is unmapped with the last view.
    return numpy.ndarray(dimensions, kind, buffer=mapping.memoryview(), order=order)


def zeros(
    shape: SupportsIndex | Iterable[SupportsIndex],
    dtype: numpy.typing.DTypeLike = "float64",
    order: Literal["C", "F"] = "C",
    *,
    huge: HugeAdvice = "auto",
    shared: bool = False,
    backing: BackingSource | str | None = None,
    locked: bool = False,
    node: int | None = None,
    threads: Threads = None,
    progress: Progress | bool = False,
    headroom: HeadroomChoice = "check",
) -> numpy.ndarray[Any, Any]:
    """Return a new array of zeros whose memory is there: no page fault when it is used.

    The kernel hands out zeroed pages, so this is :func:`prefault.empty`, also in its arguments and errors.
    """
    return empty(
        shape, dtype, order, huge=huge, shared=shared, backing=backing, locked=locked, node=node,
        threads=threads, progress=progress, headroom=headroom,
    )  # fmt: skip


def full(
    shape: SupportsIndex | Iterable[SupportsIndex],
    fill_value: Any,
    dtype: numpy.typing.DTypeLike | None = None,
    order: Literal["C", "F"] = "C",
    *,
    huge: HugeAdvice = "auto",
    shared: bool = False,
    backing: BackingSource | str | None = None,
    locked: bool = False,
    node: int | None = None,
    threads: Threads = None,
    progress: Progress | bool = False,
    headroom: HeadroomChoice = "check",
) -> numpy.ndarray[Any, Any]:
    """Return a new array with ``fill_value`` everywhere, whose memory is there: no page fault when it is used.

    Other arguments are those of :func:`prefault.empty`. ``fill_value`` is a number, or what numpy broadcasts to the shape;
    it gives the dtype where that is None.

    Raises:
        HeadroomError, PopulateError, MappingError, TypeError, ValueError: as :func:`prefault.empty`.
    """
    import numpy

    array = empty(
        shape, numpy.asarray(fill_value).dtype if dtype is None else dtype, order, huge=huge, shared=shared, backing=backing,
        locked=locked, node=node, threads=threads, progress=progress, headroom=headroom,
    )  # fmt: skip
    numpy.copyto(array, fill_value, casting="unsafe")
    return array


def _dimensions(shape: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    counts = tuple(map(operator.index, shape)) if isinstance(shape, Iterable) else (operator.index(shape),)
    if min(counts, default=0) < 0:
        raise ValueError(f"an array has no negative dimensions: {shape}")
    return counts
