"""Area: a part of a device, mapped into this process."""

from __future__ import annotations

import builtins
import errno
import os
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, SupportsIndex

from prefault._kernel import mman
from prefault.device import protocol
from prefault.device.access_log import NAMELESS, AccessLog, Content
from prefault.device.client.fault_descriptor import USER_MODE_ONLY_NOTE
from prefault.device.client.page_provider import AreaPageProvider
from prefault.device.device_pool import Access
from prefault.engine.discarding import DiscardResult, discard
from prefault.engine.locking import LockResult, lock, unlock
from prefault.engine.populating import HeadroomChoice, PopulateResult, Progress, populate
from prefault.engine.rate import RateLimit
from prefault.errors import ProtectionError
from prefault.inspection.result import Residency
from prefault.inspection.scan import residency
from prefault.mapping.mapping import MappedMemory, MemoryPin
from prefault.memory.borrowing import Borrowed
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import Size, format_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing


@dataclass(frozen=True, slots=True)
class AreaStatistics:
    """Counters of the server's work for an area since it was mapped, or for all areas of an object.

    Attributes:
        missing: faults on pages that had to be supplied.
        minor: faults on pages that were supplied already, and were mapped.
        write_protect: first writes to tracked pages, and writes to pages that are being evicted.
        populated_pages: pages that populate mapped.
        supplied_pages: pages that the driver supplied for these areas.
        errors: faults that ended in poison.
        latency: number of faults, by ``n``, that took less than ``2**n`` microseconds in the server, from read to answer.
    """

    missing: int
    minor: int
    write_protect: int
    populated_pages: int
    supplied_pages: int
    errors: int
    latency: tuple[int, ...]

    @classmethod
    def of(cls, found: protocol.Statistics) -> Self:
        """Return the counters in a reply of the server."""
        return cls(
            found.missing, found.minor, found.write_protect, found.populated_pages, found.supplied_pages, found.errors,
            found.latency,
        )  # fmt: skip

    @property
    def faults(self) -> int:
        """Number of page faults of any kind."""
        return self.missing + self.minor + self.write_protect

    def __str__(self) -> str:
        return (
            f"{self.faults} faults ({self.missing} missing, {self.minor} minor, {self.write_protect} write-protect),"
            f" {self.populated_pages} pages populated, {self.supplied_pages} supplied, {self.errors} errors"
        )


