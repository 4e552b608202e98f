"""The backings: what a :class:`~prefault.Mapping` takes its memory from."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import NamedTuple, TypeAlias

from prefault._kernel import mman
from prefault._kernel._call import explain
from prefault._kernel.memfd import MFD_CLOEXEC, MFD_HUGETLB, huge_page_flag, memfd_create
from prefault._system import hugetlb, proc
from prefault.errors import HugePagesError, MappingError
from prefault.sizes import MIB, PAGE_SIZE, Size, format_size, parse_size

# These values, and those of other modules, are named tuples and not frozen dataclasses: a dataclass is made by running
# generated source, 0.8 ms each, and its module imports inspect. Together that was a third of `import prefault`.


class OpenedBacking(NamedTuple):
    """What mmap(2) needs to know of a backing.

    ``fd`` is None for anonymous memory; ``flags`` are added to the call; ``size`` is the size of the file from ``offset``
    on, where it decides how much there is to map.
    """

    fd: int | None
    page_size: int = PAGE_SIZE
    offset: int = 0
    flags: int = 0
    size: int | None = None


class Anonymous(NamedTuple):
    """Memory without a file. Private by default; shared, it is shared with children of fork."""

    def open(self, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Nothing to open."""
        return OpenedBacking(None, flags=mman.MAP_ANONYMOUS)


