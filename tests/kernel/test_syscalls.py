"""Each function of prefault._kernel once with success and once with failure, against the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap as python_mmap
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefault._kernel import cachestat, fallocate, futex, memfd, mman, pagemap, procmap, uio
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities, cgroups, hugetlb, proc, thp
from prefault._system.meminfo import read_meminfo
from support import needs, oracle
from support.children import Child
from support.regions import PAGE, READ, WRITE, Region, file_of, special

HUGE = 2 << 20
ANONYMOUS = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS


@contextmanager
def refused(number: int, call: str) -> Iterator[None]:
    """An OSError with this errno, whose message names the call."""
    with pytest.raises(OSError, match=f"^\\[Errno {number}\\] {call}: ") as caught:
        yield
    assert caught.value.errno == number


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of eight pages, all of it a hole."""
    with file_of(tmp_path, 8 * PAGE) as (fd, _):
        yield fd


@pytest.fixture
def pagemap_fd() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


# --- mman -------------------------------------------------------------------------------------------------------------


def test_mmap_and_munmap() -> None:
    before = oracle.mappings()
    address = mman.mmap(0, 3 * PAGE, READ, ANONYMOUS)
    line = next(line for line in proc.read_maps() if line.start <= address < line.end)
    assert line.permissions == "r--p"
    mman.munmap(address, 3 * PAGE)
    mman.munmap(address, 3 * PAGE)  # nothing is there: no error, says munmap(2)
    assert oracle.mappings() <= before
    with refused(errno.EINVAL, "mmap"):
        mman.mmap(0, 0, READ, ANONYMOUS)
    with refused(errno.EBADF, "mmap"):
        mman.mmap(0, PAGE, READ, mman.MAP_SHARED, fd=-1)
    with refused(errno.ENOMEM, "mmap"):
        mman.mmap(0, 1 << 62, READ, ANONYMOUS | mman.MAP_NORESERVE)
    with refused(errno.EINVAL, "munmap"):
        mman.munmap(address + 1, PAGE)


def test_mmap_takes_offset_and_fixed_address(file: int) -> None:
    os.pwrite(file, b"third", 2 * PAGE)
    with Region(4, mman.PROT_NONE) as region:
        flags = mman.MAP_SHARED | mman.MAP_FIXED
        assert mman.mmap(region.page(1), PAGE, READ | WRITE, flags, file, 2 * PAGE) == region.page(1)
        assert ctypes.string_at(region.page(1), 5) == b"third"
        with refused(errno.EINVAL, "mmap"):
            mman.mmap(region.page(1), PAGE, READ, flags, file, 100)


def test_mprotect() -> None:
    with Region(2) as region:
        mman.mprotect(region.page(1), PAGE, READ)
        permissions = [line.permissions for line in proc.read_maps() if region.address < line.end <= region.page(2)]
        assert permissions == ["rw-p", "r--p"]
        region.punch(1, 1)
        with refused(errno.ENOMEM, "mprotect"):
            mman.mprotect(region.page(1), PAGE, READ)


def test_madvise() -> None:
    with Region(2) as region:
        region.fill(0, b"x")
        mman.madvise(region.address, region.length, mman.MADV_DONTNEED)
        assert region.read(0, 1) == bytes(PAGE)
        with refused(errno.EINVAL, "madvise"):
            mman.madvise(region.address, PAGE, 12345)
        region.punch(1, 1)
        with refused(errno.ENOMEM, "madvise"):
            mman.madvise(region.address, 2 * PAGE, mman.MADV_DONTNEED)


