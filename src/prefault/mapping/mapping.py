"""Memory that prefault maps itself: a :class:`Mapping` over a backing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prefault._kernel import mman
from prefault._system import fork_hooks, hugetlb, thp
from prefault._system.closing import Closing
from prefault._system.descriptors import Descriptors
from prefault.errors import HugePagesError, MappingError
from prefault.limits.mmap_refusal import why_no_room
from prefault.memory.backings import BackingSource, OpenedBacking, parse_backing
from prefault.memory.borrowing import Borrowed, MemoryOwner, Pin
from prefault.memory.node_policy import Interleave, policy_for
from prefault.ranges import PageRange
from prefault.sizes import MAX_SIZE, MIB, PAGE_SIZE, Size, format_count, format_size, parse_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing

HugeAdvice: TypeAlias = Literal["auto", "advise", "never"]

_MAX_LENGTH = MAX_SIZE - (64 << 30)
"""Room for rounding up to the largest huge page of any architecture."""

_ADVICE = {"advise": mman.MADV_HUGEPAGE, "never": mman.MADV_NOHUGEPAGE}


class MappedMemory(Closing, MemoryOwner):
    """Base of :class:`Mapping` and :class:`~prefault.SparseMemory`: it owns a mapping, and ends it."""

    _memory: OwnedMemory | None

    @property
    def fd(self) -> int | None:
        """The descriptor of the file behind it; None for private anonymous memory. It belongs to this object."""
        return self._open_memory().fd

    @property
    def file_offset(self) -> int:
        """Offset in that file at which the memory starts, in bytes."""
        return self._open_memory().file_offset

    @property
    def closed(self) -> bool:
        """True once the memory is unmapped or left to its views."""
        return self._memory is None

    def close(self) -> None:
        """Unmap the memory and close its file. Idempotent.

        Raises:
            BufferError: a view is still alive, or another thread is at work on the memory. Nothing has changed then.
        """
        memory = self._memory
        if memory is not None:
            memory.close()
            self._memory = None

    def _abandon(self) -> None:
        self._memory = None  # views that the exception keeps alive keep the memory until they go

    def _open_memory(self) -> OwnedMemory:
        memory = self._memory
        if memory is None:
            raise ValueError(f"the {self._what} is closed")
        return memory

    _what = "mapping"

    @staticmethod
    def _array(
        view: memoryview, dtype: numpy.typing.DTypeLike, shape: int | tuple[int, ...] | None
    ) -> numpy.ndarray[Any, Any]:
        """Return the bytes of a view as an array; without a shape, of as many items as fit."""
        import numpy

        kind = numpy.dtype(dtype)
        if kind.hasobject:
            raise TypeError("memory that others may see or discard cannot hold Python objects")
        if not kind.itemsize:
            raise ValueError(f"items of dtype {kind} have no size: say how long, for example 'S8'")
        if shape is None:
            shape = len(view) // kind.itemsize
        counts: list[int] = numpy.atleast_1d(numpy.asarray(shape, numpy.int64)).tolist()
        if min(counts, default=0) < 0:
            raise ValueError(f"an array has no negative dimensions: {shape}")
        needed = kind.itemsize * math.prod(counts)
        if needed > len(view):
            raise ValueError(f"an array of shape {shape} takes {needed} bytes, and {len(view)} are there from the offset on")
        return numpy.ndarray(shape, kind, buffer=view)


class Mapping(MappedMemory):
    """Range of memory that prefault maps, and that :meth:`close` unmaps.

    ::

        with prefault.Mapping("2 GiB", backing="memfd") as mapping:
            prefault.populate(mapping)
            array = mapping.ndarray("float64")
            ...
            del array  # a view keeps the memory, and closing refuses while there is one

    Args:
        length: bytes (``"2 GiB"`` or a number), rounded up to whole pages of the backing; None maps all of a file.
        backing: an :class:`Anonymous`, :class:`Memfd`, :class:`TemporaryFile`, :class:`File`, :class:`Descriptor` or
            :class:`Hugetlb`, or one of the names ``"anonymous"``, ``"memfd"``, ``"tmpfs"``, ``"hugetlb"``,
            ``"memfd-hugetlb"``.
        shared: MAP_SHARED or MAP_PRIVATE. The default is private for anonymous memory and shared for files.
        writable: whether the memory may be written (PROT_WRITE). It is always readable.
        huge: transparent huge pages. ``"auto"`` leaves it to the system's setting, ``"advise"`` asks for them
            (MADV_HUGEPAGE), ``"never"`` forbids them (MADV_NOHUGEPAGE).
        noreserve: MAP_NORESERVE: neither swap space nor hugetlb pages are set aside at the time of mapping.
        align: the address becomes a multiple of this; default 2 MiB for mappings that could hold a huge page.
        node: number of the NUMA node that all pages come from (MPOL_BIND). Where it is full, populating is a
            HeadroomError; a touch has the OOM killer end a process.
        interleave: True has the pages come in turn from all nodes that this process may use, numbers from these.

    Raises:
        MappingError: the backing or the memory is not available. Nothing is left behind.
        ValueError, TypeError: a wrong size, backing, node or option.
        OSError: this process may not set memory policies.
    """

    def __init__(
        self,
        length: Size | None = None,
        *,
        backing: BackingSource | str = "anonymous",
        shared: bool | None = None,
        writable: bool = True,
        huge: HugeAdvice = "auto",
        noreserve: bool = False,
        align: Size | None = None,
        node: int | None = None,
        interleave: Interleave = False,
    ) -> None:
        source = parse_backing(backing)
        if huge not in ("auto", *_ADVICE):
            raise ValueError(f"huge is 'auto', 'advise' or 'never', not {huge!r}")
        wanted = None if length is None else parse_size(length)
        if wanted == 0:
            raise ValueError("a mapping of 0 bytes is not possible: mmap(2) refuses it")
        if wanted is not None and wanted > _MAX_LENGTH:
            raise ValueError(f"{wanted} bytes are more than the kernel can map")
        self.backing = source
        self.shared = source.has_file if shared is None else shared
        self.writable = writable
        self.huge = huge
        self._node_policy = policy_for(node, interleave)
        memory = OwnedMemory()
        try:
            opened = source.open(memory.descriptors, wanted, writable=writable and self.shared)
            self.page_size = opened.page_size
            size = opened.size if wanted is None else wanted
            if size is None:
                raise ValueError(f"{type(source).__name__} has no size of its own: say how many bytes to map")
            self._length = size if source.is_given else size + -size % opened.page_size
            memory.map(
                self._length, opened, shared=self.shared, huge=huge, noreserve=noreserve,
                prot=mman.PROT_READ | (mman.PROT_WRITE if writable else 0),
                align=None if align is None else parse_size(align),
            )  # fmt: skip
            if self._node_policy is not None:
                self._node_policy.apply(memory.address, memory.address + memory.mapped)
        except BaseException:
            memory.unmap()
            raise
        self._memory = memory

    @property
    def range(self) -> PageRange:
        """The addresses of the mapping, whole pages."""
        memory = self._open_memory()
        mapped = memory.mapped
        if not mapped:  # closed by another thread since the first look
            raise ValueError("the mapping is closed")
        return PageRange(memory.address, memory.address + mapped)

    def __len__(self) -> int:
        """Return the length in bytes, rounded up to pages; for a :class:`File` or :class:`Descriptor` not rounded."""
        return self._length

    def memoryview(self) -> memoryview:
        """Return a view of the bytes, writable if ``writable`` is. While it lives, :meth:`close` refuses."""
        view = memoryview(self._open_memory().exporter(self._length)).cast("B")
        return view if self.writable else view.toreadonly()

    def ndarray(
        self, dtype: numpy.typing.DTypeLike = "uint8", shape: int | tuple[int, ...] | None = None
    ) -> numpy.ndarray[Any, Any]:
        """Return the memory as an array, without a copy.

        Args:
            dtype: anything that numpy takes for one, but no Python objects.
            shape: default: one dimension, as many items as fit.
        """
        return self._array(self.memoryview(), dtype, shape)

    def _borrow(self) -> Borrowed:
        memory = self._open_memory()
        pin = MemoryPin(memory)
        return Borrowed(
            memory.address, self._length,
            readonly=not self.writable, fd=memory.fd, huge=self.huge == "advise", pin=pin,
            nodes=() if self._node_policy is None else self._node_policy.bound, has_policy=self._node_policy is not None,
        )  # fmt: skip

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self._open_memory().address:#x}"
        sharing = "shared" if self.shared else "private"
        return f"<Mapping of {format_size(self._length)}, {sharing}, {self.backing!r}, {state}>"


class OwnedMemory:
    """Owner of a mapping and of its file's descriptor: exactly one, so that both go away exactly once.

    Views refer to this object, not to the Mapping: a Mapping that is forgotten while a view lives leaves the memory to the
    view, and the last one to go unmaps it.
    """

    def __init__(self) -> None:
        self.descriptors = Descriptors()
        """Owner of the file's descriptor; closed with the mapping."""
        self.address = 0
        self.mapped = 0
        self.file_offset = 0
        # Reentrant: a signal handler or a finalizer may come by in this very thread.
        self._lock = threading.RLock()
        self._pins: weakref.WeakSet[MemoryPin] = weakref.WeakSet()
        self._exporter: weakref.ref[Any] | None = None
        self.at_unmap: Callable[[], None] | None = None
        """Called once the memory is gone."""
        _all.add(self)

    @property
    def fd(self) -> int | None:
        """The descriptor of the file; None without one."""
        return self.descriptors.first

    def map(
        self,
        length: int,
        opened: OpenedBacking,
        *,
        shared: bool,
        prot: int,
        huge: HugeAdvice = "auto",
        noreserve: bool = False,
        align: int | None = None,
    ) -> None:
        """Map ``length`` bytes of what was opened, rounded up to its pages. The file may end before that."""
        length += -length % opened.page_size
        if align is None:
            align = max(opened.page_size, 2 * MIB if length >= 2 * MIB else PAGE_SIZE)
        if align < PAGE_SIZE or align & (align - 1):
            raise ValueError(f"an alignment is a power of two of at least {PAGE_SIZE} bytes, not {align}")
        flags = opened.flags | (mman.MAP_SHARED if shared else mman.MAP_PRIVATE)
        if noreserve:
            flags |= mman.MAP_NORESERVE
        fd = -1 if opened.fd is None else opened.fd
        try:
            self.address = _map_aligned(length, prot, flags, fd, opened.offset, align, opened.page_size)
        except OSError as error:
            data = not shared and bool(prot & mman.PROT_WRITE)
            raise _explain(error, length, opened, align, data=data, noreserve=noreserve) from error
        self.mapped = length
        self.file_offset = opened.offset
        if huge != "auto" and opened.page_size == PAGE_SIZE:
            try:
                mman.madvise(self.address, length, _ADVICE[huge])
            except OSError as error:
                if error.errno == errno.EINVAL and thp.pmd_size() is None:
                    if huge == "advise":
                        raise MappingError(error.errno, "this kernel has no transparent huge pages") from error
                else:
                    raise MappingError(error.errno or 0, f"huge={huge!r} is refused: {error.strerror}") from error

    def exporter(self, length: int) -> ctypes.Array[ctypes.c_char]:
        """Return the object that exports the memory by the buffer protocol; one for all views."""
        with self._lock:
            if not self.mapped:  # closed by another thread since the caller looked
                raise ValueError("the mapping is closed")
            array = self._exporter() if self._exporter is not None else None
            if array is None:
                array = (ctypes.c_char * length).from_address(self.address)
                array._memory = self  # type: ignore[attr-defined]  # the memory lives as long as the last view
                self._exporter = weakref.ref(array)
            return array

    def pin(self, pin: MemoryPin) -> None:
        """Keep the memory mapped for as long as that object lives or until :meth:`unpin`."""
        with self._lock:
            if not self.mapped:
                raise ValueError("the mapping is closed")
            self._pins.add(pin)

    def unpin(self, pin: MemoryPin) -> None:
        """End what :meth:`pin` began. Idempotent."""
        self._pins.discard(pin)

    def forget_other_threads(self) -> None:
        """Drop the pins of other threads, in the child of a fork, which has only the thread that forked."""
        self._lock = threading.RLock()
        me = threading.get_ident()
        self._pins = weakref.WeakSet([pin for pin in self._pins if pin.thread == me])

    def close(self) -> None:
        """Unmap and close; BufferError while a view is alive or a thread is at work."""
        with self._lock:
            if self._pins:
                raise BufferError("the mapping is in use by another thread")
            if self._exporter is not None and self._exporter() is not None:
                raise BufferError("a view of the mapping is still alive: delete it first")
            self.unmap()

    def unmap(self) -> None:
        """Unmap and close, though views or pins may exist."""
        mapped, self.mapped = self.mapped, 0
        at_unmap, self.at_unmap = self.at_unmap, None
        try:
            if mapped:
                mman.munmap(self.address, mapped)
        finally:
            self.descriptors.close()
            if at_unmap is not None:
                at_unmap()

    def __del__(self) -> None:
        # No reference to it is left, so no view and no pin is. At interpreter exit the functions may be gone.
        with contextlib.suppress(TypeError, AttributeError):
            self.unmap()


