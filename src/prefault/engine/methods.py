"""The ways to populate, one small class each.

:func:`prefault.populate` runs these, and ``prefault bench`` times these. A method does one stretch of memory in one go and
raises OSError where it cannot; what to do then, and how to cut a large range, is decided in :mod:`prefault.populate`.
"""

from __future__ import annotations

import abc
import ctypes
import errno
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from prefault._kernel import mman, uio
from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, fallocate
from prefault._kernel.futex import futex_add_zero
from prefault._system import capabilities
from prefault.sizes import PAGE_SIZE

if TYPE_CHECKING:
    import numpy.typing

Access: TypeAlias = Literal["read", "write"]


class Target(NamedTuple):
    """The mapping that a method works on, as far as methods need to know it.

    Attributes:
        page_size: the kernel's, in bytes; larger than a base page for hugetlb.
        fd: a descriptor of the file behind it, open for writing; None without one.
        file_base: what to add to an address to get the offset in that file.
        file_size: of that file in bytes; fallocate must not reach beyond it.
        shared, writable: as it is mapped.
    """

    page_size: int = PAGE_SIZE
    fd: int | None = None
    file_base: int = 0
    file_size: int = 0
    shared: bool = False
    writable: bool = True


class Method(abc.ABC):
    """A way to populate.

    Attributes:
        name: what users and result files call it.
        access: what it populates for.
        by_hand: it touches the pages from user space, so memory that cannot be had is a SIGBUS. For measurements.
        overwrites: it changes or loses what the memory holds. For measurements on empty mappings.
        hint: the kernel may do it later, in part or not at all.
    """

    name: str
    access: Access
    by_hand = False
    overwrites = False
    hint = False

    @abc.abstractmethod
    def run(self, start: int, length: int, target: Target) -> None:
        """Populate ``[start, start + length)``: page-aligned addresses inside one mapping.

        Doing it again for what is already populated changes nothing. Pages are taken in order from the first.

        Raises:
            OSError: not all of it; a part from the start may be populated.
        """

    def __repr__(self) -> str:
        return f"<method {self.name}>"


class PopulateRead(Method):
    """madvise(MADV_POPULATE_READ), Linux 5.14."""

    name = "populate_read"
    access: Access = "read"

    def run(self, start: int, length: int, target: Target) -> None:  # noqa: ARG002
        """Populate readable, as if each page were read."""
        mman.madvise(start, length, mman.MADV_POPULATE_READ)


class PopulateWrite(Method):
    """madvise(MADV_POPULATE_WRITE), Linux 5.14."""

    name = "populate_write"
    access: Access = "write"

    def run(self, start: int, length: int, target: Target) -> None:  # noqa: ARG002
        """Populate writable, as if each page were written, without changing a byte."""
        mman.madvise(start, length, mman.MADV_POPULATE_WRITE)


@contextmanager
def ourselves() -> Iterator[int]:
    """A descriptor of this process, a pidfd."""
    opened: list[int] = []
    try:
        # One call from C to C: Ctrl-C cannot strike after the opening and before the number is noted.
        opened.extend(map(os.pidfd_open, (os.getpid(),)))
        yield opened[0]
    finally:
        if opened:
            os.close(opened[0])


class ProcessMadvise(Method):
    """process_madvise on ourselves, which takes every advice since Linux 6.13."""

    _PIECE = 4 << 20  # the kernel may let others have the mmap lock between ranges of the vector

    def __init__(self, access: Access) -> None:
        self.access = access
        self.name = f"process_madvise_{access}"
        self._advice = mman.MADV_POPULATE_READ if access == "read" else mman.MADV_POPULATE_WRITE

    def run(self, start: int, length: int, target: Target) -> None:
        """One system call for up to 1024 pieces; a short count means that the next piece failed."""
        piece = max(self._PIECE, target.page_size)
        stop = start + length
        with ourselves() as pidfd:
            while start < stop:
                starts = range(start, stop, piece)[: mman.IOV_MAX]
                start += mman.process_madvise(pidfd, [(at, min(piece, stop - at)) for at in starts], self._advice)


class ProcessVmReadv(Method):
    """process_vm_readv on ourselves, one byte a page: a read fault in the kernel, so never a signal. Linux 3.2."""

    name = "process_vm_readv"
    access: Access = "read"

    def run(self, start: int, length: int, target: Target) -> None:
        """Up to 1024 pages a call; a short count means that the next page failed."""
        step = target.page_size
        sink = ctypes.create_string_buffer(mman.IOV_MAX)
        local = mman.IoVec(ctypes.addressof(sink), len(sink))
        pid = os.getpid()
        stop = start + length
        while start < stop:
            pages = range(start, stop, step)[: mman.IOV_MAX]
            remote = array("Q", [1]) * (2 * len(pages))  # struct iovec: base, length
            remote[::2] = array("Q", pages)
            done = uio.process_vm_readv(pid, ctypes.addressof(local), 1, remote.buffer_info()[0], len(pages))
            start += done * step


class FutexAdd(Method):
    """An atomic add of 0 to one word a page, done by futex(2): a write fault in the kernel, so never a signal.

    Unlike reading and writing back it can lose no other thread's write.
    """

    name = "futex_add"
    access: Access = "write"

    def run(self, start: int, length: int, target: Target) -> None:
        """One system call a page."""
        for address in range(start, start + length, target.page_size):
            futex_add_zero(address)


class Mlock(Method):
    """mlock2(2): populates and locks. Private writable memory for writing, all other for reading (mlock(2))."""

    name = "mlock"
    access: Access = "read"

    def run(self, start: int, length: int, target: Target) -> None:  # noqa: ARG002
        """Populate, and keep it from being reclaimed until munlock."""
        mman.mlock2(start, length)


