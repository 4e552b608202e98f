"""SparseMemory: a large reservation whose blocks are populated and discarded at will."""

from __future__ import annotations

import os
import threading
from array import array
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prefault._kernel import mman
from prefault._system import fork_hooks
from prefault.engine.discarding import DiscardResult, discard
from prefault.engine.methods import Access
from prefault.engine.planning import Threads
from prefault.engine.populating import HeadroomChoice, PopulateResult, Progress, populate
from prefault.engine.rate import RateLimit, rate_limit
from prefault.inspection.scan import occupied
from prefault.intervals import Intervals
from prefault.mapping.mapping import HugeAdvice, MappedMemory, MemoryPin, OwnedMemory
from prefault.memory.backings import (
    BackingSource,
    parse_backing,
)
from prefault.memory.borrowing import Borrowed
from prefault.memory.node_policy import Interleave, policy_for
from prefault.ranges import PageRange, Ranges, RangeSet
from prefault.sizes import Size, format_size, parse_size
from prefault.sparse.accounting import Accounting
from prefault.sparse.device_blocks import DeviceSource, check_device
from prefault.sparse.layout import ensure_length, size_of
from prefault.sparse.mapped_range import ACCESSIBLE, Requested, make_guard, map_backing, map_device
from prefault.sparse.transfer import copy

if TYPE_CHECKING:
    import numpy
    import numpy.typing

Unpopulated: TypeAlias = Literal["zeros", "fault"]


