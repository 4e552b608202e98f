"""The interface of a driver: the code that supplies the pages of a device, in a process of its own."""

from __future__ import annotations

import abc
import enum
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from prefault.sizes import MIB, PAGE_SIZE

Access: TypeAlias = Literal["read", "write"]


class _Zero(enum.Enum):
    ZERO = "zero"


ZERO: Final = _Zero.ZERO
"""Returned by :meth:`Device.fault` in place of writing into the frame: the page is zeros."""

Supplied: TypeAlias = Literal[_Zero.ZERO] | None


class Recipe(NamedTuple):
    """Instructions to create a device anew in another process: an importable factory and plain arguments.

    Attributes:
        factory: ``"package.module:name"`` of a class, or of a function that returns a :class:`Device`.
        arguments: keyword arguments of the factory: None, bool, int, float, str, bytes, and lists and string-keyed dicts of
            these.
    """

    factory: str
    arguments: dict[str, Any] = {}  # noqa: RUF012  never changed: a named tuple has no default factories


class FaultAround(NamedTuple):
    """Read-ahead of faults: the size in bytes of the window that one fault brings in.

    Attributes:
        first: size of the aligned window around an isolated fault; one page: no read-ahead.
        most: size up to which the window doubles while faults are sequential.
    """

    first: int
    most: int


class DeviceArea(abc.ABC):
    """A client's mapping of the device, as the driver sees it in the server.

    Pages are numbered from the start of the *device*. Frames belong to the device: a page that was supplied for one area
    is supplied for all of them.

    Attributes:
        offset, length: of the mapped part of the device, in bytes.
        access: of the client: "read" or "write".
        pid, uid: of the client.
    """

    offset: int
    length: int
    access: Access
    pid: int
    uid: int

    @property
    @abc.abstractmethod
    def pages(self) -> range:
        """Numbers of the device's pages that the area maps."""

    @abc.abstractmethod
    def frame(self, page: int) -> memoryview:
        """Return the memory of a page, to write into while the driver's call for that page runs.

        Do not keep the view after the call.
        """

    @abc.abstractmethod
    def frames(self, pages: range) -> memoryview:
        """Return the memory of consecutive pages in one piece, under the rules of :meth:`frame`."""

    @abc.abstractmethod
    def ready(self, pages: range) -> list[range]:
        """Return the runs of these pages that are supplied now."""

    @abc.abstractmethod
    def evict(self, pages: range, save: Any = None) -> bytes:
        """Take supplied pages back from every client without losing a write: write-protect, read, punch, wake.

        Args:
            pages: to evict; pages that are not supplied are skipped.
            save: ``save(run, content)``, called for each run of pages (``range``, ``memoryview``) while no client can write
                and before the memory is freed. Only what it stores outside of this process survives a crash of the server.
                If it raises, the pages of the run stay supplied.

        Returns:
            The content of all evicted pages, in order, if ``save`` is None; else ``b""``.
        """


class Device(abc.ABC):
    """Base class of drivers: a driver supplies the pages of a device, in a process of its own.

    A driver must set :attr:`length` and define :meth:`fault`; the rest is optional. A method supplies pages by writing into
    the frames that it gets from the area. If it raises, only these pages fail: touching them raises SIGBUS, and ``populate``
    raises an exception with the driver's message. The warden kills a driver's process when one call takes longer than
    :attr:`timeout_s`.

    Attributes:
        length: of the device, in bytes; set by ``__init__``. The rest of a partial last page is zeros.
        page_size: 4 KiB or 2 MiB: bytes that one fault brings in.
        writable: whether clients may write. Their writes go into the frames; :meth:`DeviceArea.evict` hands them to the
            driver.
        evicts: whether the driver calls :meth:`DeviceArea.evict` on pages that clients may write, which it may not
            otherwise. Dirty tracking then costs one fault per page, as the kernel alone cannot do it.
        populates: False: population is meaningless for this device, and asking for it raises NoPopulateError.
        workers: number of threads that call the driver. 0: the server's own thread makes all calls, one after the other,
            with the lowest latency; best for a driver that does not block.
        batch: most bytes that one call of :meth:`populate` gets.
        fault_around: read-ahead of faults, which calls :meth:`populate` for the window. None: a fault brings in its page
            only, with :meth:`fault`.
        capacity: most bytes of frames that may be supplied at once; None: limited by memory only. See :meth:`reclaim`.
        timeout_s: seconds that one call may take.
        restartable: whether a new process with a fresh copy of the device can continue after a crash, with the frames that
            were supplied before. It must then supply the same bytes.
    """

    length: int
    page_size: int = PAGE_SIZE
    writable: bool = True
    evicts: bool = False
    populates: bool = True
    workers: int = 0
    batch: int = 4 * MIB
    fault_around: FaultAround | None = None
    capacity: int | None = None
    timeout_s: float = 30.0
    restartable: bool = False

    def recipe(self) -> Recipe | None:
        """Return instructions to create this device in a fresh process, or None for a server by fork.

        A server by fork is a copy of the process that maps the device first: it has the device as it is, whatever it refers
        to, but also a copy of all other memory of that process.
        """
        return None

    def open(self, area: DeviceArea) -> None:  # noqa: B027  optional
        """Prepare for a client that maps a part of the device; raise an exception to refuse it."""

    @abc.abstractmethod
    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        """Supply one page that was touched: write into ``area.frame(page)``, which holds zeros, or return :data:`ZERO`.

        Args:
            area: whose client touched the page.
            page: number of the page, from the start of the device.
            access: of the touch: "read" or "write".
        """

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        """Supply a run of consecutive pages. The default calls :meth:`fault` for each.

        Called for each populate request and for the windows of :attr:`fault_around`. Frames that are not written stay zeros.
        If it raises, none of the pages is supplied.
        """
        for page in pages:
            self.fault(area, page, access)

    def discard(self, area: DeviceArea, pages: range) -> None:  # noqa: B027  optional
        """Handle that a client gave pages back; their frames are freed already.

        The driver decides what it supplies for these pages next. The server neither fills nor evicts them until this
        returns.
        """

    def reclaim(self, area: DeviceArea, pages: int) -> None:  # noqa: B027  optional
        """Make room for ``pages`` more frames with :meth:`DeviceArea.evict`; called when they would exceed the capacity.

        If there is not enough room afterwards, the pages fail with ENOSPC. On a device that is not writable the server
        itself evicts, first in, first out.
        """

    def close(self, area: DeviceArea) -> None:  # noqa: B027  optional
        """Clean up after an area: its client unmapped it or died, or the server is ending."""
