"""SharedMemory: the class of multiprocessing, with the memory there when the constructor returns."""

from __future__ import annotations

import errno
import functools
import mmap
import os
import secrets
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker, shared_memory
from typing import Any, NamedTuple

from prefault.engine.locking import lock
from prefault.engine.planning import Threads
from prefault.engine.populating import HeadroomChoice, PopulateResult, populate
from prefault.errors import HugePagesError, MappingError
from prefault.mapping.mapping import HugeAdvice
from prefault.shared_memory import nameless_files
from prefault.sizes import Size, format_size, parse_size

_ADVICE = {"advise": mmap.MADV_HUGEPAGE, "never": mmap.MADV_NOHUGEPAGE}


class _Wanted(NamedTuple):
    """Options of the constructor."""

    populate: bool
    huge: HugeAdvice
    locked: bool
    threads: Threads
    headroom: HeadroomChoice


class SharedMemory(shared_memory.SharedMemory):
    """Shared memory with a name, as :class:`multiprocessing.shared_memory.SharedMemory`, that is allocated when it is made.

    A full /dev/shm, memory cgroup or machine is an exception of the constructor, with sizes and remedy, in place of a SIGBUS
    or the OOM killer at some later store (cpython#114390). The memory gets its name only when it is complete, so that
    nothing is left in /dev/shm if that fails or the process is killed. Everything else is as the standard class has it:
    attaching by name, pickles, spawn and fork, ``ShareableList(name=...)``, the resource tracker.

    ::

        memory = prefault.SharedMemory(create=True, size="2 GiB")
        array = numpy.ndarray((1 << 28,), "float64", buffer=memory.buf)

    Args:
        name: of the memory; None makes up a name, with ``create``.
        create: make new memory; else attach to what has this name.
        size: bytes (a number or ``"2 GiB"``), with ``create``; no rounding.
        track: have the resource tracker remove the name when all processes of the program have ended. As in Python 3.13,
            on older ones too: pass False where another program owns the memory.
        populate: make the page tables of this process, so that it meets no page fault either. None: at creation, and not
            when attaching. False at creation allocates the memory without them. True when attaching also allocates the holes
            of memory that the standard class made.
        huge: transparent huge pages. ``"auto"`` leaves it to the mount option ``huge=`` of /dev/shm, ``"advise"`` asks for
            them (MADV_HUGEPAGE), ``"never"`` forbids them in this mapping.
        locked: populate, and lock the memory in this process, so that it is not swapped out; until :meth:`close`.
        threads: how many populate at once; None: chosen by size, affinity and CPU quota.
        headroom: ``"check"`` checks the limits before and while the memory is taken; ``"ignore"`` leaves that to the kernel.

    Attributes:
        populated: result of populating in the constructor; None if it did not.

    Raises:
        HeadroomError: a limit leaves less than is needed: /dev/shm, a memory cgroup, the machine, RLIMIT_MEMLOCK.
        BackingFullError: the kernel found no memory, though the limits had room.
        HugePagesError: huge pages were asked for, and /dev/shm is mounted without them.
        MappingError: no file can be made in /dev/shm, or none of this size be mapped.
        FileExistsError, FileNotFoundError, ValueError: as the standard class.

    Source: shm_overview(7); open(2), O_TMPFILE; madvise(2), MADV_POPULATE_WRITE.
    """

    # The attributes of the standard class, whose methods are inherited (tests/shared_memory compares them).
    _name: str | None
    _fd: int
    _mmap: mmap.mmap | None
    _flags: int
    _size: int
    _buf: memoryview | None
    _track: bool

    populated: PopulateResult | None = None

    _registered: str | None = None

    def __init__(
        self,
        name: str | None = None,
        create: bool = False,
        size: Size = 0,
        *,
        track: bool = True,
        populate: bool | None = None,
        huge: HugeAdvice = "auto",
        locked: bool = False,
        threads: Threads = None,
        headroom: HeadroomChoice = "check",
    ) -> None:
        length = parse_size(size)
        if not isinstance(name, str | None):
            raise TypeError(f"a name of shared memory is a text, not {type(name).__name__}")
        if huge not in ("auto", *_ADVICE):
            raise ValueError(f"huge is 'auto', 'advise' or 'never', not {huge!r}")
        if create and length == 0:
            raise ValueError("'size' must be a positive number different from zero")
        if populate is False and (locked or (create and huge == "advise")):
            raise ValueError("locked=True and huge='advise' take effect by populating: leave populate=False out")
        self._track = track
        wanted = _Wanted(create if populate is None else populate, huge, locked, threads, headroom)
        try:
            if create:
                self._create(name, length, wanted)
            else:
                self._attach(name)
                self._prepare(wanted)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process attaches to it; unlike the standard class it keeps ``track=False``."""
        if self._track:
            return super().__reduce__()  # type: ignore[return-value]
        return functools.partial(type(self), track=False), (self.name, False, self.size)

    if sys.version_info < (3, 13):

        def unlink(self) -> None:
            """Remove the name. The memory is freed when all processes have closed it.

            Call it once, in one of the processes.
            """
            if self._track:
                super().unlink()
            elif self._name:
                nameless_files.remove(self._name)

    def _create(self, name: str | None, length: int, wanted: _Wanted) -> None:
        self._flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        if name is not None:
            nameless_files.file_name(name)
        fd = nameless_files.create_nameless()
        try:
            if fd is None:
                self._with_new_name(name, self._create_named)
            else:
                self._fd = fd
            try:
                os.ftruncate(self._fd, length)
                self._map(length)
            except OSError as error:
                raise MappingError(error.errno or 0, _no_room(error.errno, length)) from error
            if wanted.populate:
                self._prepare(wanted)
            else:
                self._advise(wanted.huge)
                nameless_files.allocate(self._fd, wanted.headroom)
            if fd is not None:
                self._with_new_name(name, lambda chosen: nameless_files.give_name(self._fd, chosen))
        except BaseException:
            self._take_name_back()
            raise
        finally:
            vars(self).pop("_registered", None)  # of no use from now on, and no attribute of the standard class

    def _take_name_back(self) -> None:
        """Remove the name of a file that shall not be; Ctrl-C may have come right after it got that."""
        if self._name is not None and self._fd >= 0 and os.fstat(self._fd).st_nlink:
            nameless_files.remove(self._name)
        self._name = None
        if self._registered is not None:
            resource_tracker.unregister(self._registered, "shared_memory")

    def _with_new_name(self, name: str | None, make: Callable[[str], None]) -> None:
        """Have a file made or named, and registered at the resource tracker.

        A random name is registered first: then a process that is killed in between leaves no file. One that the caller chose
        may be another's, which the tracker would remove.
        """
        if name is not None:
            self._name = f"/{name}"
            make(name)
            self._register()
            return
        while True:
            self._name = f"/psm_{secrets.token_hex(4)}"
            self._register()
            try:
                make(self._name)
            except FileExistsError:
                if self._track:
                    resource_tracker.unregister(self._name, "shared_memory")
                self._name = self._registered = None
                continue
            return

    def _register(self) -> None:
        if self._track:
            assert self._name is not None
            self._registered = self._name
            resource_tracker.register(self._name, "shared_memory")

    def _create_named(self, name: str) -> None:
        self._fd = nameless_files.create_named(name)

    def _attach(self, name: str | None) -> None:
        if sys.version_info >= (3, 13):
            super().__init__(name, track=self._track)
        elif self._track:
            super().__init__(name)
        else:
            # The old constructor registers always. To unregister then would remove the entry of the creator, if both have
            # one tracker.
            if name is None:
                raise ValueError("'name' can only be None if create=True")
            self._fd = nameless_files.open_existing(name)
            self._name = f"/{name}"
            self._map(os.fstat(self._fd).st_size)

    def _map(self, length: int) -> None:
        self._mmap = mmap.mmap(self._fd, length)
        self._size = length
        self._buf = memoryview(self._mmap)

    def _prepare(self, wanted: _Wanted) -> None:
        self._advise(wanted.huge)
        if wanted.locked:
            result = lock(self._mmap, headroom=wanted.headroom)
            self.populated = result.populated
        elif wanted.populate:
            self.populated = populate(self._mmap, threads=wanted.threads, headroom=wanted.headroom)

    def _advise(self, huge: HugeAdvice) -> None:
        if huge == "advise" and nameless_files.huge_option(self._fd) not in ("advise", "within_size", "always"):
            raise HugePagesError(
                errno.ENODEV,
                f"{nameless_files.DIRECTORY} is mounted without huge pages: remount it (mount -o remount,huge=advise"
                f" {nameless_files.DIRECTORY}), or leave huge='auto'",
            )
        if huge != "auto":
            assert self._mmap is not None
            self._mmap.madvise(_ADVICE[huge])


def _no_room(number: int | None, length: int) -> str:
    """Explain why a file of ``length`` bytes cannot be made or mapped."""
    reasons = {
        errno.ENOMEM: "RLIMIT_AS or the address space has no room for it: raise it (ulimit -v), or make less",
        errno.EFBIG: "RLIMIT_FSIZE allows no file as large: raise it (ulimit -f), or make less",
    }
    return f"shared memory of {format_size(length)} cannot be mapped: {reasons.get(number or 0) or os.strerror(number or 0)}"