class MemoryPin(Pin):
    """Pin of a thread at work on the memory.

    The memory knows it weakly: wherever an asynchronous exception (Ctrl-C) strikes, the pin ends with this object.
    """

    def __init__(self, memory: OwnedMemory) -> None:
        self.thread = threading.get_ident()
        self._memory = memory
        memory.pin(self)

    def release(self) -> None:
        """End the pin. Idempotent."""
        self._memory.unpin(self)


_all = fork_hooks.instances(OwnedMemory.forget_other_threads)


_TRIES = 64


def _map_aligned(length: int, prot: int, flags: int, fd: int, offset: int, align: int, page_size: int) -> int:
    """Mmap at a multiple of ``align``: look for room, and map there if it is still free.

    Not over a reservation with MAP_FIXED: until Linux 6.11 a call that fails then has unmapped it already, and another
    thread's memory may lie there by the time of the cleanup.
    """
    if align <= page_size:
        return mman.mmap(0, length, prot, flags, fd, offset)  # hugetlb aligns by itself
    for _ in range(_TRIES):
        room = mman.mmap(0, length + align, mman.PROT_NONE, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE)
        mman.munmap(room, length + align)
        wanted = room + -room % align
        try:
            address = mman.mmap(wanted, length, prot, flags | mman.MAP_FIXED_NOREPLACE, fd, offset)
        except FileExistsError:
            continue  # another thread was faster
        if address == wanted:
            return address
        mman.munmap(address, length)  # before Linux 4.17 the address is only a hint
    raise OSError(errno.EAGAIN, "other threads took every free place first")


def _explain(error: OSError, length: int, opened: OpenedBacking, align: int, *, data: bool, noreserve: bool) -> MappingError:
    what = f"{format_size(length)} cannot be mapped"
    if error.errno == errno.ENOMEM and opened.page_size > PAGE_SIZE and not noreserve:
        pool = hugetlb.read_pool(opened.page_size)
        if pool.available < length // opened.page_size:
            return HugePagesError(
                error.errno,
                f"{what}: it takes {format_count(length // opened.page_size, 'huge page')} of"
                f" {format_size(opened.page_size)}, and"
                f" {pool.available} of {pool.total} are free and not reserved (write a larger number to {pool.setting},"
                " or map with noreserve=True and populate what there is)",
            )
    if error.errno == errno.ENOMEM:
        room = length if align <= opened.page_size else length + align
        return MappingError(error.errno, f"{what}: {why_no_room(length, room, data=data, noreserve=noreserve)}")
    if error.errno == errno.ENODEV:
        return MappingError(error.errno, f"{what}: the file system of the file does not map files; read it instead")
    return MappingError(error.errno or 0, f"{what}: {error.strerror}")
