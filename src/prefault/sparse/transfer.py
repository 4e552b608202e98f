"""Bytes in and out of sparse memory, copied by the kernel: what cannot be had is an exception, and no signal."""

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
from prefault.sparse.operations import SparseAccessGuard

_AT_ONCE = 16 * MIB
"""One system call copies at most this much, so that Ctrl-C is answered."""


def copy(memory: Borrowed, gate: SparseAccessGuard, address: int, ours: array[int], access: Access) -> None:
    """Read from ``address`` into our bytes, or write them there.

    Raises:
        NotPopulatedError: a block is behind a fence. Nothing was written, unless it was discarded meanwhile.
        PopulateError: the memory cannot be had.
    """
    move = uio.process_vm_readv if access == "read" else uio.process_vm_writev
    base, length = ours.buffer_info()
    _require_populated(memory, gate, address, length)
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
            _require_populated(memory, gate, failed, length - done)
            cause = diagnose(failed - failed % PAGE_SIZE, best(access, allocate=False), error, memory.fd)
            if gate.fence is not None and cause.error in (ProtectionError, GuardPageError, PopulateError):
                raise _not_populated(gate, offset) from error  # it is being discarded, or was until a moment ago
            raise cause.error(
                cause.errno, f"cannot {access} the bytes at offset {offset}: {cause.sentence}", address=failed, offset=offset
            ) from error


def _require_populated(memory: Borrowed, gate: SparseAccessGuard, address: int, length: int) -> None:
    if gate.fence is None:
        return
    offset = address - memory.address
    gate.ask_for_change()
    with gate.lock:
        shut = gate.fence.first_shut(offset, offset + length)
    if shut is not None:
        raise _not_populated(gate, shut)


def _not_populated(gate: SparseAccessGuard, offset: int) -> NotPopulatedError:
    return NotPopulatedError(
        errno.EFAULT, f"the block of {gate.block} bytes at offset {offset - offset % gate.block} is not populated",
        offset=offset,
    )  # fmt: skip
