"""The memory of an area: a mapping of the device's frames, registered with userfaultfd and announced to the server."""

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
from prefault.device.access_log import NAMELESS, AccessLog, Content, LoggedRun
from prefault.device.client import area_logs
from prefault.device.client.connection import DeviceConnection
from prefault.device.client.exchange import Exchange
from prefault.device.device_pool import Access, DeviceObject
from prefault.errors import DeviceError
from prefault.mapping.mapping import OwnedMemory
from prefault.memory.backings import OpenedBacking
from prefault.memory.borrowing import PageProvider, add_page_provider, remove_page_provider
from prefault.sizes import MIB, PAGE_SIZE


class MappedArea(OwnedMemory, PageProvider):
    """Mapping of a device's frames that the server knows as an area.

    Views refer to this object, so that :func:`prefault.populate` of a view still reaches the driver after the
    :class:`~prefault.device.Area` is garbage.

    Attributes:
        connection: the connection to the server.
        offset: offset of its first page in the device, bytes.
        object: the object that it maps; None: a part of the device.
        stands_for: name of the device that the object stands for, see :meth:`Device.shared_server`; None: it does not.
        length: bytes that were asked for; ``mapped`` is that in whole pages of the device.
        number: the area's number at the server; None before it is attached and after it is closed.
        access: the access that it was mapped with, the most that :meth:`Area.protect` may grant.
        prot: PROT_* of the whole area now.
        content: identity of what is mapped.
    """

    def __init__(
        self, connection: DeviceConnection, offset: int, access: Access, placed: DeviceObject | None = None, *,
        track_dirty: bool, at_end: Callable[[], None], stands_for: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.connection = connection
        self.offset = offset
        self.object = placed
        self.stands_for = stands_for
        self.length = 0
        self.number: int | None = None
        self.access: Access = access
        self.track_dirty = track_dirty
        self.prot = mman.PROT_READ | (mman.PROT_WRITE if access == "write" else 0)
        self.content: Content = NAMELESS
        self.pid = os.getpid()
        self._opening: Exchange | None = None
        """The exchange of the Map request, from its sending until the memory is unmapped."""
        self._at_end: Callable[[], None] | None = at_end
        _all_areas.add(self)

    @property
    def device_name(self) -> str:
        """Name of the device for people: of that which the object stands for, if any."""
        return self.stands_for or self.connection.device_info.name

    @property
    def write_protects(self) -> bool:
        """True if the server or the kernel write-protects pages of the area."""
        return self.track_dirty or (self.connection.device_info.evicts and self.access == "write")

    def attach(self, length: int, cpu: int | None) -> None:
        """Map ``length`` bytes, register them and open the area at the server, which may pin itself to ``cpu``."""
        self.length = length
        device_info = self.connection.device_info
        if self.write_protects and not self.connection.userfaultfd.features & UffdFeature.WP_HUGETLBFS_SHMEM:
            what = (
                "track_dirty=True"
                if self.track_dirty
                else f"writing to {device_info.name}, which evicts what clients wrote,"
            )
            raise DeviceError(
                errno.ENOSYS, f"{what} needs write-protection of shared memory by userfaultfd (Linux 5.19, on arm64 6.11),"
                " which this kernel does not have",
            )  # fmt: skip
        # Huge frames come in huge pages only; others are collapsed into them where both addresses are aligned.
        opened = OpenedBacking(self.connection.frames, device_info.page_size if device_info.huge else PAGE_SIZE, self.offset)
        length += -length % device_info.page_size
        align = max(device_info.page_size, 2 * MIB if length >= 2 * MIB else PAGE_SIZE)
        self.map(length, opened, shared=True, prot=self.prot, noreserve=True, align=align)
        # A child of fork would have it unregistered: a touch there would put zeros into the frames of all clients.
        mman.madvise(self.address, self.mapped, mman.MADV_DONTFORK)
        mode = kernel.UFFDIO_REGISTER_MODE_MISSING | kernel.UFFDIO_REGISTER_MODE_MINOR
        # The server adds it where it is needed: with it there are no huge entries.
        if self.track_dirty or (self.write_protects and not device_info.huge_faults):
            mode |= kernel.UFFDIO_REGISTER_MODE_WP
        kernel.register(self.connection.userfaultfd.fd, self.address, self.mapped, mode)
        if self.track_dirty and self.connection.kernel_tracks_writes:
            # Marks every page, absent ones too: later a page without a mark is one that was written, even if the kernel has
            # taken it out of the page table since.
            kernel.writeprotect(
                self.connection.userfaultfd.fd, self.address, self.mapped, kernel.UFFDIO_WRITEPROTECT_MODE_WP
            )  # fmt: skip
        request = protocol.Map(
            self.connection.next_id(), self.address, self.offset, self.mapped, self.access, self.track_dirty, cpu,
            self.object,
        )  # fmt: skip
        self._opening = opening = Exchange(request)
        self.number = self.connection.open(opening).area
        add_page_provider(self.address, self.mapped, self)

    # --- closing

    def unmap(self) -> None:
        """Close the area at the server, then unmap it."""
        if self.mapped:
            remove_page_provider(self.address)
        if _exiting:
            return  # the kernel unmaps it at exit, after the last touch
        if self.number is not None and os.getpid() == self.pid:
            area_logs.ending(self)
        self.number = None
        if self._opening is None or os.getpid() != self.pid:
            self._unmap_now()
        else:
            self.connection.abandon(self._opening, self._unmap_now, _deadline)

    def unmap_stale(self) -> None:
        """Unmap memory whose Map the server refused, without calling ``at_end``: another area takes its place."""
        self._at_end = None
        self.unmap()

    def _unmap_now(self) -> None:
        try:
            if self.mapped and os.getpid() == self.pid and self.connection.lost_but_served:
                # The server did not get the Unmap. It would poison or unprotect the next mapping at these addresses, even
                # one of another userfaultfd: the kernel does not tell them apart. An inaccessible mapping keeps them taken.
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
        """Reserve the addresses in a child of fork, which has no such memory (MADV_DONTFORK): a touch there is SIGSEGV."""
        if not self.mapped:
            return
        self._at_end = None
        try:
            mman.mmap(
                self.address, self.mapped, mman.PROT_NONE,
                mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE | mman.MAP_FIXED_NOREPLACE,
            )  # fmt: skip
        except OSError:  # another at-fork handler mapped something there first, which is not ours to unmap
            self.mapped = 0

    def page_at(self, address: int) -> int:
        """Return the number of the device's page that is mapped at an address."""
        return (address - self.address + self.offset) // self.connection.device_info.page_size

    def address_of(self, page: int) -> int:
        """Return the address at which a page of the device is mapped."""
        return self.address + page * self.connection.device_info.page_size - self.offset

    @property
    def logged_as(self) -> tuple[str, int]:
        """Name and length in bytes of what an access log of the area is about."""
        if self.object is None:
            return self.connection.device_info.name, self.connection.device_info.length
        return self.stands_for or self.object.name, self.object.length

    def access_log(self) -> AccessLog:
        """Ask the server for the pages that were faulted in or populated through the area, first use first."""
        request = protocol.AskLog(self.connection.next_id(), self.require_number())
        found = self.connection.ask(request, protocol.Runs)
        unit = self.connection.device_info.page_size
        base = 0 if self.object is None else self.object.offset
        logged = tuple(LoggedRun(first * unit - base, (last - first) * unit) for first, last in found.runs)
        return AccessLog(*self.logged_as, logged, self.content)

    def require_here(self) -> None:
        """Raise DeviceGoneError in a child of fork, which has no such memory."""
        if self.pid != os.getpid():
            self.connection.check()

    def require_number(self) -> int:
        """Return :attr:`number`; raise ValueError if the area is closed."""
        if self.number is None:
            self.connection.check()
            raise ValueError("the area is closed")
        return self.number


_all_areas = fork_hooks.instances(MappedArea.after_fork)


_EXIT_S = 2.0

_exiting = False
_deadline: float | None = None


def close_areas_at_exit() -> None:
    """Close all areas without a view, as far as their servers answer within 2 seconds; called at exit.

    Areas that are still viewed stay mapped: threads and finalizers may touch them until the process ends.
    """
    global _exiting, _deadline
    _deadline = time.monotonic() + _EXIT_S
    for memory in list(_all_areas):
        if memory.number is not None and memory.pid == os.getpid():
            with contextlib.suppress(BufferError, OSError, RuntimeError):
                memory.close()
    _exiting = True
    for memory in list(_all_areas):
        if memory.mapped:
            if memory.number is not None and memory.pid == os.getpid():
                area_logs.ending(memory)
            memory.connection.detach()
