"""The page provider of device memory: populate, replay, discard and protect of an area, as requests to the server."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from prefault._kernel import mman
from prefault.device import protocol
from prefault.device.client.exchange import Exchange
from prefault.device.client.mapped_area import MappedArea
from prefault.device.device_pool import Access
from prefault.errors import (
    DeviceGoneError,
    DiscardError,
    HeadroomError,
    NoPopulateError,
    PopulateError,
    PopulateInterrupted,
    ProtectionError,
)
from prefault.inspection.scan import populated_before
from prefault.intervals import Intervals
from prefault.memory.borrowing import ProvidedPages, Span
from prefault.memory.vma import vmas
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE, format_size

_CANCEL_S = 5.0
"""Seconds to wait for the answer to a cancelled populate: a driver call that is under way ends first."""

_POISON_TRIES = 4

_REPLAYED_RUNS = 64
"""Runs of an access log in one request."""


class Protections(NamedTuple):
    """Protection of an area: PROT_* of the whole as :meth:`Area.protect` set it, and of its parts as the kernel reports."""

    prot: int
    parts: tuple[tuple[PageRange, int], ...]


class AreaPageProvider(MappedArea):
    """Memory of an area whose pages the device's driver supplies."""

    def protections(self) -> Protections:
        """Return the protection of the area and of its parts now."""
        stop = self.address + self.mapped
        return Protections(
            self.prot,
            tuple(
                (
                    PageRange(max(vma.start, self.address), min(vma.stop, stop)),
                    (mman.PROT_READ if vma.readable else 0) | (mman.PROT_WRITE if vma.writable else 0),
                )
                for vma in vmas(self.address, stop)
            ),
        )

    def protect(self, prot: int) -> None:
        """Call mprotect(2) on the whole area."""
        mman.mprotect(self.address, self.mapped, prot)
        self.prot = prot

    def restore_protections(self, before: Protections) -> None:
        """Restore what :meth:`protections` returned."""
        for part, prot in before.parts:
            mman.mprotect(part.start, part.length, prot)
        self.prot = before.prot

    @property
    def writable(self) -> bool:
        """See :class:`~prefault.memory.borrowing.PageProvider`."""
        return bool(self.prot & mman.PROT_WRITE)

    def populate(
        self, pages: Intervals, origin: int, access: Literal["read", "write"], *, rollback: bool,
        progress: Callable[[int, int], None] | None, check_headroom: bool,
    ) -> ProvidedPages:  # fmt: skip
        """Populate the device's pages at these addresses; see :class:`~prefault.memory.borrowing.PageProvider`."""
        whole = pages.shifted(-self.address).outward(self.connection.device_info.page_size).shifted(self.address)
        start, stop = whole.span
        job = _PopulateCall(self, start, stop, origin, access, rollback=rollback, progress=progress, headroom=check_headroom)
        return job.run(whole)

    def replay(self, spans: Iterable[tuple[int, int]]) -> ProvidedPages:
        """Populate spans (addresses of whole pages of the device) readable, in the order that they are given in."""
        job = _PopulateCall(
            self, self.address, self.address + self.mapped, self.address, "read",
            rollback=False, progress=None, headroom=True,
        )  # fmt: skip
        # The server takes the runs of one request in the order of their addresses.
        return job.run(spans, _REPLAYED_RUNS)

    def discard(self, span: Span) -> tuple[int, int]:
        """Give the device's pages inside a span back; see :class:`~prefault.memory.borrowing.PageProvider`."""
        self.connection.check()
        unit = self.connection.device_info.page_size
        start = span.start + (self.address - span.start) % unit
        # No other area maps the rest of the last page of the device, or of an object; the rest of a page inside, one may.
        end = self.connection.device_info.length if self.object is None else self.object.offset + self.object.length
        at_end = span.stop == self.address + self.length and self.offset + self.length == end
        stop = self.address + self.mapped if at_end else span.stop - (span.stop - self.address) % unit
        if stop <= start:
            return 0, 0
        request = protocol.Discard(self.connection.next_id(), self.require_number(), self.page_at(start), self.page_at(stop))
        try:
            pages = self.connection.ask(request, protocol.Discarded).pages
            if not (self.track_dirty and self.connection.kernel_tracks_writes):  # whose marks would go as well
                self._drop_entries(start, stop - start)
            return stop - start, pages * unit
        except DeviceGoneError:
            raise
        except (OSError, ValueError) as error:
            number = (error.errno if isinstance(error, OSError) else None) or errno.EINVAL
            text = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise DiscardError(number, text, address=start) from error

    def _drop_entries(self, start: int, length: int) -> None:
        """Drop the entries of poisoned pages, which punching leaves."""
        try:
            mman.madvise(start, length, mman.MADV_DONTNEED)
        except OSError as error:
            if error.errno != errno.EINVAL:  # locked
                raise
            with contextlib.suppress(OSError):  # before Linux 5.18 they stay
                mman.madvise(start, length, mman.MADV_DONTNEED_LOCKED)


