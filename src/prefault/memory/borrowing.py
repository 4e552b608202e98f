"""Find the address range of any buffer, and keep it in place for the length of a call."""

import abc
import ctypes
import math
import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Protocol, SupportsIndex

from prefault._system import fork_hooks
from prefault.interval_index import IntervalIndex
from prefault.intervals import Intervals
from prefault.ranges import RangeSet
from prefault.sizes import Size, parse_size

if TYPE_CHECKING:
    from prefault.memory.strides import Strides


class Span(NamedTuple):
    """Bytes that a call works on: addresses ``[start, stop)``, not rounded to pages."""

    start: int
    stop: int


class Borrowed:
    """Memory of a buffer, kept in place until :meth:`release`.

    Attributes:
        address: of its first byte.
        length: bytes from the first to the last, gaps of a strided array included.
        readonly: whether the buffer's owner forbids writing through it (the pages may be writable all the same).
        strides: where the items of a buffer with gaps lie; None without gaps.
        fd: descriptor of the file behind the memory, if the owner has one, else None. Borrowed as well.
        huge: whether the owner asked for transparent huge pages, or for none: fallocate does not see that.
        access_guard: hook that populate and discard enter before they touch a page, if the owner installed one.
        nodes: numbers of the NUMA nodes that the owner bound the memory to, so that they must have room for it; none: any.
        has_policy: whether a memory policy is set, by the owner or for this call: fallocate does not see that of hugetlb.
    """

    __slots__ = ("_pin", "access_guard", "address", "fd", "has_policy", "huge", "length", "nodes", "readonly", "strides")

    def __init__(
        self, address: int, length: int, *, readonly: bool, strides: "Strides | None" = None, fd: int | None = None,
        huge: bool = False, access_guard: "AccessGuard | None" = None, pin: "Pin | None" = None, nodes: tuple[int, ...] = (),
        has_policy: bool = False,
    ) -> None:  # fmt: skip
        self.address = address
        self.length = length
        self.readonly = readonly
        self.strides = strides
        self.fd = fd
        self.huge = huge
        self.access_guard = access_guard
        self.nodes = nodes
        self.has_policy = has_policy
        self._pin = pin

    @property
    def contiguous(self) -> bool:
        """True if every byte between first and last belongs to the buffer."""
        return self.strides is None

    def release(self) -> None:
        """Let the owner move or free the memory again. Idempotent, also in a child that is forked in the midst of it."""
        if self._pin is not None:
            self._pin.release()
            self._pin = None

    def __enter__(self) -> "Borrowed":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def select(self, offset: Size, length: Size | None) -> Span:
        """Return the addresses of ``length`` bytes from ``offset`` on (None: to the end).

        Raises:
            ValueError: negative, or not inside the buffer.
        """
        start = 0 if type(offset) is int and offset == 0 else parse_size(offset)
        if start > self.length:
            raise ValueError(f"offset {start} lies outside the buffer of {self.length} bytes")
        count = self.length - start if length is None else parse_size(length)
        if count > self.length - start:
            raise ValueError(
                f"offset {start} and length {count} end at {start + count}, outside the buffer of {self.length} bytes"
            )
        return Span(self.address + start, self.address + start + count)


class Pin(abc.ABC):
    """Keeps borrowed memory in place until it is released."""

    @abc.abstractmethod
    def release(self) -> None:
        """Let the owner move or free the memory again. Idempotent."""


class AccessGuard(abc.ABC):
    """Hook that the owner of memory installs: populate and discard enter it before they touch a page.

    Sparse memory needs one for two reasons: its unpopulated blocks may be protected, and a pool charges for the populated
    ones. The guard rounds to the block size of its memory, so populate and discard work on the spans that it returns.
    """

    @abc.abstractmethod
    def populating(self, span: Span) -> "AbstractContextManager[GuardedPopulate]":
        """Return the context of a populate call on the span, rounded outward to blocks: nothing has changed on entering.

        Leaving with an exception refunds what :meth:`GuardedPopulate.admit` charged. The pages that the call brought in have
        been discarded by then: memory with an access guard is populated all or nothing.
        """

    @abc.abstractmethod
    def discarding(self, span: Span) -> AbstractContextManager[Span]:
        """Return the context of a discard call: entering protects the span, rounded inward to blocks; leaving refunds."""


