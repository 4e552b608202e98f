"""Huge pages that the kernel reserves for a pool until its members take them."""

from __future__ import annotations

import errno
import os

from prefault._kernel import mman
from prefault._system.descriptors import Descriptors
from prefault.errors import HugePagesError
from prefault.pool.store import Store


class HugePageReserve:
    """A hugetlb file whose pages are reserved and never used.

    Mapping the file shared made the kernel reserve its pages; the reservation belongs to the file and outlives the mapping
    (Documentation/mm/hugetlbfs_reserv.rst). Truncating the file releases pages before a member takes them; extending and
    mapping it reserves them again after a refund. Between the two another process can take them first.

    Attributes:
        size: bytes that are reserved.
    """

    def __init__(self, store: Store, size: int) -> None:
        with Descriptors() as descriptors:
            store.backing.open(descriptors, size, writable=True)
            self._fd: int | None = descriptors.pop()
        self._pid = os.getpid()
        self.size = 0
        try:
            if not self.resize(size):
                raise HugePagesError(errno.ENOMEM, f"the kernel does not reserve the huge pages of a pool of {size} bytes")
        except BaseException:
            self.close()
            raise

    def resize(self, size: int) -> bool:
        """Reserve exactly ``size`` bytes; return False if the kernel has not enough free huge pages."""
        if self._fd is None or size == self.size:
            return True
        # The length first, in both directions: truncation releases what lies beyond it, and only what lies before it can be
        # mapped.
        os.ftruncate(self._fd, size)
        if size > self.size:
            try:
                address = mman.mmap(0, size - self.size, mman.PROT_READ, mman.MAP_SHARED, self._fd, self.size)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return False
            mman.munmap(address, size - self.size)
        self.size = size
        return True

    def close(self) -> None:
        """Release the reservation and the file. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            if os.getpid() == self._pid:
                os.ftruncate(fd, 0)  # a fork may have it open
            os.close(fd)
            self.size = 0
