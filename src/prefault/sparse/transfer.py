"""Bytes in and out of sparse memory, copied by the kernel: unavailable memory is an exception, not a signal."""

from __future__ import annotations

import errno
import os
from array import array

from prefault._kernel import uio
from prefault.engine.diagnosis import diagnose
from prefault.engine.methods import Access, best
from prefault.errors import GuardPageError, NotPopulatedError, PopulateError, ProtectionError
from prefault.memory.borrowing import Borrowed
from prefault.sizes import MIB, PAGE_SIZE
from prefault.sparse.exclusion import BlockGuard

_AT_ONCE = 16 * MIB
"""One system call copies at most this much, so that Ctrl-C is answered."""


def copy(memory: Borrowed, guard: BlockGuard, address: int, ours: array[int], access: Access) -> None:
    """Copy from ``address`` into our bytes (``access="read"``), or our bytes to ``address``.

    Raises:
        NotPopulatedError: a block is protected. Nothing was written, unless it was discarded meanwhile.
        PopulateError: the memory is not available.
    """
    move = uio.process_vm_readv if access == "read" else uio.process_vm_writev
    base, length = ours.buffer_info()
    _require_populated(memory, guard, address, length)
    done = 0
    while done < length:
        part = min(length - done, _AT_ONCE)
        vectors = array("Q", (base + done, part, address + done, part))  # struct iovec: ours, theirs
        at = vectors.buffer_info()[0]
        try:
            done += move(os.getpid(), at, 1, at + 2 * vectors.itemsize, 1)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            failed = address + done
            offset = failed - memory.address
            _require_populated(memory, guard, failed, length - done)
            cause = diagnose(failed - failed % PAGE_SIZE, best(access, allocate=False), error, memory.fd)
            if guard.protection is not None and cause.error in (ProtectionError, GuardPageError, PopulateError):
                raise _not_populated(guard, offset) from error  # it is being discarded, or was until a moment ago
            raise cause.error(
                cause.errno, f"cannot {access} the bytes at offset {offset}: {cause.sentence}", address=failed, offset=offset
            ) from error


def _require_populated(memory: Borrowed, guard: BlockGuard, address: int, length: int) -> None:
    if guard.protection is None:
        return
    offset = address - memory.address
    guard.require_unlocked()
    with guard.lock:
        protected = guard.protection.first_protected(offset, offset + length)
    if protected is not None:
        raise _not_populated(guard, protected)


def _not_populated(guard: BlockGuard, offset: int) -> NotPopulatedError:
    return NotPopulatedError(
        errno.EFAULT, f"the block of {guard.block} bytes at offset {offset - offset % guard.block} is not populated",
        offset=offset,
    )  # fmt: skip
