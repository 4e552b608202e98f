"""The backings: what is opened for a mapping, what is refused, and that nothing is left behind by a failure."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import PAGE_SIZE, Anonymous, File, HugePagesError, Hugetlb, Mapping, MappingError, Memfd, TemporaryFile
from prefault._system import hugetlb
from prefault.memory import backings
from prefault.memory.backings import Descriptor, parse_backing
from support import needs
from support.children import in_child
from support.interrupts import strike_at

pytestmark = pytest.mark.usefixtures("no_leaks")

_NOBODY = 65534
_MODULE = str(backings.__file__)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (3 * PAGE_SIZE // 256) + b"tail")
    return path


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A file in a directory that every user may enter; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        os.chmod(name, 0o755)
        path = Path(name, "file")
        path.write_bytes(bytes(PAGE_SIZE) + b"tail")
        yield path


def _as_somebody_else(function: Callable[[], Any]) -> Any:
    """``function()`` in a child process that is not root, who may read anything."""

    def without_privilege() -> Any:
        if os.geteuid() == 0:
            os.setegid(_NOBODY)
            os.seteuid(_NOBODY)
        return function()

    return in_child(without_privilege)


# --- what they open


@pytest.mark.parametrize(
    ("name", "backing"),
    [
        ("anonymous", Anonymous()),
        ("memfd", Memfd()),
        ("tmpfs", TemporaryFile("/dev/shm")),
        ("hugetlb", Hugetlb()),
        ("memfd-hugetlb", Memfd(page_size="2 MiB")),
    ],
)
def test_names(name: str, backing: prefault.BackingSource) -> None:
    assert parse_backing(backing) is backing
    named = parse_backing(name)
    assert type(named) is type(backing)
    with pytest.raises(AttributeError):
        named.name = "x"  # type: ignore[attr-defined]  # values do not change


def test_unknown_names_and_types() -> None:
    with pytest.raises(ValueError, match=r"unknown backing 'floppy': one of anonymous, .*, or prefault.File\(path\)"):
        Mapping(PAGE_SIZE, backing="floppy")
    for wrong in (None, 5, b"memfd", Memfd):
        with pytest.raises(TypeError, match=r"a backing is a .*Anonymous"):
            Mapping(PAGE_SIZE, backing=wrong)  # type: ignore[arg-type]


def test_a_memfd() -> None:
    with Mapping(3 * PAGE_SIZE + 1, backing=Memfd("my frames")) as mapping:
        assert mapping.fd is not None
        assert os.readlink(f"/proc/self/fd/{mapping.fd}") == "/memfd:my frames (deleted)"
        assert os.fstat(mapping.fd).st_size == len(mapping) == 4 * PAGE_SIZE
        assert not os.get_inheritable(mapping.fd)


def test_a_temporary_file_has_no_name(tmp_path: Path) -> None:
    with Mapping(3 * PAGE_SIZE + 1, backing=TemporaryFile(tmp_path)) as mapping:
        assert mapping.fd is not None
        status = os.fstat(mapping.fd)
        assert (status.st_nlink, status.st_size) == (0, 4 * PAGE_SIZE)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert not os.get_inheritable(mapping.fd)
        assert list(tmp_path.iterdir()) == []
        mapping.memoryview()[:5] = b"bytes"
        assert os.pread(mapping.fd, 5, 0) == b"bytes"


def test_a_whole_file(file: Path) -> None:
    content = file.read_bytes()
    with Mapping(backing=File(file)) as mapping:
        assert len(mapping) == 3 * PAGE_SIZE + 4  # to the byte: what lies beyond is not the file's
        assert mapping.range.length == 4 * PAGE_SIZE
        assert mapping.memoryview().tobytes() == content
        assert mapping.shared
        mapping.memoryview()[-4:] = b"head"
    assert file.read_bytes() == content[:-4] + b"head"


def test_a_part_of_a_file(file: Path) -> None:
    content = file.read_bytes()
    with Mapping(100, backing=File(file, offset="4 KiB")) as mapping:
        assert mapping.memoryview().tobytes() == content[PAGE_SIZE : PAGE_SIZE + 100]
        assert mapping.file_offset == PAGE_SIZE
    with Mapping(backing=File(file, offset=3 * PAGE_SIZE)) as mapping:
        assert mapping.memoryview().tobytes() == b"tail"
        result = prefault.populate(mapping, access="read")  # the page that the file only begins
        assert result.bytes + result.present_bytes == PAGE_SIZE


def test_a_private_mapping_leaves_the_file_alone(file: Path) -> None:
    content = file.read_bytes()
    with Mapping(backing=File(file), shared=False) as mapping:
        mapping.memoryview()[:] = bytes(len(mapping))
        prefault.populate(mapping)
        prefault.discard(mapping, length=2 * PAGE_SIZE)
        assert mapping.memoryview()[: 2 * PAGE_SIZE].tobytes() == content[: 2 * PAGE_SIZE]
    assert file.read_bytes() == content


@pytest.mark.parametrize(("writable", "shared"), [(False, True), (False, False), (True, False)])
def test_a_file_that_is_not_written_needs_no_write_permission(file: Path, writable: bool, shared: bool) -> None:
    with Mapping(backing=File(file), writable=writable, shared=shared) as mapping:
        assert mapping.fd is not None
        descriptor_flags = Path(f"/proc/self/fdinfo/{mapping.fd}").read_text()
        assert int(descriptor_flags.split("flags:")[1].split()[0], 8) & os.O_ACCMODE == os.O_RDONLY


def test_a_file_on_hugetlbfs(hugetlb_pool: Callable[[int], None], tmp_path: Path) -> None:
    hugetlb_pool(3)
    mount = tmp_path / "huge"
    mount.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "prefault-test", mount], check=True)
    try:
        with Mapping(1, backing=TemporaryFile(mount)) as mapping:
            assert (mapping.page_size, len(mapping)) == (needs.HUGE, needs.HUGE)
            prefault.populate(mapping)
            assert prefault.residency(mapping).huge_bytes == needs.HUGE
        assert list(mount.iterdir()) == []
        path = mount / "file"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 2 * needs.HUGE)
        os.close(fd)
        with Mapping(backing=File(path, offset=needs.HUGE)) as mapping:
            assert (mapping.page_size, len(mapping)) == (needs.HUGE, needs.HUGE)
            mapping.memoryview()[5] = 7
        with pytest.raises(MappingError, match="offset 4096 is not a multiple of the 2097152-byte page"):
            Mapping(backing=File(path, offset=PAGE_SIZE))
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)  # an exception may hold a mapping still


# --- files that cannot be mapped


@pytest.mark.parametrize(
    ("length", "offset", "message"),
    [
        (4 * PAGE_SIZE, 0, r"is too short: it holds 12292 bytes from offset 0 on, 16384 are needed \(os.truncate"),
        (1, 4 * PAGE_SIZE, "is too short: it holds 0 bytes from offset 16384 on, 1 are needed"),
        (None, 1 << 40, "is too short: it holds 0 bytes"),
        (10, 1, "offset 1 is not a multiple of the 4096-byte page"),
        (None, 100, "offset 100 is not a multiple"),
    ],
)
def test_a_wrong_part_of_a_file(file: Path, length: int | None, offset: int, message: str) -> None:
    with pytest.raises(MappingError, match=message) as caught:
        Mapping(length, backing=File(file, offset))
    assert caught.value.errno == errno.EINVAL
    assert file.stat().st_size == 3 * PAGE_SIZE + 4  # never made longer


@pytest.mark.parametrize("offset", [-1, "some", 2**63])
def test_an_offset_that_is_none(file: Path, offset: Any) -> None:
    with pytest.raises(ValueError, match=r"negative|not a size|beyond"):
        Mapping(backing=File(file, offset))


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(MappingError, match="is too short: it holds 0 bytes from offset 0 on, some are needed"):
        Mapping(backing=File(tmp_path / "empty"))


@pytest.mark.parametrize("path", ["/proc/version", "/proc/self/maps"])
def test_a_file_that_the_kernel_makes_up(path: str) -> None:
    with pytest.raises(MappingError, match="has no length: the kernel makes its content up when it is read") as caught:
        Mapping(backing=File(path), writable=False)
    assert "truncate" not in str(caught.value)


def test_a_file_system_that_maps_nothing() -> None:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        needs.missing("no transparent huge pages in /sys")
    with pytest.raises(MappingError, match="the file system of the file does not map files; read it instead"):
        Mapping(backing=File(path), writable=False)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        MappingError, match=r"missing cannot be opened to read and write it: No such file .*ENOENT"
    ) as caught:
        Mapping(backing=File(tmp_path / "missing"))
    assert caught.value.errno == errno.ENOENT
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MappingError, match="Not a directory"):
        Mapping(backing=File("/dev/null/x"))
    with pytest.raises(ValueError, match="null"):
        Mapping(backing=File("a\0b"))
    with pytest.raises(TypeError):
        Mapping(backing=File(None))  # type: ignore[arg-type]


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, kind in (
            (tmp_path, "a directory"),
            (tmp_path / "fifo", "a FIFO"),  # and does not wait for somebody at its other end
            (tmp_path / "socket", "a socket"),
            (Path("/dev/null"), "a character device"),
        ):
            for writable in (True, False):
                with pytest.raises(MappingError, match=f"is not a regular file: {kind} cannot be mapped") as caught:
                    Mapping(backing=File(path), writable=writable)
                assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("writable", [False, True])
def test_a_file_that_becomes_a_fifo_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool) -> None:
    # Between looking and opening: it must neither wait for the other end nor be mapped.
    (tmp_path / "file").write_bytes(bytes(PAGE_SIZE))
    looked = os.stat

    def look(path: Any, **options: Any) -> os.stat_result:
        status = looked(path, **options)
        if str(path).endswith("/file") and stat.S_ISREG(status.st_mode):
            os.unlink(path)
            os.mkfifo(path)
        return status

    monkeypatch.setattr(os, "stat", look)
    # A FIFO without a writer keeps whoever opens it for reading waiting: in a process that can be killed, therefore.
    number, _ = in_child(lambda: _refused(backing=File(tmp_path / "file"), writable=writable), timeout_s=10)
    assert number == errno.EINVAL


def _refused(**options: Any) -> tuple[int | None, str]:
    with pytest.raises(MappingError) as caught:
        Mapping(**options)
    return caught.value.errno, str(caught.value)


def test_a_file_that_may_not_be_read(reachable: Path) -> None:
    reachable.chmod(0)
    number, text = _as_somebody_else(lambda: _refused(backing=File(reachable), writable=False))
    assert number == errno.EACCES
    assert f"{reachable} cannot be opened to read it: Permission denied [EACCES" in text


def test_a_file_that_may_not_be_written(reachable: Path) -> None:
    reachable.chmod(0o444)
    number, text = _as_somebody_else(lambda: _refused(backing=File(reachable)))
    assert number == errno.EACCES
    assert "cannot be opened to read and write it" in text

    def privately() -> bytes:
        with Mapping(backing=File(reachable), shared=False) as mapping:
            mapping.memoryview()[0] = 1
            return mapping.memoryview()[-4:].tobytes()

    assert _as_somebody_else(privately) == b"tail"


@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "without O_TMPFILE"])
def test_a_temporary_file_leaves_no_name_wherever_ctrl_c_strikes(monkeypatch: pytest.MonkeyPatch, unnamed: bool) -> None:
    opened = os.open

    def without_unnamed(path: str, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, mode, **options)

    if not unnamed:
        monkeypatch.setattr(os, "open", without_unnamed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        seen: set[str] = set()
        for count in itertools.count(1):
            before = sys.gettrace()
            spared = ["os.unlink", "try:"]
            sys.settrace(strike_at(count, [_MODULE], spared=spared, at_line=lambda: seen.update(os.listdir(directory))))
            try:
                Mapping(PAGE_SIZE, backing=TemporaryFile(directory)).close()
                break
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
            assert os.listdir(directory) == []
        assert count > 8, "the trace saw the module"
        assert bool(seen) is not unnamed  # without a name, not even SIGKILL leaves one


def test_a_directory_that_may_not_be_written(reachable: Path) -> None:
    reachable.parent.chmod(0o555)
    number, text = _as_somebody_else(lambda: _refused(length=PAGE_SIZE, backing=TemporaryFile(reachable.parent)))
    assert number == errno.EACCES
    assert f"no file can be made in {reachable.parent}: Permission denied" in text


# --- temporary files and memfds that cannot be made


@pytest.mark.parametrize("directory", ["/no/such/directory", "/dev/null"])
def test_a_directory_that_is_none(directory: str) -> None:
    with pytest.raises(MappingError, match=f"no file can be made in {directory}") as caught:
        Mapping(PAGE_SIZE, backing=TemporaryFile(directory))
    assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR)


def test_a_directory_without_room_for_a_file(small_tmpfs: Callable[[str], Path], tmp_path: Path) -> None:
    directory = small_tmpfs("64k,nr_inodes=2")
    (directory / "the only one").touch()
    with pytest.raises(MappingError, match="no file can be made in") as caught:
        Mapping(PAGE_SIZE, backing=TemporaryFile(directory))
    assert caught.value.errno == errno.ENOSPC


def test_a_small_tmpfs_maps_and_is_full_when_populated(small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("64k")
    with Mapping("1 MiB", backing=TemporaryFile(directory)) as mapping:
        with pytest.raises(prefault.BackingFullError):
            prefault.populate(mapping, rollback=True, headroom="ignore")
        assert prefault.populate(mapping, length="64 KiB").bytes == 64 << 10
    assert list(directory.iterdir()) == []
    assert os.statvfs(directory).f_bavail == (64 << 10) // PAGE_SIZE


def test_the_limit_of_a_file_s_size(tmp_path: Path) -> None:
    def limited() -> list[tuple[int | None, str]]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE, PAGE_SIZE))
        answers = []
        for backing in (TemporaryFile(tmp_path), Memfd()):
            before = sorted(os.listdir("/proc/self/fd"))
            with pytest.raises(MappingError) as caught:
                Mapping("1 MiB", backing=backing)
            assert sorted(os.listdir("/proc/self/fd")) == before
            answers.append((caught.value.errno, str(caught.value)))
        return answers

    for number, text in in_child(limited):
        assert number == errno.EFBIG
        assert "the file cannot be made 1.0 MiB long" in text
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_left_in_the_process(tmp_path: Path) -> None:
    def limited() -> list[int | None]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        held = []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        numbers: list[int | None] = []
        for backing in (Memfd(), TemporaryFile(tmp_path), File(__file__)):
            with pytest.raises(MappingError) as caught:
                Mapping(100, backing=backing, writable=False)
            numbers.append(caught.value.errno)
        for fd in held:
            os.close(fd)
        return numbers

    assert in_child(limited) == [errno.EMFILE] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 250, "x" * 5000])
def test_a_memfd_s_name_that_is_too_long(name: str) -> None:
    with pytest.raises(MappingError, match="memfd_create failed: Invalid argument"):
        Mapping(PAGE_SIZE, backing=Memfd(name))


# --- sizes


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "tmpfs"])
@pytest.mark.parametrize(
    ("length", "kind", "message"),
    [
        (0, ValueError, "a mapping of 0 bytes is not possible"),
        ("0 GiB", ValueError, "a mapping of 0 bytes"),
        (-1, ValueError, "cannot be negative"),
        (2**63 - 1, ValueError, "more than the kernel can map"),
        (2**63 - PAGE_SIZE, ValueError, "more than the kernel can map"),
        (2**64, ValueError, "beyond what the kernel can address"),
        ("huge", ValueError, "is not a size"),
        (1.5, TypeError, "not float"),
        (True, TypeError, "not bool"),
        (None, ValueError, "has no size of its own: say how many bytes to map"),
    ],
)
def test_wrong_sizes(backing: str, length: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Mapping(length, backing=backing)


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "tmpfs"])
@pytest.mark.parametrize("length", [1 << 48, 1 << 55, 1 << 62])
def test_more_than_the_address_space(backing: str, length: int) -> None:
    with pytest.raises(MappingError) as caught:
        Mapping(length, backing=backing)
    assert caught.value.errno in (errno.ENOMEM, errno.EFBIG)


# --- descriptors


@pytest.mark.parametrize("shared", [True, False])
def test_a_descriptor(file: Path, shared: bool) -> None:
    fd = os.open(file, os.O_RDWR)
    with Mapping(backing=Descriptor(fd), shared=shared) as mapping:
        assert mapping.fd != fd
        os.close(fd)  # it was duplicated
        assert len(mapping) == 3 * PAGE_SIZE + 4
        view = mapping.memoryview()
        assert bytes(view[-4:]) == b"tail"
        view[0] = 99
        del view
    assert file.read_bytes()[0] == (99 if shared else 0)
    assert file.stat().st_size == 3 * PAGE_SIZE + 4


def test_a_descriptor_of_a_memfd_is_the_same_memory() -> None:
    with Mapping(4 * PAGE_SIZE, backing="memfd") as one:
        assert one.fd is not None
        with Mapping(PAGE_SIZE, backing=Descriptor(one.fd, PAGE_SIZE)) as other:
            other.memoryview()[0] = 7
            assert one.memoryview()[PAGE_SIZE] == 7


def test_a_descriptor_of_huge_pages(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with Mapping("4 MiB", backing="memfd-hugetlb") as one:
        assert one.fd is not None
        with Mapping(backing=Descriptor(one.fd)) as other:
            assert (other.page_size, len(other)) == (needs.HUGE, 2 * needs.HUGE)
        with pytest.raises(MappingError, match="not a multiple of the 2097152-byte page"):
            Mapping(1, backing=Descriptor(one.fd, PAGE_SIZE))


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_a_descriptor_that_is_not_open_for_that(file: Path, flags: int) -> None:
    fd = os.open(file, flags)
    try:
        with pytest.raises(MappingError, match=f"descriptor {fd} is not open for reading and writing") as caught:
            Mapping(backing=Descriptor(fd))
        assert caught.value.errno == errno.EACCES
        if flags == os.O_WRONLY:
            with pytest.raises(MappingError, match="not open for reading"):
                Mapping(backing=Descriptor(fd), shared=False)
        else:
            Mapping(backing=Descriptor(fd), shared=False).close()
            Mapping(backing=Descriptor(fd), writable=False).close()
    finally:
        os.close(fd)


def test_what_is_no_descriptor(file: Path) -> None:
    for fd in (-1, 1 << 20, 1 << 40):
        with pytest.raises(MappingError, match=f"descriptor {fd} is not open") as caught:
            Mapping(backing=Descriptor(fd))
        assert caught.value.errno == errno.EBADF
    for wrong in ("3", True, None):
        with pytest.raises(TypeError, match="a descriptor is a number"):
            Mapping(backing=Descriptor(wrong))  # type: ignore[arg-type]
    reader, writer = os.pipe()
    try:
        with pytest.raises(MappingError, match="not a regular file or memfd"):
            Mapping(PAGE_SIZE, backing=Descriptor(reader))
    finally:
        os.close(reader)
        os.close(writer)
    with file.open("r+b") as opened:
        with pytest.raises(MappingError, match="is too short"):
            Mapping(10 * PAGE_SIZE, backing=Descriptor(opened.fileno()))
        with pytest.raises(MappingError, match="not a multiple of the 4096-byte page"):
            Mapping(backing=Descriptor(opened.fileno(), 1))


# --- huge pages


def _sizes_without() -> str:
    return next(size for size in ("8 KiB", "3 MiB", "32 MiB") if prefault.parse_size(size) not in hugetlb.page_sizes())


@pytest.mark.parametrize("kind", [Hugetlb, lambda size: Memfd(page_size=size)])
def test_huge_pages_of_a_size_that_is_none(kind: Callable[[str], prefault.BackingSource]) -> None:
    with pytest.raises(HugePagesError, match=r"this kernel has no huge pages of .* but") as caught:
        Mapping("32 MiB", backing=kind(_sizes_without()))
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
def test_a_pool_without_a_page(hugetlb_pool: Callable[[int], None], backing: str) -> None:
    hugetlb_pool(0)
    with pytest.raises(HugePagesError, match=r"takes 1 huge page of 2\.0 MiB, and 0 of"):
        Mapping(1, backing=backing)


@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_pool_that_is_too_small(hugetlb_pool: Callable[[int], None], backing: str, shared: bool) -> None:
    hugetlb_pool(2)
    with pytest.raises(
        HugePagesError,
        match=r"6.0 MiB cannot be mapped: it takes 3 huge pages of 2.0 MiB, and 2 of 2 are free and not reserved"
        r" \(write a larger number to /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages,"
        r" or map with noreserve=True and populate what there is\)",
    ) as caught:
        Mapping("5 MiB", backing=backing, shared=shared)
    assert caught.value.errno == errno.ENOMEM
    with Mapping("5 MiB", backing=backing, shared=shared, noreserve=True) as mapping:
        assert len(mapping) == 3 * needs.HUGE
        assert prefault.populate(mapping, length="4 MiB").bytes == 2 * needs.HUGE
        with pytest.raises(prefault.BackingFullError) as full:
            prefault.populate(mapping, headroom="ignore")
        assert full.value.offset == 2 * needs.HUGE
    assert hugetlb.read_pool(needs.HUGE).available == 2
