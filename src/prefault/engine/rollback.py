"""Undo a populate call without losing a byte that was there before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain

from prefault._kernel import mman
from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault._kernel.fiemap import holes
from prefault._system import thp
from prefault.engine.discarding import drop
from prefault.engine.methods import best
from prefault.engine.planning import Segment
from prefault.inspection.mincore import resident
from prefault.inspection.result import PageState
from prefault.inspection.scan import mapped_by_others, residency_of
from prefault.intervals import Intervals
from prefault.memory.vma import Backing, file_descriptor, vmas
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, PAGE_SIZE


class Rollback:
    """State of the memory before a populate call, as far as it is needed to undo the call.

    Private pages were empty, the zero page, or pages of the file: dropping them restores what was. Pages whose content is
    nowhere else stay. A file in memory (memfd, tmpfs, hugetlb) gets pages by every access to a hole, also by a read and also
    through a private mapping. Such a page may be what another process has populated or written meanwhile: only pages of
    nothing but zeros that were not in memory before, and that no other process maps, are taken from the file; the others
    just leave the page tables of this process. On a disk, holes that fallocate filled become holes again, unless a process
    wrote to them.

    A huge page may reach beyond the range. The part outside stays, for another thread may have written there.

    Args:
        segments: all of what is populated, and perhaps more.
        kept: pages whose content is nowhere else; see :func:`prefault.engine.populated_pages.pages_before`.
        resident: pages of files in memory that are there already; see :func:`file_pages`.
    """

    def __init__(self, segments: tuple[Segment, ...], kept: Intervals, resident: Intervals) -> None:
        self._segments = segments
        self._kept = kept
        self._resident = resident
        self._holes = {segment: RangeSet(_holes(segment)) for segment in segments if _allocates_on_disk(segment)}
        self._beyond = RangeSet()

    def undo(self, brought_in: RangeSet, taken: RangeSet) -> RangeSet:
        """Discard the pages, and what fallocate allocated in the chunks that were ``taken``; return those that had to stay.

        Pages stay in the page tables, or only in the file's own memory.
        """
        self._beyond |= RangeSet(_beyond(self._segments, brought_in))  # in another try the huge pages are split already
        # Windows, since a call on many ranges is undone a few ranges at a time.
        kept, resident = (some.window(*taken.span) for some in (self._kept, self._resident))
        stayed = [*(brought_in & kept), *self._beyond]
        for segment in self._segments:
            whole = RangeSet([PageRange(segment.start, segment.stop)])
            mine = (brought_in & whole) - kept
            if is_memory_file(segment):
                # fallocate may have come further than the page tables.
                allocated = mine | (taken & whole) if segment.method.allocates else mine
                allocated -= resident
                if not segment.target.shared:
                    stayed += _drop(mine)  # the copies hide the pages of the file
                for part in _with_descriptors(segment, taken.span):
                    stayed += _punch_unshared(allocated & RangeSet([PageRange(part.start, part.stop)]), part)
                mine |= allocated  # mapped in order to look who else does
            stayed += _drop(mine)
            stayed += _punch_zeros(self._holes.get(segment, RangeSet()) & taken, segment)
        return RangeSet(stayed)


def _drop(pages: RangeSet) -> Iterator[PageRange]:
    """Empty the page tables; yield the pages that the kernel refuses to free."""
    for item in pages:
        try:
            drop(item.start, item.length)
        except OSError:  # locked, before Linux 5.18
            yield item


def is_memory_file(segment: Segment) -> bool:
    """Return whether populating allocates in a file that is only memory. Private hugetlb pages are never the file's."""
    backing = segment.backing
    return backing is not None and (backing.is_shmem or (backing is Backing.HUGETLB and segment.target.shared))


def file_pages(segments: Iterable[Segment]) -> RangeSet:
    """Return the pages of memory files that are in memory already, mapped by this process or not."""
    return RangeSet.union_of(resident(PageRange(s.start, s.stop)) for s in segments if is_memory_file(s))


def _with_descriptors(segment: Segment, span: PageRange) -> Iterator[Segment]:
    """Yield the parts of a segment in a span, each with a descriptor of its file where the mapping lets no hole be punched.

    Neighbouring mappings that populate is given no descriptor of are one segment, be they of one file or of several.
    """
    target = segment.target
    if target.fd is not None or (target.shared and target.writable):
        yield segment
        return
    for vma in vmas(max(segment.start, span.start), min(segment.stop, span.stop)):
        part = segment._replace(start=max(segment.start, vma.start), stop=min(segment.stop, vma.stop))
        fd = file_descriptor(vma) if vma.inode else None
        yield part if fd is None else part._replace(target=target._replace(fd=fd, file_base=vma.file_offset - vma.start))


