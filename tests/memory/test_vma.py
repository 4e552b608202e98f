"""What is mapped where: both sources say the same, every kind of memory is told apart, and nobody's locks are lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import PAGE_SIZE
from prefault._kernel import mman
from prefault._kernel._call import declare_syscall
from prefault._system import capabilities, proc
from prefault.memory.vma import Backing, Vma, file_descriptor, file_size, vm_flags, vma_at, vmas
from prefault.testing import without
from support import needs, oracle
from support.children import in_child
from support.regions import READ, WRITE, Region, Span, file_of, filesystem_of, special

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmdt.argtypes = (ctypes.c_void_p,)
_NR_MEMFD_SECRET = 447
_memfd_secret = declare_syscall(_NR_MEMFD_SECRET, ctypes.c_uint)
_IPC_RMID = 0
_SHM_HUGETLB = 0o4000


def _at(span: Span) -> Vma:
    vma = vma_at(span.address)
    assert vma is not None
    assert vma.start <= span.address < vma.stop
    return vma


def _facts(vma: Vma) -> tuple[Any, ...]:
    return (
        vma.start, vma.stop, vma.readable, vma.writable, vma.executable, vma.shared, vma.page_size, vma.file_offset,
        vma.device, vma.inode, vma.name, vma.backing, vma.describe(),
    )  # fmt: skip


@contextlib.contextmanager
def _sysv(flags: int = 0, length: int = 4 * PAGE_SIZE) -> Iterator[Span]:
    segment = _libc.shmget(0, length, 0o1600 | flags)
    assert segment >= 0, os.strerror(ctypes.get_errno())
    address = _libc.shmat(segment, None, 0)
    _libc.shmctl(segment, _IPC_RMID, None)  # it lives on until it is detached
    try:
        yield Span(address, length)
    finally:
        _libc.shmdt(address)


@contextlib.contextmanager
def _secret() -> Iterator[Region]:
    fd = _memfd_secret(0)
    if fd < 0:
        needs.missing("memfd_secret(2) is not available (Linux 5.14, secretmem.enable=1 before 6.5)")
    try:
        os.ftruncate(fd, 2 * PAGE_SIZE)
        with Region(1, READ | WRITE, fd=fd, shared=True) as first:
            yield first
    finally:
        os.close(fd)


# --- PROCMAP_QUERY and maps


def test_both_sources_say_the_same_of_every_mapping(tmp_path: Path, hugetlb_pool: Callable[[int], None]) -> None:
    needs.capability(capabilities.PROCMAP_QUERY)
    hugetlb_pool(4)
    strange = tmp_path / " a b\nc (deleted)"
    strange.write_bytes(bytes(3 * PAGE_SIZE))
    with contextlib.ExitStack() as stack:
        for backing, shared in (
            ("memfd", True), ("memfd", False), ("tmpfs", True), ("hugetlb", True), ("hugetlb", False),
            ("memfd-hugetlb", True), (prefault.File(tmp_path / strange.name, PAGE_SIZE), False),
        ):  # fmt: skip
            stack.enter_context(
                prefault.Mapping(None if not isinstance(backing, str) else 1, backing=backing, shared=shared)
            )
        stack.enter_context(_sysv())
        stack.enter_context(_sysv(_SHM_HUGETLB, needs.HUGE))
        # Up to the stack's: user space ends below 1 << 47, and above lies [vsyscall], which is no mapping of ours.
        asked = [_facts(vma) for vma in vmas(0, 1 << 47)]
        with without("procmap_query"):
            read = [_facts(vma) for vma in vmas(0, 1 << 47)]
    # The interpreter allocates between the two, so the heap may have moved on: everything else is equal.
    differ = set(asked) ^ set(read)
    assert all(facts[11] is Backing.ANONYMOUS for facts in differ), differ
    assert len(differ) <= 8
    assert len(asked) > 50
    kinds = {facts[11] for facts in asked}
    assert kinds == set(Backing)


def test_the_vma_at_an_address_or_the_next_one() -> None:
    for names in ((), ("procmap_query",)):
        with without(*names), Region(6) as region:
            region.protect(2, 1, READ)
            region.punch(4, 1)
            first = vma_at(region.page(1))
            assert first is not None
            assert (first.start <= region.address, first.stop) == (True, region.page(2))
            hole = vma_at(region.page(4))
            assert hole is not None
            assert hole.start == region.page(5)
            found = list(vmas(region.page(1), region.page(6)))
            assert [max(vma.start, region.page(1)) for vma in found] == [region.page(index) for index in (1, 2, 3, 5)]
            assert [vma.writable for vma in found] == [True, False, True, True]
            assert list(vmas(region.page(4), region.page(5))) == []
            assert vma_at((1 << 64) - PAGE_SIZE) is None


def test_permissions_and_flags() -> None:
    with Region(3, 0) as region:
        region.protect(1, 1, READ | mman.PROT_EXEC)
        none, code = vma_at(region.page(0)), vma_at(region.page(1))
        assert none is not None
        assert code is not None
        assert (none.readable, none.writable, none.executable) == (False, False, False)
        assert none.describe() == "---p private anonymous memory"
        assert (code.readable, code.writable, code.executable) == (True, False, True)
        assert repr(code) == f"Vma([{region.page(1):#x}, {region.page(2):#x}) r-xp private anonymous memory)"
        mman.mlock2(region.page(1), PAGE_SIZE)
        assert "lo" in vm_flags(region.page(1))
        assert vm_flags(region.page(1)) == oracle.vma_flags(region.page(1))
        assert vm_flags(0) == frozenset()


def test_a_path_longer_than_the_kernel_can_tell(tmp_path: Path) -> None:
    # PATH_MAX is 4096, and by openat a tree may be deeper. The mapping has no name then, and works.
    def deep() -> tuple[str, str, str]:
        os.chdir(tmp_path)
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        fd = os.open("file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 2 * PAGE_SIZE)
        with mmap.mmap(fd, 2 * PAGE_SIZE) as memory:
            vma = vma_at(prefault.plan(memory).segments[0].start)
            assert vma is not None
            return vma.name, vma.describe(), prefault.populate(memory).method

    try:
        name, described, method = in_child(deep)
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / ("d" * 200))], check=True)
    assert name == ""
    assert described.startswith("rw-s a file")
    assert method == "fallocate+populate_read"


# --- what supplies the pages


def test_anonymous_memory() -> None:
    with Region(2) as private, Region(2, shared=True) as shared:
        assert _at(private).backing is Backing.ANONYMOUS
        assert _at(shared).backing is Backing.SHARED_ANONYMOUS
    heap = bytearray(1000)
    assert _at(Span(prefault.plan(heap).segments[0].start, 1)).backing is Backing.ANONYMOUS


@pytest.mark.parametrize("shared", [False, True])
def test_memory_files(shared: bool) -> None:
    with prefault.Mapping(PAGE_SIZE, backing="memfd", shared=shared) as mapping:
        vma = vma_at(mapping.range.start)
        assert vma is not None
        assert vma.backing is Backing.MEMFD
        assert vma.name == "/memfd:prefault (deleted)"
        assert vma.backing.is_shmem
    with file_of("/dev/shm", PAGE_SIZE) as (fd, path), Region(1, fd=fd, shared=shared) as region:
        assert _at(region).backing is Backing.TMPFS
        assert _at(region).name == str(path)
    with prefault.Mapping(PAGE_SIZE, backing="tmpfs", shared=shared) as mapping:
        vma = vma_at(mapping.range.start)
        assert vma is not None
        assert vma.name.endswith(" (deleted)")
        assert vma.backing is Backing.TMPFS


@pytest.mark.parametrize("shared", [False, True])
def test_files_on_a_disk(tmp_path: Path, shared: bool) -> None:
    if filesystem_of(tmp_path) == "tmpfs":
        needs.missing("the temporary directory is not on a disk")
    with file_of(tmp_path, 3 * PAGE_SIZE) as (fd, path), Region(1, fd=fd, shared=shared, offset=PAGE_SIZE) as region:
        vma = _at(region)
        status = os.fstat(fd)
        assert (vma.backing, vma.inode, vma.device) == (Backing.FILE, status.st_ino, status.st_dev)
        assert (vma.name, vma.file_offset) == (str(path), PAGE_SIZE)
        assert not vma.backing.is_shmem


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
def test_huge_pages(hugetlb_pool: Callable[[int], None], backing: str, shared: bool) -> None:
    hugetlb_pool(1)
    for names in ((), ("procmap_query",)):
        with without(*names), prefault.Mapping(1, backing=backing, shared=shared) as mapping:
            vma = vma_at(mapping.range.start)
            assert vma is not None
            assert (vma.backing, vma.page_size) == (Backing.HUGETLB, needs.HUGE)


@pytest.mark.parametrize(("shared", "backing"), [(False, Backing.ANONYMOUS), (True, Backing.SHARED_ANONYMOUS)])
def test_dev_zero_is_anonymous_memory(shared: bool, backing: Backing) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    try:
        with Region(2, fd=fd, shared=shared) as region:
            assert _at(region).backing is backing
            result = prefault.populate(region)
            assert (result.access, result.bytes) == ("write", 2 * PAGE_SIZE)
            region.fill(0, b"x")
            assert prefault.discard(region).bytes == 2 * PAGE_SIZE
            assert region.read(0, 2) == bytes(2 * PAGE_SIZE)
    finally:
        os.close(fd)


def test_special_mappings() -> None:
    for name in ("[vvar]", "[vdso]"):
        mapped = special(name)
        if mapped is not None:  # vvar is not on every architecture
            assert _at(mapped).backing is Backing.SPECIAL
            assert _at(mapped).name == name


def test_secret_memory() -> None:
    with _secret() as region:
        assert _at(region).backing is Backing.SPECIAL


def test_system_v_memory() -> None:
    with _sysv() as segment:
        assert _at(segment).backing is Backing.SHARED_ANONYMOUS
        view = (ctypes.c_char * segment.length).from_address(segment.address)
        prefault.populate(segment)
        view[0] = b"x"
        assert oracle.present_bytes(segment.address, segment.length) == segment.length
        assert prefault.discard(segment).freed_bytes == segment.length
        assert view[0] == b"\0"


def test_the_first_system_v_segment_has_inode_0() -> None:
    needs.root("have an IPC namespace of its own")

    def in_a_namespace() -> list[tuple[int, Backing, str]]:
        assert _libc.unshare(0x08000000) == 0  # CLONE_NEWIPC
        answers = []
        with _sysv() as segment:
            for names in ((), ("procmap_query",)):
                with without(*names):
                    vma = _at(segment)
                    answers.append((vma.inode, vma.backing, prefault.discard(segment).method))
        return answers

    assert in_child(in_a_namespace) == [(0, Backing.SHARED_ANONYMOUS, "MADV_REMOVE")] * 2


@contextlib.contextmanager
def _mounted(directory: Path, kind: str, options: str = "") -> Iterator[None]:
    command = ["mount", "-t", kind, *(["-o", options] if options else []), "prefault-test", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        needs.missing(f"{kind} cannot be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)  # an exception may hold a mapping still


def test_a_device_number_that_a_tmpfs_had_before(tmp_path: Path) -> None:
    # The kernel gives the number of an unmounted tmpfs to the next mount without a disk of its own. If the file on it were
    # taken for a tmpfs file still, discarding would punch holes into it.
    needs.root("mount a tmpfs")
    place, lower, upper, work = (tmp_path / name for name in ("place", "lower", "upper", "work"))
    for directory in (place, lower, upper, work):
        directory.mkdir()
    content = b"precious" * PAGE_SIZE
    for _ in range(20):  # other mounts that go away at this moment free their numbers as well
        with _mounted(place, "tmpfs"), prefault.Mapping(PAGE_SIZE, backing=prefault.TemporaryFile(place)) as mapping:
            first = vma_at(mapping.range.start)
            assert first is not None
            assert first.backing is Backing.TMPFS
        with _mounted(place, "overlay", f"lowerdir={lower},upperdir={upper},workdir={work}"):
            (place / "file").write_bytes(content)
            with prefault.Mapping(backing=prefault.File(place / "file")) as mapping:
                vma = vma_at(mapping.range.start)
                assert vma is not None
                assert vma.backing is Backing.FILE
                prefault.discard(mapping)
                assert mapping.memoryview().tobytes() == content
            assert (place / "file").read_bytes() == content
        if vma.device == first.device:
            return
    needs.missing("the kernel gave the number of a tmpfs to no overlay")


def test_mount_points_with_odd_names(tmp_path: Path) -> None:
    # Of all that separates lines for Python, the kernel escapes only the newline.
    needs.root("mount a tmpfs")
    place = tmp_path / "a b\nc\td\\e\rf\x0b\x1c\u2028g"
    place.mkdir()
    with _mounted(place, "tmpfs"), prefault.Mapping(PAGE_SIZE, backing=prefault.TemporaryFile(place)) as mapping:
        vma = vma_at(mapping.range.start)
        assert vma is not None
        assert vma.backing is Backing.TMPFS
        assert str(place) in {mount.directory for mount in proc.read_mounts()}


def test_a_file_on_a_mount_out_of_sight_is_taken_for_a_disk(tmp_path: Path) -> None:
    needs.root("mount a tmpfs")
    directory = tmp_path / "gone"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "prefault-test", directory], check=True)
    detached = False
    try:
        # The name that a memfd has: the file must not pass for one, as then its bytes could be taken away.
        with file_of(directory, 2 * PAGE_SIZE) as (fd, path):
            os.rename(path, directory / "memfd:precious")
            os.pwrite(fd, b"precious", 0)
            with Region(2, fd=fd, shared=True) as region:
                subprocess.run(["umount", "--lazy", directory], check=True)
                detached = True
                vma = _at(region)
                assert vma.name.startswith("/memfd:")
                assert vma.backing is Backing.FILE
                prefault.discard(region)
                assert os.pread(fd, 8, 0) == b"precious"
            path.write_bytes(b"")  # for file_of to remove
    finally:
        if not detached:
            subprocess.run(["umount", directory], check=True)
    shutil.rmtree(directory)


# --- the descriptor of a file


def test_a_writable_descriptor_of_ours_is_found(tmp_path: Path) -> None:
    with file_of(tmp_path, 2 * PAGE_SIZE) as (fd, path), Region(2, fd=fd, shared=True) as region:
        assert file_descriptor(_at(region)) == fd
        readable = os.open(path, os.O_RDONLY)
        writable = os.open(path, os.O_WRONLY)
        path_only = os.open(path, os.O_PATH)
        saved = os.dup(fd)
        os.close(fd)
        before = oracle.descriptors()
        try:
            assert file_descriptor(_at(region)) in (writable, saved)
            os.close(writable)
            assert file_descriptor(_at(region)) == saved
            assert file_size(_at(region)) == 2 * PAGE_SIZE
            os.dup2(saved, fd)
            os.close(saved)
            assert file_descriptor(_at(region)) == fd
        finally:
            os.close(readable)
            os.close(path_only)
        assert oracle.descriptors() <= before | {f"{fd} {path}"}


def test_a_file_that_is_not_open_any_more_stays_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE_SIZE))
    fd = os.open(path, os.O_RDWR)
    with Region(2, fd=fd, shared=True) as region:
        os.close(fd)
        readable = os.open(path, os.O_RDONLY)
        before = oracle.descriptors()
        assert file_descriptor(_at(region)) is None
        os.close(readable)
        assert file_size(_at(region)) == 2 * PAGE_SIZE  # by its path
        path.rename(tmp_path / "elsewhere")
        assert file_size(_at(region)) == 2 * PAGE_SIZE
        (tmp_path / "elsewhere").unlink()
        if capabilities.MAP_FILES.available:
            assert file_size(_at(region)) == 2 * PAGE_SIZE
        else:
            assert file_size(_at(region)) is None
        assert oracle.descriptors() <= before


def test_a_file_in_the_place_of_another_is_not_mistaken_for_it(tmp_path: Path) -> None:
    with file_of(tmp_path, 2 * PAGE_SIZE) as (fd, path), Region(2, fd=fd, shared=True) as region:
        other = tmp_path / "other"
        other.write_bytes(bytes(7 * PAGE_SIZE))
        path.unlink()
        other.rename(path)
        vma = _at(region)
        assert file_size(vma) == 2 * PAGE_SIZE
        assert file_descriptor(vma) == fd


_TRIES_TO_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        print("held", error.errno)
    else:
        print("lost")
"""


