"""Plan of warming one file: which pages are there, which are missing, and which have nothing to read."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import CannotTellError, FileError
from prefault.files.file_systems import MADE_BY_KERNEL, made_by_kernel
from prefault.files.open_file import OpenFile
from prefault.ranges import PageRange, RangeSet


class FilePlan(NamedTuple):
    """Pages of one file, as byte offsets.

    Attributes:
        present: pages that are in the page cache.
        missing: pages to be brought in.
        hole_bytes: bytes of pages in holes, which have nothing to read.
        is_known: True if the kernel told; False: ``missing`` is all of it.
    """

    present: RangeSet
    missing: RangeSet
    hole_bytes: int
    is_known: bool

    @classmethod
    def of(cls, file: OpenFile, ranges: RangeSet | None, *, missing_only: bool) -> FilePlan:
        """Look at the page cache of a file.

        Raises:
            FileError: its file system has none.
        """
        if file.file_system in MADE_BY_KERNEL:
            raise FileError(errno.EINVAL, made_by_kernel(file.file_system), file.path, "leave it out")
        whole = RangeSet([file.pages()])
        asked = whole if ranges is None else ranges.outward(file.page_size) & whole
        span = asked.span
        try:
            present, is_known = cached_ranges(file, span.start, span.stop) & asked, True
        except CannotTellError:
            present, is_known = RangeSet(), False
        if file.file_system == "hugetlbfs":
            return cls(present, RangeSet(), asked.length - present.length, is_known)
        missing = asked - present if missing_only else asked
        holes = _holes(file, missing)
        return cls(present, missing - holes, holes.length, is_known)

    @property
    def fresh(self) -> RangeSet:
        """Pages to be brought in that are not in the page cache yet."""
        return self.missing - self.present


def _holes(file: OpenFile, pages: RangeSet) -> RangeSet:
    """Return the pages that lie in holes of a sparse file."""
    if file.is_block_device or file.allocated_bytes >= file.size or not pages:
        return RangeSet()
    data: list[PageRange] = []
    at, stop = pages.span.start, min(pages.span.stop, file.size)
    try:
        while at < stop:
            start = os.lseek(file.fd, at, os.SEEK_DATA)  # the descriptor is ours, and so is its offset
            at = os.lseek(file.fd, start, os.SEEK_HOLE)
            data.append(PageRange.outward(start, at))
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data any more; others: the file system cannot tell
            return RangeSet()
    return pages - RangeSet(data)
