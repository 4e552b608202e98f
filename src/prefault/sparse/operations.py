"""The operations of sparse memory: charges and protection around each populate and discard.

A populate call waits until no other operation works on its blocks, has them charged, unprotects them, and if it fails undoes
all of that.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from types import TracebackType

from prefault.engine.discarding import drop
from prefault.errors import DiscardError
from prefault.inspection.mincore import resident
from prefault.inspection.result import PageState
from prefault.inspection.scan import residency_of
from prefault.intervals import Intervals
from prefault.memory.borrowing import AccessGuard, Span
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB
from prefault.sparse.accounting import Accounting
from prefault.sparse.exclusion import BlockGuard, Operation
from prefault.sparse.protection import BlockProtection, BlocksByExtent

_STEP = 64 * MIB
_AT_ONCE = 1024
"""Number of ranges that are protected while the lock is held."""


class Populating(Operation):
    """Around populating; see :meth:`prefault.memory.borrowing.AccessGuard.populating`."""

    _charging = False
    _charged = RangeSet()

    def __enter__(self) -> Populating:
        self._unprotected: BlocksByExtent = {}
        self._begin()
        return self

    def admit(self) -> Intervals:
        """See :class:`~prefault.memory.borrowing.GuardedPopulate`."""
        guard = self._guard
        if guard.accounting is not None:
            self._charge(guard.accounting)
        if guard.protection is None:
            return Intervals()
        guard.require_unlocked()
        with guard.lock:
            self._unprotected = guard.protection.protected_among(guard.protection.by_extent(self.blocks))
            guard.protection.unprotect(self._unprotected)
        return Intervals.union_of(self._unprotected.values()).shifted(guard.address)

    def _charge(self, accounting: Accounting) -> None:
        self._charging = True
        try:
            self._charged = accounting.charge(_pages(self.blocks))
        except Exception:
            self._charging = False  # nothing was charged
            raise
        self._charging = False

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind is None and self._running:
            self._unprotected, self._charged = {}, RangeSet()
            self._end()
        else:
            self.abandon()

    def _undo(self) -> None:
        guard = self._guard
        if self._unprotected and guard.protection is not None:
            guard.require_unlocked()
            with guard.lock:
                guard.protection.protect(self._unprotected)
            self._unprotected = {}
        if guard.accounting is not None:
            # Ctrl-C may come between the charge and its being noted, or when all is populated: only blocks without a page
            # need not be charged.
            empty = _pages(_without_pages(guard, self.blocks))
            charged = empty if self._charging else self._charged & empty
            if charged:
                guard.accounting.refund(charged)
            self._charging, self._charged = False, RangeSet()


class Discarding(Operation):
    """Around discarding; see :meth:`prefault.memory.borrowing.AccessGuard.discarding`."""

    _protected = False
    """True once all blocks are protected for good."""
    _punches = False
    """True if guards that are installed already may be lost: see :meth:`BlockProtection.protect`."""

    def __enter__(self) -> Span:
        self._begin()
        protection = self._guard.protection
        if self.blocks and protection is not None:
            try:
                self._protect_first(protection)
            except BaseException as error:
                self._stopped(error)
                raise
        return self.span

    def _protect_first(self, protection: BlockProtection) -> None:
        self._suspend(protection, self.blocks)

    def _suspend(self, protection: BlockProtection, blocks: Intervals) -> None:
        self._guard.require_unlocked()
        with self._guard.lock:
            protection.suspend(protection.by_extent(blocks))

    def _protect(self, protection: BlockProtection) -> None:
        for some in self.blocks.batches(_AT_ONCE):
            self._guard.require_unlocked()
            with self._guard.lock:
                protection.protect(protection.by_extent(some))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stopped(error)
            return
        try:
            if self._running:
                self._finish(self.blocks)
                self._end()
        except BaseException as failure:
            self._stopped(failure)
            raise

    def _stopped(self, error: BaseException) -> None:
        """Undo, and raise what the refusal of the kernel to protect or to discard blocks means."""
        with contextlib.suppress(OSError):  # for the same reason; the first error is the one to report
            self.abandon()
        if isinstance(error, OSError) and not isinstance(error, DiscardError):
            offset = self.blocks.span[0]
            room = (
                " (no room for page tables, or for another mapping: vm.max_map_count)" if error.errno == errno.ENOMEM else ""
            )
            raise DiscardError(
                error.errno or 0, f"cannot discard blocks from offset {offset} on: {error.strerror}{room}",
                address=self._guard.address + offset,
            ) from error  # fmt: skip

    def _undo(self) -> None:
        # It stopped in the middle: blocks without a page are gone, the others are as before.
        self._finish(_without_pages(self._guard, self.blocks))

    def _finish(self, gone: Intervals) -> None:
        """Take discarded blocks from the file, protect them and have them refunded; the other blocks are as before."""
        guard = self._guard
        if guard.scratch_file is not None:
            for start, stop in gone:
                guard.punch(guard.address + start, stop - start)
        if guard.protection is not None and not self._protected:
            guard.require_unlocked()
            with guard.lock:
                blocks = guard.protection.by_extent(self.blocks)
                guard.protection.protect(blocks if gone is self.blocks else guard.protection.by_extent(gone))
                guard.protection.resume(blocks)
        elif guard.protection is not None and self._punches:
            self._protect(guard.protection)  # again: see BlockProtection.protect
        if guard.accounting is not None and gone:
            guard.accounting.refund(_pages(gone))


class DiscardingMany(Discarding):
    """Around discarding many ranges: private memory under protection is given back on entering, as guards do that anyway.

    ``punches``: holes are punched into a file, or a device's frames, while the blocks are protected.
    """

    def __init__(self, guard: BlockGuard, blocks: Intervals, *, punches: bool) -> None:
        super().__init__(guard, blocks)
        self._punches = punches or guard.memory_file is not None
        self.refused = Intervals()
        """Blocks that a device has not taken back when the operation ends early: they become accessible again."""

    def _undo(self) -> None:
        self._finish(_without_pages(self._guard, self.blocks) - self.refused)
        protection = self._guard.protection
        if protection is not None and self.refused:
            self._guard.require_unlocked()
            with self._guard.lock:
                # Without page-table entries by now: the next touch maps the page that the device still has.
                protection.unprotect(protection.protected_among(protection.by_extent(self.refused)))

    def _protect_first(self, protection: BlockProtection) -> None:
        # Giving back much takes long, so not while holding the lock.
        for start, stop in self.blocks.longer(_STEP // 16):
            self._suspend(protection, Intervals([(start, stop)]))
            for part in PageRange(start, stop).shifted(self._guard.address).chunks(_STEP):
                drop(part.start, part.length)
        self._protect(protection)
        self._protected = True


class SparseAccessGuard(BlockGuard, AccessGuard):
    """The access guard of one sparse memory: every populate and discard of it is one of its operations."""

    def populating(self, span: Span) -> Populating:
        """See :class:`~prefault.memory.borrowing.AccessGuard`."""
        return Populating(self, *self._blocks(span, PageRange.outward))

    def discarding(self, span: Span) -> Discarding:
        """See :class:`~prefault.memory.borrowing.AccessGuard`."""
        return Discarding(self, *self._blocks(span, PageRange.inward))

    def _blocks(self, span: Span, round_to: Callable[[int, int, int], PageRange]) -> tuple[Intervals, Span]:
        """Return the blocks of a span as offsets, and as addresses: a span also where it is empty."""
        start, stop = round_to(span.start - self.address, span.stop - self.address, self.block)
        return Intervals([(start, stop)]), Span(self.address + start, self.address + stop)


def _without_pages(guard: BlockGuard, blocks: Intervals) -> Intervals:
    """Return the blocks without a single page, not even in the file."""
    found: list[Intervals] = []
    for start, stop in blocks:
        span = PageRange(guard.address + start, guard.address + stop)
        there = [r for r in residency_of(span).runs if r.state & (PageState.PRESENT | PageState.SWAPPED)]
        pages = RangeSet(PageRange(r.start, r.stop) for r in there)
        if guard.memory_file is not None:
            pages |= resident(span)
        found.append(Intervals([(start, stop)]) - pages.shifted(-guard.address).outward(guard.block))
    return Intervals.union_of(found)


def _pages(blocks: Intervals) -> RangeSet:
    return RangeSet.from_edges(blocks.edges)