class _PopulateCall:
    """A populate call in progress: asks the server for absent pages, accounts for them and explains failures."""

    def __init__(
        self, memory: AreaPageProvider, start: int, stop: int, origin: int, access: Access, *, rollback: bool,
        progress: Callable[[int, int], None] | None, headroom: bool,
    ) -> None:  # fmt: skip
        self._memory = memory
        self._connection = memory.connection
        self._start, self._stop = start, stop
        self._origin = origin
        self._access = access
        self._rollback = rollback
        self._progress = progress
        self._headroom = headroom
        self._done: list[PageRange] = []
        self._supplied: list[protocol.Run] = []
        self._done_bytes = 0
        self._total = 0
        self._threads = 1
        self._whole: tuple[protocol.Run, ...] = ()

    def run(self, spans: Iterable[tuple[int, int]], most_runs: int = protocol.MAX_RUNS) -> ProvidedPages:
        self._connection.check()
        self._check_permitted()
        wanted: list[protocol.Run] = []
        whole: list[protocol.Run] = []
        for start, stop in spans:
            self._total += stop - start
            wanted += self._lacking(start, stop)
            whole.append((self._memory.page_at(start), self._memory.page_at(stop)))
        if most_runs == protocol.MAX_RUNS >= len(whole):  # else they are scattered, or replayed in their order
            self._whole = tuple(whole)
        lacking = sum(last - first for first, last in wanted) * self._unit
        self._done_bytes = present = max(0, self._total - lacking)
        for index in range(0, len(wanted), most_runs):
            self._populate_runs(wanted[index : index + most_runs])
        notes = self._collapse(wanted)
        return ProvidedPages(lacking, present, self._threads, notes, RangeSet(self._done), self._undo)

    @property
    def _unit(self) -> int:
        return self._connection.device_info.page_size

    def _check_permitted(self) -> None:
        """Refuse what this process knows to be impossible, without a request."""
        name = self._memory.device_name
        needed = mman.PROT_WRITE if self._access == "write" else mman.PROT_READ
        if not self._memory.prot & needed:
            how = "writable" if self._access == "write" else "readable"
            raise ProtectionError(
                errno.EINVAL, f"the area of {name} is not {how}: ask for access='read', or change it with protect()",
                 address=self._start, offset=max(0, self._start - self._origin),
            )  # fmt: skip
        if not self._connection.device_info.populates:
            raise NoPopulateError(
                errno.EOPNOTSUPP, f"the driver of {name} declares population as meaningless: its pages come when they are"
                " touched", address=self._start, offset=max(0, self._start - self._origin),
            )  # fmt: skip

    def _lacking(self, start: int, stop: int) -> list[protocol.Run]:
        """Return the runs of the device's pages that the page table lacks."""
        memory, unit = self._memory, self._unit
        present = populated_before(start, stop, write=self._access == "write", private=False)
        lacking = (Intervals([(start, stop)]) - present).shifted(memory.offset - memory.address).outward(unit)
        return [(first // unit, last // unit) for first, last in lacking]

    # --- requests

    def _populate_runs(self, runs: list[protocol.Run]) -> None:
        """Populate as many runs as one message holds."""
        wanted = runs
        for _ in range(_POISON_TRIES):
            reply = self._ask(wanted)
            if isinstance(reply, protocol.Failed):
                raise self._failed(reply)
            self._threads = max(self._threads, reply.threads)
            self._supplied += reply.supplied
            if not reply.poisoned:
                break
            # The driver failed there once, and has supplied the pages since. Only this process can drop its poison entries.
            for first, last in reply.poisoned:
                self._drop(self._range(first, last))
            wanted = list(reply.poisoned)
        else:
            first = wanted[0][0]
            raise self._error(PopulateError, mman.EHWPOISON, first, "the page is poisoned again as soon as it is supplied")
        for first, last in runs:
            self._done.append(self._range(first, last))
            self._done_bytes += (last - first) * self._unit
        self._report(0)

    def _ask(self, runs: list[protocol.Run]) -> protocol.Populated | protocol.Failed:
        request = protocol.Populate(
            self._connection.next_id(), self._memory.require_number(), tuple(runs), self._access, self._rollback,
            self._progress is not None, self._headroom, self._whole,
        )  # fmt: skip
        try:
            with self._connection.asking(request) as exchange:
                try:
                    self._connection.wait(exchange, progress=self._report)
                except (DeviceGoneError, RuntimeError):
                    raise
                except BaseException as interruption:  # Ctrl-C, or what the caller's progress function raised
                    self._interrupted(interruption, exchange, runs)
                    raise
        except DeviceGoneError as gone:
            kept = self._kept(self._present(runs))
            raise DeviceGoneError(
                gone.errno or errno.ENOTCONN, gone.strerror or str(gone), address=self._start,
                offset=max(0, self._start - self._origin), populated=kept,
            ) from None  # fmt: skip
        reply = exchange.reply
        if isinstance(reply, protocol.Populated | protocol.Failed):
            return reply
        if isinstance(reply, protocol.Refused):
            raise protocol.error_of(reply)
        raise DeviceGoneError(errno.EPROTO, f"the device's server answered a Populate with a {type(reply).__name__}")

    def _report(self, pages: int) -> None:
        if self._progress is not None:
            self._progress(min(self._total, self._done_bytes + pages * self._unit), self._total)

    # --- failures

    def _failed(self, failed: protocol.Failed) -> BaseException:
        mapped = RangeSet(self._range(first, last) for first, last in failed.mapped)
        kept = self._kept(mapped)
        if failed.kind == "cancelled":
            return PopulateInterrupted(f"cancelled: {self._outcome(kept)}", kept)
        if failed.kind == "headroom":
            message = self._message(failed.page, failed.message, kept)
            address = self._memory.address_of(failed.page)
            return HeadroomError(
                failed.number or errno.ENOMEM, message, address=address, offset=self._offset(failed.page), populated=kept,
                limit=failed.limit, needed_bytes=failed.needed_bytes, available_bytes=failed.available_bytes,
            )  # fmt: skip
        return self._error(protocol.FAILURES[failed.kind], failed.number or errno.EIO, failed.page, failed.message, kept)

    def _error(
        self, kind: type[PopulateError], number: int, page: int, what: str, kept: RangeSet | None = None
    ) -> PopulateError:
        kept = self._kept(RangeSet()) if kept is None else kept
        address = self._memory.address_of(page)
        message = self._message(page, what, kept)
        return kind(number, message, address=address, offset=self._offset(page), populated=kept)

    def _message(self, page: int, what: str, kept: RangeSet) -> str:
        memory = self._memory
        first = memory.object.offset // self._unit if memory.stands_for and memory.object else 0
        where = f"offset {self._offset(page)} (page {page - first} of the device)"
        return f"{memory.device_name} cannot supply the page at {where}: {what}; {self._outcome(kept)}"

    def _offset(self, page: int) -> int:
        """Return the offset in the caller's buffer of its first byte on that page."""
        return max(0, self._memory.address_of(page) - self._origin)

    def _outcome(self, kept: RangeSet) -> str:
        undone = ", the rest given back" if self._rollback else ""
        return f"{format_size(kept.length)} of {format_size(self._total)} populated{undone}"

    def _interrupted(self, interruption: BaseException, exchange: Exchange, runs: list[protocol.Run]) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the wait for the answer
            self._connection.cancel(exchange, _CANCEL_S)
        reply = exchange.reply
        if isinstance(reply, protocol.Failed):
            mapped = RangeSet(self._range(first, last) for first, last in reply.mapped)
        else:
            mapped = self._present(runs)
            if self._rollback:
                for pages in mapped:
                    self._drop(pages)
                mapped = RangeSet()
        kept = self._kept(mapped)
        if isinstance(interruption, KeyboardInterrupt):
            raise PopulateInterrupted(f"interrupted: {self._outcome(kept)}", kept) from None
        interruption.add_note(f"populate was stopped: {self._outcome(kept)}")

    def _present(self, runs: list[protocol.Run]) -> RangeSet:
        """Return what the page table has by now of pages that it lacked."""
        ranges = [self._range(first, last) for first, last in runs]
        return RangeSet.union_of(populated_before(pages.start, pages.stop, write=False, private=False) for pages in ranges)

    def _kept(self, mapped: RangeSet) -> RangeSet:
        """Return what this call mapped and what stays: finished runs and ``mapped``. Roll the former back if asked."""
        if self._rollback:
            self._undo()
        return RangeSet(self._done) | mapped

    def _undo(self) -> None:
        """Drop the pages of finished requests, and give those back that were supplied for them. Idempotent."""
        for pages in self._done:
            self._drop(pages)
        self._done.clear()
        supplied, number = self._supplied, self._memory.number
        while supplied and number is not None:
            runs = tuple(supplied[: protocol.MAX_RUNS])
            request = protocol.Undo(self._connection.next_id(), number, runs)
            try:
                self._connection.ask(request, protocol.Done)
            except (OSError, ValueError):  # the server is gone, or the area closed: nobody is left to give them to
                return
            del supplied[: len(runs)]

    def _drop(self, pages: PageRange) -> None:
        """Drop pages from this process's page table."""
        mman.madvise(pages.start, pages.length, mman.MADV_DONTNEED)

    def _range(self, first: int, last: int) -> PageRange:
        return PageRange(self._memory.address_of(first), self._memory.address_of(last))

    # --- huge pages

    def _collapse(self, runs: list[protocol.Run]) -> tuple[str, ...]:
        """Collapse runs of 2 MiB device pages in small frames into huge pages; return a note where that was refused."""
        if self._unit == PAGE_SIZE or self._connection.device_info.huge or not runs:
            return ()
        if self._memory.write_protects:
            return ("mapped in small pages: write-protected memory cannot be collapsed into huge ones",)
        for first, last in runs:
            pages = self._range(first, last)
            try:
                mman.madvise(pages.start, pages.length, mman.MADV_COLLAPSE)
            except OSError as error:
                # EINVAL: no such advice (before Linux 6.1), or huge pages are denied for shared memory. ENOMEM, EBUSY and
                # EAGAIN are temporary. The populate succeeded all the same.
                if error.errno not in (errno.EINVAL, errno.ENOMEM, errno.EBUSY, errno.EAGAIN):
                    raise
                reason = os.strerror(error.errno)
                return (f"mapped in small pages: MADV_COLLAPSE refused to make huge ones of them ({reason})",)
        return ()
