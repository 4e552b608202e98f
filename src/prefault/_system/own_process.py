"""This process, as process_madvise(2) names it."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefault._kernel import mman
from prefault._system.descriptors import opened
from prefault.sizes import PAGE_SIZE


@contextmanager
def own_process() -> Iterator[int]:
    """Return a context with what process_madvise(2) takes for this process: a constant, or a pidfd before Linux 6.15."""
    if has_constant():
        yield mman.PIDFD_SELF_THREAD_GROUP  # nothing to close, which would give up the GIL
        return
    with opened(os.pidfd_open, os.getpid()) as pidfd:
        yield pidfd


@functools.cache
def has_constant() -> bool:
    """Return whether process_madvise(2) takes PIDFD_SELF_THREAD_GROUP, which needs no descriptor (Linux 6.15)."""
    page = mman.mmap(0, PAGE_SIZE, mman.PROT_READ, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS)
    try:
        ranges = [(page, PAGE_SIZE)]
        return mman.process_madvise(mman.PIDFD_SELF_THREAD_GROUP, ranges, mman.MADV_POPULATE_READ) == PAGE_SIZE
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return False
    finally:
        mman.munmap(page, PAGE_SIZE)