class GuardedPopulate(Protocol):
    """A populate call on memory with an access guard."""

    span: Span
    """Addresses of the whole blocks."""

    def admit(self) -> Intervals:
        """Charge and unprotect the blocks; return the addresses of those that were protected, which had no pages.

        Called once the limits of the system are checked: a call that they refuse is not charged.

        Raises:
            PopulateError: a limit of the owner does not allow it; no page is touched and nothing charged.
        """


class ProvidedPages(NamedTuple):
    """Result of :meth:`PageProvider.populate`.

    Attributes:
        bytes: bytes that it brought in.
        present_bytes: bytes that were there before.
        threads: number of threads that worked.
        notes: sentences that a user should know.
        brought_in: the pages that it brought in, as addresses.
        undo: give them back, for a call that failed elsewhere later; pages that others may have written since stay supplied.
    """

    bytes: int
    present_bytes: int
    threads: int
    notes: tuple[str, ...]
    brought_in: RangeSet
    undo: Callable[[], None]


class PageProvider(abc.ABC):
    """Supplies the pages of device memory, which the kernel could populate only fault by fault.

    Every route that asks for population comes here: at map time, :func:`prefault.populate`, :func:`prefault.lock` and a
    change of protection.
    """

    @property
    @abc.abstractmethod
    def writable(self) -> bool:
        """True if the memory may be written."""

    @abc.abstractmethod
    def populate(
        self, pages: Intervals, origin: int, access: Literal["read", "write"], *, rollback: bool,
        progress: Callable[[int, int], None] | None, check_headroom: bool,
    ) -> ProvidedPages:  # fmt: skip
        """Make pages of its own present, given as addresses; PopulateError with offsets from ``origin``."""

    @abc.abstractmethod
    def discard(self, span: Span) -> tuple[int, int]:
        """Give the whole pages inside ``span`` back to the device; return their bytes, and how many were supplied."""


class ProvidedSpan(NamedTuple):
    """Addresses ``[start, stop)`` whose pages a page provider supplies."""

    start: int
    stop: int
    page_provider: PageProvider


class _PageProviders:
    """Page providers by address: a view of device memory, such as an ndarray, does not know its provider."""

    def __init__(self) -> None:
        # By address, and asked without the lock.
        self._index: IntervalIndex[int] = IntervalIndex()
        self.references: dict[int, weakref.ref[PageProvider]] = {}
        self._stops: dict[int, int] = {}
        self._changes: deque[Callable[[], None]] = deque()
        self._changing = False
        self._lock = threading.RLock()  # reentrant: a finalizer removes an entry

    def within(self, start: int, stop: int) -> tuple[ProvidedSpan, ...]:
        found = []
        for first, last, address in sorted(self._index.overlapping(start, stop)):
            reference = self.references.get(address)
            page_provider = None if reference is None else reference()
            if page_provider is not None:
                found.append(ProvidedSpan(max(first, start), min(last, stop), page_provider))
        return tuple(found)

    def add(self, address: int, length: int, page_provider: PageProvider) -> None:
        self._change(partial(self._add, address, address + length, weakref.ref(page_provider)))

    def remove(self, address: int) -> None:
        self._change(partial(self._remove, address))

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            self._changes.append(change)
            if self._changing:
                return  # a finalizer in the midst of another change, which this one follows
            try:
                self._changing = True
                while self._changes:
                    self._changes.popleft()()
            finally:
                self._changing = False

    def _add(self, address: int, stop: int, reference: weakref.ref[PageProvider]) -> None:
        self.references[address], self._stops[address] = reference, stop
        self._index.add(address, stop, address)

    def _remove(self, address: int) -> None:
        stop = self._stops.pop(address, None)
        if stop is not None:
            del self.references[address]
            self._index.remove(address, stop, address)

    def forget_threads(self) -> None:
        self._changing = False
        self._lock = threading.RLock()


_page_providers = _PageProviders()
fork_hooks.register(in_child=_page_providers.forget_threads)


def provided_spans(start: int, stop: int) -> tuple[ProvidedSpan, ...]:
    """Return the parts of ``[start, stop)`` that page providers supply, in order; the kernel supplies the rest."""
    return _page_providers.within(start, stop) if _page_providers.references else ()


def other_spans(start: int, stop: int, provided: Sequence[ProvidedSpan]) -> list[Span]:
    """Return the parts of ``[start, stop)`` that the kernel supplies, given those that :func:`provided_spans` found."""
    found = []
    for first, last, _ in provided:
        if start < first:
            found.append(Span(start, first))
        start = last
    if start < stop:
        found.append(Span(start, stop))
    return found


