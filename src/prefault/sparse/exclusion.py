"""Mutual exclusion of the operations on the blocks of one sparse memory, across threads, Ctrl-C and fork.

Operations on a common block wait for each other. The lock is held while accounting and protection change, never while memory
is populated or discarded.
"""

from __future__ import annotations

import contextlib
import threading
import weakref

from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault._system import fork_hooks
from prefault.intervals import Intervals
from prefault.memory.borrowing import Span
from prefault.sparse.accounting import Accounting
from prefault.sparse.protection import BlockProtection

_PATIENCE_S = 1.0
"""How often a waiting thread looks again: the operation it waits for may have been stopped just before its end."""


class BlockGuard:
    """The lock of one sparse memory, what it protects, and the operations at work on its blocks.

    Args:
        address: of its first byte.
        block: bytes; everything here is in whole blocks, as offsets.
        protection: None where unpopulated blocks read as zeros.
        accounting: charged for populated blocks; None without a pool.
        memory_file: a descriptor of the file that discarded blocks are taken from, a memory file that is mapped shared.
        scratch_file: a descriptor of a file on a disk that only this memory uses: its discarded blocks become holes.
        file_offset: of the first byte in these files.
        inherited: whether a child of fork has the memory too.

    Attributes:
        lock: to be taken as ``with guard.lock``, after :meth:`require_unlocked`.
        operations: those at work now.
    """

    def __init__(
        self,
        address: int,
        block: int,
        protection: BlockProtection | None,
        accounting: Accounting | None,
        *,
        memory_file: int | None = None,
        scratch_file: int | None = None,
        file_offset: int = 0,
        inherited: bool = True,
    ) -> None:
        self.address = address
        self.block = block
        self.protection = protection
        self.accounting = accounting
        self.memory_file = memory_file
        self.scratch_file = scratch_file
        self._file_base = file_offset - address
        self._inherited = inherited
        # Entering and leaving a C lock is one step, also for Ctrl-C. Methods written in Python are not.
        self.lock = threading.RLock()
        self.operations: weakref.WeakSet[Operation] = weakref.WeakSet()
        self._orphans: list[Operation] = []
        with _fork_lock:  # a fork goes through them
            _all.add(self)

    def punch(self, start: int, length: int) -> str:
        """Punch a hole into the file at these addresses, and return the name of the method."""
        fd = self.memory_file if self.memory_file is not None else self.scratch_file
        assert fd is not None
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start + self._file_base, length)
        return "FALLOC_FL_PUNCH_HOLE"

    def is_locked_here(self) -> bool:
        """Tell whether this very thread holds the lock: a signal handler or a finalizer struck in the middle of a change."""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]

    def require_unlocked(self) -> None:
        """Check, before the lock is taken, that this thread does not hold it, and abandon orphaned operations.

        Raises:
            RuntimeError: a signal handler interrupted its own thread in a change of protection, and would see half of it.
        """
        if self.is_locked_here():
            raise RuntimeError(
                "a signal handler or a finalizer cannot use this memory now: the thread that it interrupted is changing"
                " its protection"
            )
        while self._orphans:
            self._orphans.pop().abandon()

    def add_orphan(self, operation: Operation) -> None:
        """Leave an operation that cannot be abandoned now to the next caller of :meth:`require_unlocked`."""
        self._orphans.append(operation)

    def after_fork_in_parent(self) -> None:
        """Release the lock that was taken for the fork."""
        self.lock.release()

    def after_fork_in_child(self) -> None:
        """Undo the operations of all other threads: only the thread that forked exists here."""
        self.lock = threading.RLock()
        if not self._inherited:
            return  # there is nothing here that an operation could change
        me = threading.get_ident()
        # They are at work in the parent still, or done by now: the file is not ours to take anything from.
        file, self.scratch_file = self.scratch_file, None
        try:
            for operation in list(self.operations):
                if operation.thread != me:
                    operation.abandon()
        finally:
            self.scratch_file = file


_NO_SPAN = Span(0, 0)


class Operation:
    """One call at work on blocks; a context manager.

    Attributes:
        blocks: offsets of the blocks.
        span: the same as addresses, where the call is on one span, which may be empty.
    """

    _running = False

    def __init__(self, guard: BlockGuard, blocks: Intervals, span: Span = _NO_SPAN) -> None:
        self.blocks = blocks
        self.span = span
        self.thread = threading.get_ident()
        self._guard = guard
        self._working = threading.Lock()
        """Held until the operation ends; others wait for it. Not a Condition, which Ctrl-C can leave in disorder."""
        self._working.acquire()

    def abandon(self) -> None:
        """Undo an operation that will not be finished, as far as the work done allows. Idempotent."""
        if not self._running:
            return
        if self._guard.is_locked_here():
            self._guard.add_orphan(self)
            return
        try:
            self._undo()
        except Exception:
            self._end()
            raise
        self._end()  # not where Ctrl-C came between: then the finalizer, __del__, does it again

    def _undo(self) -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        """Wait until no other operation is at work on a block of this one."""
        guard = self._guard
        while self.blocks:
            guard.require_unlocked()
            with guard.lock:
                other = next((o for o in guard.operations if not o.blocks.isdisjoint(self.blocks)), None)
                if other is None:
                    self._running = True
                    guard.operations.add(self)
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
                del _waiting[self.thread], other  # its finalizer is to run when its owner drops it

    def _end(self) -> None:
        with self._guard.lock:
            if self._running:
                self._running = False
                self._guard.operations.discard(self)
                self._working.release()

    def __del__(self) -> None:
        # An asynchronous exception (Ctrl-C) can strike between entering and the body of the `with`.
        if self._running:
            self.abandon()


_waiting: dict[int, Operation] = {}
"""For each waiting thread the operation that it waits for."""


def _waits_for_itself(thread: int) -> bool:
    at = _waiting.get(thread)
    for _ in range(len(_waiting)):
        if at is None or not at._running:
            return False
        if at.thread == thread:
            return True
        at = _waiting.get(at.thread)
    return False


_all: weakref.WeakSet[BlockGuard] = weakref.WeakSet()
_forking: list[BlockGuard] = []
_fork_lock = threading.RLock()  # two threads may fork at once


def _before_fork() -> None:
    _fork_lock.acquire()
    # So that no protection is half changed in the child.
    for guard in list(_all):
        guard.lock.acquire()
        _forking.append(guard)


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
