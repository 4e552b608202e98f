"""The backings: where a :class:`~prefault.Mapping` takes its memory from."""

import abc
import errno
import fcntl
import os
import stat
from typing import NamedTuple

from prefault._kernel import mman
from prefault._kernel._call import explain
from prefault._kernel.memfd import MFD_CLOEXEC, MFD_HUGETLB, huge_page_flag
from prefault._system import hugetlb, proc
from prefault._system.descriptors import Descriptors
from prefault.errors import HugePagesError, MappingError
from prefault.sizes import MIB, PAGE_SIZE, Size, format_size, parse_size

# These values, and those of other modules, are named tuples and not frozen dataclasses: a dataclass is made by running
# generated source, 0.8 ms each, and its module imports inspect. Together that was a third of `import prefault`.


class OpenedBacking(NamedTuple):
    """Arguments of mmap(2) for a backing.

    ``fd`` is None for anonymous memory; ``flags`` are added to the call; ``size`` is the size of the file from ``offset``
    on, where it decides how much there is to map.
    """

    fd: int | None
    page_size: int = PAGE_SIZE
    offset: int = 0
    flags: int = 0
    size: int | None = None


class BackingSource(abc.ABC):
    """Source of memory: a plain value, which opens nothing before :meth:`open`.

    The attributes of its class, and properties, say what the rest of the package must know of a backing.

    Attributes:
        has_file: the memory is the file's, so that mappings of it are shared unless the caller says otherwise.
        is_given: the file exists before, belongs to the caller, and is never made longer or shorter.
    """

    __slots__ = ()

    has_file = True
    is_given = False

    @property
    def huge_page_size(self) -> int | None:
        """Bytes in a huge page of the hugetlb pool that it takes its memory from; None where it takes none by name."""
        return None

    @property
    def location(self) -> str | int | None:
        """Path or descriptor on the file system that supplies the memory; None for the kernel's own."""
        return None

    @property
    def when_shared(self) -> "BackingSource":
        """The backing with a descriptor that gives the same memory, shared; nearly always itself."""
        return self

    @abc.abstractmethod
    def open(self, descriptors: Descriptors, length: int | None, *, writable: bool) -> OpenedBacking:
        """Make the backing ready to be mapped, and create its file if it has one.

        Args:
            descriptors: owner of the descriptor that is opened, from the moment that the kernel returns it: open it by
                ``descriptors.open(function, ...)``.
            length: bytes to map; None: all of a file.
            writable: the mapping writes through to the file.

        Raises:
            MappingError: the memory is not available. Nothing is left on disk; the caller closes ``descriptors``.
        """


class _AnonymousFields(NamedTuple):
    pass


