"""What a driver is: the code that supplies the pages of a device, in a process of its own."""

from __future__ import annotations

import abc
import enum
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from prefault.sizes import MIB, PAGE_SIZE

Access: TypeAlias = Literal["read", "write"]


class _Zero(enum.Enum):
    ZERO = "zero"


ZERO: Final = _Zero.ZERO
"""What :meth:`Device.fault` returns instead of writing into the frame: the page is zeros."""

Supplied: TypeAlias = Literal[_Zero.ZERO] | None


class Recipe(NamedTuple):
    """How to make a device anew in another process: importable, and with plain arguments.

    Attributes:
        factory: ``"package.module:name"``, a class or a function that returns a :class:`Device`.
        arguments: its keyword arguments: None, bool, int, float, str, bytes, and lists and string-keyed dicts of these.
    """

    factory: str
    arguments: dict[str, Any] = {}  # noqa: RUF012  never changed: a named tuple has no default factories


class FaultAround(NamedTuple):
    """How much a fault brings in besides the page that was touched, in bytes.

    Attributes:
        first: for a fault anywhere: the aligned window of that size around it. One page: nothing besides.
        most: up to which the window doubles while faults go forward one behind the other.
    """

    first: int
    most: int


class DeviceArea(abc.ABC):
    """A client's mapping as its driver sees it, in the server. Pages are numbered from the start of the *device*.

    Frames belong to the device: what is supplied once is there for every area.

    Attributes:
        offset, length: which part of the device it maps, in bytes.
        access: what the client may do with it.
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
        """The device's pages that it maps."""

    @abc.abstractmethod
    def frame(self, page: int) -> memoryview:
        """The memory of a page, to write into while the driver was asked for it. It is not to be kept after the call."""

    @abc.abstractmethod
    def frames(self, pages: range) -> memoryview:
        """The memory of pages that follow each other, in one piece; to be used as that of :meth:`frame`."""

    @abc.abstractmethod
    def ready(self, pages: range) -> list[range]:
        """Those of the pages that are supplied now, in runs."""

    @abc.abstractmethod
    def evict(self, pages: range, save: Any = None) -> bytes:
        """Take supplied pages back from every client, so that no write is lost: write-protect, read, punch, wake.

        Args:
            pages: those that are not supplied are left out.
            save: ``save(run, content)``, called for each run of pages (``range``, ``memoryview``) while nobody can write and
                before the memory goes. Only what it keeps outside of this process survives a crash of the server. If it
                raises, these pages stay as they are.

        Returns:
            The content of all pages that were evicted, in order, if ``save`` is None; else ``b""``.
        """


class Device(abc.ABC):
    """A driver: it supplies the pages of a device. Yours; it runs in a process of its own.

    Only :attr:`length` and :meth:`fault` are needed. A method supplies pages by writing into the frames that it asks the
    area for, or raises: whoever touches a page that could not be supplied gets SIGBUS, and ``populate`` an exception with
    what the driver said. Exceptions harm no other page. A call that takes longer than :attr:`timeout_s` costs the driver its
    process.

    Attributes:
        length: bytes; set by ``__init__``. A last page that is only partly the device's is zeros behind its end.
        page_size: 4 KiB or 2 MiB: what one fault brings in.
        writable: whether clients may write: into the frames, from where :meth:`DeviceArea.evict` gives it to the driver.
        evicts: whether the driver calls :meth:`DeviceArea.evict` on pages that clients may write; it may not without. Dirty
            tracking then costs a fault a page, where the kernel could do it alone.
        populates: False: population is meaningless for this device, and asking for it is an error (requirement C2).
        workers: how many calls may run at once, each in a thread; 0: one after the other in the server's own thread, which
            answers fastest, and is best for whatever does not wait.
        batch: bytes that one call of :meth:`populate` is given at most.
        fault_around: see :class:`FaultAround`; None: a fault brings in its page, by :meth:`fault`. Else what lies around
            comes by :meth:`populate`.
        capacity: bytes of frames that may be supplied at once; None: no bound but the memory. See :meth:`reclaim`.
        timeout_s: how long one call may take, in seconds.
        restartable: whether a new process with a fresh copy of the device can go on after a crash, with the frames that
            were supplied. It must then give the same bytes.
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
        """How to make this device anew in a fresh process. None: the server is a fork of the process that maps it first.

        A fork has the device as it is, whatever it is made of, but also a copy of all other memory of the process.
        """
        return None

    def open(self, area: DeviceArea) -> None:  # noqa: B027  optional
        """A client maps a part of the device. Raising refuses it."""

    @abc.abstractmethod
    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        """Supply one page that was touched: write all of ``area.frame(page)``, or return :data:`ZERO`.

        The frame holds zeros before. ``page`` counts from the start of the device.
        """

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        """Supply many pages, which follow each other: the hook. By default it calls :meth:`fault` for each.

        Called where population was asked for, and for what :attr:`fault_around` brings in. Frames that are not written stay
        zeros.
        """
        for page in pages:
            self.fault(area, page, access)

    def discard(self, area: DeviceArea, pages: range) -> None:  # noqa: B027  optional
        """Pages are given back; their frames are gone. What is supplied for them next is up to the driver.

        None of these pages is filled or evicted until this returns.
        """

    def reclaim(self, area: DeviceArea, pages: int) -> None:  # noqa: B027  optional
        """Before ``pages`` more would exceed the capacity: make room, by :meth:`DeviceArea.evict`.

        If there is not enough room afterwards, supplying fails with ENOSPC. Frames of a device that is not writable need no
        help: those that were supplied first go first.
        """

    def close(self, area: DeviceArea) -> None:  # noqa: B027  optional
        """A client gave up its mapping, or died."""
