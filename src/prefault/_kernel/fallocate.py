"""fallocate(2)."""

from __future__ import annotations

from prefault._kernel._call import INT, OFFSET, declare, fail

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_fallocate = declare("fallocate", INT, INT, OFFSET, OFFSET)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, or punch a hole into, ``length`` bytes of a file. fallocate(2).

    ``os.posix_fallocate`` is no substitute: it writes into every block where the file system cannot allocate.
    """
    if _fallocate(fd, mode, offset, length):
        fail("fallocate")