class Anonymous(_AnonymousFields, BackingSource):
    """Memory without a file. Private by default; shared, it is shared with children of fork."""

    __slots__ = ()

    has_file = False

    @property
    def when_shared(self) -> BackingSource:
        """A memfd."""
        return Memfd()

    def open(self, descriptors: Descriptors, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Return the flags; there is nothing to open."""
        return OpenedBacking(None, flags=mman.MAP_ANONYMOUS)


class _HugetlbFields(NamedTuple):
    page_size: Size = 2 * MIB


class Hugetlb(_HugetlbFields, BackingSource):
    """Anonymous huge pages from the hugetlb pool (``vm.nr_hugepages``)."""

    __slots__ = ()

    has_file = False

    @property
    def huge_page_size(self) -> int:
        """Bytes in a huge page."""
        return parse_size(self.page_size)

    @property
    def when_shared(self) -> BackingSource:
        """A memfd of huge pages of the same size."""
        return Memfd(page_size=self.page_size)

    def open(self, descriptors: Descriptors, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Return the flags; there is nothing to open, but the kernel must know the page size."""
        page_size = check_huge_page_size(self.page_size)
        flags = mman.MAP_ANONYMOUS | mman.MAP_HUGETLB | huge_page_flag(page_size, mman.MAP_HUGE_SHIFT)
        return OpenedBacking(None, page_size, flags=flags)


class _MemfdFields(NamedTuple):
    name: str = "prefault"
    page_size: Size | None = None


class Memfd(_MemfdFields, BackingSource):
    """An anonymous file in memory (memfd_create(2)); with ``page_size``, of huge pages from the hugetlb pool."""

    __slots__ = ()

    @property
    def huge_page_size(self) -> int | None:
        """Bytes in a huge page; None for pages of the kernel's base size."""
        return None if self.page_size is None else parse_size(self.page_size)

    def open(self, descriptors: Descriptors, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Create the memfd and give it its size."""
        flags, page_size = MFD_CLOEXEC, PAGE_SIZE
        if self.page_size is not None:
            page_size = check_huge_page_size(self.page_size)
            flags |= MFD_HUGETLB | huge_page_flag(page_size)
        size = _round_up(_required(length, "a memfd"), page_size)
        try:
            fd = descriptors.open(os.memfd_create, self.name, flags)
        except OSError as error:
            raise MappingError(error.errno, f"memfd_create failed: {explain(error.errno or 0)}") from error
        return _sized(fd, size, page_size)


class _TemporaryFileFields(NamedTuple):
    directory: str | os.PathLike[str] = "/dev/shm"


class TemporaryFile(_TemporaryFileFields, BackingSource):
    """An unnamed file in ``directory`` that goes away with the mapping.

    The directory decides what it is: ``/dev/shm`` or another tmpfs, a hugetlbfs mount, or a disk.
    """

    __slots__ = ()

    @property
    def location(self) -> str:
        """The directory."""
        return os.fsdecode(self.directory)

    def open(self, descriptors: Descriptors, length: int | None, *, writable: bool) -> OpenedBacking:  # noqa: ARG002
        """Create the file, without a name, and give it its size."""
        size = _required(length, "a temporary file")
        directory = os.path.abspath(self.location)
        try:
            try:
                fd = descriptors.open(os.open, directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                    raise
                fd = _open_unlinked(directory, descriptors)
        except OSError as error:
            raise MappingError(
                error.errno, f"no file can be made in {self.directory}: {explain(error.errno or 0)}"
            ) from error
        page_size = os.fstatvfs(fd).f_bsize if _is_hugetlbfs(fd) else PAGE_SIZE
        return _sized(fd, _round_up(size, page_size), page_size)


class _FileFields(NamedTuple):
    path: str | os.PathLike[str]
    offset: Size = 0


class File(_FileFields, BackingSource):
    """An existing file, from ``offset`` on. It is never made longer or shorter.

    Attributes:
        path: of a regular file.
        offset: where the mapping starts, a multiple of the page size.
    """

    __slots__ = ()

    is_given = True

    @property
    def location(self) -> str:
        """The path."""
        return os.fsdecode(self.path)

    def open(self, descriptors: Descriptors, length: int | None, *, writable: bool) -> OpenedBacking:
        """Open the file, for writing if the mapping writes through to it."""
        path, offset = os.fspath(self.path), parse_size(self.offset)
        # O_NONBLOCK: opening a FIFO must not wait for its other end. It means nothing to a regular file.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise MappingError(errno.EINVAL, f"{path} is not a regular file: {_file_kind(path)} cannot be mapped")
            fd = descriptors.open(os.open, path, flags)
        except MappingError:
            raise
        except OSError as error:
            wish = "read and write it" if writable else "read it"
            raise MappingError(error.errno, f"{path} cannot be opened to {wish}: {explain(error.errno or 0)}") from error
        return _existing(fd, str(path), offset, length)


class _DescriptorFields(NamedTuple):
    fd: int
    offset: Size = 0


class Descriptor(_DescriptorFields, BackingSource):
    """The file behind an open descriptor, from ``offset`` on: a memfd that came over a socket, another mapping's ``fd``.

    It is duplicated, so the one given may be closed, and the file is never made longer or shorter.

    Attributes:
        fd: of a regular file or memfd; open for writing too, where the mapping is to write through to it.
        offset: where the mapping starts, a multiple of the file's page size.
    """

    __slots__ = ()

    is_given = True

    @property
    def location(self) -> int:
        """The descriptor."""
        return self.fd

    def open(self, descriptors: Descriptors, length: int | None, *, writable: bool) -> OpenedBacking:
        """Duplicate the descriptor."""
        offset = parse_size(self.offset)
        if isinstance(self.fd, bool) or not isinstance(self.fd, int):
            raise TypeError(f"a descriptor is a number, not {type(self.fd).__name__}")
        try:
            fd = descriptors.open(fcntl.fcntl, self.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except (OSError, OverflowError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                raise MappingError(errno.EMFILE, f"descriptor {self.fd} cannot be kept: {explain(errno.EMFILE)}") from error
            raise MappingError(errno.EBADF, f"descriptor {self.fd} is not open") from error
        name = f"descriptor {self.fd}"
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise MappingError(errno.EINVAL, f"{name} is not a regular file or memfd: it cannot be mapped")
        if mode == os.O_WRONLY or (writable and mode != os.O_RDWR):
            raise MappingError(errno.EACCES, f"{name} is not open for {'reading and writing' if writable else 'reading'}")
        return _existing(fd, name, offset, length)


def parse_backing(backing: BackingSource | str) -> BackingSource:
    """Return the backing of a name, ``"anonymous"`` or ``"memfd-hugetlb"`` for example; a backing is returned as it is."""
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
    """Return ``size`` in bytes, if this kernel has a pool of huge pages of that size.

    Raises:
        HugePagesError: the kernel has no such pool.
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


def _open_unlinked(directory: str, descriptors: Descriptors) -> int:
    """Create and unlink a file, where the file system has no O_TMPFILE: NFS, and hugetlbfs of old kernels."""
    path = os.path.join(directory, f"prefault-{os.urandom(8).hex()}")
    try:
        return descriptors.open(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    finally:  # also after Ctrl-C. The system call is the first one here: a second Ctrl-C strikes after it.
        try:  # noqa: SIM105  suppress() would be that first call
            os.unlink(path)
        except FileNotFoundError:
            pass


def _sized(fd: int, size: int, page_size: int) -> OpenedBacking:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise MappingError(error.errno, f"the file cannot be made {format_size(size)} long: {error.strerror}") from error
    return OpenedBacking(fd, page_size, size=size)


def _existing(fd: int, name: str, offset: int, length: int | None) -> OpenedBacking:
    """Return how to map ``length`` bytes of an open file; MappingError where it has less."""
    page_size = os.fstatvfs(fd).f_bsize if _is_hugetlbfs(fd) else PAGE_SIZE
    available = os.fstat(fd).st_size - offset
    wanted = available if length is None else length
    if available <= 0 or wanted > available or offset % page_size:
        if available + offset == 0 and _is_made_up(fd):
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
    return any(mount.device == device and mount.filesystem in MADE_UP for mount in proc.read_mounts())


MADE_UP = ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "bpf", "pstore")
"""File systems without storage, whose files the kernel makes up when they are read."""


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
