"""Who is at work on which blocks: what stands before sparse memory, whichever way its pages come and go.

A populate call passes through here: it waits until nobody else is at work on its blocks, has them charged, opens their
fences, and if it fails all of that is taken back. The lock is held for the books only, never while memory is populated or
discarded.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault._system import fork_hooks
from prefault.engine.discarding import drop
from prefault.errors import DiscardError
from prefault.inspection.scan import PageState, residency_of, resident
from prefault.memory.borrowing import AccessGuard, Span
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB
from prefault.sparse.accounting import Accounting
from prefault.sparse.protection import BlockProtection, Edges

if TYPE_CHECKING:
    from prefault.sparse.range_arguments import Numbers

_STEP = 64 * MIB
_AT_ONCE = 2048  # edges

_PATIENCE_S = 1.0
"""How often a waiting thread looks again: another that waits may have been stopped just when it would let us go."""


class SparseAccessGuard(AccessGuard):
    """The gate of one sparse memory.

    Args:
        address: of its first byte.
        block: bytes; everything here is in whole blocks, as offsets.
        fence: None where what is not populated reads as zeros.
        books: to be charged; None without a pool.
        memory_file: a descriptor of the file that discarded blocks are taken from, a memory file that is mapped shared.
        scratch_file: the same of a file on a disk that only this memory uses: its discarded blocks become holes.
        file_offset: of the first byte in these files.
    """

    def __init__(
        self,
        address: int,
        block: int,
        fence: BlockProtection | None,
        books: Accounting | None,
        *,
        memory_file: int | None = None,
        scratch_file: int | None = None,
        file_offset: int = 0,
    ) -> None:
        self.address = address
        self.block = block
        self.fence = fence
        self.books = books
        self.memory_file = memory_file
        self.scratch_file = scratch_file
        self._file_base = file_offset - address
        # Always as `with gate.lock`: entering and leaving it is then one step, also for Ctrl-C. Methods of Python are not.
        self.lock = threading.RLock()
        self.operations: weakref.WeakSet[Operation] = weakref.WeakSet()
        self._orphans: list[Operation] = []
        with _fork_lock:  # a fork goes through them
            _all.add(self)

    def populating(self, spans: Sequence[Span]) -> Populating:
        """See :class:`~prefault.memory.borrowing.AccessGuard`."""
        return Populating(self, self._blocks(spans, outward=True))

    def discarding(self, spans: Sequence[Span]) -> Discarding:
        """See :class:`~prefault.memory.borrowing.AccessGuard`."""
        return Discarding(self, self._blocks(spans, outward=False))

    def _blocks(self, spans: Sequence[Span], *, outward: bool) -> list[int]:
        (span,) = spans
        round_to = PageRange.outward if outward else PageRange.inward
        return list(round_to(span.start - self.address, span.stop - self.address, self.block))

    def punch(self, start: int, length: int) -> str:
        """Take pages, given by address, from the file."""
        fd = self.memory_file if self.memory_file is not None else self.scratch_file
        assert fd is not None
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start + self._file_base, length)
        return "FALLOC_FL_PUNCH_HOLE"

    def is_mine(self) -> bool:
        """Whether this very thread holds the lock: we are a signal handler or a finalizer, in the middle of a change."""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]

    def ask_for_change(self) -> None:
        """To be called before taking the lock.

        Raises:
            RuntimeError: a signal handler may come by in a thread that is changing fences, and would see half a change.
        """
        if self.is_mine():
            raise RuntimeError(
                "a signal handler or a finalizer cannot use this memory now: the thread that it interrupted is changing"
                " its fences"
            )
        while self._orphans:
            self._orphans.pop().abandon()

    def adopt(self, operation: Operation) -> None:
        """Nobody can finish it now, so the next one to come by does."""
        self._orphans.append(operation)

    def after_fork_in_parent(self) -> None:
        """Nothing has happened here."""
        self.lock.release()

    def after_fork_in_child(self) -> None:
        """Only the thread that forked is here: what the others were about to do is taken back."""
        self.lock = threading.RLock()
        me = threading.get_ident()
        # They are at work in the parent still, or done by now: the file is not ours to take anything from.
        file, self.scratch_file = self.scratch_file, None
        try:
            for operation in list(self.operations):
                if operation.thread != me:
                    operation.abandon()
        finally:
            self.scratch_file = file


class Operation:
    """One call at work on blocks, given as edges; a context manager that yields the spans of its blocks."""

    _running = False

    def __init__(self, gate: SparseAccessGuard, blocks: list[int] | Numbers) -> None:
        # An empty set is still one span, for callers that want one.
        self.empty = len(blocks) == 0 or bool(blocks[0] == blocks[-1])
        self.blocks = blocks
        self.thread = threading.get_ident()
        self._gate = gate
        self._working = threading.Lock()
        """Held until it ends, for others to wait for. Not a Condition, which Ctrl-C can leave in disorder."""
        self._working.acquire()

    def spans(self) -> list[Span]:
        """Its blocks as addresses; none where they were given as an array, since who does so has no use for them."""
        base = self._gate.address
        if not isinstance(self.blocks, list):
            return []
        return [Span(base + start, base + stop) for start, stop in _pairs(self.blocks)]

    def abandon(self) -> None:
        """Nobody will finish it: put everything into the order that what was done so far asks for."""
        if not self._running:
            return
        if self._gate.is_mine():
            self._gate.adopt(self)
            return
        try:
            self._take_back()
        except Exception:
            self._end()
            raise
        self._end()  # not where Ctrl-C came between: then our end, __del__, does it again

    def _take_back(self) -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        """Wait until nobody else is at work on a block of ours."""
        gate = self._gate
        while not self.empty:
            gate.ask_for_change()
            with gate.lock:
                other = next((o for o in gate.operations if _overlap(o.blocks, self.blocks)), None)
                if other is None:
                    self._running = True
                    gate.operations.add(self)
                    return
            if other.thread == self.thread:
                raise RuntimeError(
                    "this thread is at work on these blocks already: a signal handler, a finalizer or a progress"
                    " function cannot populate or discard them meanwhile"
                )
            _waiting[self.thread] = other
            try:
                if _waits_for_itself(self.thread):
                    raise RuntimeError(
                        "two threads would wait for each other: each is at work on blocks and wants, from within (in a"
                        " progress function, say), blocks of the other"
                    )
                if other._working.acquire(timeout=_PATIENCE_S):
                    other._working.release()
            finally:
                del _waiting[self.thread], other  # it is to end where its owner lets go of it

    def _end(self) -> None:
        with self._gate.lock:
            if self._running:
                self._running = False
                self._gate.operations.discard(self)
                self._working.release()

    def _without_pages(self) -> list[int]:
        """Blocks of which no page is there, not even in the file."""
        gate = self._gate
        found: list[int] = []
        for start, stop in _pairs(self.blocks):
            whole = PageRange(start, stop)
            span = whole.shifted(gate.address)
            there = [r for r in residency_of(span).runs if r.state & (PageState.PRESENT | PageState.SWAPPED)]
            pages = RangeSet(PageRange(r.start, r.stop) for r in there).shifted(-gate.address)
            if gate.memory_file is not None:
                pages |= resident(span).shifted(-gate.address)
            blocks = RangeSet(PageRange.outward(r.start, r.stop, gate.block) for r in pages)
            found += chain.from_iterable(RangeSet([whole]) - blocks)
        return found

    def __del__(self) -> None:
        # An asynchronous exception (Ctrl-C) can strike between entering and the body of the `with`.
        if self._running:
            self.abandon()


class Populating(Operation):
    """Around populating; see :meth:`prefault.memory.borrowing.AccessGuard.populating`."""

    _charging = False
    _charged = RangeSet()

    def __enter__(self) -> list[Span]:
        self._opened: list[int] = []
        self._begin()
        if not self.empty:
            self._admit()
        return self.spans()

    def _admit(self) -> None:
        gate = self._gate
        try:
            if gate.books is not None:
                self._charge(gate.books)
            if gate.fence is not None:
                gate.ask_for_change()
                with gate.lock:
                    gate.fence.open(self.blocks, self._opened)
        except BaseException:
            self.abandon()
            raise

    def _charge(self, books: Accounting) -> None:
        self._charging = True
        try:
            self._charged = books.charge(_as_set(self.blocks))
        except Exception:
            self._charging = False  # nothing was booked
            raise
        self._charging = False

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind is None and self._running:
            self._opened, self._charged = [], RangeSet()
            self._end()
        else:
            self.abandon()

    def _take_back(self) -> None:
        gate = self._gate
        if self._opened and gate.fence is not None:
            gate.ask_for_change()
            with gate.lock:
                gate.fence.close(self._opened)
            self._opened = []
        if gate.books is not None:
            # Where Ctrl-C came between the charge and its being noted, blocks without a page need not be charged.
            charged = RangeSet.from_edges(self._without_pages()) if self._charging else self._charged
            if charged:
                gate.books.refund(charged)
            self._charging, self._charged = False, RangeSet()


class Discarding(Operation):
    """Around discarding; see :meth:`prefault.memory.borrowing.AccessGuard.discarding`.

    Of blocks that are given as an array, private memory behind fences is given back on entering: guards do that anyway.
    """

    _closed = False

    def __enter__(self) -> list[Span]:
        self._begin()
        if not self.empty and self._gate.fence is not None:
            try:
                self._shut(self._gate.fence)
            except BaseException as error:
                self._stopped(error)
                raise
        return self.spans()

    def _shut(self, fence: BlockProtection) -> None:
        gate = self._gate
        if isinstance(self.blocks, list):
            gate.ask_for_change()
            with gate.lock:
                fence.shut(*self.blocks)
            return
        from prefault.sparse.range_arguments import longer

        blocks = self.blocks
        for start, stop in _pairs(longer(blocks, _STEP // 16)):
            # Giving back much takes long, so not while holding the lock.
            gate.ask_for_change()
            with gate.lock:
                fence.shut(start, stop)
            for part in PageRange(start, stop).shifted(gate.address).chunks(_STEP):
                drop(part.start, part.length)
        self._close(fence)
        self._closed = True

    def _close(self, fence: BlockProtection) -> None:
        gate = self._gate
        for first in range(0, len(self.blocks), _AT_ONCE):
            gate.ask_for_change()
            with gate.lock:
                fence.close(self.blocks[first : first + _AT_ONCE])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stopped(error)
            return
        try:
            if self._running:
                self._gone(self.blocks)
                self._end()
        except BaseException as failure:
            self._stopped(failure)
            raise

    def _stopped(self, error: BaseException) -> None:
        """The kernel does not let us shut blocks, or give them back. Raises what that means."""
        with contextlib.suppress(OSError):  # for the same reason; the first error is the one to tell
            self.abandon()
        if isinstance(error, OSError) and not isinstance(error, DiscardError):
            offset = int(self.blocks[0])
            room = (
                " (no room for page tables, or for another mapping: vm.max_map_count)" if error.errno == errno.ENOMEM else ""
            )
            raise DiscardError(
                error.errno or 0, f"cannot discard blocks from offset {offset} on: {error.strerror}{room}",
                address=self._gate.address + offset,
            ) from error  # fmt: skip

    def _take_back(self) -> None:
        # It stopped in the middle: blocks without a page are gone, the others are as before.
        self._gone(self._without_pages())

    def _gone(self, blocks: Edges | Numbers) -> None:
        gate = self._gate
        if gate.scratch_file is not None:
            for start, stop in _pairs(blocks):
                gate.punch(gate.address + start, stop - start)
        if gate.fence is not None and not self._closed:
            gate.ask_for_change()
            with gate.lock:
                gate.fence.close(blocks)
                for start, stop in _pairs(self.blocks):
                    gate.fence.settle(start, stop)
        elif gate.fence is not None and gate.memory_file is not None:
            self._close(gate.fence)  # again: see Fence.close
        if gate.books is not None and len(blocks):
            gate.books.refund(_as_set(blocks))


_waiting: dict[int, Operation] = {}
"""Threads that wait, and for what."""


def _waits_for_itself(thread: int) -> bool:
    at = _waiting.get(thread)
    for _ in range(len(_waiting)):
        if at is None or not at._running:
            return False
        if at.thread == thread:
            return True
        at = _waiting.get(at.thread)
    return False


def _pairs(blocks: Edges | Numbers) -> Iterator[tuple[int, int]]:
    plain: Edges = blocks.tolist() if hasattr(blocks, "tolist") else blocks
    return zip(plain[::2], plain[1::2], strict=True)


def _overlap(one: Any, other: Any) -> bool:
    """Whether two sets of edges have a byte in common."""
    if one[0] >= other[-1] or other[0] >= one[-1]:
        return False
    if len(one) == len(other) == 2:
        return True
    import numpy

    from prefault.sparse.range_arguments import common

    return len(common(numpy.asarray(one, numpy.int64), numpy.asarray(other, numpy.int64))) > 0


def _as_set(blocks: Any) -> RangeSet:
    return RangeSet.from_edges(blocks if isinstance(blocks, list) else blocks.tolist())


_all: weakref.WeakSet[SparseAccessGuard] = weakref.WeakSet()
_forking: list[SparseAccessGuard] = []
_fork_lock = threading.RLock()  # two threads may fork at once


def _before_fork() -> None:
    _fork_lock.acquire()
    # So that no fence is half changed in the child.
    for gate in list(_all):
        gate.lock.acquire()
        _forking.append(gate)


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork_in_parent()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock
    _fork_lock = threading.RLock()
    _waiting.clear()
    with contextlib.ExitStack() as stack:  # all of them, whatever one raises
        while _forking:
            stack.callback(_forking.pop().after_fork_in_child)


fork_hooks.register(before=_before_fork, in_parent=_after_fork_in_parent, in_child=_after_fork_in_child)