def test_process_madvise() -> None:
    needs.capability(capabilities.PROCESS_MADVISE)
    pidfd = os.pidfd_open(os.getpid())
    with Region(8) as region:
        region.protect(4, 1, mman.PROT_NONE)
        pieces = [(region.page(0), PAGE), (region.page(2), 2 * PAGE)]
        assert mman.process_madvise(pidfd, pieces, mman.MADV_POPULATE_WRITE) == 3 * PAGE
        there = [True, False, True, True] + [False] * 4
        assert oracle.present(region.address, region.length) == there
        # A range that fails: a short count, and the ranges after it are not looked at.
        pieces = [(region.page(5), PAGE), (region.page(4), PAGE), (region.page(6), PAGE)]
        assert mman.process_madvise(pidfd, pieces, mman.MADV_POPULATE_WRITE) == PAGE
        there[5] = True
        assert oracle.present(region.address, region.length) == there
        # Ranges in any order and of any length, up to the limit of the vector.
        with Region(mman.IOV_MAX) as many:
            ranges = [(many.page(index), PAGE) for index in reversed(range(mman.IOV_MAX))]
            assert mman.process_madvise(pidfd, ranges, mman.MADV_POPULATE_WRITE) == many.length
            assert oracle.present_bytes(many.address, many.length) == many.length
            with refused(errno.EINVAL, "process_madvise"):
                mman.process_madvise(pidfd, [*ranges, ranges[0]], mman.MADV_POPULATE_WRITE)
        with refused(errno.EINVAL, "process_madvise"):
            mman.process_madvise(pidfd, [(region.page(4), PAGE)], mman.MADV_POPULATE_WRITE)
    os.close(pidfd)
    with refused(errno.EBADF, "process_madvise"):
        mman.process_madvise(pidfd, [(0, PAGE)], mman.MADV_POPULATE_WRITE)


def test_mlock2_and_munlock() -> None:
    with Region(4) as region:
        mman.mlock2(region.address, 2 * PAGE)
        assert oracle.smaps(region.address)["Locked"] == 2 * PAGE
        mman.munlock(region.address, 2 * PAGE)
        assert oracle.smaps(region.address)["Locked"] == 0
        with refused(errno.EINVAL, "mlock2"):
            mman.mlock2(region.address, PAGE, 1 << 20)
        region.punch(3, 1)
        with refused(errno.ENOMEM, "mlock2"):
            mman.mlock2(region.address, 4 * PAGE)
        with refused(errno.ENOMEM, "munlock"):
            mman.munlock(region.address, 4 * PAGE)


def test_mincore() -> None:
    with Region(4) as region:
        region.fill(1, b"x")
        assert [byte & 1 for byte in mman.mincore(region.address, region.length)] == [0, 1, 0, 0]
        assert len(mman.mincore(region.address, PAGE + 1)) == 2
        assert mman.mincore(region.address, 0) == b""
        with refused(errno.EINVAL, "mincore"):
            mman.mincore(region.address + 1, PAGE)
        region.punch(3, 1)
        with refused(errno.ENOMEM, "mincore"):
            mman.mincore(region.address, region.length)


# --- files ------------------------------------------------------------------------------------------------------------


def test_fallocate(file: int) -> None:
    fallocate.fallocate(file, fallocate.FALLOC_FL_KEEP_SIZE, 0, 16 * PAGE)
    assert os.fstat(file).st_size == 8 * PAGE
    assert os.fstat(file).st_blocks * 512 >= 16 * PAGE
    os.pwrite(file, b"x" * 8 * PAGE, 0)
    punch = fallocate.FALLOC_FL_PUNCH_HOLE | fallocate.FALLOC_FL_KEEP_SIZE
    fallocate.fallocate(file, punch, PAGE, PAGE)
    assert os.pread(file, 3 * PAGE, 0) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    with refused(errno.EINVAL, "fallocate"):
        fallocate.fallocate(file, 0, 0, 0)
    # Offsets and lengths beyond 32 bits arrive whole.
    with refused(errno.EFBIG, "fallocate"):
        fallocate.fallocate(file, 0, 1 << 62, 1 << 61)
    with refused(errno.EBADF, "fallocate"):
        fallocate.fallocate(-1, 0, 0, PAGE)


