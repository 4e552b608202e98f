"""The pool of a device: its frames, and a state for each page, in memory that the warden and all servers share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os

from prefault._kernel import mman
from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from prefault._kernel.memfd import MFD_ALLOW_SEALING, MFD_CLOEXEC, MFD_HUGETLB, huge_page_flag, memfd_create
from prefault._system import hugetlb
from prefault.device import limit_messages
from prefault.device.kept_memory import KEPT_TABLE_BYTES, KeptMemory
from prefault.device.page_states import DevicePageState, PageFlag, PageStates
from prefault.errors import DeviceError
from prefault.memory.borrowing import borrow
from prefault.sizes import MIB, PAGE_SIZE, format_size

_log = logging.getLogger("prefault.device")

HUGE_PAGE = 2 * MIB

SLOTS = PAGE_SIZE // 8
"""Slots of the heartbeat: the driver call in the loop, those in workers, and :data:`RESULTS`."""

RESULTS = SLOTS - 1
"""Slot of the heartbeat for results of workers that the loop has not collected yet."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_STATES_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL  # kept memory is added behind the tables
_POPULATE = mman.MADV_POPULATE_WRITE
_STEP = 32 * MIB
_AHEAD = 64 << 10
"""Bytes that are allocated ahead, at most, while faults go forward."""
_TABLE_BYTES = 48 << 20
"""Bytes of the table of areas, which :class:`~prefault.device.registry.AreaTable` lays out."""
_SHARED_BYTES = PAGE_SIZE + _TABLE_BYTES + KEPT_TABLE_BYTES
"""Bytes behind the states and flags: the heartbeat, the table of areas, and the table of kept memory."""
_CHUNK_BYTES = 4 << 20
"""Bytes that are copied aside, or back, before the originals are given back."""
_LARGE = 1 << 20
"""Bytes from which on zeros are mapped, and not allocated."""