def _beyond(segments: tuple[Segment, ...], brought_in: RangeSet) -> Iterator[PageRange]:
    """Yield the parts of huge pages that were brought in and that lie outside of all segments."""
    size = thp.pmd_size()
    for segment in segments:
        if size is None or segment.target.page_size > PAGE_SIZE:
            continue
        before = PageRange(segment.start - segment.start % size, segment.start)
        after = PageRange(segment.stop, segment.stop + -segment.stop % size)
        for outside, edge in ((before, segment.start), (after, segment.stop - PAGE_SIZE)):
            page = PageRange(edge, edge + PAGE_SIZE)
            # One entry maps all of a huge page: what came with this page came at once.
            if outside and page in brought_in and any(run.state & PageState.HUGE for run in residency_of(page).runs):
                yield from RangeSet([outside]) - RangeSet(PageRange(other.start, other.stop) for other in segments)


def _allocates_on_disk(segment: Segment) -> bool:
    return segment.backing is Backing.FILE and segment.method.allocates


def _holes(segment: Segment) -> Iterator[PageRange]:
    """Yield the holes that fallocate is about to fill, as addresses; none where the file system cannot tell them."""
    target = segment.target
    assert target.fd is not None
    at, stop = segment.start + target.file_base, min(segment.stop + target.file_base, target.file_size)
    stop += -stop % PAGE_SIZE  # the last page of the file, in whole
    for first, end in holes(target.fd, at, stop):
        yield PageRange.inward(first - target.file_base, end - target.file_base)


_FEW = 16 * PAGE_SIZE
"""Bytes that are looked at and punched at once: few, since other processes may map the pages at any moment."""


def _punch_unshared(pages: RangeSet, segment: Segment) -> Iterator[PageRange]:
    """Take the pages of zeros that no other process maps from the file; yield those that the kernel refuses to free."""
    read = best("read", allocate=False)
    for item in pages:
        # Of what fallocate alone brought in, and of the file behind a private mapping, only our page tables tell whether
        # others map it too.
        for there in resident(item):
            with contextlib.suppress(OSError):
                read.run(there.start, there.length, segment.target)
        for few in item.chunks(max(_FEW, segment.target.page_size)):
            zeros, unread = _look(few, segment)
            # Last, so that as little time as possible lies between the look and the hole.
            yield from _punch_all(zeros - mapped_by_others(few), segment)
            for page in unread:
                yield from resident(page)


def _punch_zeros(pages: RangeSet, segment: Segment) -> Iterator[PageRange]:
    """Take the pages that hold nothing but zeros from the file; yield those that the kernel refuses to free."""
    for item in pages:
        for part in item.chunks(max(MIB, segment.target.page_size)):
            yield from _punch_all(_look(part, segment)[0], segment)


def _punch_all(pages: RangeSet, segment: Segment) -> Iterator[PageRange]:
    for item in pages:
        try:
            _punch(item, segment)
        except OSError:
            yield from _punch_each(item, segment)


def _punch_each(pages: PageRange, segment: Segment) -> Iterator[PageRange]:
    """Punch page by page: some are locked, and there is no descriptor to go round that; or the memfd is sealed."""
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


def _look(pages: PageRange, segment: Segment) -> tuple[RangeSet, RangeSet]:
    """Return the pages that hold nothing but zeros, and those that cannot be read."""
    step = segment.target.page_size
    content = _read(pages, segment)
    if len(content) < pages.length and pages.length > step:
        parts = [_look(page, segment) for page in pages.chunks(step)]
        zeros, unread = zip(*parts, strict=True)
        return RangeSet(chain.from_iterable(zeros)), RangeSet(chain.from_iterable(unread))
    if not content:
        return RangeSet(), RangeSet([pages])
    return RangeSet(
        PageRange(pages.start + offset, pages.start + offset + step)
        for offset in range(0, len(content), step)
        if not content[offset : offset + step].strip(b"\0")
    ), RangeSet()


def _read(part: PageRange, segment: Segment) -> bytes:
    """Return the bytes as far as the kernel can read them: a guard page, or a file that shrinks meanwhile, is no signal."""
    target = segment.target
    with contextlib.suppress(OSError):
        if target.fd is not None:
            return os.pread(target.fd, part.length, part.start + target.file_base)
        # Not process_vm_readv: this reads memory that is mapped for writing only, too.
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            content = os.pread(memory.fileno(), part.length, part.start)
            return content if len(content) == part.length else b""
    return b""