def test_memfd_create() -> None:
    fd = memfd.memfd_create("a name", memfd.MFD_CLOEXEC | memfd.MFD_ALLOW_SEALING)
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:a name (deleted)"
    assert not os.get_inheritable(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Invalid argument"):
        memfd.memfd_create("x", 1 << 20)


def test_memfd_of_huge_pages() -> None:
    for size in hugetlb.page_sizes():
        fd = memfd.memfd_create("huge", memfd.MFD_HUGETLB | memfd.huge_page_flag(size))
        assert os.fstatvfs(fd).f_bsize == size
        os.close(fd)
    assert memfd.huge_page_flag(HUGE) == 21 << 26
    assert memfd.huge_page_flag(1 << 30, mman.MAP_HUGE_SHIFT) == 30 << 26
    with pytest.raises(OSError, match=r".") as caught:
        memfd.memfd_create("huge", memfd.MFD_HUGETLB | memfd.huge_page_flag(1 << 40))
    assert caught.value.errno in (errno.ENODEV, errno.EINVAL)


def test_cachestat(disk: Path) -> None:
    needs.capability(capabilities.CACHESTAT)
    with file_of(disk, 8 * PAGE) as (fd, _):
        assert cachestat.cachestat(fd) == cachestat.PageCache(0, 0, 0, 0, 0)
        os.pwrite(fd, b"x" * 3 * PAGE, 2 * PAGE)
        found = cachestat.cachestat(fd)
        assert (found.cached, found.dirty + found.writeback) == (3, 3)
        assert cachestat.cachestat(fd, 3 * PAGE, PAGE).cached == 1
        assert cachestat.cachestat(fd, 5 * PAGE).cached == 0
        os.fsync(fd)
        found = cachestat.cachestat(fd)
        assert (found.cached, found.dirty, found.writeback) == (3, 0, 0)
    with refused(errno.EBADF, "cachestat"):
        cachestat.cachestat(-1)
    if hugetlb.page_sizes():
        huge = memfd.memfd_create("huge", memfd.MFD_HUGETLB)
        with refused(errno.EOPNOTSUPP, "cachestat"):
            cachestat.cachestat(huge)
        os.close(huge)


# --- process_vm_readv and futex ---------------------------------------------------------------------------------------


def test_process_vm_readv() -> None:
    with Region(4) as region:
        region.fill(0, b"abc")
        region.fill(1, b"def")
        region.punch(2, 1)
        sink = ctypes.create_string_buffer(16)
        local = mman.IoVec(ctypes.addressof(sink), 16)
        remote = (mman.IoVec * 3)(*(mman.IoVec(region.page(index), 2) for index in (1, 0, 2)))

        def read(count: int, first: int = 0) -> int:
            vector = ctypes.addressof(remote) + first * ctypes.sizeof(mman.IoVec)
            return uio.process_vm_readv(os.getpid(), ctypes.addressof(local), 1, vector, count)

        assert read(2) == 4
        assert sink.raw[:4] == b"deab"
        assert read(3) == 4  # a short count: the third cannot be read
        with refused(errno.EFAULT, "process_vm_readv"):
            read(1, first=2)
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        with refused(errno.ESRCH, "process_vm_readv"):
            uio.process_vm_readv(child, ctypes.addressof(local), 1, ctypes.addressof(remote), 1)


def test_futex_add_zero(file: int) -> None:
    with Region(2) as region:
        futex.futex_add_zero(region.address)
        assert oracle.present(region.address, region.length) == [True, False]
        assert oracle.smaps(region.address)["Private_Dirty"] == PAGE
        region.fill(1, b"\xff\xff\xff\xff")
        futex.futex_add_zero(region.page(1))
        assert region.read(1, 1)[:4] == b"\xff\xff\xff\xff"
        with refused(errno.EINVAL, "futex"):
            futex.futex_add_zero(region.address + 1)
        region.protect(1, 1, READ)
        with refused(errno.EFAULT, "futex"):
            futex.futex_add_zero(region.page(1))
        region.punch(1, 1)
        with refused(errno.EFAULT, "futex"):
            futex.futex_add_zero(region.page(1))
    with Region(8, fd=file, shared=True) as region:
        os.ftruncate(file, PAGE)
        futex.futex_add_zero(region.address)
        with refused(errno.EFAULT, "futex"):
            futex.futex_add_zero(region.page(1))


# --- pagemap ----------------------------------------------------------------------------------------------------------


def test_read_pagemap(pagemap_fd: int) -> None:
    # More than the kernel gives in one read, and a hole in it.
    pages = 40_000
    with Region(pages) as region:
        region.fill(0, b"x")
        region.fill(pages - 1, b"x")
        region.punch(100, 10)
        entries = pagemap.read_pagemap(pagemap_fd, region.address // PAGE, pages)
        assert len(entries) == pages * pagemap.ENTRY_BYTES
        words = memoryview(entries).cast("Q").tolist()
        assert words == oracle.entries(region.address, region.length)
        assert [index for index, word in enumerate(words) if word & pagemap.PM_PRESENT] == [0, pages - 1]
    # Beyond the end of user space nothing comes.
    assert pagemap.read_pagemap(pagemap_fd, (1 << 63) // PAGE // 8, 1) == b""


def test_pagemap_scan(pagemap_fd: int) -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    with Region(16) as region:
        for index in (1, 2, 5, 9):
            region.fill(index, b"x")
        regions = (pagemap.PageRegion * 2)()
        argument = pagemap.PmScanArg(ctypes.sizeof(pagemap.PmScanArg), 0, region.address, region.address + region.length)
        argument.vec, argument.vec_len = ctypes.addressof(regions), len(regions)
        argument.category_mask = argument.return_mask = PageCategory.PRESENT
        # The vector is full after two runs; walk_end is where to go on.
        assert pagemap.pagemap_scan(pagemap_fd, argument) == 2
        assert [(item.start, item.end, item.categories) for item in regions] == [
            (region.page(1), region.page(3), PageCategory.PRESENT),
            (region.page(5), region.page(6), PageCategory.PRESENT),
        ]
        argument.start = argument.walk_end
        assert region.page(6) <= argument.walk_end <= region.page(9)
        assert pagemap.pagemap_scan(pagemap_fd, argument) == 1
        assert (regions[0].start, regions[0].end) == (region.page(9), region.page(10))
        assert argument.walk_end == region.address + region.length
        argument.size = 8
        with pytest.raises(OSError, match="Invalid argument"):
            pagemap.pagemap_scan(pagemap_fd, argument)


# --- /proc ------------------------------------------------------------------------------------------------------------


def test_procmap_query_agrees_with_every_line_of_maps() -> None:
    needs.capability(capabilities.PROCMAP_QUERY)
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    lines = [line for line in proc.read_maps() if line.name != "[vsyscall]"]  # which is no mapping of the process
    assert len(lines) > 10
    name = ctypes.create_string_buffer(4096)
    for line in lines:
        query = procmap.ProcmapQuery(ctypes.sizeof(procmap.ProcmapQuery), 0, line.end - 1)
        query.vma_name_size, query.vma_name_addr = len(name), ctypes.addressof(name)
        procmap.procmap_query(fd, query)
        flags = {
            "r": procmap.PROCMAP_QUERY_VMA_READABLE,
            "w": procmap.PROCMAP_QUERY_VMA_WRITABLE,
            "x": procmap.PROCMAP_QUERY_VMA_EXECUTABLE,
            "s": procmap.PROCMAP_QUERY_VMA_SHARED,
        }
        assert query.vma_flags == sum(flags.get(letter, 0) for letter in line.permissions)
        assert (query.vma_start, query.vma_offset, query.inode) == (line.start, line.offset, line.inode)
        assert os.makedev(query.dev_major, query.dev_minor) == line.device
        assert query.vma_page_size == PAGE
        assert (os.fsdecode(name.value) if query.vma_name_size else "") == line.name
        # Allocations in between make the heap longer at most.
        assert query.vma_end >= line.end
    os.close(fd)


def test_procmap_query_of_holes() -> None:
    needs.capability(capabilities.PROCMAP_QUERY)
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    with Region(3) as region:
        region.punch(1, 1)
        query = procmap.ProcmapQuery(ctypes.sizeof(procmap.ProcmapQuery), 0, region.page(1))
        with pytest.raises(FileNotFoundError):
            procmap.procmap_query(fd, query)
        query.query_flags = procmap.PROCMAP_QUERY_COVERING_OR_NEXT_VMA
        procmap.procmap_query(fd, query)
        assert query.vma_start == region.page(2)
        query.size = 4
        with pytest.raises(OSError, match="Invalid argument"):
            procmap.procmap_query(fd, query)
    os.close(fd)


NAMES = [
    "plain",
    "two  spaces",
    "new\nline",
    "tab\tand\\slash",
    "separators\x0b\x0c\x1c\u2028end",
    "1-2 r--p 0 0:0 0",
    "umlaut ä",
]


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_maps_and_smaps_lines_of_odd_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(3 * PAGE))
    with path.open("r+b") as opened, Region(2, READ, fd=opened.fileno(), shared=True, offset=PAGE) as region:
        for deleted in (False, True):
            if deleted:
                path.unlink()
            for lines in (proc.read_maps(), proc.read_smaps()):
                line = next(line for line in lines if line.start == region.address)
                assert line.name == f"{tmp_path}/{name}" + " (deleted)" * deleted
                assert (line.end, line.permissions, line.offset) == (region.page(2), "r--s", PAGE)
                status = os.fstat(opened.fileno())
                assert (line.device, line.inode) == (status.st_dev, status.st_ino)


def test_maps_name_that_is_no_unicode(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    with Region(1, READ, fd=fd) as region:
        line = next(line for line in proc.read_maps() if line.start == region.address)
        assert os.fsencode(line.name) == path
    os.close(fd)


def test_smaps_of_a_mapping() -> None:
    with Region(8) as region:
        region.fill(3, b"x")
        mman.mlock2(region.address, region.length, mman.MLOCK_ONFAULT)
        line = next(line for line in proc.read_smaps() if line.start == region.address)
        wanted = oracle.smaps(region.address)
        assert line.fields == wanted
        assert (wanted["Size"], wanted["Rss"], wanted["Locked"]) == (8 * PAGE, PAGE, PAGE)
        assert line.vm_flags == oracle.vma_flags(region.address)
        assert {"rd", "wr", "lo"} <= line.vm_flags


def test_maps_has_every_line() -> None:
    starts = [line.start for line in proc.read_maps()]
    assert starts == sorted(starts)
    assert len(starts) >= oracle.mappings() - 2  # reading may map something
    vdso = special("[vdso]")
    assert vdso is not None
    assert vdso.address in starts
    assert not any(line.fields for line in proc.read_maps())


def test_maps_of_another_process() -> None:
    gate, opener = os.pipe()
    with Region(3) as region, Child(lambda: os.read(gate, 1)) as child:
        assert any(line.start == region.address for line in proc.read_maps(child.pid))
        assert any(line.start == region.address for line in proc.read_smaps(child.pid))
        os.write(opener, b"x")
        child.result()
    os.close(gate)
    os.close(opener)
    with pytest.raises(FileNotFoundError):
        list(proc.read_maps("no-such-process"))


def test_mounts() -> None:
    mounts = proc.read_mounts()
    assert any(mount.directory == "/proc" and mount.filesystem == "proc" for mount in mounts)
    # Mounts over the same directory hide each other; the last one is seen.
    for directory, mount in {mount.directory: mount for mount in mounts}.items():
        if mount.filesystem in ("tmpfs", "proc", "sysfs") and os.access(directory, os.X_OK):
            assert os.stat(directory).st_dev == mount.device


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_mounts_with_odd_names(tmp_path: Path, name: str) -> None:
    needs.root("mount a tmpfs")
    directory = tmp_path / name
    directory.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "odd source", directory], capture_output=True, text=True
    )
    if mount.returncode:
        needs.missing(f"a tmpfs cannot be mounted: {mount.stderr.strip()}")
    try:
        found = next(mount for mount in proc.read_mounts() if mount.directory == str(directory))
        assert (found.filesystem, found.device, found.root) == ("tmpfs", directory.stat().st_dev, "/")
        assert "size=64k" in found.options.split(",")
    finally:
        subprocess.run(["umount", directory], check=True)


def test_meminfo() -> None:
    total, available = read_meminfo("MemTotal", "MemAvailable")
    assert total == os.sysconf("SC_PHYS_PAGES") * PAGE
    assert 0 < available <= total
    if hugetlb.page_sizes():
        # Counts are no sizes.
        size, pages = read_meminfo("Hugepagesize", "HugePages_Total")
        assert size in hugetlb.page_sizes()
        assert pages == hugetlb.read_pool(size).total
    with pytest.raises(KeyError, match="MemAvail"):
        read_meminfo("MemAvail")


# --- cgroups ----------------------------------------------------------------------------------------------------------


def cgroup_mounts(filesystem: str, controller: str = "") -> list[Path]:
    """Where hierarchies are mounted, from /proc/self/mounts."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, directory, kind, options, *_ = line.split()
        if kind == filesystem and (not controller or controller in options.split(",")):
            found.append(Path(directory))
    return found


def test_cgroup_directories_are_those_that_hold_us() -> None:
    found = cgroups.directories("memory")
    v1 = cgroup_mounts("cgroup", "memory")
    if not found:
        assert not v1
        needs.missing("no memory cgroup hierarchy is mounted")
    assert str(os.getpid()) in (found[0] / "cgroup.procs").read_text().split()
    assert [parent for parent in found[0].parents if parent in found] == found[1:]
    assert cgroups.directories("memory", os.getpid()) == found
    if v1:
        assert found[-1] == v1[0]
        assert cgroups.read_bytes(found[-1] / "memory.usage_in_bytes") is not None
        # The root group has no limit, which v1 says with a huge number.
        assert cgroups.read_bytes(found[-1] / "memory.limit_in_bytes") is None


def test_cgroup_directories_of_another_process() -> None:
    gate, opener = os.pipe()

    def groups() -> list[Path]:
        os.read(gate, 1)  # a process that has ended is in no group any more
        return cgroups.directories("memory")

    with Child(groups) as child:
        found = cgroups.directories("memory", child.pid)
        os.write(opener, b"x")
        assert found == child.result()
    os.close(gate)
    os.close(opener)
    with pytest.raises(FileNotFoundError):
        cgroups.directories("memory", "no-such-process")


def test_cgroup_v2_as_it_is_mounted() -> None:
    mounts = cgroup_mounts("cgroup2")
    if not mounts:
        needs.missing("cgroup v2 is not mounted")
    controllers = (mounts[0] / "cgroup.controllers").read_text().split()
    if not controllers:
        needs.missing("cgroup v2 has no controller here")
    for controller in controllers:
        found = cgroups.directories(controller)
        assert found
        assert str(os.getpid()) in (found[0] / "cgroup.procs").read_text().split()
        assert found[-1] == mounts[0]
    paths = [path for names, path in cgroups.hierarchies() if not names]
    assert len(paths) == 1
    assert paths[0].startswith("/")


def test_cgroup_v2_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that shows a part of the hierarchy, with the memory controller, which not every machine has in v2."""
    directory = tmp_path / "cgroup"
    inside = directory / "group" / "deep"
    inside.mkdir(parents=True)
    (directory / "cgroup.controllers").write_text("cpu memory\n")
    (inside / "memory.max").write_text("max\n")
    (inside.parent / "memory.max").write_text("1048576\n")
    mount = proc.Mount(0, "/docker", str(directory), "cgroup2", "rw")
    monkeypatch.setattr(cgroups, "read_mounts", lambda: [mount])
    monkeypatch.setattr(cgroups, "hierarchies", lambda pid: iter([(frozenset[str](), "/docker/group/deep")]))
    found = cgroups.directories("memory")
    assert found == [inside, inside.parent, directory]
    assert [cgroups.read_bytes(path / "memory.max") for path in found] == [None, 1 << 20, None]
    assert cgroups.read_text(inside / "memory.max") == "max"
    assert cgroups.directories("pids") == []
    # A group outside of what is mounted.
    monkeypatch.setattr(cgroups, "hierarchies", lambda pid: iter([(frozenset[str](), "/elsewhere")]))
    assert cgroups.directories("memory") == []


# --- sysfs ------------------------------------------------------------------------------------------------------------


def test_hugetlb_pool(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(3)
    before = hugetlb.read_pool(HUGE)
    assert (before.page_size, before.available) == (HUGE, 3)
    assert hugetlb.resize_pool(HUGE, before.total - 1) == before.total - 1
    with Region(2, flags=mman.MAP_HUGETLB, page_size=HUGE) as region:
        reserved = hugetlb.read_pool(HUGE)
        assert (reserved.free, reserved.reserved, reserved.available) == (before.free - 1, before.reserved + 2, 0)
        region.fill(0, b"x")
        used = hugetlb.read_pool(HUGE)
        assert (used.free, used.reserved, used.available) == (before.free - 2, before.reserved + 1, 0)
    assert hugetlb.read_pool(HUGE).available == 2


def test_hugetlb_sizes() -> None:
    sizes = hugetlb.page_sizes()
    assert sizes == sorted(sizes)
    assert all(size & (size - 1) == 0 and size > PAGE for size in sizes)
    for size in sizes:
        assert hugetlb.read_pool(size).free <= hugetlb.read_pool(size).total
    with pytest.raises(FileNotFoundError):
        hugetlb.read_pool(3 << 20)


def test_hugetlb_without_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugetlb, "_POOLS", tmp_path / "missing")
    assert hugetlb.page_sizes() == []


def test_thp_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Path("/sys/kernel/mm/transparent_hugepage")
    if not settings.is_dir():
        assert thp.read_setting("enabled") is None
        assert thp.pmd_size() is None
        needs.missing("this kernel has no transparent huge pages")
    for name in ("enabled", "defrag", "shmem_enabled"):
        chosen = thp.read_setting(name)
        assert chosen is not None
        assert f"[{chosen}]" in (settings / name).read_text()
    assert thp.pmd_size() == int((settings / "hpage_pmd_size").read_text())
    assert thp.read_setting("no-such-setting") is None
    monkeypatch.setattr(thp, "_SETTINGS", tmp_path)
    assert thp.pmd_size() is None
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert thp.read_setting("enabled") == "madvise"


# --- what calls must not do -------------------------------------------------------------------------------------------


def test_declarations_do_not_change_each_other() -> None:
    """Many calls go through one syscall(2): an argument list of one must not be used for another."""
    fd = memfd.memfd_create("x")
    os.ftruncate(fd, PAGE)
    with Region(1) as region:
        for _ in range(2):
            futex.futex_add_zero(region.address)
            if capabilities.CACHESTAT.available:
                cachestat.cachestat(fd)
            with pytest.raises(OSError, match=r"^\[Errno 9\] process_madvise: "):
                mman.process_madvise(-1, [(region.address, PAGE)], mman.MADV_COLD)
    os.close(fd)


def test_the_page_size_is_the_systems() -> None:
    assert PAGE == os.sysconf("SC_PAGE_SIZE") == python_mmap.PAGESIZE
    assert re.search(rf"KernelPageSize:\s+{PAGE // 1024} kB", Path("/proc/self/smaps").read_text())
