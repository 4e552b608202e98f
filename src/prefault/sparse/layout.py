"""Block, size and reservation of a sparse memory, and the length of the file behind it."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from prefault._system import thp
from prefault.errors import MappingError
from prefault.mapping.mapping import HugeAdvice
from prefault.memory.backings import BackingSource, OpenedBacking
from prefault.sizes import MAX_SIZE, PAGE_SIZE, Size, format_size, parse_size

_MOST = MAX_SIZE >> 1


class Layout(NamedTuple):
    """Block, size and reservation in bytes, the latter two in whole blocks; and the advice on huge pages that fits them."""

    block: int
    size: int
    reservation: int
    huge: HugeAdvice


def size_of(size: Size, what: str) -> int:
    """Parse a size that a mapping can have, in bytes.

    Raises:
        ValueError: zero, or more than the kernel can map.
    """
    wanted = parse_size(size)
    if wanted == 0:
        raise ValueError(f"a {what} of 0 bytes is not possible: mmap(2) refuses it")
    if wanted > _MOST:
        raise ValueError(f"a {what} of {wanted} bytes is more than the kernel can map")
    return wanted


def lay_out(
    source: object,
    opened: OpenedBacking,
    wanted: int | None,
    reserved: int | None,
    block: int | None,
    huge: HugeAdvice,
) -> Layout:
    """Round the requested size and reservation to whole blocks, and choose what was left open.

    Raises:
        ValueError: the requests contradict each other.
    """
    page_size = opened.page_size
    huge_page = _huge_page(page_size)
    if block is None:
        block = huge_page if huge == "advise" else page_size
    if block <= 0 or block % page_size:
        raise ValueError(f"a block is a multiple of the page size, {page_size} bytes, not {block} bytes")
    # A huge page larger than a block would bring in, and keep, blocks that the caller did not ask for: populating could not
    # be undone, and discarding a part of the page frees nothing.
    if block % huge_page and huge == "advise":
        raise ValueError(
            f"with transparent huge pages a block is a multiple of {huge_page} bytes, not {block} bytes (huge='never'"
            " does without them)"
        )
    if block % huge_page and huge == "auto":
        huge = "never"
    size = opened.size if wanted is None else wanted
    if size is None:
        raise ValueError(f"{type(source).__name__} has no size of its own: say how many bytes")
    if reserved is not None and reserved < size:
        raise ValueError(f"a reservation of {reserved} bytes is smaller than the size, {size} bytes")
    rounded = size + -size % block
    return Layout(block, rounded, max(rounded, 0 if reserved is None else reserved + -reserved % block), huge)


def _huge_page(page_size: int) -> int:
    """Return the bytes in a transparent huge page; the page size where this memory cannot have one."""
    return (thp.pmd_size() or page_size) if page_size == PAGE_SIZE else page_size


def ensure_length(source: BackingSource, fd: int, offset: int, size: int, page_size: int) -> None:
    """Check that a file holds ``size`` bytes from ``offset`` on. Files that prefault made are made longer where needed.

    Raises:
        MappingError: the file is too short, and is the caller's or cannot be made longer.
    """
    there = os.fstat(fd).st_size - offset
    if size <= there + -there % page_size:
        return
    if source.is_given:
        raise MappingError(
            errno.EINVAL,
            f"the file holds {there} bytes from offset {offset} on, and {size} are needed, in whole blocks"
            " (os.truncate makes it longer)",
        )
    try:
        os.ftruncate(fd, offset + size)
    except OSError as error:
        raise MappingError(error.errno, f"the file cannot be made {format_size(size)} long: {error.strerror}") from error
