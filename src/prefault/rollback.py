"""Taking back what a populate call brought in, without losing a byte that was there before."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from ctypes import addressof, c_char

from prefault import capabilities
from prefault._kernel import mman, uio
from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault._kernel.fiemap import holes
from prefault.discard import drop
from prefault.errors import PopulateError
from prefault.methods import FallocateThen
from prefault.plan import Segment
from prefault.ranges import PageRange, RangeSet
from prefault.residency import PageState, mapped_by_others, residency_of, resident
from prefault.sizes import MIB, PAGE_SIZE
from prefault.vma import Backing


class Rollback:
    """What has to be known before a populate call in order to undo it.

    Private pages were empty, the zero page, or pages of the file: dropping them restores what was. Pages whose content is
    nowhere else stay. A page of shared memory may be what another process has populated or written meanwhile: only pages of
    nothing but zeros that were not in memory before, and that nobody else maps, are taken from the file; the others just
    leave our page tables. On a disk, the holes that fallocate filled and nobody wrote to become holes again.
    """

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments
        self._kept = RangeSet(pages for segment in segments for pages in _of_its_own(segment))
        self._resident = RangeSet(
            item for s in segments if _is_shared_memory(s) for item in resident(PageRange(s.start, s.stop))
        )
        self._holes = {segment: holes_before(segment) for segment in segments if _allocates_on_disk(segment)}

    @classmethod
    def knowing(cls, segment: Segment, kept: RangeSet, resident: RangeSet, holes: RangeSet) -> Rollback:
        """For one segment of which all was found out before, by a caller who has faster ways for many small ranges.

        Args:
            segment: all of what is populated, and perhaps more.
            kept: pages whose content is nowhere else.
            resident: pages of shared memory that were in memory, whether this process had mapped them or not.
            holes: those of a file on a disk; see :func:`holes_before`.
        """
        known = cls.__new__(cls)
        known._segments, known._kept, known._resident, known._holes = (segment,), kept, resident, {segment: holes}
        return known

    def undo(self, brought_in: RangeSet, taken: RangeSet) -> RangeSet:
        """Discard the pages, and what fallocate set aside in the chunks that were ``taken`` up; those that had to stay."""
        stayed = [*(brought_in & self._kept)]
        for segment in self._segments:
            whole = RangeSet([PageRange(segment.start, segment.stop)])
            mine = (brought_in & whole) - self._kept
            if _is_shared_memory(segment):
                # fallocate may have come further than the page tables.
                allocated = mine | (taken & whole) if isinstance(segment.method, FallocateThen) else mine
                stayed += _punch_unshared(allocated - self._resident, segment)
                mine |= allocated - self._resident  # mapped in order to look who else does
            for pages in mine:
                try:
                    drop(pages.start, pages.length)
                except OSError:  # locked, before Linux 5.18
                    stayed.append(pages)
            stayed += _punch_zeros(self._holes.get(segment, RangeSet()) & taken, segment)
        return RangeSet(stayed) & brought_in


def _of_its_own(segment: Segment) -> Iterator[PageRange]:
    """Pages whose content is nowhere else: in swap, under migration, or present and neither the file's nor the zero page.

    One look at each entry decides: between two looks a page could be swapped out or migrate, and be in neither answer.
    """
    found = residency_of(PageRange(segment.start, segment.stop))
    if found.source == "mincore":
        # Nobody knows then which pages were there before, and to discard those would lose what they hold.
        raise PopulateError(
            errno.EOPNOTSUPP,
            "rollback is not possible here: /proc/self/pagemap cannot be read, so the pages that a call brings in"
            " cannot be told from those before; nothing was populated",
            address=segment.start,
        )
    copies = segment.method.access == "write" and not segment.target.shared
    for start, stop, state in found.runs:
        present = bool(state & PageState.PRESENT)
        if present and copies:
            zero = PageState.ALLOCATED not in found.unknown and not state & PageState.ALLOCATED
            present = not zero and not state & PageState.FILE
        if present or state & PageState.SWAPPED:
            yield PageRange(start, stop)


def _is_shared_memory(segment: Segment) -> bool:
    return segment.target.shared and segment.target.writable and segment.backing is not Backing.FILE


def _allocates_on_disk(segment: Segment) -> bool:
    return segment.backing is Backing.FILE and isinstance(segment.method, FallocateThen)


def holes_before(segment: Segment) -> RangeSet:
    """The holes that fallocate is about to fill; none where it does not."""
    return RangeSet(_holes(segment)) if _allocates_on_disk(segment) else RangeSet()


def _holes(segment: Segment) -> Iterator[PageRange]:
    """The parts of the file under a segment that have no blocks, as addresses; none where the file system cannot tell."""
    target = segment.target
    assert target.fd is not None
    at, stop = segment.start + target.file_base, min(segment.stop + target.file_base, target.file_size)
    stop += -stop % PAGE_SIZE  # the last page of the file, in whole
    for first, end in holes(target.fd, at, stop):
        yield PageRange.inward(first - target.file_base, end - target.file_base)


_FEW = 16 * PAGE_SIZE
"""Others may map the pages at any moment, so that few are looked at and taken away at once."""


def _punch_unshared(pages: RangeSet, segment: Segment) -> Iterator[PageRange]:
    """As :func:`_punch_zeros`, but for pages that others map too: to them they are populated."""
    for item in pages:
        if capabilities.MADV_POPULATE.available:
            # Of what fallocate alone brought in, only our page tables tell whether others map it too.
            for there in resident(item):
                with contextlib.suppress(OSError):
                    mman.madvise(there.start, there.length, mman.MADV_POPULATE_READ)
        for few in item.chunks(max(_FEW, segment.target.page_size)):
            zeros = RangeSet(_zeros(few, segment))
            # Last, so that as little time as can be lies between the look and the hole.
            yield from _punch_all(zeros - mapped_by_others(few), segment)


def _punch_zeros(pages: RangeSet, segment: Segment) -> Iterator[PageRange]:
    """Take the pages that hold nothing but zeros from the file; those that the kernel does not let go of."""
    for item in pages:
        yield from _punch_all(RangeSet(_zeros(item, segment)), segment)


def _punch_all(pages: RangeSet, segment: Segment) -> Iterator[PageRange]:
    for item in pages:
        try:
            _punch(item, segment)
        except OSError:
            yield from _punch_each(item, segment)


def _punch_each(pages: PageRange, segment: Segment) -> Iterator[PageRange]:
    """Page by page: some are locked, and there is no descriptor to go round that; or the memfd is sealed."""
    for page in pages.chunks(segment.target.page_size):
        try:
            _punch(page, segment)
        except OSError:
            yield page


def _punch(pages: PageRange, segment: Segment) -> None:
    target = segment.target
    if target.fd is not None:
        fallocate(target.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pages.start + target.file_base, pages.length)
    else:
        mman.madvise(pages.start, pages.length, mman.MADV_REMOVE)


def _zeros(pages: PageRange, segment: Segment) -> Iterator[PageRange]:
    """The pages that hold nothing but zeros."""
    step = segment.target.page_size
    for part in pages.chunks(max(MIB, step)):
        content = _read(part, segment)
        for offset in range(0, len(content), step):
            if not content[offset : offset + step].strip(b"\0"):
                yield PageRange(part.start + offset, part.start + offset + step)


def _read(part: PageRange, segment: Segment) -> bytes:
    """Its bytes, read by the kernel: a guard page, or a file that shrinks meanwhile, is no signal."""
    target = segment.target
    if target.fd is not None:
        return os.pread(target.fd, part.length, part.start + target.file_base)
    if not capabilities.PROCESS_VM_READV.available:
        return b""  # seccomp filters it: the pages stay in the file, and only leave our page tables
    copy = (c_char * part.length)()
    local, remote = mman.IoVec(addressof(copy), part.length), mman.IoVec(part.start, part.length)
    got = uio.process_vm_readv(os.getpid(), addressof(local), 1, addressof(remote), 1)
    return bytes(copy)[: got - got % target.page_size]
