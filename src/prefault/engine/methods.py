"""Methods of populating, one small class each.

:func:`prefault.populate` runs them, and ``prefault bench`` times them. A method populates one stretch of memory at once and
raises OSError where it cannot; :mod:`prefault.engine.execution` cuts large ranges and handles failures. The attributes of
:class:`Method` say what the rest of the package must know of it, so that a new method is one class here and its line in
:data:`METHODS`; measured, also a line in the benchmark's grid.
"""

import abc
import ctypes
import errno
import os
from array import array
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from prefault._kernel import mman, uio
from prefault._kernel.fallocate import FALLOC_FL_KEEP_SIZE, fallocate
from prefault._kernel.futex import futex_add_zero
from prefault._system import capabilities
from prefault._system.own_process import own_process
from prefault.sizes import PAGE_SIZE

if TYPE_CHECKING:
    import numpy.typing

Access: TypeAlias = Literal["read", "write"]


class Target(NamedTuple):
    """Properties of the mapping that a method works on.

    Attributes:
        page_size: the kernel's page size in bytes; larger than a base page for hugetlb.
        fd: descriptor of the file behind the mapping, open for writing; None without one.
        file_base: added to an address it gives the offset in that file.
        file_size: size of that file in bytes; fallocate must not reach beyond it.
        shared, writable: how the file is mapped.
    """

    page_size: int = PAGE_SIZE
    fd: int | None = None
    file_base: int = 0
    file_size: int = 0
    shared: bool = False
    writable: bool = True


class Method(abc.ABC):
    """One way to populate.

    Attributes:
        name: the name in ``method=`` and in result files.
        access: populates readable or writable.
        by_hand: touches the pages from user space, so that missing memory is a SIGBUS. For measurements.
        overwrites: changes or loses what the memory holds. For measurements on empty mappings.
        hint: the kernel may do it later, in part or not at all.
        allocates: fills holes of the file by fallocate(2), for which it needs a shared mapping and a descriptor of the file
            that is open for writing.
        locks: locks the pages, within RLIMIT_MEMLOCK.
        advice: the MADV_* constant that populates as this method does, for process_madvise(2) on many ranges; None where
            there is none.
        capability: the kernel feature that it needs; None where every supported kernel has it.
        is_fallback: :func:`best` chooses it only where the kernel lacks a feature; the plan says that it is slower.
        falls_back: :attr:`without_fallocate` does where the file system has no fallocate (EOPNOTSUPP); else the call fails.
    """

    name: str
    access: Access
    by_hand = False
    overwrites = False
    hint = False
    allocates = False
    locks = False
    advice: int | None = None
    capability: capabilities.Capability | None = None
    is_fallback = False
    falls_back = False

    @property
    def without_fallocate(self) -> "Method":
        """The method that populates alike without fallocate before it; most methods are that themselves."""
        return self

    @abc.abstractmethod
    def run(self, start: int, length: int, target: Target) -> None:
        """Populate ``[start, start + length)``: page-aligned addresses inside one mapping.

        Idempotent. Pages are populated in order from the first. It fails where an ordinary access would: /proc/self/mem
        reads inaccessible memory as well.

        Raises:
            OSError: a page could not be populated; pages from the start on may be.
        """

    def __repr__(self) -> str:
        return f"<method {self.name}>"


_ADVICE: dict[Access, int] = {"read": mman.MADV_POPULATE_READ, "write": mman.MADV_POPULATE_WRITE}


class MadvisePopulate(Method):
    """madvise(MADV_POPULATE_READ or MADV_POPULATE_WRITE), Linux 5.14."""

    capability = capabilities.MADV_POPULATE
    advice: int

    def __init__(self, access: Access) -> None:
        self.access = access
        self.name = f"populate_{access}"
        self.advice = _ADVICE[access]

    def run(self, start: int, length: int, target: Target) -> None:  # noqa: ARG002
        """Populate as if each page were read, or were written without changing a byte."""
        mman.madvise(start, length, self.advice)


class ProcessMadvise(Method):
    """process_madvise(2) on this process, which takes every advice since Linux 6.13."""

    capability = capabilities.PROCESS_MADVISE
    _PIECE = 4 << 20  # the kernel may give up the mmap lock between ranges of the vector

    def __init__(self, access: Access) -> None:
        self.access = access
        self.name = f"process_madvise_{access}"

    def run(self, start: int, length: int, target: Target) -> None:
        """Make one system call for up to 1024 pieces; a short count means that the next piece failed."""
        piece = max(self._PIECE, target.page_size)
        stop = start + length
        with own_process() as pidfd:
            while start < stop:
                starts = range(start, stop, piece)[: mman.IOV_MAX]
                start += mman.process_madvise(pidfd, [(at, min(piece, stop - at)) for at in starts], _ADVICE[self.access])


class ProcessVmReadv(Method):
    """process_vm_readv(2) on this process, one byte per page: a read fault in the kernel, so never a signal. Linux 3.2."""

    name = "process_vm_readv"
    access: Access = "read"
    is_fallback = True

    def run(self, start: int, length: int, target: Target) -> None:
        """Read up to 1024 pages per call; a short count means that the next page failed."""
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
    """Atomic add of 0 to one word per page, by futex(2): a write fault in the kernel, so never a signal.

    Unlike reading and writing back, an atomic add can lose no other thread's write.
    """

    name = "futex_add"
    access: Access = "write"
    is_fallback = True

    def run(self, start: int, length: int, target: Target) -> None:
        """Make one system call per page."""
        for address in range(start, start + length, target.page_size):
            futex_add_zero(address)