class Area(MappedMemory):
    """A part of a device as memory, used by plain loads and stores; the device's server answers the page faults.

    Made by :func:`prefault.device.map` and :meth:`DeviceClient.map`. A context manager. :meth:`close` raises BufferError
    while a view is alive; closing the last area of a private device ends its server. Touching a page that the driver
    cannot supply raises SIGBUS, whereas :meth:`populate` and :meth:`read` raise an exception. A child of fork does not
    inherit the memory: touching it there raises SIGSEGV.

    Attributes:
        device: name of the device.
        object: the object that was mapped by its name; None: a part of the device was mapped.
        offset: offset of the area in the object, or else in the device, bytes.
        page_size: page size of the device, bytes: a fault brings in one page.
        access: the access that the area was mapped with, "read" or "write".
        track_dirty: True if :meth:`dirty_pages` works.
        user_mode_only: True if faults that the kernel itself raises are not answered: see :attr:`notes`.
        populated: result of the populate that :func:`prefault.device.map` was asked for; None without.
    """

    _what = "area"
    _memory: AreaPageProvider | None

    def __init__(self, memory: AreaPageProvider, length: int) -> None:
        """Not public: use :func:`prefault.device.map`."""
        self._memory = memory
        self._length = length
        self.populated: PopulateResult | None = None
        self._connection = connection = memory.connection
        self.device = memory.device_name
        self.object = memory.object
        self._stands_for = memory.stands_for
        self.offset = memory.offset - self._base
        self.page_size = connection.device_info.page_size
        self.access: Access = memory.access
        self.track_dirty = memory.track_dirty
        self.user_mode_only = connection.userfaultfd.user_mode_only

    @property
    def _base(self) -> int:
        """Offset in the device of what is mapped: an object, or the device itself; bytes."""
        return 0 if self.object is None else self.object.offset

    # --- the memory

    @property
    def fd(self) -> int | None:
        """Descriptor of the device's frames, which the connection owns."""
        self._open_memory()
        return self._connection.frames

    @property
    def file_offset(self) -> int:
        """Offset of the area in the file of frames, bytes."""
        return self.offset + self._base

    @property
    def address(self) -> int:
        """Address of the area's first byte."""
        return self._here().address

    @property
    def range(self) -> PageRange:
        """Addresses of the area, rounded outward to whole pages of the device."""
        memory = self._here()
        return PageRange(memory.address, memory.address + memory.mapped)

    @property
    def writable(self) -> bool:
        """True if the area may be written now; :meth:`protect` changes that."""
        return bool(self._here().prot & mman.PROT_WRITE)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that name what is weaker on this machine than usual."""
        own = (USER_MODE_ONLY_NOTE,) if self.user_mode_only else ()
        return self._connection.device_info.notes + own

    def __len__(self) -> int:
        return self._length

    def memoryview(self) -> memoryview:
        """Return a view of the bytes, which pins the memory: :meth:`close` raises BufferError while it is alive."""
        memory = self._here()
        view = memoryview(memory.exporter(self._length)).cast("B")
        return view if memory.prot & mman.PROT_WRITE else view.toreadonly()

    def ndarray(
        self, dtype: numpy.typing.DTypeLike = "uint8", shape: int | tuple[int, ...] | None = None
    ) -> numpy.ndarray[Any, Any]:
        """Return the memory as an array, without a copy.

        Args:
            dtype: any dtype of numpy except Python objects.
            shape: shape of the array; None: one dimension, as many items as fit.
        """
        return self._array(self.memoryview(), dtype, shape)

    def _here(self) -> AreaPageProvider:
        memory = self._memory
        if memory is None:
            raise ValueError("the area is closed")
        memory.require_here()
        return memory

    def release_memory(self) -> AreaPageProvider:
        """Leave the memory to the caller, who unmaps it, and close the area itself."""
        memory = self._here()
        self._memory = None
        return memory

    def _borrow(self) -> Borrowed:
        memory = self._here()
        pin = MemoryPin(memory)
        return Borrowed(memory.address, self._length, readonly=not memory.writable, fd=self._connection.frames, pin=pin)

    # --- the verbs

    def populate(
        self, access: Access | None = None, *, offset: Size = 0, length: Size | None = None, rollback: bool = False,
        progress: Progress | bool = False, rate: RateLimit | Size | None = None, headroom: HeadroomChoice = "check",
    ) -> PopulateResult:  # fmt: skip
        """Have the driver supply all pages in few calls, and map them: :func:`prefault.populate` of this area."""
        return populate(
            self, access=access, offset=offset, length=length, rollback=rollback, progress=progress, rate=rate,
            headroom=headroom,
        )  # fmt: skip

    def discard(self, *, offset: Size = 0, length: Size | None = None) -> DiscardResult:
        """Give pages back, for all clients: :func:`prefault.discard` of this area. Rounds inward to whole pages."""
        return discard(self, offset=offset, length=length)

    def residency(self, *, offset: Size = 0, length: Size | None = None) -> Residency:
        """Return which pages this process has mapped: :func:`prefault.residency` of this area."""
        return residency(self, offset=offset, length=length)

    def lock(
        self, *, access: Access | None = None, offset: Size = 0, length: Size | None = None,
        progress: Progress | bool = False, rate: RateLimit | Size | None = None, headroom: HeadroomChoice = "check",
    ) -> LockResult:  # fmt: skip
        """Populate and lock against swapping: :func:`prefault.lock` of this area. The driver may still evict the pages."""
        return lock(self, access=access, offset=offset, length=length, progress=progress, rate=rate, headroom=headroom)

    def unlock(self, *, offset: Size = 0, length: Size | None = None) -> int:
        """Undo :meth:`lock`: :func:`prefault.unlock` of this area."""
        return unlock(self, offset=offset, length=length)

    def protect(self, access: Literal["none", "read", "write"], *, populate: bool = False) -> PopulateResult | None:
        """Change the protection of the area with mprotect(2), and populate it for the new access if ``populate`` is True.

        Live views keep their own flag of being writable; a write through them then raises SIGSEGV.

        If the call fails, or Ctrl-C stops it, each part of the area gets back the protection that ``/proc/self/maps``
        reported before, even if another thread has changed it since; pages that were populated until then stay. Where the
        kernel refuses to restore it (ENOMEM: differently protected parts are separate mappings, of which a process has
        ``vm.max_map_count`` at most), a note on the exception says so.

        Raises:
            ValueError: "write" on an area that was mapped with ``access="read"``.
            PopulateError: the populate failed, as :meth:`populate` describes.
        """
        memory = self._here()
        self._connection.check()
        prots = {"none": mman.PROT_NONE, "read": mman.PROT_READ, "write": mman.PROT_READ | mman.PROT_WRITE}
        if access not in prots:
            raise ValueError(f"access is 'none', 'read' or 'write', not {access!r}")
        if access == "write" and self.access == "read":
            raise ValueError("the area was mapped for reading: map the device with access='write' to write to it")
        if access == "none" and populate:
            raise ValueError("memory without any access (access='none') cannot be populated")
        pin = MemoryPin(memory)
        before = memory.protections()
        try:
            memory.protect(prots[access])
            return self.populate("write" if access == "write" else "read") if populate else None
        except BaseException as failure:
            try:
                memory.restore_protections(before)
            except OSError as error:
                failure.add_note(
                    f"the protection of the area could not be put back ({error.strerror}): it is {access!r} now"
                )
            raise
        finally:
            pin.release()

    def read(self, offset: Size = 0, length: Size | None = None) -> bytes:
        """Populate bytes, then return a copy: pages that the driver cannot supply raise an exception instead of SIGBUS.

        For a driver that declares population as meaningless (``Device.populates``), the copy touches the pages, and a
        failure is SIGBUS.

        Raises:
            PopulateError: the driver cannot supply a page, or there is no room for it.
            ValueError: the range is not inside the area.
        """
        with self._borrow() as borrowed:
            span = borrowed.select(offset, length)
        start = span.start - borrowed.address
        if self._connection.device_info.populates:
            self.populate("read", offset=start, length=span.stop - span.start)
        elif not self._here().prot & mman.PROT_READ:
            raise ProtectionError(errno.EINVAL, f"the area of {self.device} is not readable: change that with protect()")
        with self.memoryview() as view:
            return bytes(view[start : start + span.stop - span.start])

    def control(self, request: bytes | bytearray | builtins.memoryview, *, timeout: float | None = None) -> bytes:
        """Send the driver a request that is not about memory: :meth:`DeviceClient.control` of the area's device."""
        self._here()
        return self._connection.control(request, timeout)

    # --- records of the server

    def stats(self) -> AreaStatistics:
        """Ask the server for the counters of its work for this area."""
        memory = self._here()
        request = protocol.AskStatistics(self._connection.next_id(), memory.require_number())
        return AreaStatistics.of(self._connection.ask(request, protocol.Statistics))

    def dirty_pages(self, *, clear: bool = False) -> RangeSet:
        """Return the pages that this process wrote since they were supplied, or since the last call with ``clear``.

        The result is byte offsets from the start of the area, in whole pages of the device or smaller. It may include pages
        that were not written (where a crash of the server lost the record), and never omits one that was. Read the bytes of
        the pages *after* the call with ``clear``: writes from then on are in the next result.

        Raises:
            ValueError: the area was mapped without ``track_dirty=True``.
        """
        memory = self._here()
        if not self.track_dirty:
            raise ValueError("writes to this area are not tracked: map it with track_dirty=True")
        if self._connection.kernel_tracks_writes:
            from prefault.device.client.dirty_pages import written_pages

            pin = MemoryPin(memory)
            try:
                return written_pages(memory.address, memory.mapped, clear=clear).shifted(-memory.address)
            finally:
                pin.release()
        request = protocol.DirtyPages(self._connection.next_id(), memory.require_number(), clear)
        unit = self.page_size
        return RangeSet(
            PageRange(first * unit - self.file_offset, last * unit - self.file_offset)
            for first, last in self._connection.ask(request, protocol.Runs).runs
        )

    def access_log(self) -> AccessLog:
        """Ask the server for the pages that were faulted in or populated through this area, first use first.

        The log of an object has its name and length, and offsets from its start; else those of the device.
        """
        return self._here().access_log()

    @property
    def content(self) -> Content:
        """Identity of what is mapped, such as the URL and the version of a remote file."""
        return self._here().content

    @content.setter
    def content(self, content: Content) -> None:
        self._here().content = content

    def fits(self, log: AccessLog) -> bool:
        """Tell whether a log is of what this area maps: device, length and content."""
        memory = self._here()
        return (log.device, log.length) == memory.logged_as and log.content in (NAMELESS, memory.content)

    def replay(self, log: AccessLog) -> PopulateResult:
        """Populate the pages that an access log names, in its order, as far as they lie in this area.

        Raises:
            ValueError: the log is of another device or object, or of one of another length.
            PopulateError: the driver cannot supply a page, or there is no room for it.
        """
        began = perf_counter()
        memory = self._here()
        name, length = memory.logged_as
        if (log.device, log.length) != (name, length):
            raise ValueError(f"the log is of {log.device} of {log.length} bytes, and this is {name} of {length} bytes")
        if not self.fits(log):
            raise ValueError(f"the log is of {_shown(log.content)}, and this is {_shown(memory.content)}")
        stop = self.offset + memory.mapped
        spans: list[tuple[int, int]] = []
        for run in log.runs:
            first = max(run.offset - run.offset % self.page_size, self.offset)
            last = min(run.offset + run.length + -(run.offset + run.length) % self.page_size, stop)
            if first < last:
                spans.append((first - self.offset + memory.address, last - self.offset + memory.address))
        pin = MemoryPin(memory)
        try:
            done = memory.replay(spans)
        finally:
            pin.release()
        took = perf_counter() - began
        return PopulateResult(done.bytes, done.present_bytes, took, "read", "device", done.threads, done.notes)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "an Area cannot be copied or pickled: copy its bytes, or map the device in the other process as well"
            " (prefault.device.serve there or here, and prefault.device.connect)"
        )

    def __repr__(self) -> str:
        memory = self._memory
        if memory is None:
            state = "closed"
        elif memory.pid != os.getpid():
            state = "of the process that this one is a fork of"
        else:
            state = f"at {memory.address:#x}"
        what = self.device if self.object is None or self._stands_for else f"object {self.object.name!r} of {self.device}"
        return f"<Area of {what}, {format_size(self._length)} from {self.offset} on, {self.access}, {state}>"


def _shown(content: Content) -> str:
    return f"{content.source} ({content.version or 'of no known version'})" if content.source else "content without a name"
