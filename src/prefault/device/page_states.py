"""The state of each page of a device, and its flags: a byte each, in memory that the warden and all servers share."""

from __future__ import annotations

import enum
import errno
import functools
import os
import re
from collections.abc import Iterator
from typing import Final

from prefault.sizes import PAGE_SIZE

_SPARSE = 64 << 10
"""States that are searched without asking the kernel first which of them were ever written."""


class DevicePageState(enum.IntEnum):
    """State of a page of a device: MISSING, FILLING, READY, and what takes it away from clients again."""

    MISSING = 0
    FILLING = 1
    """The driver writes into the frame, which no client has mapped. After a crash: MISSING, and the frame is punched."""
    READY = 2
    """Supplied."""
    EVICTING = 3
    """Write-protected everywhere and being saved, or being discarded at the driver. After a crash: READY."""
    PUNCHING = 4
    """Saved; its frame goes. After a crash: it is punched again, and MISSING."""
    ASIDE = 5
    """Shot down: its content is in the copy aside, and no client has an entry. After a crash it is copied back: READY."""


UNSETTLED: Final = (DevicePageState.FILLING, DevicePageState.EVICTING, DevicePageState.PUNCHING, DevicePageState.ASIDE)
"""States of pages that some call is working on: neither supplied nor missing before it ends."""


class PageFlag(enum.IntFlag):
    """Flags of a page of a device, in any state; they survive the server."""

    READ_ONLY = 1
    """Clients get entries without write permission; a store asks the driver (``Device.mkwrite``)."""
    DIRTY = 2
    """A client may have written to the page since it was supplied or written back; for ``Device.tracks_writes``."""
    POISONED = 4
    """The driver poisoned it: touching it is SIGBUS until it is supplied or discarded."""


@functools.cache
def _pattern(states: tuple[int, ...]) -> re.Pattern[bytes]:
    return re.compile(b"[" + b"".join(b"\\x%02x" % state for state in states) + b"]+")


def _class_of(values: list[int]) -> bytes:
    return b"[" + b"".join(b"\\x%02x" % value for value in values) + b"]"


_SET = {flag: bytes(value | flag for value in range(256)) for flag in PageFlag}
_CLEAR = {flag: bytes(value & ~flag & 255 for value in range(256)) for flag in PageFlag}
_FLAG_RUNS = {
    flag: re.compile(
        _class_of([value for value in range(256) if value & flag])
        + b"+|"
        + _class_of([value for value in range(256) if not value & flag])
        + b"+"
    )
    for flag in PageFlag
}


class PageStates:
    """The states and the flags of a device's pages.

    Args:
        fd: of the file whose first bytes they are.
        memory: a mapping of the file.
        pages: number of pages.

    Attributes:
        states: a byte a page, :class:`DevicePageState`.
        flags: a byte a page, :class:`PageFlag`.
    """

    def __init__(self, fd: int, memory: memoryview, pages: int) -> None:
        self._file = fd
        self.pages = pages
        self.states = memory[:pages]
        self._flags_at = self.size(pages) // 2
        self.flags = memory[self._flags_at : self._flags_at + pages]

    @staticmethod
    def size(pages: int) -> int:
        """Return the bytes that states and flags take."""
        return 2 * (pages + -pages % PAGE_SIZE)

    def mark(self, pages: range, state: DevicePageState) -> None:
        """Set the state of adjacent pages."""
        count = pages.stop - pages.start
        if count == 1:
            self.states[pages.start] = state
        elif count > 1:
            self.states[pages.start : pages.stop] = bytes((state,)) * count

    def runs(self, pages: range, *states: DevicePageState) -> list[range]:
        """Return the pages that are in one of these states, in runs."""
        return list(self._matches(pages, states))

    def count(self, pages: range, *states: DevicePageState) -> int:
        """Return the number of pages that are in one of these states."""
        return sum(len(run) for run in self._matches(pages, states))

    def _matches(self, pages: range, states: tuple[int, ...]) -> Iterator[range]:
        if len(pages) <= _SPARSE:
            yield from self._matches_in(pages, states)
            return
        # Most states of a large device were never written: reading them would allocate them, and be slow.
        before = range(pages.start, pages.start)
        for piece, written in self._pieces(pages):
            found = self._matches_in(piece, states) if written else [piece] if DevicePageState.MISSING in states else []
            for run in found:
                if run.start != before.stop:
                    if len(before):
                        yield before
                    before = run
                else:
                    before = range(before.start, run.stop)
        if len(before):
            yield before

    def _matches_in(self, pages: range, states: tuple[int, ...]) -> Iterator[range]:
        for match in _pattern(states).finditer(self.states, pages.start, pages.stop):
            yield range(match.start(), match.end())

    def _pieces(self, pages: range, base: int = 0) -> Iterator[tuple[range, bool]]:
        """Split the pages into pieces whose states, or bytes at ``base``, were ever written, and others, which are 0."""
        at = pages.start
        while at < pages.stop:
            try:
                data = min(os.lseek(self._file, base + at, os.SEEK_DATA) - base, pages.stop)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = pages.stop
            hole = min(os.lseek(self._file, base + data, os.SEEK_HOLE) - base, pages.stop) if data < pages.stop else data
            for piece, written in ((range(at, data), False), (range(data, hole), True)):
                if len(piece):
                    yield piece, written
            at = hole

    def run_at(self, page: int, stop: int) -> tuple[int, int]:
        """Return the state of a page, and the end of the run of pages in that state, at most ``stop``."""
        state = self.states[page]
        found = _pattern((state,)).match(self.states, page, stop)
        return state, found.end() if found else page + 1

    def run_before(self, page: int, start: int) -> int:
        """Return the start of the run of pages in the state of ``page``, at least ``start``."""
        before = bytes(self.states[start:page])
        return start + len(before.rstrip(bytes((self.states[page],))))

    # --- the flags

    def set_flag(self, pages: range, flag: PageFlag) -> None:
        """Set a flag of pages."""
        self._map_flags(pages, _SET[flag])

    def clear_flag(self, pages: range, flag: PageFlag) -> None:
        """Clear a flag of pages."""
        self._map_flags(pages, _CLEAR[flag])

    def _map_flags(self, pages: range, table: bytes) -> None:
        if pages.stop - pages.start == 1:
            self.flags[pages.start] = table[self.flags[pages.start]]
            return
        for piece, written in self._flag_pieces(pages):
            if written or table[0]:  # reading flags that were never written would allocate them
                before = bytes(self.flags[piece.start : piece.stop])
                after = before.translate(table)
                if after != before:  # a write allocates memory for flags that are all 0
                    self.flags[piece.start : piece.stop] = after

    def _flag_pieces(self, pages: range) -> Iterator[tuple[range, bool]]:
        """Split a large range into pieces whose flags were ever written, and others, which have none."""
        if len(pages) <= _SPARSE:
            yield pages, True
        else:
            yield from self._pieces(pages, self._flags_at)

    def flag_runs(self, pages: range, flag: PageFlag) -> list[tuple[range, bool]]:
        """Split pages into runs with and without a flag."""
        runs: list[tuple[range, bool]] = []
        for piece, written in self._flag_pieces(pages):
            if not written:
                runs.append((piece, False))
                continue
            runs += [
                (range(found.start(), found.end()), bool(self.flags[found.start()] & flag))
                for found in _FLAG_RUNS[flag].finditer(self.flags, piece.start, piece.stop)
            ]
        return runs

    def has_flags(self) -> bool:
        """Return whether a page has a flag."""
        for run, written in self._pieces(range(self.pages), self._flags_at):
            if written and any(self.flags[run.start : run.stop]):
                return True
        return False
