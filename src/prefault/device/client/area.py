"""An area: a part of a device, mapped into this process."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NoReturn, SupportsIndex

from prefault._kernel import mman
from prefault.device import protocol
from prefault.device.access_log import AccessLog, LoggedRun
from prefault.device.client.fault_descriptor import USER_MODE_ONLY_NOTE
from prefault.device.client.page_provider import AreaPageProvider
from prefault.device.driver import Access
from prefault.engine.discarding import DiscardResult, discard
from prefault.engine.locking import LockResult, lock, unlock
from prefault.engine.populating import HeadroomChoice, PopulateResult, Progress, populate
from prefault.errors import ProtectionError
from prefault.inspection.scan import Residency, residency
from prefault.mapping.mapping import MappedMemory, MemoryPin
from prefault.memory.borrowing import Borrowed
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import Size, format_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing


@dataclass(frozen=True, slots=True)
class AreaStatistics:
    """What the server did for an area since it was mapped.

    Attributes:
        missing: faults on pages that had to be supplied.
        minor: faults on pages that were supplied already, and were mapped.
        write_protect: first writes to pages that are tracked, and writes to pages that are being evicted.
        populated_pages: pages that populate mapped.
        supplied_pages: pages that the driver supplied for this area.
        errors: faults that ended in poison.
        latency: how many faults took less than ``2**n`` microseconds in the server, from reading to answering, by ``n``.
    """

    missing: int
    minor: int
    write_protect: int
    populated_pages: int
    supplied_pages: int
    errors: int
    latency: tuple[int, ...]

    @property
    def faults(self) -> int:
        """Page faults of any kind."""
        return self.missing + self.minor + self.write_protect

    def __str__(self) -> str:
        return (
            f"{self.faults} faults ({self.missing} missing, {self.minor} minor, {self.write_protect} write-protect),"
            f" {self.populated_pages} pages populated, {self.supplied_pages} supplied, {self.errors} errors"
        )


class Area(MappedMemory):
    """A part of a device as memory: plain loads and stores, whose page faults the device's server answers.

    Made by :func:`prefault.device.map` and :meth:`DeviceClient.map`. A context manager; :meth:`close` refuses (BufferError)
    while a view is alive, and the last area of a private device ends its server. A page that the driver cannot supply
    is a SIGBUS for whoever touches it, and an exception for :meth:`populate` and :meth:`read`. A child of fork has none of
    it: touching it there is a SIGSEGV.

    Attributes:
        device: the name of the device.
        offset: where in the device it starts, bytes.
        page_size: what one fault brings in, bytes.
        access: what it was mapped for.
        track_dirty: whether :meth:`dirty_pages` works.
        user_mode_only: see :attr:`notes`.
        populated: what was populated when it was mapped, if that was asked for.
    """

    _what = "area"
    _memory: AreaPageProvider | None

    def __init__(self, memory: AreaPageProvider, length: int) -> None:
        """Not for users."""
        self._memory = memory
        self._length = length
        self.populated: PopulateResult | None = None
        self._link = link = memory.link
        self.device = link.facts.name
        self.offset = memory.offset
        self.page_size = link.facts.page_size
        self.access: Access = memory.access
        self.track_dirty = memory.track_dirty
        self.user_mode_only = link.userfaultfd.user_mode_only

    # --- the memory

    @property
    def fd(self) -> int | None:
        """The descriptor of the device's frames, which belongs to the connection."""
        self._open_memory()
        return self._link.frames

    @property
    def file_offset(self) -> int:
        """Where in the frames it starts, in bytes."""
        return self.offset

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self._here().address

    @property
    def range(self) -> PageRange:
        """The addresses, in whole pages of the device."""
        memory = self._here()
        return PageRange(memory.address, memory.address + memory.mapped)

    @property
    def writable(self) -> bool:
        """Whether it may be written now."""
        return bool(self._here().prot & mman.PROT_WRITE)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is weaker here than one might expect."""
        own = (USER_MODE_ONLY_NOTE,) if self.user_mode_only else ()
        return self._link.facts.notes + own

    def __len__(self) -> int:
        return self._length

    def memoryview(self) -> memoryview:
        """The bytes. It keeps the memory; :meth:`close` refuses while it lives."""
        memory = self._here()
        view = memoryview(memory.exporter(self._length)).cast("B")
        return view if memory.prot & mman.PROT_WRITE else view.toreadonly()

    def ndarray(
        self, dtype: numpy.typing.DTypeLike = "uint8", shape: int | tuple[int, ...] | None = None
    ) -> numpy.ndarray[Any, Any]:
        """The memory as an array, without a copy.

        Args:
            dtype: anything that numpy takes for one, but no Python objects.
            shape: default: one dimension, as many items as fit.
        """
        return self._array(self.memoryview(), dtype, shape)

    def _here(self) -> AreaPageProvider:
        memory = self._memory
        if memory is None:
            raise ValueError("the area is closed")
        if memory.pid != os.getpid():
            self._link.check()  # raises: a fork
        return memory

    def _borrow(self) -> Borrowed:
        memory = self._here()
        pin = MemoryPin(memory)
        return Borrowed(
            memory.address, self._length, readonly=not memory.prot & mman.PROT_WRITE, fd=self._link.frames,
            page_provider=memory, pin=pin,
        )  # fmt: skip

    # --- the verbs

    def populate(
        self, access: Access | None = None, *, offset: Size = 0, length: Size | None = None, rollback: bool = False,
        progress: Progress | bool = False, headroom: HeadroomChoice = "check",
    ) -> PopulateResult:  # fmt: skip
        """Have the driver supply all pages, in few calls, and map them: :func:`prefault.populate` of this area."""
        return populate(
            self, access=access, offset=offset, length=length, rollback=rollback, progress=progress, headroom=headroom
        )

    def discard(self, *, offset: Size = 0, length: Size | None = None) -> DiscardResult:
        """Give pages back to the device, for all who map it: :func:`prefault.discard`. Inward to whole pages."""
        return discard(self, offset=offset, length=length)

    def residency(self, *, offset: Size = 0, length: Size | None = None) -> Residency:
        """What this process has mapped: :func:`prefault.residency`."""
        return residency(self, offset=offset, length=length)

    def lock(
        self, *, access: Access | None = None, offset: Size = 0, length: Size | None = None,
        progress: Progress | bool = False, headroom: HeadroomChoice = "check",
    ) -> LockResult:  # fmt: skip
        """Populate it, and keep it from being swapped out: :func:`prefault.lock`. A driver may evict it all the same."""
        return lock(self, access=access, offset=offset, length=length, progress=progress, headroom=headroom)

    def unlock(self, *, offset: Size = 0, length: Size | None = None) -> int:
        """The end of :meth:`lock`: :func:`prefault.unlock`."""
        return unlock(self, offset=offset, length=length)

    def protect(self, access: Literal["none", "read", "write"], *, populate: bool = False) -> PopulateResult | None:
        """Change what may be done with the memory, with mprotect(2), and populate it for that.

        Views that are alive keep their own notion of being writable; a write through them is then a SIGSEGV.

        If it fails, or Ctrl-C stops it, the protection is put back to what each part of the area had, as
        ``/proc/self/maps`` told before; pages that were populated until then stay. What other threads protect meanwhile is
        put back as well. Where the kernel refuses to put it back (ENOMEM: parts of an area that was protected in parts are
        mappings of their own, of which a process has ``vm.max_map_count`` at most), a note on the exception says so.

        Raises:
            ValueError: "write" on an area that was mapped with ``access="read"``.
            PopulateError: as :meth:`populate`.
        """
        memory = self._here()
        self._link.check()
        prots = {"none": mman.PROT_NONE, "read": mman.PROT_READ, "write": mman.PROT_READ | mman.PROT_WRITE}
        if access not in prots:
            raise ValueError(f"access is 'none', 'read' or 'write', not {access!r}")
        if access == "write" and self.access == "read":
            raise ValueError("the area was mapped for reading: map the device with access='write' to write to it")
        if access == "none" and populate:
            raise ValueError("memory that nobody may access cannot be populated")
        pin = MemoryPin(memory)
        before = memory.protections()
        try:
            memory.protect(prots[access])
            return self.populate("write" if access == "write" else "read") if populate else None
        except BaseException as failure:
            try:
                memory.put_back(before)
            except OSError as error:
                failure.add_note(
                    f"the protection of the area could not be put back ({error.strerror}): it is {access!r} now"
                )
            raise
        finally:
            pin.release()

    def read(self, offset: Size = 0, length: Size | None = None) -> bytes:
        """A copy of bytes, populated first: what the driver cannot supply is an exception and no SIGBUS.

        Not so for a driver that declares population as meaningless (``Device.populates``): the copy then touches the pages.

        Raises:
            PopulateError: as :meth:`populate`.
            ValueError: outside of the area.
        """
        with self._borrow() as borrowed:
            span = borrowed.select(offset, length)
        start = span.start - borrowed.address
        if self._link.facts.populates:
            self.populate("read", offset=start, length=span.stop - span.start)
        elif not self._here().prot & mman.PROT_READ:
            raise ProtectionError(errno.EINVAL, f"the area of {self.device} is not readable: change that with protect()")
        with self.memoryview() as view:
            return bytes(view[start : start + span.stop - span.start])

    # --- what the server knows

    def stats(self) -> AreaStatistics:
        """What the server did for this area so far."""
        memory = self._here()
        request = protocol.AskStatistics(self._link.next_id(), memory.numbered())
        found = self._link.ask(request, protocol.Statistics)
        return AreaStatistics(
            found.missing, found.minor, found.write_protect, found.populated_pages, found.supplied_pages, found.errors,
            found.latency,
        )  # fmt: skip

    def dirty_pages(self, *, clear: bool = False) -> RangeSet:
        """The pages that this process wrote since they were filled in, or since the last time with ``clear``.

        As byte offsets from the start of the area, in whole pages of the device or smaller. A page may be told that was not
        written, where the kernel or a server that died lost count; never the other way round. The bytes of
        a page are to be read *after* this call with ``clear``: what is written meanwhile is told the next time.

        Raises:
            ValueError: the area was mapped without ``track_dirty=True``.
        """
        memory = self._here()
        if not self.track_dirty:
            raise ValueError("nobody tracks writes to this area: map it with track_dirty=True")
        if self._link.tracks_by_itself:
            from prefault.device.client.dirty_pages import written

            pin = MemoryPin(memory)
            try:
                return written(memory.address, memory.mapped, clear=clear).shifted(-memory.address)
            finally:
                pin.release()
        request = protocol.DirtyPages(self._link.next_id(), memory.numbered(), clear)
        unit = self.page_size
        return RangeSet(
            PageRange(first * unit - self.offset, last * unit - self.offset) for first, last in self._link.ask_runs(request)
        )

    def access_log(self) -> AccessLog:
        """What was asked for of this area, by fault or populate, in order."""
        memory = self._here()
        runs = self._link.ask_runs(protocol.AskLog(self._link.next_id(), memory.numbered()))
        unit = self.page_size
        logged = tuple(LoggedRun(first * unit, (last - first) * unit) for first, last in runs)
        return AccessLog(self.device, self._link.facts.length, logged)

    def replay(self, log: AccessLog) -> PopulateResult:
        """Populate what an earlier run asked for, in its order, as far as it lies in this area.

        Raises:
            ValueError: the log is of another device, or of one of another length.
            PopulateError: as :meth:`populate`.
        """
        began = perf_counter()
        memory = self._here()
        if (log.device, log.length) != (self.device, self._link.facts.length):
            raise ValueError(
                f"the log is of {log.device} of {log.length} bytes, and this is {self.device} of"
                f" {self._link.facts.length} bytes"
            )
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
        return f"<Area of {self.device}, {format_size(self._length)} from {self.offset} on, {self.access}, {state}>"
