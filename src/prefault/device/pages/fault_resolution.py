"""The ioctls of a userfaultfd and the meaning of their errors: for the server, and for the warden when there is no server.

No function here raises for what a client did to its memory or to itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from prefault._kernel import userfaultfd
from prefault.device.frames import HUGE_PAGE
from prefault.device.page_states import DevicePageState
from prefault.sizes import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefault.device.frames import Frames
    from prefault.device.registry import AreaRecord, ClientRecord

_MAX_UNREACHABLE = 2000
"""Consecutive pages that are not mapped or not registered, after which the rest is assumed to be so as well."""
_PATIENCE = 100
_NOWHERE = 1 << 20
"""An address that mmap(2) never chooses. Probing an area would take away the protection that evictions rely on."""
_CHUNK = 16 << 20


class Result:
    """Outcome for a run of addresses.

    Attributes:
        mapped: spans that have new entries.
        present: spans that had entries already; threads that waited there were woken.
        holes: addresses whose frame does not exist.
        unreachable: some of it is not mapped any more, or not registered.
        busy: the client's address space is changing (fork, mremap); the rest is to be tried again.
        gone: the process has no such memory any more: it ended, or called execve(2); or its descriptor is broken.
        failed: an errno that has no other meaning here.
    """

    __slots__ = ("busy", "failed", "gone", "holes", "mapped", "present", "unreachable")

    def __init__(self) -> None:
        self.mapped: list[tuple[int, int]] = []
        self.present: list[tuple[int, int]] = []
        self.holes: list[int] = []
        self.unreachable = self.busy = self.gone = False
        self.failed = 0

    def add(self, other: Result) -> None:
        """Add the outcome of a run behind this one."""
        self.mapped += other.mapped
        self.present += other.present
        self.holes += other.holes
        self.unreachable |= other.unreachable
        self.busy |= other.busy
        self.gone |= other.gone
        self.failed = self.failed or other.failed


def map_run(fd: int, start: int, length: int, unit: int, write_protect: bool) -> Result:
    """Map supplied frames by UFFDIO_CONTINUE, and wake the threads that wait for them."""
    mode = userfaultfd.UFFDIO_CONTINUE_MODE_WP if write_protect else 0
    return _run(fd, start, length, unit, lambda at, size: userfaultfd.continue_(fd, at, size, mode))


def poison_run(fd: int, start: int, length: int, unit: int) -> Result:
    """Poison addresses without entries by UFFDIO_POISON: touching them is SIGBUS, also for the threads that wait."""
    # A marker of write protection counts as an entry; real entries stay.
    unprotect(fd, start, length)
    return _run(fd, start, length, unit, lambda at, size: userfaultfd.poison(fd, at, size))


def _run(fd: int, start: int, length: int, unit: int, ask: Callable[[int, int], int]) -> Result:
    result = Result()
    pending = [(start, start + length)] if length else []
    unreachable = patience = 0
    while pending:
        at, stop = pending.pop()
        try:
            done = ask(at, stop - at)
        except OSError as error:
            match error.errno:
                case errno.EEXIST:
                    unreachable = 0
                    _extend(result.present, at, at + unit)
                    wake(fd, at, unit)
                case errno.EFAULT:
                    result.holes.append(at)
                case errno.ENOENT if stop - at > unit:
                    # It ends in the middle of a mapping, or reaches over several (after mprotect or mlock of a part).
                    middle = at + (stop - at) // (2 * unit) * unit
                    pending += ((middle, stop), (at, middle))
                    unreachable += 1
                    if unreachable > _MAX_UNREACHABLE:
                        result.unreachable = True
                        return result
                    continue
                case errno.ENOENT:
                    result.unreachable = True
                    wake(fd, at, unit)
                case errno.EAGAIN:
                    patience += 1
                    if patience > _PATIENCE:
                        result.busy = True
                        wake(fd, at, stop - at)
                        return result
                    pending.append((at, stop))
                    continue
                case errno.ESRCH | errno.EBADF | errno.ENOTTY | errno.EINVAL:
                    result.gone = error.errno != errno.EINVAL
                    result.unreachable = True
                    return result
                case _:
                    result.failed = error.errno or errno.EIO
                    wake(fd, at, stop - at)
                    return result
            if at + unit < stop:
                pending.append((at + unit, stop))
            continue
        _extend(result.mapped, at, at + done)
        unreachable = 0
        if at + done < stop:
            pending.append((at + done, stop))
    return result


def _extend(spans: list[tuple[int, int]], start: int, stop: int) -> None:
    if spans and spans[-1][1] == start:
        spans[-1] = (spans[-1][0], stop)
    else:
        spans.append((start, stop))


# Errors that a client causes by changes to its memory, or to itself.
_THEIRS = (errno.ENOENT, errno.ESRCH, errno.EINVAL, errno.EBADF, errno.ENOTTY, errno.EFAULT)


def wake(fd: int, start: int, length: int) -> None:
    """Wake the threads that wait at these addresses, by UFFDIO_WAKE: they fault again."""
    try:
        userfaultfd.wake(fd, start, length)
    except OSError as error:
        if error.errno not in _THEIRS:
            raise


def register(fd: int, start: int, length: int, mode: int, unit: int) -> None:
    """Register addresses by UFFDIO_REGISTER, but for what the client has mapped there by itself.

    Raises:
        OSError: ENOMEM: no more mappings.
    """
    pending = [(start, start + length)]
    while pending:
        at, stop = pending.pop()
        try:
            userfaultfd.register(fd, at, stop - at, mode)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise
            # EINVAL, EBUSY, EPERM: memory of another kind. The kernel registers all of a range or nothing.
            if error.errno in (errno.EINVAL, errno.EBUSY, errno.EPERM) and stop - at > unit:
                middle = at + (stop - at) // (2 * unit) * unit
                pending += ((middle, stop), (at, middle))


def protect(fd: int, start: int, length: int, unit: int) -> bool:
    """Write-protect addresses by UFFDIO_WRITEPROTECT; pages without an entry are marked as well.

    Returns:
        False: the client's address space keeps changing, and threads may go on writing.
    """
    return _for_parts(fd, start, length, unit, userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP)


def _for_parts(fd: int, start: int, length: int, unit: int, mode: int) -> bool:
    pending = [(start, start + length)]
    while pending:
        at, stop = pending.pop()
        try:
            if not _write_protect(fd, at, stop - at, mode):
                return False
        except FileNotFoundError:
            # The kernel stops at the first page that is not registered any more. Those behind it may be written to.
            if stop - at > unit:
                middle = at + (stop - at) // (2 * unit) * unit
                pending += ((middle, stop), (at, middle))
    return True


def unprotect(fd: int, start: int, length: int) -> bool:
    """Remove the write protection of addresses, and wake the threads that wait there. False: they fault again."""
    try:
        return _write_protect(fd, start, length, 0)
    except FileNotFoundError:
        return True  # a write behind the page that is not registered any more is a fault, which unprotects its page


def _write_protect(fd: int, start: int, length: int, mode: int) -> bool:
    for _ in range(100 * _PATIENCE):
        try:
            userfaultfd.writeprotect(fd, start, length, mode)
        except OSError as error:
            if error.errno in _THEIRS and error.errno != errno.ENOENT:
                return True
            if error.errno != errno.EAGAIN:
                raise
            os.sched_yield()
        else:
            return True
    return False


def is_another_program(client: ClientRecord) -> bool:
    """Return whether a process has none of its areas: it mapped none, ended, or called execve(2).

    UFFDIO_WAKE reports neither.
    """
    if not client.areas:
        return True
    try:
        userfaultfd.writeprotect(client.userfaultfd, _NOWHERE, PAGE_SIZE, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def resolve_all(frames: Frames, client: ClientRecord) -> None:
    """Map every supplied page of a client and poison all others, so that no fault waits: the orderly end."""
    for area in client.areas.values():
        for start, stop, ready in _pieces(frames, area):
            if ready:
                result = map_run(client.userfaultfd, start, stop - start, frames.unit, False)
                if result.holes:
                    poison_run(client.userfaultfd, start, stop - start, frames.unit)
            else:
                result = poison_run(client.userfaultfd, start, stop - start, frames.unit)
            if result.gone:
                return
        # First writes are not tracked any more, and nothing is evicted: both would wait for an answer.
        # Parts of an area with huge entries are not registered for protection: the others are behind and between them.
        _for_parts(client.userfaultfd, area.address, area.length, HUGE_PAGE, 0)
        wake(client.userfaultfd, area.address, area.length)


def _pieces(frames: Frames, area: AreaRecord) -> list[tuple[int, int, bool]]:
    """Return the addresses of an area, in runs of supplied pages and of others."""
    size, pages = frames.page_size, range(area.offset // frames.page_size, (area.offset + area.length) // frames.page_size)
    pieces, page = [], pages.start
    while page < pages.stop:
        state, stop = frames.run_at(page, min(pages.stop, page + max(1, _CHUNK // size)))
        start = area.address + page * size - area.offset
        pieces.append((start, start + (stop - page) * size, state in (DevicePageState.READY, DevicePageState.EVICTING)))
        page = stop
    return pieces


def disarm(lifeline_read: int) -> None:
    """Clear O_ASYNC on a lifeline: the end of server and warden does not end the client any more."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(lifeline_read, fcntl.F_SETFL, fcntl.fcntl(lifeline_read, fcntl.F_GETFL) & ~os.O_ASYNC)
