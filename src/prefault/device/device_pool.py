"""Handle of a driver on the pages of its device, whichever clients map them."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

Access: TypeAlias = Literal["read", "write"]

Save: TypeAlias = Callable[[range, memoryview], object]
"""Function that gets each run of pages, and their memory."""


class ClientProcess(NamedTuple):
    """A process that is connected to the server of a device.

    Attributes:
        number: of its connection; the device never gives a number twice, not even after a crash of its server.
        pid, uid: of the process.
    """

    number: int
    pid: int
    uid: int


class DeviceObject(NamedTuple):
    """An extent of a device's address space that has a name; what graphics drivers call a GEM object.

    Attributes:
        name: up to 200 bytes in UTF-8.
        offset: in the device, in bytes: a multiple of 2 MiB.
        length: in bytes.
    """

    name: str
    offset: int
    length: int

    def pages(self, page_size: int) -> range:
        """Return the numbers of the device's pages that the object lies in, the last one perhaps in part."""
        return range(self.offset // page_size, -(-(self.offset + self.length) // page_size))


class ShootDown(contextlib.AbstractContextManager["ShootDown"]):
    """A change of pages while no client has an entry for them: ``with pool.shoot_down(pages) as move``.

    As a kernel driver calls unmap_mapping_range(): from entering to leaving, a touch of any of the pages waits. Leaving
    commits; after an exception, and after the death of the server, the pages hold what they held, with the old protection.

    Attributes:
        pages: as asked for.
        runs: those of the pages that were supplied. The others stay missing.
    """

    pages: range
    runs: list[range]

    @abc.abstractmethod
    def content(self, pages: range) -> memoryview:
        """Return what pages of one run hold, with all writes of clients; read-only. Do not keep the view."""

    @abc.abstractmethod
    def frames(self, pages: range) -> memoryview:
        """Return new frames for pages of one run, which take the place of their content: zeros, to write into.

        OSError (ENOSPC): there is no memory for them.
        """

    @abc.abstractmethod
    def protect(self, pages: range, access: Access) -> None:
        """Have clients get these pages with that protection from the commit on, as :meth:`DevicePool.protect` does."""

    @abc.abstractmethod
    def drop(self, pages: range) -> None:
        """Give the frames of pages back at the commit: the driver is asked for them at the next touch."""


class DevicePool(abc.ABC):
    """The pages of a device as its driver acts on them, whichever clients map them; usable in any thread of the server.

    Pages are ranges of the device's page numbers. What acts on pages that clients may have written needs
    :attr:`Device.evicts`, and raises RuntimeError without.

    Attributes:
        page_size: of the device, in bytes.
        capacity: number of pages that may be supplied at once; None: limited by memory only.
    """

    page_size: int
    capacity: int | None

    @property
    @abc.abstractmethod
    def pages(self) -> range:
        """Numbers of all pages of the device."""

    @property
    @abc.abstractmethod
    def reclaiming_for(self) -> list[range]:
        """Pages of the populate call that :meth:`Device.reclaim` makes room for, in order; empty if it is for a fault.

        Those that were there before are among them. Evicting one would undo the call. Valid inside of ``reclaim``.
        """

    @abc.abstractmethod
    def ready(self, pages: range) -> list[range]:
        """Return the runs of these pages that are supplied now; inside of ``reclaim``, without :attr:`reclaiming_for`."""

    @abc.abstractmethod
    def dirty(self, pages: range) -> list[range]:
        """Return the runs of these pages that clients may have written to since they were supplied or written back.

        Exact with :attr:`Device.tracks_writes`, but for pages that a crash of the server cut off between the fault and the
        write. Without it, all supplied pages of a writable device.
        """

    @abc.abstractmethod
    def evict(self, pages: range, save: Save | None = None) -> bytes:
        """Take supplied pages back from every client without losing a write, as :meth:`DeviceArea.evict` does.

        With :attr:`Device.tracks_writes`, ``save`` gets the dirty pages only: the driver has the others as they are.
        """

    @abc.abstractmethod
    def writeback(self, pages: range, save: Save) -> int:
        """Save the dirty ones of these pages, which stay supplied, and are clean then; return their number.

        While ``save(run, content)`` runs, a write to the run waits, and reading goes on. If it raises, the pages of that run
        and of those behind it stay dirty.
        """

    @abc.abstractmethod
    def supply(self, pages: range, write: Save | None = None) -> int:
        """Bring the missing ones of these pages in, unasked or after :data:`RETRY`; return their number.

        ``write(run, frames)`` fills each run of missing pages (``range``, writable ``memoryview`` of zeros); None: zeros.
        Poisoned pages are cured. Pages that another call is supplying are left to that, and pages that another thread shoots
        down are waited for. If ``write`` raises, the pages of its run stay missing, and poisoned if they were.

        Raises:
            OSError: ENOSPC: there is no memory for the frames, or the capacity has no room; make it with :meth:`evict`.
                EBUSY: a shoot-down of some of the pages does not end in half of :attr:`Device.timeout_s`.
            RuntimeError: this thread shoots some of the pages down.
        """

    @abc.abstractmethod
    def retry(self, pages: range) -> None:
        """Ask the driver again for those of these pages that it answered with :data:`RETRY`."""

    @abc.abstractmethod
    def protect(self, pages: range, access: Access) -> None:
        """Set whether clients may write to pages, those that are supplied later included.

        "read": a store waits, and calls :meth:`Device.mkwrite`. A write that began before is in the pages when this returns.
        "write": the protection ends, and ``mkwrite`` is not called any more.

        Raises:
            OSError: EBUSY: a client keeps changing its mappings; the protection is as before.
        """

    @abc.abstractmethod
    def prefer_huge(self, pages: range, huge: bool = True) -> None:
        """Have the whole, aligned 2 MiB chunks of these pages be huge pages, or not any more; for this server's life.

        A fault in such a chunk asks :meth:`Device.populate` for all of it, and clients map it with one entry of 2 MiB.
        Where that cannot be, small entries do the same: the kernel has no huge page left, a page of the chunk is read-only
        or missing, the area does not map all of it, or the client tracks its writes. Entries that exist stay as they are.

        Frames are huge pages from the start if ``/sys/kernel/mm/transparent_hugepage/shmem_enabled`` is ``advise``,
        ``within_size`` or ``always``; else the kernel copies each chunk into one when it is mapped first.

        Raises:
            RuntimeError: the device does not declare :attr:`Device.huge_faults`.
        """

    @abc.abstractmethod
    def poison(self, pages: range, reason: str = "") -> None:
        """Drop the content of pages, and make each touch an error until they are supplied by :meth:`supply` or discarded.

        Touching one raises SIGBUS, and ``populate`` raises DriverError with the reason. Poison survives the server, its
        reason does not. Pages that are being supplied are poisoned once they are.
        """

    @abc.abstractmethod
    def shoot_down(self, pages: range) -> ShootDown:
        """Take the entries of all clients for these pages away, and change the pages meanwhile: see :class:`ShootDown`.

        Entering waits for calls that supply, evict or discard some of the pages, half of :attr:`Device.timeout_s` at most.

        Raises:
            OSError: EBUSY: such a call does not end, or a client keeps changing its mappings. ENOSPC: there is no memory for
                a copy of the supplied pages, which are kept besides while this lasts. All pages are as before.
            RuntimeError: this thread shoots some of the pages down already.
        """

    @abc.abstractmethod
    def keep(self, name: str, length: int) -> memoryview:
        """Return memory that survives the server: zeros the first time, the same bytes in the server after a crash.

        For tables that a driver needs to go on: versions, offsets, placements. A store counts once it is made: no message
        carries it, and SIGKILL of the server, of the warden, or of one after the other loses none. It ends with the device,
        in an orderly way or not. Memory is taken for the pages that are written to; :func:`prefault.discard` on a part of
        the view gives pages back, which are zeros again.

        Args:
            name: one to 100 bytes in UTF-8, without NUL. Names that begin with ``prefault.`` are the framework's.
            length: in bytes. A device keeps at most 100 names, and 16 TiB in total.

        Raises:
            ValueError: the name is kept with another length, or the name or the length is beyond a limit.
            DeviceError: the system refuses the memory (a limit on the sizes of files or of address space).
        """

    @abc.abstractmethod
    def create_object(self, name: str, length: int) -> DeviceObject:
        """Make an object: give a name to the first free extent of the device's address space that is long enough.

        Its pages are not supplied. It survives the server, until :meth:`delete_object` or the end of the device. A device
        has at most 262 143 objects, each of which takes whole units of 2 MiB: of address space, not of memory.

        Args:
            name: one to 200 bytes in UTF-8, without NUL.
            length: in bytes.

        Raises:
            FileExistsError: an object has that name.
            OSError: ENOSPC: no free extent is long enough, or there are too many objects; EBUSY: pages of the extent, which
                some client mapped without a name, are being supplied or evicted.
            ValueError: the name or the length is beyond a limit.
        """

    @abc.abstractmethod
    def delete_object(self, name: str) -> None:
        """Delete an object: its pages are dropped as by a discard, and its extent is free again.

        It can be deleted from the driver's :meth:`Device.close` of its last area on. Clients that mapped the extent without
        the name keep their areas: the driver is asked for their pages anew.

        Raises:
            FileNotFoundError: no object has that name.
            OSError: EBUSY: a client maps the object, or pages of it are being supplied or evicted.
        """

    @abc.abstractmethod
    def object(self, name: str) -> DeviceObject:
        """Return the object of a name; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def objects(self) -> list[DeviceObject]:
        """Return all objects, in the order of their offsets."""

    @abc.abstractmethod
    def object_at(self, page: int) -> DeviceObject | None:
        """Return the object that a page of the device belongs to, or None."""

    @abc.abstractmethod
    def clients(self) -> list[ClientProcess]:
        """Return the processes that are connected; a process that tracks dirty pages may be in the list twice."""
