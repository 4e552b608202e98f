"""The memory of an area: a mapping of the device's frames, registered and known to the device's server."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable

from prefault._kernel import mman
from prefault._kernel import userfaultfd as kernel
from prefault._kernel.userfaultfd import UffdFeature
from prefault._system import fork_hooks
from prefault.device import protocol
from prefault.device.client.channel import Exchange
from prefault.device.client.connection import DeviceConnection
from prefault.device.driver import Access
from prefault.errors import DeviceError
from prefault.mapping.mapping import OwnedMemory
from prefault.memory.backings import OpenedBacking
from prefault.memory.borrowing import PageProvider, add_page_provider, remove_page_provider
from prefault.sizes import MIB, PAGE_SIZE


class MappedArea(OwnedMemory, PageProvider):
    """Mapped frames, known to the server as an area.

    Views refer to this object, so that :func:`prefault.populate` of a view reaches the driver however long ago the
    :class:`~prefault.device.Area` was forgotten.

    Attributes:
        link: to the server.
        offset: of its first page in the device, bytes.
        length: bytes that were asked for; ``mapped`` is that in whole pages of the device.
        number: of the area at the server; None before and after.
        access: what the server was told: nothing more may be done with it.
        prot: PROT_* as it is now.
    """

    def __init__(
        self, link: DeviceConnection, offset: int, access: Access, *, track_dirty: bool, at_end: Callable[[], None]
    ) -> None:
        super().__init__(None)
        self.link = link
        self.offset = offset
        self.length = 0
        self.number: int | None = None
        self.access: Access = access
        self.track_dirty = track_dirty
        self.prot = mman.PROT_READ | (mman.PROT_WRITE if access == "write" else 0)
        self.pid = os.getpid()
        self._opening: Exchange | None = None
        """The Map, from when it is sent until the memory is unmapped."""
        self._at_end: Callable[[], None] | None = at_end
        _all_areas.add(self)

    @property
    def write_protects(self) -> bool:
        """Whether the server, or the kernel, write-protects its pages."""
        return self.track_dirty or (self.link.facts.evicts and self.access == "write")

    def attach(self, length: int, cpu: int | None) -> None:
        """Map ``length`` bytes, and tell the server."""
        self.length = length
        facts = self.link.facts
        if self.write_protects and not self.link.userfaultfd.features & UffdFeature.WP_HUGETLBFS_SHMEM:
            what = "track_dirty=True" if self.track_dirty else f"writing to {facts.name}, which evicts what clients wrote,"
            raise DeviceError(
                errno.ENOSYS, f"{what} needs write-protection of shared memory by userfaultfd (Linux 5.19, on arm64 6.11),"
                " which this kernel does not have",
            )  # fmt: skip
        # Huge frames come in huge pages only; others are collapsed into them where both addresses are aligned.
        opened = OpenedBacking(self.link.frames, facts.page_size if facts.huge else PAGE_SIZE, self.offset)
        length += -length % facts.page_size
        align = max(facts.page_size, 2 * MIB if length >= 2 * MIB else PAGE_SIZE)
        self.map(length, opened, shared=True, prot=self.prot, noreserve=True, align=align)
        # Not registered in a child of fork, it would give zeros there, and put them into the frames for everybody.
        mman.madvise(self.address, self.mapped, mman.MADV_DONTFORK)
        mode = kernel.UFFDIO_REGISTER_MODE_MISSING | kernel.UFFDIO_REGISTER_MODE_MINOR
        if self.write_protects:
            mode |= kernel.UFFDIO_REGISTER_MODE_WP
        kernel.register(self.link.userfaultfd.fd, self.address, self.mapped, mode)
        if self.track_dirty and self.link.tracks_by_itself:
            # Marks every page, also those that are not there: later a page without a mark is one that was written, though
            # the kernel may have taken it out of the page table since.
            kernel.writeprotect(
                self.link.userfaultfd.fd, self.address, self.mapped, kernel.UFFDIO_WRITEPROTECT_MODE_WP
            )  # fmt: skip
        request = protocol.Map(
            self.link.next_id(), self.address, self.offset, self.mapped, self.access, self.track_dirty, cpu
        )  # fmt: skip
        self._opening = opening = Exchange(request)
        self.number = self.link.open(opening).area
        add_page_provider(self.address, self.mapped, self)

    # --- the end

    def unmap(self) -> None:
        """Have the server let go of it, then unmap it."""
        if self.mapped:
            remove_page_provider(self.address)
        if _leaving:
            return  # the kernel unmaps it, when nobody can touch it any more
        self.number = None
        if self._opening is None or os.getpid() != self.pid:
            self._unmap_now()
        else:
            self.link.give_up(self._opening, self._unmap_now, _deadline)

    def _unmap_now(self) -> None:
        try:
            if self.mapped and os.getpid() == self.pid and self.link.answered_for:
                # The server was not told. It would poison or unprotect whatever is mapped here next, also through another
                # userfaultfd: the kernel does not tell them apart.
                mapped, self.mapped = self.mapped, 0
                mman.mmap(
                    self.address, mapped, mman.PROT_NONE,
                    mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE | mman.MAP_FIXED,
                )  # fmt: skip
            super().unmap()
        finally:
            self._opening = None
            at_end, self._at_end = self._at_end, None
            if at_end is not None and os.getpid() == self.pid:
                at_end()

    def after_fork(self) -> None:
        """In the child: the memory is not there (MADV_DONTFORK). A fence takes its place, so that nothing else ever does."""
        if not self.mapped:
            return
        self._at_end = None
        try:
            mman.mmap(
                self.address, self.mapped, mman.PROT_NONE,
                mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE | mman.MAP_FIXED_NOREPLACE,
            )  # fmt: skip
        except OSError:  # somebody else's at-fork handler was faster: then it is not ours to unmap
            self.mapped = 0

    def page_at(self, address: int) -> int:
        """The device's page that is mapped there."""
        return (address - self.address + self.offset) // self.link.facts.page_size

    def address_of(self, page: int) -> int:
        """Where a page of the device is mapped."""
        return self.address + page * self.link.facts.page_size - self.offset

    def numbered(self) -> int:
        """Its number at the server. ValueError if it is closed."""
        if self.number is None:
            self.link.check()
            raise ValueError("the area is closed")
        return self.number


_all_areas = fork_hooks.instances(MappedArea.after_fork)


_LEAVE_S = 2.0

_leaving = False
_deadline: float | None = None


def leave() -> None:
    """At the end of the process: close all areas that nobody looks at, if their servers answer soon.

    What is still viewed may be touched until the very end, by threads and by finalizers, and so is left as it is.
    """
    global _leaving, _deadline
    _deadline = time.monotonic() + _LEAVE_S
    for memory in list(_all_areas):
        if memory.number is not None and memory.pid == os.getpid():
            with contextlib.suppress(BufferError, OSError, RuntimeError):
                memory.close()
    _leaving = True
    for memory in list(_all_areas):
        if memory.mapped:
            memory.link.leave()
