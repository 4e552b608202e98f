"""Eviction and writeback: pages are isolated and saved; eviction then gives their frames back, writeback keeps them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from prefault.device.pages.isolation import Isolation
    from prefault.device.pages.served_areas import ServerState

Save: TypeAlias = Callable[[range, memoryview], object]


class Eviction:
    """The primitives that save pages; from any thread."""

    def __init__(self, state: ServerState, isolation: Isolation) -> None:
        self._state = state
        self._frames = state.frames
        self._isolation = isolation

    def evict(self, pages: range, save: Save | None = None) -> bytes:
        """Implement :meth:`DevicePool.evict`."""
        contents: list[bytes] = []
        with self._isolated(pages) as left:
            while left:
                if save is None:
                    contents.append(bytes(self._frames.view(left[0])))
                else:
                    self._save(left[0], save)
                self._isolation.drop(left[0])
                left.popleft()
        return b"".join(contents)

    def writeback(self, pages: range, save: Save) -> int:
        """Implement :meth:`DevicePool.writeback`."""
        saved = 0
        for run in self._state.protections.dirty_runs(pages):
            with self._isolated(run) as left:
                while left:
                    saved += self._save(left[0], save)
                    with self._state.lock:
                        self._state.protections.mark_clean(left[0])
                    self._isolation.put_back(left[0])
                    left.popleft()
        return saved

    def _save(self, run: range, save: Save) -> int:
        """Have those of a run saved that are dirty, where that is known; return their number."""
        saved = 0
        for dirty in self._state.protections.dirty_runs(run) if self._state.device.tracks_writes else [run]:
            save(dirty, self._frames.view(dirty).toreadonly())
            saved += len(dirty)
        return saved

    @contextlib.contextmanager
    def _isolated(self, pages: range) -> Iterator[deque[range]]:
        """Isolate pages, in runs; those that the caller leaves in the list are put back."""
        state = self._state
        self._isolation.check()
        with state.lock:
            state.pool.evicting += 1  # room comes in a moment, for those that wait for it
        left: deque[range] = deque()
        try:
            left.extend(self._isolation.isolate(pages))
            yield left
        finally:
            for run in left:
                self._isolation.put_back(run)
            with state.lock:
                state.pool.evicting -= 1
                state.changes += 1
            state.notify()
