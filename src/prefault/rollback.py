"""Taking back what a populate call brought in, without losing a byte that was there before."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from ctypes import addressof, c_char

from prefault import capabilities
from prefault._kernel import mman, uio
from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault.discard import drop
from prefault.errors import PopulateError
from prefault.methods import FallocateThen
from prefault.plan import Segment
from prefault.ranges import PageRange, RangeSet
from prefault.residency import swapped
from prefault.sizes import MIB, PAGE_SIZE
from prefault.vma import Backing


class Rollback:
    """What has to be known before a populate call in order to undo it.

    Private pages were empty, the zero page, or pages of the file: dropping them restores what was, except for pages in swap,
    whose content is nowhere else once they are read in; these stay. A page of shared memory may hold what another process
    wrote: only pages of nothing but zeros are taken from the file, the others just leave our page tables. On a disk, the
    holes that fallocate filled and nobody wrote to become holes again.
    """

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        if not (capabilities.PAGEMAP_SCAN.available or capabilities.PAGEMAP.available):
            # Without it nobody knows which pages were there before, and to discard those would lose what they hold.
            raise PopulateError(
                errno.EOPNOTSUPP,
                "rollback is not possible here: /proc/self/pagemap cannot be read, so the pages that a call brings in"
                f" cannot be told from those before ({capabilities.PAGEMAP.refusal}); nothing was populated",
                address=segments[0].start,
            )
        self._segments = segments
        self._swapped = swapped(segments[0].start, segments[-1].stop)
        self._holes = {segment: RangeSet(_holes(segment)) for segment in segments if _allocates_on_disk(segment)}

    def undo(self, brought_in: RangeSet) -> RangeSet:
        """Discard the pages; those that had to stay."""
        for segment in self._segments:
            whole = RangeSet([PageRange(segment.start, segment.stop)])
            for pages in (brought_in & whole) - self._swapped:
                if segment.target.shared and segment.target.writable and segment.backing is not Backing.FILE:
                    for zeros in RangeSet(_zero_pages(pages, segment.target.page_size)):
                        _punch(zeros, segment)
                drop(pages.start, pages.length)
            for hole in self._holes.get(segment, ()):
                # SEEK_HOLE no longer tells: allocated blocks with a page in the page cache look like data (iomap, ext4).
                for zeros in RangeSet(_zeros_in_file(hole, segment)):
                    _punch(zeros, segment)
        return brought_in & self._swapped


def _allocates_on_disk(segment: Segment) -> bool:
    return segment.backing is Backing.FILE and isinstance(segment.method, FallocateThen)


def _holes(segment: Segment) -> Iterator[PageRange]:
    """The holes of the file under a segment, as addresses. Blocks that are allocated and never written look like holes."""
    target = segment.target
    assert target.fd is not None
    at, stop = segment.start + target.file_base, min(segment.stop + target.file_base, target.file_size)
    while at < stop:
        start = os.lseek(target.fd, at, os.SEEK_HOLE)
        try:
            at = min(os.lseek(target.fd, start, os.SEEK_DATA), stop) if start < stop else stop
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data up to the end of the file
                raise
            at = stop
        if start < at:
            end = at if at < stop else at + -at % PAGE_SIZE  # the last page of the file, in whole
            yield PageRange.inward(start - target.file_base, end - target.file_base)


def _zeros_in_file(pages: PageRange, segment: Segment) -> Iterator[PageRange]:
    """The pages of a stretch of the file that hold nothing but zeros. Read from the file: its mapping may be forbidden."""
    target = segment.target
    assert target.fd is not None
    for part in pages.chunks(MIB):
        content = os.pread(target.fd, part.length, part.start + target.file_base)
        for offset in range(0, part.length, PAGE_SIZE):
            if not content[offset : offset + PAGE_SIZE].strip(b"\0"):
                yield PageRange(part.start + offset, part.start + offset + PAGE_SIZE)


def _punch(pages: PageRange, segment: Segment) -> None:
    target = segment.target
    if target.fd is not None:
        fallocate(target.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pages.start + target.file_base, pages.length)
    else:
        mman.madvise(pages.start, pages.length, mman.MADV_REMOVE)


def _zero_pages(pages: PageRange, page_size: int) -> Iterator[PageRange]:
    """The stretches that hold nothing but zeros. Read by the kernel: a file that shrinks meanwhile is no SIGBUS."""
    if not capabilities.PROCESS_VM_READV.available:
        return  # seccomp filters it: the pages stay in the file, and only leave our page tables
    step = max(MIB, page_size)
    copy = (c_char * step)()
    view = memoryview(copy).cast("B")
    zeros = bytes(page_size)
    for part in pages.chunks(step):
        local, remote = mman.IoVec(addressof(copy), part.length), mman.IoVec(part.start, part.length)
        got = uio.process_vm_readv(os.getpid(), addressof(local), 1, addressof(remote), 1)
        for offset in range(0, got - page_size + 1, page_size):
            if view[offset : offset + page_size] == zeros:
                yield PageRange(part.start + offset, part.start + offset + page_size)
