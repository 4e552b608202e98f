"""Shooting down: the entries of all clients for a range of pages are taken away, until a change of the pages is committed.

1. The range is held: a touch of a page that is missing waits, and so does one of a page that is taken.
2. The supplied pages are isolated: no client can write to them any more.
3. Their content is copied aside and their frames are punched, which removes the entries of every process. User space has no
   other way to remove an entry of another process: process_madvise(2) takes no MADV_DONTNEED for one.
4. Leaving copies the content back, or leaves the new content that the driver wrote into the frames, and the pages are READY.

The copy aside outlives the server: killed in the middle, it leaves pages that are READY with the content they had.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
import time
from typing import TYPE_CHECKING

from prefault.device.device_pool import Access, ShootDown
from prefault.device.page_runs import append_run, subtract
from prefault.device.page_states import UNSETTLED

if TYPE_CHECKING:
    from types import TracebackType

    from prefault.device.pages.held_pages import Hold
    from prefault.device.pages.isolation import Isolation
    from prefault.device.pages.served_areas import ServerState

_LOOK_S = 0.0005


class ServedShootDown(ShootDown):
    """A shoot-down in the server.

    Args:
        waits: another thread can bring pages that are being filled to an end: False in the loop of a device without workers.
    """

    def __init__(self, state: ServerState, isolation: Isolation, pages: range, *, waits: bool) -> None:
        self.pages = pages
        self.runs: list[range] = []
        self._state = state
        self._frames = state.frames
        self._isolation = isolation
        self._waits = waits
        self._hold: Hold | None = None
        self._maps: dict[int, tuple[range, mmap.mmap]] = {}
        self._replaced: list[range] = []
        self._dropped: list[range] = []
        self._protections: list[tuple[range, Access]] = []

    # --- the transaction

    def __enter__(self) -> ServedShootDown:
        if self._hold is not None:
            raise RuntimeError("a shoot-down is entered once")
        self._isolation.check()
        with self._state.lock:
            self._hold = self._state.held.hold(self.pages)
        isolated: list[range] = []
        try:
            self._settle()
            isolated = self._isolation.isolate(self.pages)
            for run in isolated:
                self._isolation.move_aside(run)
        except BaseException:
            for run in isolated:
                self._isolation.restore(run)
            self._release()
            raise
        self.runs = isolated
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
            else:
                for run in self._replaced:
                    self._frames.punch(run)
                for run in self.runs:
                    self._isolation.restore(run)
        finally:
            self.runs = []
            self._release()

    def _settle(self) -> None:
        """Wait until no page of the range is being filled, evicted, or shot down by another thread."""
        assert self._hold is not None
        state, until = self._state, time.monotonic() + self._state.device.timeout_s / 2
        while True:
            with state.lock:
                older = state.held.before(self._hold)
                if not older and not self._frames.runs(self.pages, *UNSETTLED):
                    return
            if any(held.thread == threading.get_ident() for held in older):
                raise RuntimeError(f"this thread shoots some of {self.pages} down already")
            if not self._waits or time.monotonic() > until:
                raise OSError(errno.EBUSY, f"some of {self.pages} are being supplied or evicted, and do not come to rest")
            time.sleep(_LOOK_S)

    def _commit(self) -> None:
        kept = [piece for run in self.runs for piece in subtract(run, self._replaced + self._dropped)]
        moved = [piece for run in kept for piece in self._isolation.move_back(run)]
        for replaced in self._replaced:
            self._frames.clear_tail(replaced)
        with self._state.lock:
            for pages, access in self._protections:
                self._state.protections.set(pages, access)
            for replaced in self._replaced:
                moved += subtract(replaced, self._dropped)
            for run in moved:
                self._isolation.end_aside(run, ready=True)
            for run in self._dropped:
                self._isolation.end_aside(run, ready=False)

    def _release(self) -> None:
        assert self._hold is not None
        for _, memory in self._maps.values():
            with contextlib.suppress(BufferError):  # the driver keeps a view: the mapping goes with that
                memory.close()
        self._maps.clear()
        with self._state.lock:
            self._state.held.release(self._hold)
            self._state.changes += 1
        self._state.notify()

    # --- for the driver

    def content(self, pages: range) -> memoryview:
        """Return what supplied pages hold: see :meth:`ShootDown.content`."""
        run = self._taken(pages)
        if run.start not in self._maps:
            self._maps[run.start] = run, self._frames.aside(run)
        size = self._state.page_size
        view = memoryview(self._maps[run.start][1]).toreadonly()
        return view[(pages.start - run.start) * size : (pages.stop - run.start) * size]

    def frames(self, pages: range) -> memoryview:
        """Return the new frames of supplied pages: see :meth:`ShootDown.frames`."""
        self._taken(pages)
        self._frames.secure(pages)
        for piece in subtract(pages, self._replaced):
            append_run(self._replaced, piece)
        self._dropped = [piece for run in self._dropped for piece in subtract(run, [pages])]
        return self._frames.view(pages)

    def protect(self, pages: range, access: Access) -> None:
        """Set the protection after the commit: see :meth:`ShootDown.protect`."""
        self._inside(pages)
        if access not in ("read", "write"):
            raise ValueError(f"access is 'read' or 'write', not {access!r}")
        self._protections.append((pages, access))

    def drop(self, pages: range) -> None:
        """Leave pages MISSING after the commit: see :meth:`ShootDown.drop`."""
        self._inside(pages)
        for run in self.runs:
            piece = range(max(run.start, pages.start), min(run.stop, pages.stop))
            for fresh in subtract(piece, self._dropped) if len(piece) else ():
                append_run(self._dropped, fresh)

    def _inside(self, pages: range) -> None:
        self._state.check_pages(pages)
        if pages.start < self.pages.start or pages.stop > self.pages.stop:
            raise ValueError(f"{pages} are not all shot down: {self.pages} are")

    def _taken(self, pages: range) -> range:
        """Return the run of supplied pages that these lie in."""
        self._inside(pages)
        for run in self.runs:
            if run.start <= pages.start and pages.stop <= run.stop:
                return run
        raise ValueError(f"{pages} are not in one run of supplied pages: {self.runs}")