def _lock_is_held(path: Path) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", _TRIES_TO_LOCK, path], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split()[0] == "lost" or int(done.stdout.split()[1]) in (errno.EAGAIN, errno.EACCES)
    return done.stdout.startswith("held")


@pytest.mark.parametrize("memory", ["mmap", "memmap"])
@pytest.mark.parametrize("names", [(), ("procmap_query", "map_files"), ("madv_populate",)])
def test_record_locks_survive(tmp_path: Path, memory: str, names: tuple[str, ...]) -> None:
    # A process loses all its POSIX locks on a file as soon as it closes *any* descriptor of it (fcntl(2)).
    import numpy

    path = tmp_path / "database"
    path.write_bytes(b"record" * PAGE_SIZE)
    with path.open("r+b") as file, without(*names):
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert _lock_is_held(path)
        if memory == "mmap":
            mapped: Any = mmap.mmap(file.fileno(), 0)
        else:
            # np.memmap opens and closes the file: the lock is taken afterwards, as by a program that maps first.
            mapped = numpy.memmap(path, dtype="u1", mode="r+")
            fcntl.lockf(file, fcntl.LOCK_EX)
        prefault.populate(mapped)
        prefault.residency(mapped)
        prefault.discard(mapped)
        prefault.plan(mapped)
        os.ftruncate(file.fileno(), PAGE_SIZE)
        with pytest.raises(prefault.BeyondEndError):
            prefault.populate(mapped)
        assert _lock_is_held(path)
        del mapped
        gc.collect()  # an exception in a cycle with its traceback holds the mmap, and that a descriptor
    assert not _lock_is_held(path)