class Hugetlb(NamedTuple):
    """Anonymous huge pages from the hugetlb pool (``vm.nr_hugepages``)."""

    page_size: Size = 2 * MIB

    def open(self, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Nothing to open; the kernel must know the page size."""
        page_size = check_huge_page_size(self.page_size)
        flags = mman.MAP_ANONYMOUS | mman.MAP_HUGETLB | huge_page_flag(page_size, mman.MAP_HUGE_SHIFT)
        return OpenedBacking(None, page_size, flags=flags)


class Memfd(NamedTuple):
    """An anonymous file in memory (memfd_create(2)); with ``page_size``, of huge pages from the hugetlb pool."""

    name: str = "prefault"
    page_size: Size | None = None

    def open(self, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Create the memfd and give it its size."""
        flags, page_size = MFD_CLOEXEC, PAGE_SIZE
        if self.page_size is not None:
            page_size = check_huge_page_size(self.page_size)
            flags |= MFD_HUGETLB | huge_page_flag(page_size)
        size = _round_up(_required(length, "a memfd"), page_size)
        try:
            fd = memfd_create(self.name, flags)
        except OSError as error:
            raise MappingError(error.errno, f"memfd_create failed: {explain(error.errno or 0)}") from error
        return _sized(fd, size, page_size)


class TemporaryFile(NamedTuple):
    """An unnamed file in ``directory`` that goes away with the mapping.

    The directory decides what it is: ``/dev/shm`` or another tmpfs, a hugetlbfs mount, or a disk.
    """

    directory: str | os.PathLike[str] = "/dev/shm"

    def open(self, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Create the file, unlink it and give it its size."""
        import tempfile  # here, as it takes longer to import than all of this package's own modules

        size = _required(length, "a temporary file")
        try:
            # Not O_TMPFILE: hugetlbfs and some network file systems do not have it.
            fd, path = tempfile.mkstemp(prefix="prefault-", dir=os.fsdecode(self.directory))
        except OSError as error:
            raise MappingError(
                error.errno, f"no file can be made in {self.directory}: {explain(error.errno or 0)}"
            ) from error
        try:
            os.unlink(path)
            page_size = os.fstatvfs(fd).f_bsize if _is_hugetlbfs(fd) else PAGE_SIZE
        except OSError:
            os.close(fd)
            raise
        return _sized(fd, _round_up(size, page_size), page_size)


class File(NamedTuple):
    """An existing file, from ``offset`` on. It is never made longer or shorter.

    Attributes:
        path: of a regular file.
        offset: where the mapping starts, a multiple of the page size.
    """

    path: str | os.PathLike[str]
    offset: Size = 0

    def open(self, length: int | None, *, writable: bool) -> OpenedBacking:
        """Open it, for writing if the mapping writes through to it."""
        path, offset = os.fspath(self.path), parse_size(self.offset)
        # O_NONBLOCK: opening a FIFO must not wait for its other end. It means nothing to a regular file.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise MappingError(errno.EINVAL, f"{path} is not a regular file: {_file_kind(path)} cannot be mapped")
            fd = os.open(path, flags)
        except MappingError:
            raise
        except OSError as error:
            wish = "read and write it" if writable else "read it"
            raise MappingError(error.errno, f"{path} cannot be opened to {wish}: {explain(error.errno or 0)}") from error
        return _existing(fd, str(path), offset, length)


class Descriptor(NamedTuple):
    """The file behind an open descriptor, from ``offset`` on: a memfd that came over a socket, another mapping's ``fd``.

    It is duplicated, so the one given may be closed, and the file is never made longer or shorter.

    Attributes:
        fd: of a regular file or memfd; open for writing too, where the mapping is to write through to it.
        offset: where the mapping starts, a multiple of the file's page size.
    """

    fd: int
    offset: Size = 0

    def open(self, length: int | None, *, writable: bool) -> OpenedBacking:
        """Duplicate it."""
        offset = parse_size(self.offset)
        if isinstance(self.fd, bool) or not isinstance(self.fd, int):
            raise TypeError(f"a descriptor is a number, not {type(self.fd).__name__}")
        try:
            fd = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except (OSError, OverflowError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                raise MappingError(errno.EMFILE, f"descriptor {self.fd} cannot be kept: {explain(errno.EMFILE)}") from error
            raise MappingError(errno.EBADF, f"descriptor {self.fd} is not open") from error
        name = f"descriptor {self.fd}"
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if not stat.S_ISREG(os.fstat(fd).st_mode) or mode == os.O_WRONLY or (writable and mode != os.O_RDWR):
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
            os.close(fd)
            if not regular:
                raise MappingError(errno.EINVAL, f"{name} is not a regular file or memfd: it cannot be mapped")
            wish = "reading and writing" if writable else "reading"
            raise MappingError(errno.EACCES, f"{name} is not open for {wish}")
        return _existing(fd, name, offset, length)


BackingSource: TypeAlias = Anonymous | Hugetlb | Memfd | TemporaryFile | File | Descriptor
"""Where memory comes from. A plain value; ``open(length, writable=...)`` makes it ready, and nothing is opened before.

``open`` raises MappingError where the memory cannot be had, and leaves nothing open or on disk then.
"""


def parse_backing(backing: BackingSource | str) -> BackingSource:
    """A backing, or its name: ``"anonymous"``, ``"memfd"``, ``"tmpfs"``, ``"hugetlb"``, ``"memfd-hugetlb"``."""
    if isinstance(backing, BackingSource):
        return backing
    known: dict[str, BackingSource] = {
        "anonymous": Anonymous(),
        "memfd": Memfd(),
        "tmpfs": TemporaryFile("/dev/shm"),
        "hugetlb": Hugetlb(),
        "memfd-hugetlb": Memfd(page_size=2 * MIB),
    }
    if not isinstance(backing, str):
        raise TypeError(f"a backing is a prefault.Anonymous, Memfd, ... or a name, not {type(backing).__name__}")
    if backing not in known:
        path = repr(backing) if "/" in backing else "path"
        raise ValueError(
            f"unknown backing {backing!r}: one of {', '.join(known)}, prefault.TemporaryFile(directory),"
            f" prefault.Descriptor(fd), or prefault.File({path})"
        )
    return known[backing]


def check_huge_page_size(size: Size) -> int:
    """``size`` in bytes, if this kernel has a pool of huge pages of that size.

    Raises:
        HugePagesError: it has none.
    """
    page_size = parse_size(size)
    sizes = hugetlb.page_sizes()
    if page_size not in sizes:
        known = ", ".join(map(format_size, sizes)) or "none at all"
        raise HugePagesError(errno.ENODEV, f"this kernel has no huge pages of {format_size(page_size)}, but {known}")
    return page_size


def _required(length: int | None, what: str) -> int:
    if length is None:
        raise ValueError(f"{what} has no size of its own: say how many bytes to map")
    return length


def _sized(fd: int, size: int, page_size: int) -> OpenedBacking:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise MappingError(error.errno, f"the file cannot be made {format_size(size)} long: {error.strerror}") from error
    return OpenedBacking(fd, page_size, size=size)


def _existing(fd: int, name: str, offset: int, length: int | None) -> OpenedBacking:
    """``length`` bytes of a file that is open already, if it has them; else it is closed."""
    page_size = os.fstatvfs(fd).f_bsize if _is_hugetlbfs(fd) else PAGE_SIZE
    available = os.fstat(fd).st_size - offset
    wanted = available if length is None else length
    if available <= 0 or wanted > available or offset % page_size:
        made_up = available + offset == 0 and _is_made_up(fd)
        os.close(fd)
        if made_up:
            raise MappingError(
                errno.ENODEV, f"{name} has no length: the kernel makes its content up when it is read; read it, then copy it"
            )
        if available > 0 and offset % page_size:
            raise MappingError(errno.EINVAL, f"offset {offset} is not a multiple of the {page_size}-byte page")
        raise MappingError(
            errno.EINVAL,
            f"{name} is too short: it holds {max(0, available)} bytes from offset {offset} on,"
            f" {'some' if length is None else length} are needed (os.truncate makes it longer)",
        )
    return OpenedBacking(fd, page_size, offset, size=available)


def _round_up(size: int, page_size: int) -> int:
    return size + -size % page_size


def _is_hugetlbfs(fd: int) -> bool:
    # os.fstatvfs has no f_type. Of all file systems only hugetlbfs has blocks of a huge page.
    return os.fstatvfs(fd).f_bsize in hugetlb.page_sizes()


def _is_made_up(fd: int) -> bool:
    """Return whether the file lies on a file system without storage, such as proc: no file there can become longer."""
    device = os.fstat(fd).st_dev
    return any(mount.device == device and mount.filesystem in _MADE_UP for mount in proc.read_mounts())


_MADE_UP = ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "bpf", "pstore")


def _file_kind(path: str) -> str:
    mode = os.stat(path).st_mode
    for test, kind in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return kind
    return "this kind of file"
