"""The interface of a driver: the code that supplies the pages of a device, in a process of its own."""

from __future__ import annotations

import abc
import enum
import errno
from typing import Any, Final, NamedTuple, TypeAlias

from prefault.device.access_log import Content
from prefault.device.device_pool import Access, ClientProcess, DeviceObject, DevicePool
from prefault.sizes import MIB, PAGE_SIZE


class FaultAnswer(enum.Enum):
    """Answers of :meth:`Device.fault` and :meth:`Device.populate` besides None, which means: supplied."""

    ZERO = "zero"
    READ_ONLY = "read-only"
    RETRY = "retry"


ZERO: Final = FaultAnswer.ZERO
"""The page is zeros; nothing was written into the frame."""

READ_ONLY: Final = FaultAnswer.READ_ONLY
"""The page is supplied, and clients may not write to it: a store calls :meth:`Device.mkwrite`."""

RETRY: Final = FaultAnswer.RETRY
"""The page cannot be supplied yet (VM_FAULT_RETRY): its thread waits, and the server does not.

:meth:`DevicePool.supply` completes it, and after :meth:`DevicePool.retry` the driver is asked again. A page that is neither
within :attr:`Device.timeout_s` fails, as if the driver had raised.
"""

Supplied: TypeAlias = FaultAnswer | None


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


class SharedObject(NamedTuple):
    """A device that is served as an object of another one, so that many such devices share one server.

    Attributes:
        device: has the server. Its driver knows the two requests.
        name: of the object.
        open_request: control request that opens a handle of the object, and makes the object if it is not there; sent
            again if the server dies meanwhile.
        close_request: control request that closes a handle, sent when the object is mapped, or cannot be. The driver deletes
            an object without handles and areas.
    """

    device: Device
    name: str
    open_request: bytes
    close_request: bytes


