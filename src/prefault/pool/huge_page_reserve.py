"""Huge pages that the kernel sets aside for a pool until its members take them."""

from __future__ import annotations

import errno
import os

from prefault._kernel import mman
from prefault._system.descriptors import Descriptors
from prefault.errors import HugePagesError
from prefault.pool.store import Store


class HugePageReserve:
    """A hugetlb file of which no page is ever used: mapping it made the kernel reserve them, unmapping did not undo that.

    The reservation of a shared hugetlb mapping belongs to the file (Documentation/mm/hugetlbfs_reserv.rst). It is given up
    from the end, by truncation, when members are about to take pages, and taken again when they gave them back. Between the
    two is a moment in which another process can be faster; :attr:`held` says what there is.

    Attributes:
        held: bytes that are set aside.
    """

    def __init__(self, store: Store, size: int) -> None:
        with Descriptors() as descriptors:
            store.backing.open(descriptors, size, writable=True)
            self._fd: int | None = descriptors.pop()
        self._pid = os.getpid()
        self.held = 0
        try:
            if not self.hold(size):
                raise HugePagesError(errno.ENOMEM, f"the kernel does not set aside the huge pages of a pool of {size} bytes")
        except BaseException:
            self.close()
            raise

    def hold(self, size: int) -> bool:
        """Set aside so many bytes, no more and no less; whether it could be had."""
        if self._fd is None or size == self.held:
            return True
        # The length first, both ways: what lies beyond the end is given up, and only what lies before it can be mapped.
        os.ftruncate(self._fd, size)
        if size > self.held:
            try:
                address = mman.mmap(0, size - self.held, mman.PROT_READ, mman.MAP_SHARED, self._fd, self.held)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return False
            mman.munmap(address, size - self.held)
        self.held = size
        return True

    def close(self) -> None:
        """Give everything up."""
        fd, self._fd = self._fd, None
        if fd is not None:
            if os.getpid() == self._pid:
                os.ftruncate(fd, 0)  # a fork may have it open
            os.close(fd)
            self.held = 0