class Mlock(Method):
    """mlock2(2): populates and locks. Private writable memory for writing, all other for reading (mlock(2))."""

    name = "mlock"
    access: Access = "read"
    locks = True

    def run(self, start: int, length: int, target: Target) -> None:  # noqa: ARG002
        """Populate the pages, and keep them from being reclaimed until munlock(2)."""
        mman.mlock2(start, length)


class WillNeed(Method):
    """madvise(MADV_WILLNEED): starts read-ahead of a file. A hint."""

    name = "willneed"
    access: Access = "read"
    hint = True

    def run(self, start: int, length: int, target: Target) -> None:  # noqa: ARG002
        """Start read-ahead; no page is mapped, and none is promised."""
        mman.madvise(start, length, mman.MADV_WILLNEED)


class Fallocate(Method):
    """fallocate(2): memory or disk space for the file behind a shared mapping; no page is mapped yet."""

    name = "fallocate"
    access: Access = "read"
    hint = True  # the page tables stay as they are
    allocates = True

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
    """Allocate by fallocate(2) first, then populate by another method, ``then``."""

    allocates = True

    def __init__(self, then: Method, *, falls_back: bool = False) -> None:
        self.then = then
        self.falls_back = falls_back
        self.name = f"fallocate+{then.name}"
        self.access = then.access
        self.by_hand = then.by_hand
        self.overwrites = then.overwrites
        self.hint = then.hint
        self.capability = then.capability
        self.is_fallback = then.is_fallback

    @property
    def without_fallocate(self) -> Method:
        """The method that follows fallocate."""
        return self.then

    def run(self, start: int, length: int, target: Target) -> None:
        """Allocate the range, then populate it."""
        FALLOCATE.run(start, length, target)
        self.then.run(start, length, target)


class ReadByHand(Method):
    """One load per page, from user space."""

    name = "read"
    access: Access = "read"
    by_hand = True

    def run(self, start: int, length: int, target: Target) -> None:
        """Touch one byte per page; SIGBUS or SIGSEGV where the kernel cannot supply it."""
        _first_bytes(start, length, target).max(initial=0)


class WriteByHand(Method):
    """One store per page, from user space: it overwrites the first byte of each with 0."""

    name = "write"
    access: Access = "write"
    by_hand = True
    overwrites = True

    def run(self, start: int, length: int, target: Target) -> None:
        """Touch one byte per page; SIGBUS or SIGSEGV where the kernel cannot supply it."""
        _first_bytes(start, length, target)[:] = 0


class ReadWriteByHand(Method):
    """One load and one store of the same byte per page, from user space: loses what another thread writes in between."""

    name = "read/write"
    access: Access = "write"
    by_hand = True
    overwrites = True

    def run(self, start: int, length: int, target: Target) -> None:
        """Touch one byte per page; SIGBUS or SIGSEGV where the kernel cannot supply it."""
        import numpy

        pages = _first_bytes(start, length, target)
        numpy.bitwise_or(pages, numpy.uint8(0), out=pages)  # element by element: load, store, next page


class _Bytes:
    """Array interface of a range of addresses, for numpy."""

    def __init__(self, start: int, length: int, *, readonly: bool) -> None:
        self.__array_interface__ = {
            "data": (start, readonly), "shape": (length,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def _first_bytes(start: int, length: int, target: Target) -> "numpy.typing.NDArray[Any]":
    import numpy

    view = numpy.asarray(_Bytes(start, length, readonly=not target.writable))
    return view[:: target.page_size]


POPULATE_READ = MadvisePopulate("read")
POPULATE_WRITE = MadvisePopulate("write")
PROCESS_VM_READV = ProcessVmReadv()
FUTEX_ADD = FutexAdd()
FALLOCATE = Fallocate()

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
        Mlock(),
        ProcessMadvise("read"),
        ProcessMadvise("write"),
        PROCESS_VM_READV,
        FUTEX_ADD,
        FallocateThen(PROCESS_VM_READV),
        FallocateThen(FUTEX_ADD),
    )
}
"""All methods by name."""


def by_name(name: str, access: Access | None = None) -> Method:
    """Return the method called ``name``. ``"process_madvise"`` alone is the one for ``access`` (default: write).

    Raises:
        ValueError: there is none of this name.
    """
    if not isinstance(name, str):
        raise TypeError(f"a method is named by a text, not by {type(name).__name__}")
    if name == "process_madvise":
        name = f"process_madvise_{access or 'write'}"
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: one of {', '.join(METHODS)}")
    return METHODS[name]


def best(access: Access, *, allocate: bool) -> Method:
    """Return the best method for ``access`` on this kernel; with ``allocate``, after fallocate where there is one."""
    preferred, fallback = _BEST[access]
    method = preferred if capabilities.MADV_POPULATE.available else fallback
    return _ALLOCATING[method] if allocate else method


_BEST: dict[Access, tuple[Method, Method]] = {
    "read": (POPULATE_READ, PROCESS_VM_READV),
    "write": (POPULATE_WRITE, FUTEX_ADD),
}
_ALLOCATING = {method: FallocateThen(method, falls_back=True) for pair in _BEST.values() for method in pair}
