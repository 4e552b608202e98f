"""Huge entries: one page-table entry of a client for 2 MiB of a device with 4 KiB pages.

The driver prefers chunks of 2 MiB, with :meth:`DevicePool.prefer_huge`: their frames come as huge pages where the kernel has
them, a fault brings a whole chunk in, and process_madvise(MADV_COLLAPSE, Linux 6.1) of the server makes the one entry in the
page table of the client, as vmf_insert_pfn_pmd() does for a kernel driver. Where that fails, small entries do the same.

The kernel makes no such entry in memory that is registered for write protection. So clients register their areas without it,
and the server adds it (:meth:`HugePages.protect`) for the chunks that it is about to protect, until they are mapped huge
again. Adding it leaves entries as they are; protecting removes a huge one.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from prefault._kernel import mman, userfaultfd
from prefault.device.frames import HUGE_PAGE
from prefault.device.page_states import DevicePageState, PageFlag
from prefault.device.pages import fault_resolution

if TYPE_CHECKING:
    from prefault.device.pages.served_areas import ServedArea, ServerState

_NOT_ARMED = userfaultfd.UFFDIO_REGISTER_MODE_MISSING | userfaultfd.UFFDIO_REGISTER_MODE_MINOR
_ARMED = _NOT_ARMED | userfaultfd.UFFDIO_REGISTER_MODE_WP


class HugePages:
    """Chunks of a device that shall be huge pages, and the write protection of areas, which excludes them.

    Attributes:
        in_use: some chunk is preferred.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._frames = state.frames
        self._enabled = state.device.huge_faults
        self._pages = HUGE_PAGE // state.page_size
        self._preferred: set[int] = set()
        self.in_use = False

    def prefer(self, pages: range, huge: bool) -> None:
        """Implement :meth:`DevicePool.prefer_huge`."""
        if not self._enabled:
            raise RuntimeError(
                f"{type(self._state.device).__name__} prefers huge pages: it has to declare huge_faults = True"
            )
        chunks = range(-(-pages.start // self._pages), pages.stop // self._pages)
        if not chunks:
            return
        with self._state.lock:
            if huge:
                self._preferred.update(chunks)
            else:
                self._preferred.difference_update(chunks)
            self.in_use = bool(self._preferred)
        self._frames.advise_huge(range(chunks.start * self._pages, chunks.stop * self._pages), huge)

    def chunk_at(self, area: ServedArea, page: int) -> range | None:
        """Return the preferred chunk that a page is in, if the area maps all of it at an address that is aligned."""
        number = page // self._pages
        if number not in self._preferred or area.tracks or area.base % HUGE_PAGE:
            return None
        chunk = range(number * self._pages, (number + 1) * self._pages)
        return chunk if area.first <= chunk.start and chunk.stop <= area.last else None

    def map(self, area: ServedArea, pages: range) -> list[range]:
        """Make huge entries for the READY chunks in a run of pages, where they can be had; return the runs that got them.

        Under the lock. Threads that wait there are woken.
        """
        if not self.in_use or area.tracks or area.base % HUGE_PAGE or area.collapse_fails:
            return []
        found: list[range] = []
        for number in range(-(-pages.start // self._pages), pages.stop // self._pages):
            chunk = self.chunk_at(area, number * self._pages)
            if chunk is None or not self._is_plain(chunk):
                continue
            if found and found[-1].stop == chunk.start:
                found[-1] = range(found[-1].start, chunk.stop)
            else:
                found.append(chunk)
        return [run for run in found if self._collapse(area, run)]

    def _is_plain(self, chunk: range) -> bool:
        """Return whether all pages of a chunk are READY and may be written to."""
        frames = self._frames
        if frames.run_at(chunk.start, chunk.stop) != (DevicePageState.READY, chunk.stop):
            return False
        return not any(set_ for _, set_ in frames.flag_runs(chunk, PageFlag.READ_ONLY))

    def _collapse(self, area: ServedArea, run: range) -> bool:
        start, length = area.address(run.start), len(run) * self._state.page_size
        self._disarm(area, run)
        try:
            done = mman.process_madvise(area.client.record.pidfd, [(start, length)], mman.MADV_COLLAPSE)
        except OSError as error:
            # EPERM: no CAP_SYS_NICE. EACCES: no right to ptrace. EINVAL: foreign memory there, or no huge pages at all.
            area.collapse_fails = error.errno == errno.EPERM
            done = 0
        fault_resolution.wake(area.fd, start, length)
        return done == length

    # --- write protection

    def protect(self, area: ServedArea, start: int, length: int) -> bool:
        """Write-protect addresses of an area: see :func:`fault_resolution.protect`."""
        if self._enabled:
            self.arm(area, start, length)
        return fault_resolution.protect(area.fd, start, length, self._state.unit)

    def unprotect(self, area: ServedArea, start: int, length: int) -> None:
        """Remove the write protection of addresses of an area: see :func:`fault_resolution.unprotect`."""
        if not self._enabled:
            fault_resolution.unprotect(area.fd, start, length)
            return
        at, stop = start, start + length
        while at < stop:
            armed, end = self._armed_at(area, at, stop)
            if armed:
                fault_resolution.unprotect(area.fd, at, end - at)
            at = end

    def arm(self, area: ServedArea, start: int, length: int) -> None:
        """Register addresses of an area for write protection; entries stay as they are."""
        if not self._enabled:
            return
        first, last = self._chunks(area, start, start + length)
        if area.armed.find(0, first, last) < 0:
            return
        self._register(area, first, last, _ARMED)
        area.armed[first:last] = b"\x01" * (last - first)

    def _disarm(self, area: ServedArea, run: range) -> None:
        """Register READY pages without write protection. A touch between the two calls gets the frame from the kernel."""
        first, last = self._chunks(area, area.address(run.start), area.address(run.stop))
        if area.armed.find(1, first, last) < 0:
            return
        try:
            userfaultfd.unregister(area.fd, area.address(run.start), len(run) * self._state.page_size)
        except OSError:
            return  # the client mapped something else there, or is gone
        if self._register(area, first, last, _NOT_ARMED):
            area.armed[first:last] = bytes(last - first)

    def _register(self, area: ServedArea, first: int, last: int, mode: int) -> bool:
        """Register chunks; False: all of the area is registered for write protection instead."""
        start = max(area.start, (area.start // HUGE_PAGE + first) * HUGE_PAGE)
        stop = min(area.stop, (area.start // HUGE_PAGE + last) * HUGE_PAGE)
        try:
            fault_resolution.register(area.fd, start, stop - start, mode, self._state.unit)
        except OSError as error:
            # Not the client's doing: no more mappings (vm.max_map_count). One mode for all of it needs no more.
            if error.errno != errno.ENOMEM:
                raise
            fault_resolution.register(area.fd, area.start, area.stop - area.start, _ARMED, self._state.unit)
            area.armed[:] = b"\x01" * len(area.armed)
            return False
        return True

    def _chunks(self, area: ServedArea, start: int, stop: int) -> tuple[int, int]:
        """Return the indexes into ``area.armed`` of addresses."""
        base = area.start // HUGE_PAGE
        return start // HUGE_PAGE - base, -(-stop // HUGE_PAGE) - base

    def _armed_at(self, area: ServedArea, at: int, stop: int) -> tuple[bool, int]:
        """Return whether an address is registered for write protection, and the end of the run where that is so."""
        first, last = self._chunks(area, at, stop)
        armed = area.armed[first]
        other = area.armed.find(1 - armed, first, last)
        return bool(armed), stop if other < 0 else min(stop, (area.start // HUGE_PAGE + other) * HUGE_PAGE)