class Frames(PageStates):
    """Two memfds, mapped shared: the frames; and the states and flags of pages, the heartbeat, and tables.

    The tables are those of areas and of kept memory. Behind them the second memfd has room for a copy of each page, which
    shooting down uses (``copy_aside``), and then the kept memory.

    Args:
        fd, states_fd: the two, owned from now on.
        length: of the device, in bytes.
        page_size: of the device, in bytes.
        huge: the frames are huge pages of hugetlb.
        notes: how the frames are weaker than asked for.

    Attributes:
        length: whole pages, in bytes.
        unit: bytes that a page-table entry of a client maps: the page size, but 4 KiB for 2 MiB pages without hugetlb.
        heartbeat: per slot, the start (CLOCK_MONOTONIC, ns) of the driver's call, or of the loop's delay in taking results;
            0: there is none.
        area_words: the memory of the table of areas.
        kept: memory that the driver keeps for the next server.
        tail: bytes of the last page behind the end of the device.
    """

    def __init__(
        self, fd: int, states_fd: int, length: int, page_size: int, huge: bool, notes: tuple[str, ...] = ()
    ) -> None:
        self.fd = fd
        self.states_fd = states_fd
        self.page_size = page_size
        self.pages = -(-length // page_size)
        self.length = self.pages * page_size
        self.tail = self.length - length
        self.huge = huge
        self.unit = page_size if huge else PAGE_SIZE
        self.notes = notes
        flags = mmap.MAP_SHARED | (mman.MAP_NORESERVE if huge else 0)
        self._frames_map = mmap.mmap(fd, self.length, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        self._states_map = mmap.mmap(states_fd, _states_bytes(self.pages), mmap.MAP_SHARED)
        everything = memoryview(self._states_map)
        super().__init__(states_fd, everything, self.pages)
        self._frames = memoryview(self._frames_map)
        self._advise = self._frames_map.madvise
        self._next = -1
        self._ahead = 0
        """Pages from ``_next`` to here are allocated already."""
        self._step = 1
        self._advised: set[int] = set()
        self._most = max(1, _AHEAD // page_size)
        heartbeat = len(everything) - _SHARED_BYTES
        self.heartbeat = everything[heartbeat : heartbeat + PAGE_SIZE].cast("Q")
        self.area_words = everything[heartbeat + PAGE_SIZE : -KEPT_TABLE_BYTES].cast("Q")
        self.kept = KeptMemory(states_fd, everything[-KEPT_TABLE_BYTES:], len(everything) + self.length)
        with borrow(self._frames) as memory:
            self._address = memory.address

    @classmethod
    def create(cls, length: int, page_size: int, capacity: int | None = None) -> Frames:
        """Create both memfds, with all pages MISSING. ``capacity``: bytes of frames that there will be at once, None: all.

        Raises:
            DeviceError: there is no memory for them, or a limit is reached.
            ValueError: the length is not positive, or the page size is neither 4 KiB nor 2 MiB.
        """
        if length <= 0:
            raise ValueError(f"a device has a length of at least one byte, not {length}")
        if page_size not in (PAGE_SIZE, HUGE_PAGE):
            raise ValueError(
                f"the pages of a device have {format_size(PAGE_SIZE)} or {format_size(HUGE_PAGE)}, not {page_size} bytes"
            )
        huge = False
        notes: tuple[str, ...] = ()
        if page_size == HUGE_PAGE:
            huge, notes = _has_huge_pages(-(-min(length, capacity or length) // page_size))
        pages = -(-length // page_size)
        opened: list[int] = []
        try:
            flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
            opened.append(memfd_create("prefault-frames", flags | (MFD_HUGETLB | huge_page_flag(page_size) if huge else 0)))
            os.ftruncate(opened[0], pages * page_size)
            opened.append(memfd_create("prefault-states", flags))
            os.ftruncate(opened[1], _states_bytes(pages) + pages * page_size)
            for fd, seals in zip(opened, (_SEALS, _STATES_SEALS), strict=True):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return cls(opened[0], opened[1], length, page_size, huge, notes)
        except (OSError, OverflowError) as error:
            for fd in opened:
                os.close(fd)
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EFBIG
            why = limit_messages.reason(number) or os.strerror(number)
            raise DeviceError(number, f"cannot create frames of {format_size(length)} for the device: {why}") from error

    def close(self) -> None:
        """Unmap and close both memfds; idempotent. Views of frames must be gone."""
        if self.fd < 0:
            return
        self.states.release()
        self.flags.release()
        self.heartbeat.release()
        self.area_words.release()
        self.kept.release()
        self._frames.release()
        for mapping in (self._frames_map, self._states_map):
            mapping.close()
        os.close(self.fd)
        os.close(self.states_fd)
        self.fd = self.states_fd = -1

    # --- the memory

    def view(self, pages: range) -> memoryview:
        """Return the memory of adjacent pages."""
        size = self.page_size
        return self._frames[pages.start * size : pages.stop * size]

    def view_one(self, page: int) -> memoryview:
        """Return the memory of a page."""
        start = page * self.page_size
        return self._frames[start : start + self.page_size]

    def secure(self, pages: range) -> None:
        """Allocate the frames, so that no access to them fails; new ones are zeros.

        Raises:
            OSError: ENOSPC: there is no memory for them, or no huge page.
        """
        start, stop = pages.start * self.page_size, pages.stop * self.page_size
        try:
            if self.huge:  # not by populating, which fails with EFAULT; a first access after fallocate cannot fail
                os.posix_fallocate(self.fd, start, stop - start)
                return
            while start < stop:
                size = min(_STEP, stop - start)
                mman.madvise(self._address + start, size, mman.MADV_POPULATE_WRITE)
                start += size
        except OSError as error:
            if error.errno not in (errno.EFAULT, errno.ENOMEM, errno.ENOSPC):
                raise
            where = f"the frames of pages {pages.start} to {pages.stop - 1}, {format_size(len(pages) * self.page_size)}"
            if self.huge:
                pool = hugetlb.read_pool(self.page_size)
                message = (
                    f"no huge pages of {format_size(self.page_size)} left for {where}: the pool has {pool.available} of"
                    f" {pool.total}; write a larger number to {pool.setting}, or raise a hugetlb cgroup limit"
                )
            else:
                message = (
                    f"no memory left for {where}: free some, or raise the limit (vm.overcommit_ratio with"
                    " vm.overcommit_memory = 2, or a memory cgroup)"
                )
            raise OSError(errno.ENOSPC, message) from error

    def secure_one(self, page: int) -> None:
        """Allocate the frame of one page, by a call that is 1.5 us faster than :meth:`secure`, and keeps the GIL.

        While pages are allocated in order, one call allocates some of the next ones too, as many as there were, which saves
        another 1.5 us for each. For one thread only.
        """
        if not self.huge:
            forward = page == self._next
            self._next = page + 1
            if forward and page < self._ahead:
                return
            count = min(2 * self._step, self._most, self.pages - page) if forward else 1
            self._step = count
            self._ahead = page + count  # before the call: punch(), in another thread, resets it after it punched
            try:
                self._advise(_POPULATE, page * self.page_size, count * self.page_size)
                return
            except OSError:
                self._ahead = 0  # secure() raises it with its cause
        self.secure(range(page, page + 1))

    def has(self, offset: int) -> bool:
        """Return whether there is a frame at an offset, which is a multiple of the unit."""
        try:
            if not self.huge:
                return os.lseek(self.fd, offset, os.SEEK_DATA) == offset
            # hugetlbfs reports all of a file as data; but allocating what is allocated takes nothing more.
            before = os.fstat(self.fd).st_blocks
            os.posix_fallocate(self.fd, offset, self.page_size)
            return os.fstat(self.fd).st_blocks == before
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOSPC):
                raise
            return False

    def advise_huge(self, pages: range, huge: bool) -> None:
        """Have frames of whole chunks of 2 MiB that are allocated from now on be huge pages where the kernel can, or not."""
        chunk = HUGE_PAGE // self.page_size
        for number in range(pages.start // chunk, pages.stop // chunk):
            (self._advised.add if huge else self._advised.discard)(number)
        advice = mman.MADV_HUGEPAGE if huge else mman.MADV_NOHUGEPAGE
        # EINVAL: a kernel without transparent huge pages. ENOMEM: too many mappings. Small frames do the same.
        with contextlib.suppress(OSError):
            mman.madvise(self._address + pages.start * self.page_size, len(pages) * self.page_size, advice)

    def _is_huge(self, pages: range) -> bool:
        """Return whether pages are whole chunks that shall be huge pages."""
        chunk = HUGE_PAGE // self.page_size
        if not self._advised or pages.start % chunk or pages.stop % chunk:
            return False
        return all(number in self._advised for number in range(pages.start // chunk, pages.stop // chunk))

    def punch(self, pages: range) -> None:
        """Free the frames, which removes them from every process's page tables as well."""
        size = self.page_size
        fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pages.start * size, len(pages) * size)
        # Frames ahead would never be freed where pages are punched one by one: none is allocated ahead any more.
        self._most, self._ahead = 1, 0

    # --- the copy aside

    def copy_aside(self, pages: range) -> None:
        """Copy frames to the room behind the table; OSError (ENOSPC) if there is no memory."""
        if self._is_huge(pages):
            with self.aside(pages) as memory, memoryview(memory) as copy:
                memory.madvise(mman.MADV_HUGEPAGE)
                _populate(memory)
                done = 0
                while done < len(copy):
                    with copy[done:] as rest:
                        done += os.preadv(self.fd, [rest], pages.start * self.page_size + done)
            return
        # write(2) does not clear the new pages first, as a store would have the kernel do: 2.5 times as fast.
        at, content = self._aside_offset(pages.start), self.view(pages)
        while len(content):
            written = os.pwrite(self.states_fd, content, at)
            at, content = at + written, content[written:]

    def aside(self, pages: range) -> mmap.mmap:
        """Map the copies of adjacent pages."""
        return mmap.mmap(
            self.states_fd, len(pages) * self.page_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE,
            offset=self._aside_offset(pages.start),
        )  # fmt: skip

    def copy_back(self, pages: range) -> None:
        """Copy the copies of pages back to their frames, which were punched; OSError (ENOSPC) if there is no memory."""
        if self.huge or self._is_huge(pages):  # hugetlbfs has no write(2), and with it there are no huge pages of shmem
            self.secure(pages)
            done = 0
            while done < len(pages) * self.page_size:
                with self.view(pages) as frames, frames[done:] as rest:
                    done += os.preadv(self.states_fd, [rest], self._aside_offset(pages.start) + done)
            return
        with self.aside(pages) as memory, memoryview(memory) as content:
            at, done = pages.start * self.page_size, 0
            while done < len(content):
                with content[done:] as rest:
                    done += os.pwrite(self.fd, rest, at + done)

    def chunks(self, pages: range) -> list[range]:
        """Split pages into pieces that are copied one after the other, so that the copies need little memory besides."""
        step = max(1, _CHUNK_BYTES // self.page_size)
        return [range(at, min(at + step, pages.stop)) for at in range(pages.start, pages.stop, step)]

    def forget_aside(self, pages: range) -> None:
        """Free the copies of pages."""
        flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        fallocate(self.states_fd, flags, self._aside_offset(pages.start), len(pages) * self.page_size)

    def _aside_offset(self, page: int) -> int:
        return _states_bytes(self.pages) + page * self.page_size

    def clear_tail(self, pages: range) -> None:
        """Zero the bytes that the driver wrote behind the end of the device, if the last page is one of these."""
        if self.tail and pages.stop == self.pages:
            self._frames[self.length - self.tail :] = bytes(self.tail)

    def repair(self) -> None:
        """Settle the states after a server died: each page is MISSING or READY, and no call runs."""
        everything = range(self.pages)
        for run in self.runs(everything, DevicePageState.FILLING, DevicePageState.PUNCHING):
            self.punch(run)
            self.mark(run, DevicePageState.MISSING)
        for run in self.runs(everything, DevicePageState.EVICTING):
            self.mark(run, DevicePageState.READY)
        for run in self.runs(everything, DevicePageState.ASIDE):
            self.punch(run)  # new content that was not committed
            for piece in self.chunks(run):
                try:
                    self.copy_back(piece)
                except OSError as error:
                    _log.error(
                        "pages %d to %d are lost: there was no memory to put their content back after a crash: %s",
                        piece.start, piece.stop - 1, error.strerror,
                    )  # fmt: skip
                    self.set_flag(piece, PageFlag.POISONED)
                self.mark(piece, DevicePageState.READY)
                self.forget_aside(piece)
        for run in self.runs(everything, DevicePageState.READY):
            for poisoned, flagged in self.flag_runs(run, PageFlag.POISONED):
                if flagged:  # the flag comes first, and pages that are taken are punched at the end only
                    self.punch(poisoned)
                    self.mark(poisoned, DevicePageState.MISSING)
        for slot in range(SLOTS):
            self.heartbeat[slot] = 0


def _populate(memory: mmap.mmap) -> None:
    """Allocate all pages of a mapping; OSError (ENOSPC) if there is no memory."""
    try:
        memory.madvise(mman.MADV_POPULATE_WRITE)
    except OSError as error:
        raise OSError(errno.ENOSPC, "no memory for a copy of the pages") from error


def _states_bytes(pages: int) -> int:
    """Return the bytes of states, flags, heartbeat and tables."""
    used = PageStates.size(pages) + _SHARED_BYTES
    return used + -used % HUGE_PAGE  # so that copies of huge pages are huge


def _has_huge_pages(wanted: int) -> tuple[bool, tuple[str, ...]]:
    try:
        pool = hugetlb.read_pool(HUGE_PAGE)
    except FileNotFoundError:
        return False, ("the kernel has no huge pages of 2 MiB: the device's pages are made of ordinary ones",)
    # All of them: a page that the pool does not have when it is touched is a SIGBUS.
    there = pool.available + pool.surplus_left
    if there >= wanted:
        return True, ()
    return False, (
        f"the hugetlb pool has {there} pages of 2 MiB left, and the device may take {wanted}: its pages are made of ordinary"
        f" ones (write a larger number of pages to {pool.setting})",
    )


def zeros(count: int) -> mmap.mmap | bytearray:
    """Return a writable buffer of zeros; a large one costs only what is written to it, since an area may have a terabyte."""
    if count < _LARGE:
        return bytearray(count)
    return mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mman.MAP_NORESERVE)
