"""The swap file of buffer objects: each page at its offset in the device, in a sparse file."""

from __future__ import annotations

import errno
import fcntl
import os

from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.sizes import PAGE_SIZE


class SwapFile:
    """Content of pages that are missing; a hole is zeros.

    Args:
        path: of the file; None: there is none, and each missing page is zeros.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._fd = -1

    def open(self) -> None:
        """Open the file, and make it if it does not exist.

        Raises:
            BufferObjectError: EBUSY: another device has it, at the same offsets.
        """
        if self._path is None:
            return
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise BufferObjectError(
                errno.EBUSY, f"the swap file {self._path} belongs to another device: give each device one of its own"
            ) from None

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def save(self, run: range, content: memoryview) -> None:
        """Write pages."""
        at = run.start * PAGE_SIZE
        while len(content):
            written = os.pwrite(self._fd, content, at)
            at, content = at + written, content[written:]

    def load(self, pages: range, frames: memoryview) -> None:
        """Read pages into frames of zeros."""
        done = 0
        while self._fd >= 0 and done < len(frames):
            got = os.preadv(self._fd, [frames[done:]], pages.start * PAGE_SIZE + done)
            if not got:  # behind the end of the file
                return
            done += got

    def forget(self, pages: range) -> None:
        """Free what the file holds for pages."""
        if self._fd < 0:
            return
        try:
            flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            fallocate(self._fd, flags, pages.start * PAGE_SIZE, len(pages) * PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self.save(pages, memoryview(bytes(len(pages) * PAGE_SIZE)))
