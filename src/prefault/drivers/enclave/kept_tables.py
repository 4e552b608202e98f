"""Tables of an enclave page cache in memory that outlives the server: the EPCM, versions, sealed pages, and the enclaves.

All are as large as the address space of the device, in sparse memory: an entry that was never written takes nothing. Reading
such an entry would allocate it, so a summary says which groups of pages were ever added.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

from prefault._kernel import mman
from prefault.drivers.enclave.epcm import FREE
from prefault.memory.borrowing import borrow
from prefault.sizes import PAGE_SIZE

GROUP: Final = PAGE_SIZE
"""Pages in a group: their entries fill one page of the EPCM."""

MAX_ENCLAVES: Final = 65536

TAG: Final = 16
"""Bytes of the authentication tag of a sealed page."""

Keep: TypeAlias = Callable[[str, int], memoryview]
"""``DevicePool.keep``."""

_ROW = struct.Struct("<QQQB7x")
_WRITTEN = re.compile(rb"[^\x00]+")


class EnclaveRow(NamedTuple):
    """An enclave in the table: what the processor keeps in its SECS.

    Attributes:
        number: of the enclave, never given twice.
        offset, length: of its pages in the device, in bytes.
        explicit: pages that were added have to be accepted by EACCEPT.
        overcommit: populate may evict pages of other enclaves.
        max_permissions: bits that its pages may have.
    """

    number: int
    offset: int
    length: int
    explicit: bool
    overcommit: bool
    max_permissions: int

    @property
    def pages(self) -> range:
        """Its pages, numbered from the start of the device."""
        first = self.offset // PAGE_SIZE
        return range(first, first + -(-self.length // PAGE_SIZE))


class KeptTables:
    """Memory that outlives the server, for a device of ``pages`` pages.

    Attributes:
        header: words: see the constants of :mod:`prefault.drivers.enclave.sealing` and :meth:`add`.
        entries: EPCM entries, a byte a page.
        versions: version of the sealed copy of each page, 0: there is none.
        sealed: the sealed pages, each at the place that it has in the device.
        tags: their authentication tags.
    """

    def __init__(self, keep: Keep, pages: int) -> None:
        self.pages = pages
        self.header = keep("enclave header", PAGE_SIZE).cast("Q")
        self.entries = keep("enclave epcm", _whole_pages(pages))
        self._groups = keep("enclave epcm groups", _whole_pages(-(-pages // GROUP)))
        self._version_bytes = keep("enclave versions", _whole_pages(8 * pages))
        self.versions = self._version_bytes.cast("Q")
        self.sealed = keep("enclave sealed pages", pages * PAGE_SIZE)
        self.tags = keep("enclave tags", _whole_pages(TAG * pages))
        self._rows = keep("enclave table", MAX_ENCLAVES * _ROW.size)
        numbers = [_unpack(self._rows, index).number for index in range(self.header[_ROWS])]
        self._index = {number: index for index, number in enumerate(numbers) if number}
        self._unused = [index for index, number in enumerate(numbers) if not number]

    # --- the EPCM

    def set_entries(self, pages: range, entries: bytes) -> None:
        """Set the EPCM entries of a run of pages."""
        for group in range(pages.start // GROUP, (pages.stop - 1) // GROUP + 1):
            if not self._groups[group]:
                self._groups[group] = 1  # before the entries: a crash in between leaves a group of free pages
        self.entries[pages.start : pages.stop] = entries

    def added(self, pages: range) -> Iterator[tuple[range, bytes]]:
        """Yield the pages that were added, in runs with their entries; pages that were never touched cost nothing."""
        first, last = pages.start // GROUP, -(-pages.stop // GROUP)
        for match in _WRITTEN.finditer(self._groups, first, last):
            for group in range(*match.span()):
                start, stop = max(pages.start, group * GROUP), min(pages.stop, (group + 1) * GROUP)
                entries = bytes(self.entries[start:stop])
                for run in _WRITTEN.finditer(entries):
                    yield range(start + run.start(), start + run.end()), run.group()

    def forget(self, pages: range) -> None:
        """Drop the sealed copies and the versions of pages that were added; their entries stay."""
        for run, _ in self.added(pages):
            _free(self._version_bytes, 8 * run.start, 8 * run.stop)
            _free(self.tags, TAG * run.start, TAG * run.stop)
            _free(self.sealed, PAGE_SIZE * run.start, PAGE_SIZE * run.stop)

    def clear(self, pages: range) -> None:
        """Make pages free, without sealed copies and versions."""
        # In this order: after a crash in between, a free page has no version, and nothing of its old content is ever loaded.
        self.forget(pages)
        for run, _ in self.added(pages):
            self.entries[run.start : run.stop] = bytes([FREE]) * len(run)

    # --- the enclaves

    def rows(self) -> list[EnclaveRow]:
        """Return the enclaves."""
        return [_unpack(self._rows, index) for index in sorted(self._index.values())]

    def add(self, offset: int, length: int, *, explicit: bool, overcommit: bool, max_permissions: int) -> EnclaveRow:
        """Enter an enclave.

        Raises:
            OSError: ENOSPC: the table is full.
        """
        count = self.header[_ROWS]
        if len(self._index) == MAX_ENCLAVES:
            raise OSError(errno.ENOSPC, f"there are {MAX_ENCLAVES} enclaves already, the maximum: delete some")
        free = self._unused.pop() if self._unused else count
        number = self.header[_NEXT_NUMBER] + 1
        self.header[_NEXT_NUMBER] = number
        flags = explicit | overcommit << 1 | max_permissions << 2
        _ROW.pack_into(self._rows, free * _ROW.size, 0, offset, length, flags)
        self.header[_ROWS] = max(count, free + 1)
        self._rows.cast("Q")[free * _ROW.size // 8] = number  # one store makes it valid
        self._index[number] = free
        return EnclaveRow(number, offset, length, explicit, overcommit, max_permissions)

    def remove(self, number: int) -> None:
        """Remove an enclave."""
        index = self._index.pop(number)
        self._rows.cast("Q")[index * _ROW.size // 8] = 0
        self._unused.append(index)


_ROWS = 8
_NEXT_NUMBER = 9


def _unpack(rows: memoryview, index: int) -> EnclaveRow:
    number, offset, length, flags = _ROW.unpack_from(rows, index * _ROW.size)
    return EnclaveRow(number, offset, length, bool(flags & 1), bool(flags & 2), flags >> 2)


def _whole_pages(size: int) -> int:
    return size + -size % PAGE_SIZE


def _free(memory: memoryview, start: int, stop: int) -> None:
    """Zero a part of kept memory, and give whole pages of it back."""
    first, last = start + -start % PAGE_SIZE, stop - stop % PAGE_SIZE
    if first >= last:
        memory[start:stop] = bytes(stop - start)
        return
    memory[start:first] = bytes(first - start)
    memory[last:stop] = bytes(stop - last)
    with borrow(memory[first:last]) as pages:
        mman.madvise(pages.address, last - first, mman.MADV_REMOVE)