class DeviceArea(abc.ABC):
    """A client's mapping of the device, as the driver sees it in the server.

    Pages are numbered from the start of the *device*. Frames belong to the device: a page that was supplied for one area
    is supplied for all of them.

    Attributes:
        offset, length: of the mapped part of the device, in bytes.
        access: of the client: "read" or "write".
        pid, uid: of the client.
        object: the object that the client mapped by its name; None: it mapped a part of the device. :attr:`offset` is one in
            the device in either case.
    """

    offset: int
    length: int
    access: Access
    pid: int
    uid: int
    object: DeviceObject | None = None

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
        evicts: whether the driver acts on pages that clients may write: evicts, protects, shoots down, writes back. It may
            not otherwise. Dirty tracking of a client then costs one fault per page, as the kernel alone cannot do it.
        tracks_writes: whether :meth:`DevicePool.dirty` knows which pages clients wrote: at the price of one more fault for
            the first write to each page. Needs ``evicts``.
        populates: False: population is meaningless for this device, and asking for it raises NoPopulateError.
        workers: number of threads that call the driver. 0: the server's own thread makes all calls, one after the other,
            with the lowest latency; best for a driver that does not block. Threads are started when calls need them.
        object_workers: most workers that calls for the areas of one object may take at once, so that a store that hangs for
            one object leaves workers for the others; None: all of them. Control requests are not counted.
        batch: most bytes that one call of :meth:`populate` gets.
        huge_faults: whether the driver has huge pages mapped with one entry: see :meth:`DevicePool.prefer_huge`.
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
    tracks_writes: bool = False
    populates: bool = True
    workers: int = 0
    object_workers: int | None = None
    batch: int = 4 * MIB
    huge_faults: bool = False
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

    def content_identity(self) -> Content:
        """Return the identity of what the device maps, by which a recording finds it again; empty by default."""
        return Content()

    def shared_server(self) -> SharedObject | None:
        """Return the object of another device that :func:`prefault.device.map` maps in place of this device.

        None, the default: this device has a server of its own.
        """
        return None

    def start(self, pool: DevicePool) -> None:  # noqa: B027  optional
        """Prepare the device: called once in each server process, before any other call.

        After a crash it is called again, in the new server, whose areas are opened next; ``pool.ready()`` tells what was
        supplied before. If it raises, the device is refused: the process that maps it gets a DeviceError with the message.
        It has :attr:`timeout_s`, as each call.

        Args:
            pool: all pages of the device; keep it for later.
        """

    def stop(self) -> None:  # noqa: B027  optional
        """Finish with the device: called once, after the last :meth:`close`, when the server ends in an orderly way.

        Pages that are still supplied can be saved here, by ``pool.evict(pool.pages, save)``. Clients that are left, of a
        device at a path, keep those that are not evicted; other pages raise SIGBUS from then on. Not called when the process
        is killed. The server of a device at a path has :attr:`timeout_s` and five seconds for all calls at its end.
        """

    def open(self, area: DeviceArea) -> None:  # noqa: B027  optional
        """Prepare for a client that maps a part of the device; raise an exception to refuse it."""

    @abc.abstractmethod
    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        """Supply one page that was touched: write into ``area.frame(page)``, which holds zeros.

        Returns:
            None: the page is supplied. :data:`ZERO`: it is zeros. :data:`READ_ONLY`: supplied, and not to be written to.
            :data:`RETRY`: not yet.

        Args:
            area: whose client touched the page.
            page: number of the page, from the start of the device.
            access: of the touch: "read" or "write".
        """

    def populate(self, area: DeviceArea, pages: range, access: Access) -> Supplied:
        """Supply a run of consecutive pages. The default calls :meth:`fault` for each, whose answers then count one by one.

        Called for each populate request and for the windows of :attr:`fault_around`. Frames that are not written stay zeros.
        If it raises, none of the pages is supplied. The answers of :meth:`fault` are allowed, and count for all of them.
        """
        answers = set()
        for page in pages:
            answers.add(self.fault(area, page, access))
            if RETRY in answers:
                return RETRY
        return READ_ONLY if READ_ONLY in answers else None

    def discard(self, area: DeviceArea, pages: range) -> None:  # noqa: B027  optional
        """Forget the content of pages that a client gives back, or raise to refuse.

        Called before the frames go. Meanwhile no client gets new entries for the pages, and they are neither filled nor
        evicted (``evict`` and ``ready`` pass over them); threads that touch pages which they have not mapped wait. After the
        return the frames are freed, and the driver decides what it supplies next. If it raises, the pages stay as they are,
        and the client's ``discard`` fails with the driver's message. Repeated after a crash.
        """

    def mkwrite(self, area: DeviceArea, page: int) -> None:  # noqa: ARG002
        """Allow a client to write to a page that it got without permission, or raise to refuse (page_mkwrite).

        Once allowed, every client may write to the page. Refused, the thread gets SIGBUS, and so does each later touch of
        the page in that process until it discards or populates it.
        """
        raise PermissionError(errno.EACCES, f"page {page} is read-only")

    def reclaim(self, area: DeviceArea, pages: int) -> None:  # noqa: B027  optional
        """Make room for ``pages`` more frames with :meth:`DeviceArea.evict`; called when they would exceed the capacity.

        If there is not enough room afterwards, the pages fail with ENOSPC. On a device that is not writable the server
        itself evicts, first in, first out.
        """

    def close(self, area: DeviceArea) -> None:  # noqa: B027  optional
        """Clean up after an area: its client unmapped it or died, or the server is ending."""

    def control(self, client: ClientProcess, request: bytes) -> bytes:  # noqa: ARG002  for drivers
        """Answer a request of a client that is not about memory, as a kernel driver answers ioctl(2).

        The server passes the bytes on without a look at them: check all of them. Requests and replies have at most 64 512
        bytes. A request is delivered at most once: after a crash of the server in the middle, the client gets an error and
        has to find out itself. To refuse a request, raise OSError(number, text): the client gets DeviceError with both. Any
        other exception is logged, and the client gets EIO with its text.

        Raises:
            OSError: ENOTTY, by this default.
        """
        raise OSError(errno.ENOTTY, f"the driver {type(self).__name__} takes no control requests")

    def disconnect(self, client: ClientProcess) -> None:  # noqa: B027  optional
        """Clean up after a client process that is gone, or the end of the server; all its areas are closed."""