def add_page_provider(address: int, length: int, page_provider: PageProvider) -> None:
    """Have these addresses populated by ``page_provider``, which is referred to weakly, from now on."""
    _page_providers.add(address, length, page_provider)


def remove_page_provider(address: int) -> None:
    """Remove the page provider of the memory at ``address``, before that is unmapped. Does nothing where there is none."""
    _page_providers.remove(address)


class MemoryOwner(abc.ABC):
    """An object whose memory can be borrowed without the buffer protocol (which a Python class has only since 3.12)."""

    @abc.abstractmethod
    def _borrow(self) -> Borrowed:
        """Return the memory, pinned. ValueError when it is closed."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # copy and pickle call this. Two owners of one mapping would both unmap it, or both believe to be alone.
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: copy its bytes, or share its memory by fork or, where it"
            " has a file, by its descriptor (fd, prefault.Descriptor)"
        )


class PyBuffer(ctypes.Structure):
    """``Py_buffer`` (Include/cpython/object.h); the layout is part of the stable ABI since Python 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    )


# INDIRECT | STRIDES | ND. Not FORMAT: numpy refuses it for dates and other types that have no letter in struct.
_PYBUF_ANY_LAYOUT = 0x0100 | 0x0010 | 0x0008

# PyDLL functions: they need the GIL, and raise the exception that CPython set.
get_buffer = ctypes.pythonapi.PyObject_GetBuffer
get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
release_buffer = ctypes.pythonapi.PyBuffer_Release
release_buffer.argtypes = (ctypes.c_void_p,)
release_buffer.restype = None
_is_contiguous = ctypes.pythonapi.PyBuffer_IsContiguous
_is_contiguous.argtypes = (ctypes.c_void_p, ctypes.c_char)


class _Export(Pin):
    """Export of the buffer protocol: until its release the owner refuses to resize, close or free the memory."""

    __slots__ = ("view",)

    def __init__(self, view: PyBuffer) -> None:
        self.view = view

    def release(self) -> None:
        release_buffer(ctypes.addressof(self.view))  # which does nothing the second time

    def __del__(self) -> None:
        # An asynchronous exception (Ctrl-C) can strike between the borrowing and the caller's `try`.
        self.release()


class _Reference(Pin):
    """Keeps an object alive that has no exports to count."""

    __slots__ = ("_object",)

    def __init__(self, held: object) -> None:
        self._object: object = held

    def release(self) -> None:
        self._object = None


_NO_PIN = _Reference(None)


def borrow(buffer: Any) -> Borrowed:
    """Return the memory of ``buffer``, kept in place until released.

    Args:
        buffer: a :class:`~prefault.Mapping`; anything with the buffer protocol (ndarray, mmap, memoryview, bytearray,
            array.array, Arrow buffers, ctypes objects; read-only ones too); ``SharedMemory``; anything with
            ``__array_interface__`` or, on the CPU, ``__dlpack__`` (tensors of every item type; a Parameter too). A tensor
            whose library exports DLPack without a version counts as read-only, as numpy has it: populate it with
            ``access="write"``.

    Raises:
        TypeError: none of these, or an object that fails to say where its memory is.
        BufferError: a tensor in the memory of another device, or one that its library does not lend.
        ValueError: a closed mapping or a released memoryview.
    """
    if isinstance(buffer, MemoryOwner):
        return buffer._borrow()
    view = PyBuffer()
    pointer = ctypes.addressof(view)
    try:
        get_buffer(buffer, pointer, _PYBUF_ANY_LAYOUT)
    except TypeError:
        return _borrow_otherwise(buffer)
    export = _Export(view)
    if view.ndim > 0 and not _is_contiguous(pointer, b"A"):
        itemsize, shape, strides = _layout_of_view(view)
        return _with_strides(view.buf or 0, itemsize, shape, strides, readonly=bool(view.readonly), pin=export)
    return Borrowed(view.buf or 0, view.len, readonly=bool(view.readonly), pin=export)


def _layout_of_view(view: PyBuffer) -> tuple[int, list[int], list[int]]:
    """Return item size, shape and strides of an export."""
    if view.suboffsets:
        for dimension in range(view.ndim):
            if view.suboffsets[dimension] >= 0:
                raise ValueError("an array of pointers (PIL style suboffsets) has no one address range")
    return view.itemsize, [view.shape[i] for i in range(view.ndim)], [view.strides[i] for i in range(view.ndim)]


