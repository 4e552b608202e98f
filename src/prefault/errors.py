"""Errors, named by their cause.

Your call: plain ``TypeError``, ``ValueError`` and ``BufferError``. The memory or the machine: a subclass of
:class:`PopulateError`, :class:`DiscardError` or :class:`MappingError`, each an ``OSError`` with ``errno``. The person at the
keyboard: :class:`PopulateInterrupted`.
"""

from __future__ import annotations

import errno
import os

from prefault.ranges import RangeSet


class PopulateError(OSError):
    """Population stopped before all of the range was populated.

    Attributes:
        errno: the kernel's error number.
        address: address of the first page that could not be populated.
        offset: distance of that page in bytes from the start of the buffer; negative by less than a page where the buffer
            starts inside that page.
        populated: the pages that this call brought in and that are still there, as addresses. After a rollback: those that
            could not be discarded, some of them only in the memory of the file; nearly always none.
        populated_bytes: how many bytes that is. Pages that were populated before the call are not counted.
    """

    address: int
    offset: int
    populated: RangeSet

    def __init__(
        self, number: int, message: str, *, address: int = 0, offset: int = 0, populated: RangeSet | None = None
    ) -> None:
        super().__init__(number, message)
        self.address = address
        self.offset = offset
        self.populated = populated if populated is not None else RangeSet()

    @property
    def populated_bytes(self) -> int:
        """Bytes that this call brought in and that are still there."""
        return self.populated.length

    def __str__(self) -> str:
        return f"{self.strerror} [{errno_name(self.errno)}]"


class HoleError(PopulateError):
    """Nothing is mapped at the address (ENOMEM)."""

    def __str__(self) -> str:
        if self.errno != errno.ENOMEM:
            return super().__str__()
        return f"{self.strerror} [ENOMEM: what madvise(2) says of a hole; no memory is lacking]"


class ProtectionError(PopulateError):
    """The mapping does not permit the access (EINVAL)."""


class SpecialMappingError(PopulateError):
    """Device, I/O or secret memory, which the kernel does not populate (EINVAL)."""


class BackingFullError(PopulateError):
    """No memory or space is left behind the mapping: tmpfs, hugetlb pool or disk (EFAULT, or ENOSPC from fallocate)."""


class BeyondEndError(PopulateError):
    """The page lies beyond the end of the mapped file (EFAULT)."""


class GuardPageError(PopulateError):
    """The page is a guard region (MADV_GUARD_INSTALL, Linux 6.13): any access is meant to fail (EFAULT)."""


class PoisonedPageError(PopulateError):
    """The page is hardware-poisoned: its content is lost (EHWPOISON)."""


class OutOfMemoryError(PopulateError):
    """The kernel has no memory for the page or its page table (ENOMEM with the page mapped)."""


class HeadroomError(PopulateError):
    """A limit leaves less than the populate call needs, so it did not start, or stopped before the OOM killer came (ENOMEM).

    Or pages of a mapped file were evicted while others came in, so that they are not there at its end.

    Attributes:
        limit: the name of the limit, as :func:`prefault.headroom` lists it.
        needed_bytes: bytes that the call would still have taken from it.
        available_bytes: bytes that it leaves.
    """

    def __init__(
        self, number: int, message: str, *, address: int = 0, offset: int = 0, populated: RangeSet | None = None,
        limit: str = "", needed_bytes: int = 0, available_bytes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(number, message, address=address, offset=offset, populated=populated)
        self.limit = limit
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class PoolFullError(PopulateError):
    """A pool, or a member's limit in it, does not have the blocks; no page was touched (ENOSPC)."""


class PoolGoneError(PopulateError, ConnectionError):
    """The pool cannot be asked: its server is gone, it is closed, or this is a fork of its process; no page was touched."""


class DriverError(PopulateError):
    """The driver of a device raised an exception for the page (EIO); the message quotes it."""


class NoPopulateError(PopulateError):
    """The driver of a device declares population as meaningless (EOPNOTSUPP); touching the pages faults them in."""


class DeviceGoneError(PopulateError, ConnectionError):
    """A device cannot be asked: its server is gone, it is closed, or this is a fork of the process that mapped it."""


class PopulateCancelled(PopulateError):
    """:meth:`prefault.PopulateTask.cancel` stopped a call in the background (ECANCELED); ``populated`` is what came in."""


class DeviceError(OSError):
    """A device cannot be served or mapped; nothing is left behind."""

    def __str__(self) -> str:
        return f"{self.strerror} [{errno_name(self.errno)}]"


class NotPopulatedError(OSError):
    """Read or write of bytes that are not populated, in sparse memory that faults there (EFAULT).

    Attributes:
        offset: distance of the first such byte from the start of the memory.
    """

    def __init__(self, number: int, message: str, *, offset: int = 0) -> None:
        super().__init__(number, message)
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.strerror} [{errno_name(self.errno)}]"


class PopulateInterrupted(KeyboardInterrupt):
    """Ctrl-C while populating; the pages that were brought in until then stay, unless ``rollback`` was asked for.

    Attributes:
        populated: the pages that this call brought in and that are still there, as addresses.
        populated_bytes: how many bytes that is.
    """

    def __init__(self, message: str = "", populated: RangeSet | None = None) -> None:
        # Both have defaults because pickle and copy call this with the message alone and set the attributes afterwards.
        super().__init__(message)
        self.populated = populated if populated is not None else RangeSet()

    @property
    def populated_bytes(self) -> int:
        """Bytes that this call brought in and that are still there."""
        return self.populated.length


class PageFaultsError(RuntimeError):
    """A block that :func:`prefault.ready` checks had page faults.

    Attributes:
        minor_faults: how many needed no input.
        major_faults: how many waited for a disk or swap.
    """

    def __init__(self, minor_faults: int = 0, major_faults: int = 0, message: str = "") -> None:
        super().__init__(minor_faults, major_faults, message)
        self.minor_faults = minor_faults
        self.major_faults = major_faults

    def __str__(self) -> str:
        return str(self.args[2])


class DiscardError(OSError):
    """Pages could not be given back.

    Attributes:
        address: address of the part that could not be discarded; the parts before it are.
    """

    def __init__(self, number: int, message: str, *, address: int = 0) -> None:
        super().__init__(number, message)
        self.address = address

    def __str__(self) -> str:
        return f"{self.strerror} [{errno_name(self.errno)}]"


class MappingError(OSError):
    """Memory could not be mapped, or its backing not be made; nothing is left behind."""

    def __str__(self) -> str:
        return f"{self.strerror} [{errno_name(self.errno)}]"


class HugePagesError(MappingError):
    """The hugetlb pool is too small, or the kernel has no huge pages of that size."""


def errno_name(number: int | None) -> str:
    """Return name and meaning of an errno: ``"EFAULT: Bad address"`` for 14."""
    if number is None:
        return "no errno"
    return f"{errno.errorcode.get(number, f'errno {number}')}: {os.strerror(number)}"