class WillNeed(Method):
    """madvise(MADV_WILLNEED): asks for read-ahead of a file. A hint."""

    name = "willneed"
    access: Access = "read"
    hint = True

    def run(self, start: int, length: int, target: Target) -> None:  # noqa: ARG002
        """Start read-ahead; nothing is mapped and nothing promised."""
        mman.madvise(start, length, mman.MADV_WILLNEED)


class Fallocate(Method):
    """fallocate(2): memory or disk space for the file behind a shared mapping; nothing is mapped yet."""

    name = "fallocate"
    access: Access = "read"
    hint = True  # of population: the page tables stay as they are

    def run(self, start: int, length: int, target: Target) -> None:
        """Allocate the holes of the file under the range, as far as the file reaches."""
        if target.fd is None:
            raise OSError(errno.EBADF, "fallocate needs a descriptor of the file, open for writing")
        offset = start + target.file_base
        inside = min(length, target.file_size - offset)
        if inside <= 0:
            return
        while True:
            try:
                fallocate(target.fd, FALLOC_FL_KEEP_SIZE, offset, inside)
            except InterruptedError:
                continue  # shmem undoes it all on a signal; Python runs the handler before this line (PEP 475)
            return


class FallocateThen(Method):
    """fallocate first, then another method.

    Attributes:
        then: the other method.
        optional: the other method alone will do where the file system has no fallocate (EOPNOTSUPP).
    """

    def __init__(self, then: Method, *, optional: bool = False) -> None:
        self.then = then
        self.optional = optional
        self.name = f"fallocate+{then.name}"
        self.access = then.access
        self.by_hand = then.by_hand
        self.overwrites = then.overwrites
        self.hint = then.hint

    def run(self, start: int, length: int, target: Target) -> None:
        """Allocate the range, then populate it."""
        FALLOCATE.run(start, length, target)
        self.then.run(start, length, target)


class ReadByHand(Method):
    """A load from every page, from user space."""

    name = "read"
    access: Access = "read"
    by_hand = True

    def run(self, start: int, length: int, target: Target) -> None:
        """One byte a page; SIGBUS or SIGSEGV where it cannot be had."""
        _one_byte_a_page(start, length, target).max(initial=0)


class WriteByHand(Method):
    """A store to every page, from user space: it overwrites the first byte of each with 0."""

    name = "write"
    access: Access = "write"
    by_hand = True
    overwrites = True

    def run(self, start: int, length: int, target: Target) -> None:
        """One byte a page; SIGBUS or SIGSEGV where it cannot be had."""
        _one_byte_a_page(start, length, target)[:] = 0


class ReadWriteByHand(Method):
    """A load and a store of the same byte to every page, from user space: loses what another thread writes between."""

    name = "read/write"
    access: Access = "write"
    by_hand = True
    overwrites = True

    def run(self, start: int, length: int, target: Target) -> None:
        """One byte a page; SIGBUS or SIGSEGV where it cannot be had."""
        import numpy

        pages = _one_byte_a_page(start, length, target)
        numpy.bitwise_or(pages, numpy.uint8(0), out=pages)  # element by element: load, store, next page


class _Bytes:
    """Addresses as an array interface, for numpy."""

    def __init__(self, start: int, length: int, *, readonly: bool) -> None:
        self.__array_interface__ = {
            "data": (start, readonly), "shape": (length,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def _one_byte_a_page(start: int, length: int, target: Target) -> numpy.typing.NDArray[Any]:
    import numpy

    view = numpy.asarray(_Bytes(start, length, readonly=not target.writable))
    return view[:: target.page_size]


POPULATE_READ = PopulateRead()
POPULATE_WRITE = PopulateWrite()
PROCESS_VM_READV = ProcessVmReadv()
FUTEX_ADD = FutexAdd()
FALLOCATE = Fallocate()
MLOCK = Mlock()

_PLAIN: tuple[Method, ...] = (
    ReadByHand(),
    WriteByHand(),
    ReadWriteByHand(),
    POPULATE_READ,
    POPULATE_WRITE,
)
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *_PLAIN,
        FALLOCATE,
        *(FallocateThen(method) for method in _PLAIN),
        WillNeed(),
        MLOCK,
        ProcessMadvise("read"),
        ProcessMadvise("write"),
        PROCESS_VM_READV,
        FUTEX_ADD,
        FallocateThen(PROCESS_VM_READV),
        FallocateThen(FUTEX_ADD),
    )
}
"""Every method by its name."""


def by_name(name: str, access: Access | None = None) -> Method:
    """The method called ``name``. ``"process_madvise"`` alone is the one for ``access`` (default: write).

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str):
        raise TypeError(f"a method is named by a text, not by {type(name).__name__}")
    if name == "process_madvise":
        name = f"process_madvise_{access or 'write'}"
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: one of {', '.join(METHODS)}")
    return METHODS[name]


def best(access: Access, *, allocate: bool) -> Method:
    """The method for ``access`` that this kernel has; with ``allocate``, after fallocate where the file system has it."""
    if capabilities.MADV_POPULATE.available:
        name = "populate_read" if access == "read" else "populate_write"
    else:
        name = "process_vm_readv" if access == "read" else "futex_add"
    return _ALLOCATING[name] if allocate else METHODS[name]


_POPULATING = (POPULATE_READ, POPULATE_WRITE, PROCESS_VM_READV, FUTEX_ADD)
_ALLOCATING = {method.name: FallocateThen(method, optional=True) for method in _POPULATING}