def _with_strides(
    first: int, itemsize: int, shape: list[int], strides: list[int] | None, *, readonly: bool, pin: Pin
) -> Borrowed:
    """Return the memory of an array whose first item lies at ``first``; without strides it has no gap."""
    if strides is None:
        return Borrowed(first, itemsize * math.prod(shape), readonly=readonly, pin=pin)
    from prefault.memory.strides import Strides  # only now: most programs have no arrays with gaps

    (below, stop), dense = _layout(itemsize, shape, strides)
    gaps = None if dense else Strides(first, itemsize, tuple(shape), tuple(strides))
    return Borrowed(first + below, stop - below, readonly=readonly, strides=gaps, pin=pin)


def _layout(itemsize: int, shape: list[int], strides: list[int]) -> tuple[Span, bool]:
    """Return the bytes from the lowest item to the highest, counted from the first item, and whether there is no gap.

    Negative strides reach below the first item. Reversed and transposed arrays have no gap.
    """
    if 0 in shape:
        return Span(0, 0), True
    dense, expected = True, itemsize
    for stride, count in sorted((abs(stride), count) for count, stride in zip(shape, strides, strict=True) if count > 1):
        dense = dense and stride == expected
        expected *= count
    reach = [(count - 1) * stride for count, stride in zip(shape, strides, strict=True)]
    return Span(sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + itemsize), dense


def _borrow_otherwise(buffer: Any) -> Borrowed:
    inner = getattr(buffer, "buf", None)  # multiprocessing.shared_memory.SharedMemory; None once it is closed
    if isinstance(inner, memoryview):
        return borrow(inner)
    interface = getattr(buffer, "__array_interface__", None)
    if isinstance(interface, dict):
        return _borrow_array_interface(buffer, interface)
    if hasattr(buffer, "__dlpack__"):
        return _borrow_tensor(buffer)
    if isinstance(buffer, str | os.PathLike):
        raise TypeError(
            f"{buffer!r} is a path, not memory: prefault.warm takes paths (prefault.warm_async in the background), and"
            " prefault.Mapping(backing=prefault.File(path)) maps one"
        )
    if hasattr(buffer, "buf") and inner is None:
        raise ValueError(f"the {type(buffer).__name__} is closed")
    raise TypeError(
        f"{type(buffer).__name__} has no memory to work on: give a buffer (ndarray, mmap, memoryview, bytearray, ...),"
        " a SharedMemory, a prefault.Mapping, or an object with __array_interface__"
    )


def _borrow_tensor(buffer: Any) -> Borrowed:
    from prefault.memory.dlpack import export

    tensor = export(buffer)
    return _with_strides(
        tensor.address, tensor.itemsize, tensor.shape, tensor.strides, readonly=tensor.readonly,
        pin=_Reference(tensor.capsule),
    )  # fmt: skip


_TYPESTR = r"[<>|=]?(?P<letter>[a-zA-Z])(?P<size>[0-9]+)"


def _borrow_array_interface(buffer: Any, interface: dict[str, Any]) -> Borrowed:
    """Borrow by the array interface of NumPy, version 3: a dictionary with address, shape, type and strides."""
    data = interface.get("data")
    if data is None:
        raise TypeError(f"the __array_interface__ of {type(buffer).__name__} gives no address")
    kind = re.match(_TYPESTR, str(interface.get("typestr")))
    if kind is None:
        raise TypeError(
            f"the __array_interface__ of {type(buffer).__name__} has an unknown type {interface.get('typestr')!r}"
        )
    itemsize = int(kind["size"]) * (4 if kind["letter"] == "U" else 1)  # of text it counts characters
    shape, by = list(interface["shape"]), interface.get("strides")
    strides = None if by is None else list(by)
    if isinstance(data, tuple):
        address, readonly = data
        return _with_strides(address, itemsize, shape, strides, readonly=bool(readonly), pin=_Reference(buffer))
    # An object with the buffer protocol, in which the array starts at `offset`.
    inner = borrow(data)
    try:
        if inner.strides is not None:
            raise TypeError(f"the __array_interface__ of {type(buffer).__name__} lies in an array with gaps")
        array = _with_strides(
            inner.address + interface.get("offset", 0), itemsize, shape, strides, readonly=inner.readonly, pin=_NO_PIN
        )
        inner.address, stop = inner.select(array.address - inner.address, array.length)
    except BaseException:
        inner.release()
        raise
    inner.length, inner.strides = stop - inner.address, array.strides
    return inner
