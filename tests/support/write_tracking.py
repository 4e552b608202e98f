"""userfaultfd write-protection in asynchronous mode (Linux 6.7): the kernel notes which pages are written, on its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefault._kernel.userfaultfd import UFFDIO_REGISTER_MODE_WP, UffdFeature
from support import userfaultfd


@contextmanager
def tracking(address: int, length: int) -> Iterator[None]:
    """From here on the kernel tracks writes to ``[address, address + length)``; no page counts as written at first."""
    with userfaultfd.opened(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED) as watcher:
        watcher.register(address, length, UFFDIO_REGISTER_MODE_WP)
        watcher.write_protect(address, length, protect=True)
        yield
