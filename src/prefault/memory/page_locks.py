"""Locks of pages by mlock(2), of which the kernel has one a page: who needs it, and when it ends."""

import contextlib
import threading
import weakref

from prefault._kernel import mman
from prefault._system import fork_hooks, proc
from prefault._system.capabilities import MLOCK_ONFAULT
from prefault.intervals import Intervals


class PageLocks:
    """Locks of this process's pages: lasting ones, and those that end with the last of the blocks that need them.

    The kernel counts no locks: one munlock(2) ends all, that of another thread as well. So the pages of blocks are noted
    here, and stay locked while a block needs them. Locks that were there before a block, and lasting ones that come
    inside of it, outlive it.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._needed: weakref.WeakKeyDictionary[object, Intervals] = weakref.WeakKeyDictionary()
        self._end_with_blocks = Intervals()
        """Pages that only blocks have locked; some block needs each of them."""

    def begin(self, block: object, pages: Intervals) -> Intervals:
        """Note the pages that a block is about to lock; return those that were not locked, nor noted, before."""
        with self._mutex:
            fresh = pages - Intervals(proc.mappings_with_flag("lo")) - self._end_with_blocks
            self._end_with_blocks |= fresh
            self._needed[block] = pages
        return fresh

    def end(self, block: object) -> None:
        """Unlock the pages of a block that no other block needs, unless their locks are lasting. Idempotent."""
        with self._mutex:
            pages = self._needed.pop(block, None)
            if pages is None:
                return
            over = (pages & self._end_with_blocks) - self._needed_pages()
            self._end_with_blocks -= over
            for start, stop in over:
                with contextlib.suppress(OSError):  # unmapped by its owner meanwhile, and its lock with it
                    mman.munlock(start, stop - start)

    def lock(self, pages: Intervals, *, lasting: bool) -> tuple[int, OSError] | None:
        """Lock pages that are present.

        Args:
            pages: their addresses.
            lasting: until they are unlocked; else for the blocks that need them.

        Returns:
            The address at which the kernel refused, and its error; the pages before it are unlocked then, except those
            that were locked before, or that a block needs. None if all are locked.
        """
        # On fault: what is present is locked. Without, the kernel populates once more, and hides failures.
        flags = mman.MLOCK_ONFAULT if MLOCK_ONFAULT.available else 0
        with self._mutex:
            # Of a single range the kernel refuses all, so that there is nothing to undo.
            locked_before = Intervals(proc.mappings_with_flag("lo")) if len(pages) > 1 else Intervals()
            for start, stop in pages:
                try:
                    mman.mlock2(start, stop - start, flags)
                except OSError as error:
                    self.unlock(pages.clipped(0, start) - locked_before)
                    return start, error
            if lasting:
                self._end_with_blocks -= pages
        return None

    def unlock(self, pages: Intervals) -> None:
        """End lasting locks of pages; those that a block needs stay locked until it ends.

        Raises:
            OSError: a part of them is not mapped; its ``filename`` is the address. What lies before it is unlocked.
        """
        with self._mutex:
            needed = self._needed_pages() & pages
            self._end_with_blocks |= needed
            for start, stop in pages - needed:
                try:
                    mman.munlock(start, stop - start)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, start) from error

    def _needed_pages(self) -> Intervals:
        return Intervals.union_of(self._needed.values())

    def forget(self) -> None:
        """Forget all locks, in a forked child, which inherits none."""
        self.__init__()  # type: ignore[misc]


page_locks = PageLocks()
"""Locks of this process."""

fork_hooks.register(in_child=page_locks.forget)
