"""userfaultfd write-protection in asynchronous mode (Linux 6.7): the kernel itself records which pages are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefault._kernel.userfaultfd import UFFDIO_REGISTER_MODE_WP, UffdFeature
from support import userfaultfd


@contextmanager
def tracking(address: int, length: int) -> Iterator[None]:
    """Have the kernel track writes to ``[address, address + length)`` inside the block; all pages start out clean."""
    with userfaultfd.opened(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED) as tracker:
        tracker.register(address, length, UFFDIO_REGISTER_MODE_WP)
        tracker.write_protect(address, length, protect=True)
        yield