class SparseMemory(MappedMemory):
    """A reserved range of addresses in which blocks are populated and discarded, without ever being mapped anew.

    ::

        with prefault.SparseMemory("1 TiB", block="2 MiB", unpopulated="fault") as memory:
            memory.populate("10 GiB", "64 MiB")  # real now, or an exception and nothing has changed
            view = memory.view("10 GiB", "64 MiB")
            ...
            memory.discard("10 GiB", "64 MiB")  # the memory is given back; the view stays, touching it is a SIGSEGV

    A reservation takes no memory (MAP_NORESERVE), only addresses. All calls may come from several threads at once; those
    that concern a common block wait for each other. Offsets and sizes are bytes, or texts such as ``"2 MiB"``.

    Args:
        size: rounded up to whole blocks. None: as long as the file of a :class:`File` or :class:`Descriptor`.
        reservation: how far :meth:`resize` may go; default: ``size``. What lies between is not accessible.
        backing: as for :class:`Mapping`. A file that is given by name or descriptor keeps its length; the others grow.
        shared: MAP_SHARED or MAP_PRIVATE, as for :class:`Mapping`. Shared anonymous memory is a memfd here.
        block: the granularity, a multiple of the page size of the backing, which is the default; with ``huge="advise"`` of
            a huge page, 2 MiB.
        unpopulated: what touching a block that is not populated does. ``"zeros"``: it faults pages in, as ordinary memory.
            ``"fault"``: a SIGSEGV, in this process and in its forks; another process has protection of its own.
        huge: transparent huge pages, as for :class:`Mapping`; never where a block is smaller than one.
        accounting: charged before blocks are populated, refunded after they are discarded: a pool's account.
        device: a device that the blocks come from, in place of a backing: what :func:`prefault.device.open` and
            :func:`prefault.device.connect` return. One call of its driver's populate hook supplies a block, and a discard
            gives it back. A block is a multiple of the device's page size. A child of fork has no such memory.
        offset: first byte of the device, or of the object, that the memory maps; what other memories map is theirs as well.
        object: name of an object of the device, which the memory maps in place of a part of the device.
        node: number of the NUMA node that all pages come from, as for :class:`Mapping`; not with a device.
        interleave: True has the pages come in turn from all nodes that this process may use, numbers from these.

    Raises:
        MappingError: the backing or the addresses are not available. Nothing is left behind.
        DeviceError: the device cannot be mapped.
        ValueError, TypeError: a wrong size, backing, device or option.
    """

    def __init__(
        self,
        size: Size | None,
        *,
        reservation: Size | None = None,
        backing: BackingSource | str = "anonymous",
        shared: bool | None = None,
        block: Size | None = None,
        unpopulated: Unpopulated = "zeros",
        huge: HugeAdvice = "auto",
        accounting: Accounting | None = None,
        device: DeviceSource | None = None,
        offset: Size = 0,
        object: str | None = None,  # noqa: A002  as in prefault.device.map
        node: int | None = None,
        interleave: Interleave = False,
    ) -> None:
        if huge not in ("auto", "advise", "never"):
            raise ValueError(f"huge is 'auto', 'advise' or 'never', not {huge!r}")
        if unpopulated not in ("zeros", "fault"):
            raise ValueError(f"unpopulated is 'zeros' or 'fault', not {unpopulated!r}")
        wanted = None if size is None else size_of(size, "size")
        reserved = None if reservation is None else size_of(reservation, "reservation")
        self.unpopulated = unpopulated
        self.device = device
        requested = Requested(wanted, reserved, None if block is None else parse_size(block), huge)
        faults = unpopulated == "fault"
        self._node_policy = policy_for(node, interleave)
        if device is not None and self._node_policy is not None:
            raise ValueError("the server of a device decides where its memory comes from: leave node and interleave out")
        if device is None:
            self.backing: BackingSource | None = parse_backing(backing)
            self.shared = self.backing.has_file if shared is None else shared
            mapped = map_backing(self.backing, self.shared, requested, faults=faults)
        else:
            check_device(device, backing=backing, shared=shared, huge=huge)
            self.backing, self.shared = None, True
            mapped = map_device(device, parse_size(offset), object, requested, faults=faults)
        try:
            if self._node_policy is not None:
                self._node_policy.apply(mapped.memory.address, mapped.memory.address + mapped.memory.mapped)
            self._guard = make_guard(mapped, accounting)
        except BaseException:
            mapped.memory.unmap()
            raise
        if accounting is not None:
            mapped.memory.at_unmap = _Closing(accounting)
        self.page_size = mapped.page_size
        self.block, self._size, self._reservation, self.huge = mapped.layout
        self._require_here = mapped.require_here
        self._memory = mapped.memory

    # --- pages come and go

    def populate(
        self,
        offset: Size = 0,
        length: Size | None = None,
        *,
        access: Access | None = None,
        threads: Threads = None,
        progress: Progress | bool = False,
        rate: RateLimit | Size | None = None,
        headroom: HeadroomChoice = "check",
    ) -> PopulateResult:
        """Make blocks present, all or none, as :func:`prefault.populate` of this object does.

        Rounded outward to whole blocks. On failure or Ctrl-C the pages that this call brought in are discarded again, and
        whatever was there before keeps its bytes.

        Args:
            offset: where to start.
            length: how far; None: to the end.
            access: ``"read"``, ``"write"`` or None, the better one.
            threads: how many at once; ``"auto"`` or None: chosen by size, affinity and CPU quota.
            progress: True draws a bar on stderr, or logs where that is no terminal; a function is called with the bytes done
                and in all.
            rate: limit of the bytes a second that are brought in, as ``"2 GiB/s"``; None: none.
            headroom: ``"check"`` checks the limits before the start and between chunks, ``"ignore"`` skips these checks.

        Raises:
            PopulateError: one of its subclasses says why; of a pool also PoolFullError.
            PopulateInterrupted: Ctrl-C.
            ValueError, TypeError: outside of the memory; closed; an unknown option.
        """
        return populate(
            self, access=access, offset=offset, length=length, threads=threads, progress=progress, rate=rate,
            headroom=headroom,
        )  # fmt: skip

    def discard(self, offset: Size = 0, length: Size | None = None) -> DiscardResult:
        """Give blocks back and protect them, as :func:`prefault.discard` of this object does.

        Rounded **inward** to whole blocks. Blocks that may be read are zeros afterwards; those of private mappings of a file
        hold the file's bytes. Memory files lose the pages for every process; of files on a disk only a
        :class:`TemporaryFile` of this memory's own loses them, other files are never changed.

        Raises:
            DiscardError: the kernel refuses; blocks that were not discarded are as before.
            ValueError, TypeError: outside of the memory; closed.
        """
        return discard(self, offset=offset, length=length)

    def populate_many(
        self, ranges: Ranges, *, access: Access | None = None, progress: Progress | bool = False,
        rate: RateLimit | Size | None = None, headroom: HeadroomChoice = "check",
    ) -> PopulateResult:  # fmt: skip
        """Populate many ranges in few system calls, all or none, each rounded outward to whole blocks.

        Args:
            ranges: pairs of offset and length, :class:`PageRange`, a :class:`RangeSet`, or an integer array of shape
                ``(n, 2)``, in any order; overlapping and touching ones are merged, empty ones left out.
            access: as for :meth:`populate`.
            progress: as for :meth:`populate`.
            rate: as for :meth:`populate`.
            headroom: as for :meth:`populate`; the space of a disk is not checked.

        Raises:
            ValueError: an item is no range inside the memory; the message has its index. Nothing was populated.
            PopulateError, PopulateInterrupted: as :meth:`populate`.
        """
        from prefault.engine.scattered.range_arguments import parse_ranges
        from prefault.sparse import batch

        with self._borrow() as memory:
            blocks = parse_ranges(ranges, memory.length).outward(self.block)
            return batch.populate_many(memory, self._guard, blocks, access, headroom, progress, rate_limit(rate))

    def discard_many(self, ranges: Ranges) -> DiscardResult:
        """Discard many ranges, merged as for :meth:`populate_many` and then rounded inward to whole blocks.

        Raises:
            ValueError: an item is no range inside the memory; the message has its index. Nothing was discarded.
            DiscardError: as :meth:`discard`.
        """
        from prefault.engine.scattered.range_arguments import parse_ranges
        from prefault.sparse import batch

        with self._borrow() as memory:
            blocks = parse_ranges(ranges, memory.length).inward(self.block)
            return batch.discard_many(memory, self._guard, blocks)

    @property
    def populated(self) -> RangeSet:
        """The offsets of all pages that are present or swapped out, asked of the kernel."""
        with self._borrow() as memory:
            return self._populated(memory)

    def _populated(self, memory: Borrowed) -> RangeSet:
        spans = Intervals([(memory.address, memory.address + memory.length)])
        if self._guard.protection is not None:
            # Protected blocks have no pages, but perhaps page tables full of guards, which take their time to walk and look
            # like swapped pages before Linux 6.15.
            self._guard.require_unlocked()
            with self._guard.lock:
                spans = self._guard.protection.unprotected.shifted(memory.address)
        rows = occupied(spans.edges, how=False)
        return RangeSet.from_arrays(rows[:, 0] - memory.address, rows[:, 1] - memory.address)

    # --- bytes

    def read(self, offset: Size, length: Size) -> bytes:
        """Read bytes at ``offset`` through the kernel: unavailable memory is an exception, not a signal.

        Raises:
            NotPopulatedError: a block is not populated, and unpopulated memory faults here.
            PopulateError: the memory for it is not available (tmpfs full, hugetlb pool empty, a poisoned page, ...).
            ValueError: outside of the memory; closed.
        """
        with self._borrow() as memory:
            span = memory.select(offset, length)
            content = array("B", bytes(span.stop - span.start))
            if content:
                copy(memory, self._guard, span.start, content, "read")
            return content.tobytes()

    def write(self, offset: Size, data: Any) -> None:
        """Write bytes at ``offset``; see :meth:`read`. Nothing is written where a block of them is not populated."""
        source = memoryview(data).cast("B")
        with self._borrow() as memory:
            span = memory.select(offset, len(source))
            if len(source):
                copy(memory, self._guard, span.start, array("B", bytes(source)), "write")

    def view(self, offset: Size = 0, length: Size | None = None) -> memoryview:
        """Return the bytes as a memoryview, which pins the memory.

        While it lives :meth:`close` refuses, and :meth:`resize` works. Touching unpopulated blocks does what ``unpopulated``
        says, and is a SIGBUS where the memory for them is not available.
        """
        with self._borrow() as memory:
            span = memory.select(offset, length)
            # Always of the whole reservation, so that one exporter does for all sizes.
            whole = memoryview(self._open_memory().exporter(self._reservation)).cast("B")
            return whole[span.start - memory.address : span.stop - memory.address]

    def ndarray(
        self, dtype: numpy.typing.DTypeLike = "uint8", shape: int | tuple[int, ...] | None = None, *, offset: Size = 0
    ) -> numpy.ndarray[Any, Any]:
        """Return the memory from ``offset`` on as an array, without a copy.

        Args:
            dtype: anything that numpy takes for one, but no Python objects.
            shape: default: one dimension, as many items as fit.
            offset: of the first item, in bytes.
        """
        return self._array(self.view(offset), dtype, shape)

    # --- the object

    def resize(self, size: Size) -> None:
        """Make it longer, up to the reservation. Views that were made before stay valid, and as long as they are.

        Raises:
            ValueError: shorter than it is, or longer than the reservation.
            MappingError: the file behind it is too short, or cannot be made longer.
        """
        wanted = size_of(size, "size")
        memory = self._open_memory()
        rounded = wanted + -wanted % self.block
        self._guard.require_unlocked()
        with self._guard.lock:
            if wanted < self._size and rounded < self._size:
                raise ValueError(f"{wanted} bytes are fewer than the {self._size} that there are: memory only grows")
            if rounded > self._reservation:
                raise ValueError(f"{wanted} bytes are more than the reservation of {self._reservation} bytes")
            if memory.fd is not None and self.backing is not None:
                ensure_length(self.backing, memory.fd, memory.file_offset, rounded, self.page_size)
            if self._guard.protection is None and rounded > self._size:
                mman.mprotect(memory.address + self._size, rounded - self._size, ACCESSIBLE)
            self._size = rounded

    @property
    def reservation(self) -> int:
        """Bytes of addresses that are reserved."""
        return self._reservation

    @property
    def range(self) -> PageRange:
        """The addresses of the memory, as far as its present size."""
        address = self._open_memory().address
        return PageRange(address, address + self._size)

    def __len__(self) -> int:
        """Bytes, in whole blocks."""
        return self._size

    def _borrow(self) -> Borrowed:
        memory = self._open_memory()
        pin = MemoryPin(memory)
        return Borrowed(
            memory.address,
            self._size,
            readonly=False,
            fd=memory.fd,
            # "never" as well: fallocate does not see it, and may bring in 2 MiB for a block of 4 KiB.
            huge=self.huge != "auto",
            access_guard=self._guard,
            pin=pin,
            nodes=() if self._node_policy is None else self._node_policy.bound,
            has_policy=self._node_policy is not None,
        )

    def _open_memory(self) -> OwnedMemory:
        memory = super()._open_memory()
        if not memory.mapped:  # closed by another thread since we looked
            raise ValueError(f"the {self._what} is closed")
        if self._require_here is not None:
            self._require_here()
        return memory

    _what = "sparse memory"

    def __repr__(self) -> str:
        memory = self._memory
        state = "closed" if memory is None else f"at {memory.address:#x}"
        sharing = "shared" if self.shared else "private"
        source = self.backing if self.device is None else self.device
        return (
            f"<SparseMemory of {format_size(self._size)} ({format_size(self._reservation)} reserved), blocks of"
            f" {format_size(self.block)}, {sharing}, {source!r}, {state}>"
        )


class _Closing:
    """Closes the accounting when the memory is unmapped; not the parent's when a forked child closes its own copy."""

    def __init__(self, accounting: Accounting) -> None:
        self._accounting = accounting
        self._process = os.getpid()

    def __call__(self) -> None:
        if os.getpid() == self._process:
            self._accounting.close()


def _before_fork() -> None:
    # What another thread is loading at the moment of the fork would stay locked in the child for ever.
    if threading.active_count() > 1:
        import numpy  # noqa: F401


fork_hooks.register(before=_before_fork)
