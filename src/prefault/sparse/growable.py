"""GrowableArray: an ndarray that grows in place, into addresses that are reserved for it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, SupportsIndex

from prefault._system import thp
from prefault._system.closing import Closing
from prefault.errors import PopulateError
from prefault.mapping.mapping import HugeAdvice
from prefault.memory.backings import Anonymous, BackingSource, parse_backing
from prefault.memory.borrowing import Borrowed, MemoryOwner, borrow
from prefault.sizes import MIB, Size, format_size, parse_size
from prefault.sparse import SparseMemory

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_AHEAD = 4 * MIB
_BATCH = 4096
"""Number of items of an iterable that are converted at once. Memory for them comes on top of the data."""

_PLAIN_TYPES: dict[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "i": frozenset({bool, int}),
    "u": frozenset({bool, int}),
    "f": frozenset({bool, int, float}),
    "c": frozenset({bool, int, float, complex}),
}
"""Types of Python for each kind of dtype that numpy stores without changing their kind, checking the range."""


class GrowableArray(Closing, MemoryOwner):
    """A one-dimensional array, or one of rows, that grows and shrinks at its end without ever being copied.

    ::

        with prefault.GrowableArray("float64", capacity="64 GiB") as samples:
            samples.extend(chunk)            # an ndarray, or anything iterable
            samples.append(1.5)
            samples.array.mean()             # the ndarray of what there is now

    The capacity is address space, not memory. Memory is populated ahead of the items in steps, so that growing meets no page
    fault, needs no second copy, and a lack of memory is an exception instead of a signal or the OOM killer.

    Views taken earlier stay valid: the items do not move. A view has the length that the array had then. What lies beyond a
    later, shorter length is no longer the array's: such a view reads old items there, or zeros, or items that were appended
    since. Writing there may allocate memory that the array does not count.

    One thread at a time may change the length; others may read and write items meanwhile. After a fork the child has a copy
    of its own, copied page by page as either side writes; with a file behind the memory (memfd, tmpfs) both have the same
    items, and only one of them may change the length.

    Args:
        dtype: anything that numpy takes for one, except Python objects.
        capacity: the most that the array can ever take, in bytes.
        item_shape: shape of one item: ``(3,)`` makes an array of shape ``(len, 3)``.
        backing: as for :class:`~prefault.Mapping`.
        huge: transparent huge pages, as for :class:`~prefault.Mapping`; None asks for them for anonymous memory, where the
            kernel has them in a size of 2 MiB. Growing is several times faster then, and takes at least 2 MiB.
        step: how far to populate ahead, in bytes. Default: as much again as there is, up to 4 MiB; of large arrays a
            sixty-fourth.

    Raises:
        ValueError, TypeError: a capacity too small for one item, a negative shape, a dtype without a size or with objects.
        MappingError: the addresses, or the backing, are not available.
    """

    def __init__(
        self,
        dtype: numpy.typing.DTypeLike = "float64",
        *,
        capacity: Size = "64 GiB",
        item_shape: int | tuple[int, ...] = (),
        backing: BackingSource | str = "anonymous",
        huge: HugeAdvice | None = None,
        step: Size | None = None,
    ) -> None:
        import numpy

        self.dtype = numpy.dtype(dtype)
        self.item_shape = _checked_shape(item_shape)
        if self.dtype.hasobject:
            raise TypeError("memory that is discarded cannot hold Python objects")
        if not self.dtype.itemsize:
            raise ValueError(f"items of dtype {self.dtype} have no size: say how long, for example 'S8'")
        self._item_bytes = self.dtype.itemsize
        for count in self.item_shape:
            self._item_bytes *= count
        size = parse_size(capacity)
        self.capacity = size // self._item_bytes
        if not self.capacity:
            raise ValueError(f"a capacity of {size} bytes is too small for one item of {self._item_bytes} bytes")
        self._step = None if step is None else parse_size(step)
        if huge is None:
            # Not of files: tmpfs and memfds rarely have them, and the last megabyte of a small one should be usable.
            of_its_own = isinstance(parse_backing(backing), Anonymous)
            huge = "advise" if of_its_own and thp.pmd_size() == 2 * MIB else "auto"
        self._plain: frozenset[type] = frozenset()
        if not self.item_shape:
            self._plain = _PLAIN_TYPES.get(self.dtype.kind, frozenset())
            if self._plain:
                self._plain |= {self.dtype.type}
            elif self.dtype.names is not None:
                self._plain = frozenset({tuple})
        memory = SparseMemory(size, backing=backing, huge=huge)
        self._unit = memory.block
        self._memory: SparseMemory | None = memory
        self._all = self._whole(memory)
        self._length = 0
        self._populated = 0
        self._room = 0

    def _whole(self, memory: SparseMemory) -> numpy.ndarray[Any, Any]:
        """Return the array of the whole capacity, populated or not."""
        return memory.ndarray(self.dtype, (self.capacity, *self.item_shape))

    def _nothing(self) -> numpy.ndarray[Any, Any]:
        import numpy

        return numpy.empty((0, *self.item_shape), self.dtype)

    # --- the array

    @property
    def array(self) -> numpy.ndarray[Any, Any]:
        """The items, shape ``(len(self), *item_shape)``: a view, writable, that stays where it is."""
        return self._open()[: self._length]

    @property
    def memory(self) -> SparseMemory:
        """The memory that holds the items, from its first byte on: for its descriptor, its residency or its address."""
        if self._memory is None:
            raise ValueError("the array is closed")
        return self._memory

    @property
    def nbytes(self) -> int:
        """Bytes of the items."""
        return self._length * self._item_bytes

    @property
    def populated_bytes(self) -> int:
        """Bytes of populated memory: the items, and the pages ahead of them."""
        return self._populated

    @property
    def closed(self) -> bool:
        """True once the memory is released."""
        return self._memory is None

    def __len__(self) -> int:
        """Count the items."""
        return self._length

    def __getitem__(self, key: Any) -> Any:
        return self.array[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[key] = value

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items that there are now."""
        return iter(self.array)

    def __array__(self, dtype: numpy.typing.DTypeLike | None = None, copy: bool | None = None) -> numpy.ndarray[Any, Any]:
        """Return the items for ``numpy.asarray``: no copy, unless another dtype or a copy is requested."""
        array = self.array
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"items of {self.dtype} cannot become {dtype} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    # --- growing and shrinking

    def append(self, item: Any) -> None:
        """Add one item at the end.

        Raises:
            ValueError: beyond the capacity; another shape than ``item_shape``; the array is closed.
            TypeError, OverflowError: an item of another kind (numpy's rule "same_kind"), or out of the dtype's range.
            PopulateError: no memory, as for :func:`~prefault.populate`: HeadroomError, BackingFullError, ...

        After any of them the array is as it was, and can still be used.
        """
        length = self._length
        if length >= self._room:
            self._grow(length + 1)
        if type(item) in self._plain:
            self._all[length] = item
        else:
            self._store(length, [item])
        self._length = length + 1

    def extend(self, items: Iterable[Any]) -> None:
        """Add many items at the end.

        Args:
            items: an array, or an object with the buffer protocol, of shape ``(n, *item_shape)``: all of it is added, or
                nothing. The array itself and views of it will do. Or any other iterable, whose items are added one after
                the other: if it raises, or an item does not fit, the items before stay, as with :meth:`list.extend`.
                Integers of an array that are too large for the dtype are cut off, as numpy does; those of other iterables
                are an OverflowError.

        Raises:
            ValueError, TypeError, OverflowError, PopulateError: as :meth:`append`; and the exceptions of the iterable.
        """
        self._open()
        array = _as_array(items)
        if array is not None:
            self._extend_by(array)
            return
        batch: list[Any] = []
        try:
            for item in items:
                batch.append(item)
                if len(batch) == _BATCH:
                    full, batch = batch, []
                    self._extend_by_batch(full)
        finally:
            if batch:
                self._extend_by_batch(batch)

    def shrink(self, length: SupportsIndex) -> None:
        """Keep the first ``length`` items, and give the memory of the others back, in whole steps of huge pages or pages.

        Raises:
            ValueError: negative, or more than there are; the array is closed.
            DiscardError: the kernel does not take the memory back (it is locked). The items are gone all the same.
        """
        kept = operator.index(length)
        memory = self.memory
        if not 0 <= kept <= self._length:
            raise ValueError(f"an array of {self._length} items cannot be shrunk to {kept}")
        self._length = kept
        populated = self._rounded(kept * self._item_bytes)
        if populated < self._populated:
            memory.discard(populated, self._populated - populated)
            self._set_populated(populated)

    def close(self) -> None:
        """Release memory and addresses. Idempotent.

        Raises:
            BufferError: a view of the array is alive. The array is as before then.
        """
        memory = self._memory
        if memory is None:
            return
        self._all = self._nothing()  # else it would be a view as well
        try:
            memory.close()
        except BufferError:
            self._all = self._whole(memory)
            raise
        self._abandon()

    def _abandon(self) -> None:
        self._memory, self._all = None, self._nothing()
        self._length = self._populated = self._room = 0

    def _borrow(self) -> Borrowed:
        return borrow(self.array)

    def _open(self) -> numpy.ndarray[Any, Any]:
        if self._memory is None:
            raise ValueError("the array is closed")
        return self._all

    # --- growing

    def _grow(self, items: int) -> None:
        """Populate room for ``items`` items, and a step more."""
        memory = self.memory
        if items > self.capacity:
            raise ValueError(
                f"{items} items of {self._item_bytes} bytes are more than the capacity of {self.capacity} items"
                f" ({format_size(self.capacity * self._item_bytes)}): make the array with a larger capacity="
            )
        used = items * self._item_bytes
        needed = self._rounded(used)
        ahead = max(used // 64, min(used, _AHEAD)) if self._step is None else self._step
        wanted = min(len(memory), max(needed, (used + ahead) // self._unit * self._unit))
        try:
            memory.populate(self._populated, wanted - self._populated, access="write")
        except PopulateError:
            if needed == wanted:
                raise
            wanted = needed  # populating ahead is for speed only
            memory.populate(self._populated, wanted - self._populated, access="write")
        self._set_populated(wanted)

    def _rounded(self, used: int) -> int:
        return min(len(self.memory), used + -used % self._unit)

    def _set_populated(self, populated: int) -> None:
        self._populated = populated
        self._room = min(self.capacity, populated // self._item_bytes)

    def _extend_by(self, items: numpy.ndarray[Any, Any]) -> None:
        import numpy

        if items.ndim == 0 or items.shape[1:] != self.item_shape:
            wanted = ", ".join(map(str, ("n", *self.item_shape)))
            raise ValueError(f"items come in an array of shape ({wanted}), not {items.shape}")
        if not numpy.can_cast(items.dtype, self.dtype, "same_kind"):
            raise TypeError(f"items of {items.dtype} cannot be stored as {self.dtype}: convert them with astype first")
        start, stop = self._length, self._length + len(items)
        if stop > self._room:
            self._grow(stop)
        numpy.copyto(self._open()[start:stop], items, casting="same_kind")
        self._length = stop

    def _extend_by_batch(self, items: list[Any]) -> None:
        start, stop = self._length, self._length + len(items)
        if stop <= self.capacity:
            if stop > self._room:
                self._grow(stop)
            try:
                self._store(start, items)
            except (TypeError, ValueError, OverflowError):
                pass  # one of them does not fit: those before it do
            else:
                self._length = stop
                return
        for item in items:
            self.append(item)

    def _store(self, start: int, items: list[Any]) -> None:
        """Write Python objects, each one item, where room is populated for them."""
        import numpy

        values = numpy.asarray(items)
        if values.shape[1:] != self.item_shape:
            raise ValueError(f"an item has the shape {self.item_shape}, not {values.shape[1:]}")
        if values.dtype.kind in "iu" and self.dtype.kind in "iu":
            narrow = values.astype(self.dtype)  # lists of integers are int64 to numpy, whatever is in them
            if not numpy.array_equal(narrow, values):
                raise OverflowError(f"an integer is out of the range of {self.dtype}")
            values = narrow
        numpy.copyto(self._open()[start : start + len(items)], values, casting="same_kind")

    def __repr__(self) -> str:
        if self.closed:
            return f"<GrowableArray of {self.dtype}, closed>"
        items = f"{self._length} of at most {self.capacity} items"
        shape = f" of shape {self.item_shape}" if self.item_shape else ""
        return f"<GrowableArray of {self.dtype}, {items}{shape}, {format_size(self._populated)} populated>"


def _checked_shape(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    counts = tuple(operator.index(count) for count in (shape if isinstance(shape, tuple) else (shape,)))
    if any(count <= 0 for count in counts):
        raise ValueError(f"an item of shape {counts} has no bytes")
    return counts


def _as_array(items: Any) -> numpy.ndarray[Any, Any] | None:
    """Return an array or a buffer as an ndarray without a copy; None for other iterables."""
    import numpy

    if not any(hasattr(items, name) for name in ("__array__", "__array_interface__")):
        try:
            items = memoryview(items)  # array.array, bytes, mmap, ...
        except TypeError:
            return None
    return numpy.asarray(items)
