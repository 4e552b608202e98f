"""Warming a running process: pages that come in, and those that must not; limits, races and refusals."""

from __future__ import annotations

import contextlib
import os
import random
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from prefault import processes
from prefault._kernel import mman
from prefault._system import capabilities, proc
from prefault.processes import MappingStatus, ProcessWarmResult, SkippedMapping
from prefault.processes.missing_pages import MissingPages
from prefault.processes.other_process import OtherProcess
from prefault.ranges import RangeSet
from prefault.testing import without
from support import needs, oracle
from support.cgroups import groups
from support.children import in_child
from support.machine_lock import MachineLock
from support.mapped_process import MappedProcess

_PAGE = oracle.PAGE
_MIB = 1 << 20
_SHARED = 0x21


@pytest.fixture
def other() -> Iterator[MappedProcess]:
    with MappedProcess() as process:
        yield process


@pytest.fixture
def swap(tmp_path: Path, machine_lock: MachineLock) -> Iterator[None]:
    """Swap space of 64 MiB, for the length of a test."""
    needs.root("add swap space")
    machine_lock.be_alone()
    file = tmp_path / "swap"
    with open(file, "wb") as space:
        os.posix_fallocate(space.fileno(), 0, 64 * _MIB)
    file.chmod(0o600)
    for command in ("mkswap", "swapon"):
        done = subprocess.run([command, file], capture_output=True, text=True, timeout=60)
        if done.returncode:
            needs.missing(f"no swap space can be added: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", file], check=True, timeout=60)


def _file(path: Path, length: int) -> Path:
    path.write_bytes(random.Random(5).randbytes(length))
    return path


def _map_file(other: MappedProcess, path: Path, length: int, flags: int = 2, prot: int = 1) -> int:
    other.do(f"fd = os.open({str(path)!r}, os.O_RDWR)")
    start: int = other.do(f"answer = mapped({length}, prot={prot}, flags={flags}, fd=fd)")
    return start


def _evict(other: MappedProcess, start: int, length: int) -> None:
    """Have the kernel take the pages away from the process (MADV_PAGEOUT), where it lets us (CAP_SYS_NICE)."""
    pidfd = os.pidfd_open(other.pid)
    try:
        with contextlib.suppress(PermissionError):
            mman.process_madvise(pidfd, [(start, length)], mman.MADV_PAGEOUT)
    finally:
        os.close(pidfd)


def _as_another_user(pid: int) -> ProcessWarmResult:
    os.setuid(65534)
    return processes.warm(pid)


def _reason(result: ProcessWarmResult, address: int) -> SkippedMapping:
    (found,) = (one for one in result.skipped if one.mapping.start <= address < one.mapping.stop)
    return found


@pytest.mark.parametrize("lacking", [(), ("pagemap_scan",)])
@pytest.mark.parametrize("flags", [1, 2], ids=["shared", "private"])
@pytest.mark.parametrize("advice", [mman.MADV_NORMAL, mman.MADV_RANDOM])
def test_a_file_comes_in(other: MappedProcess, tmp_path: Path, flags: int, lacking: tuple[str, ...], advice: int) -> None:
    path = _file(tmp_path / "data", 8 * _MIB)
    start = _map_file(other, path, 8 * _MIB, flags)
    other.do(f"checked(libc.madvise({start}, {8 * _MIB}, {advice}))")
    _evict(other, start, 8 * _MIB)
    before = oracle.present_bytes(start, 8 * _MIB, other.pid)
    assert before < 8 * _MIB
    told: list[tuple[int, int]] = []
    with without(*lacking):
        result = processes.warm(other.pid, "data", progress=lambda done, total: told.append((done, total)))
    assert oracle.present_bytes(start, 8 * _MIB, other.pid) == 8 * _MIB
    assert result.bytes == result.wanted_bytes == 8 * _MIB - before
    assert result.complete
    assert (result.mappings, result.stopped, result.skipped) == (1, "", ())
    assert told[-1] == (result.bytes, result.bytes)
    assert "8.0 MiB" in str(result) or before


def test_without_permission_for_advice_the_pages_come_in_as_well(other: MappedProcess, tmp_path: Path) -> None:
    needs.root("become another user")
    start = _map_file(other, _file(tmp_path / "data", _MIB), _MIB)
    other.do(f"checked(libc.madvise({start}, {_MIB}, {mman.MADV_RANDOM}))")
    other.become(65534)
    result = in_child(lambda: _as_another_user(other.pid))
    assert not any(one.failed for one in result.skipped)
    assert oracle.present_bytes(start, _MIB, other.pid) == _MIB


def test_pages_of_holes_and_beyond_the_end_stay_out(other: MappedProcess, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 16 * 4)  # four pages
        file.seek(32 * _PAGE)
        file.write(b"x")
    start = _map_file(other, path, 64 * _PAGE, flags=1)
    result = processes.warm(other.pid, str(path))
    there = oracle.present(start, 64 * _PAGE, other.pid)
    assert all(there[:4])
    assert there[32]
    assert not any(there[33:])
    assert result.complete
    assert processes.warm(other.pid, str(path), untouched=True).complete
    assert oracle.present(start, 64 * _PAGE, other.pid) == [True] * 33 + [False] * 31


def test_holes_of_shared_memory_are_not_filled(other: MappedProcess) -> None:
    needs.root("open the memfd of another process")
    start = other.do(f"fd = os.memfd_create('holes'); os.ftruncate(fd, {64 * _PAGE})\n"
                     f"answer = mapped({64 * _PAGE}, flags=1, fd=fd)")  # fmt: skip
    other.do(f"os.pwrite(fd, b'x', {5 * _PAGE}); os.pwrite(fd, b'x', {9 * _PAGE})")
    blocks = other.do("answer = os.fstat(fd).st_blocks")
    result = processes.warm(other.pid, "memfd:holes (deleted)")
    assert result.bytes == 2 * _PAGE
    there = oracle.present(start, 64 * _PAGE, other.pid)
    assert [page for page, present in enumerate(there) if present] == [5, 9]
    assert other.do("answer = os.fstat(fd).st_blocks") == blocks
    assert processes.warm(other.pid, "*holes*", untouched=True).bytes == 62 * _PAGE


def test_shared_memory_that_cannot_be_opened_is_named(other: MappedProcess) -> None:
    needs.root("become another user")
    start = other.map(16 * _PAGE, flags=_SHARED)
    other.become(65534)
    found = _reason(in_child(lambda: _as_another_user(other.pid)), start)
    assert "CAP_CHECKPOINT_RESTORE" in found.reason
    assert not found.failed
    assert oracle.present_bytes(start, 16 * _PAGE, other.pid) == 0


def test_untouched_memory_stays_untouched(other: MappedProcess) -> None:
    start = other.map(32 * _PAGE)
    processes.warm(other.pid, "[anonymous]")
    assert oracle.present_bytes(start, 32 * _PAGE, other.pid) == 0
    processes.warm(other.pid, "[anonymous]", untouched=True)
    assert oracle.present_bytes(start, 32 * _PAGE, other.pid) == 32 * _PAGE


@pytest.mark.alone
@pytest.mark.parametrize("flags", [0x22, _SHARED], ids=["private", "shared"])
def test_swapped_pages_come_back(other: MappedProcess, swap: None, flags: int) -> None:
    start = other.map(16 * _MIB, flags=flags)
    other.do(f"for page in range(4096): store({start} + page * {_PAGE}, page % 251)")
    _evict(other, start, 16 * _MIB)
    (before,) = (one for one in processes.status(other.pid).mappings if one.start <= start < one.stop)
    if before.swapped_bytes < 8 * _MIB:
        needs.missing("the kernel did not swap the pages out")
    result = processes.warm(other.pid)
    assert result.bytes >= before.swapped_bytes
    (after,) = (one for one in processes.status(other.pid).mappings if one.start <= start < one.stop)
    assert after.swapped_bytes == 0
    assert oracle.present_bytes(start, 16 * _MIB, other.pid) == 16 * _MIB
    assert other.do(f"answer = [load({start} + page * {_PAGE}) for page in range(4096)]") == [
        page % 251 for page in range(4096)
    ]


def test_swapped_pages_that_a_fork_shares_stay_one_copy(other: MappedProcess, swap: None) -> None:
    length = 4 * _MIB
    start = other.map(length)
    other.do(f"for at in range({start}, {start} + {length}, {_PAGE}): store(at)")
    for _ in range(50):  # pages that just came wait in lists of each CPU, where the kernel does not look for them
        _evict(other, start, length)
        if not oracle.present_bytes(start, length, other.pid):
            break
    else:
        needs.missing("the kernel swaps nothing out at our word")
    child = other.do("r, w = os.pipe(); answer = os.fork()\nif answer == 0: os.close(w); os.read(r, 1); os._exit(0)")
    for pid in (other.pid, child):
        result = processes.warm(pid, "[anonymous]")
        assert result.complete
        assert oracle.present_bytes(start, length, pid) == length
    shared = re.search(rb"%x-.*?^Pss: +(\d+) kB" % start, Path(f"/proc/{child}/smaps").read_bytes(), re.S | re.M)
    assert shared is not None
    assert int(shared[1]) * 1024 == length // 2  # the proportional share of one copy
    other.do(f"os.close(w); os.waitpid({child}, 0)")


def test_huge_pages_of_a_shared_file_are_not_guessed(other: MappedProcess, hugetlb_pool: Any) -> None:
    hugetlb_pool(2)
    start = other.map(2 << 21, flags=0x40021)  # MAP_HUGETLB | MAP_ANONYMOUS | MAP_SHARED
    assert "which huge pages of a shared file exist" in _reason(processes.warm(other.pid), start).reason
    other.do(f"store({start}); store({start} + (1 << 21))")
    assert not [one for one in processes.warm(other.pid).skipped if one.mapping.start == start]


def test_present_pages_are_not_read(other: MappedProcess) -> None:
    """A page that a fork shares would be copied by the read (the kernel un-shares what it pins)."""
    needs.page_frames()
    start = other.map(16 * _PAGE)
    other.do(f"for page in range(16): store({start} + page * {_PAGE})")
    child = other.do("r, w = os.pipe()\nanswer = os.fork()\nif not answer: os.close(w); os.read(r, 1); os._exit(0)")
    frames = [entry & ((1 << 55) - 1) for entry in oracle.entries(start, 16 * _PAGE, other.pid)]
    processes.warm(other.pid, untouched=True)
    assert [entry & ((1 << 55) - 1) for entry in oracle.entries(start, 16 * _PAGE, other.pid)] == frames
    other.do(f"os.close(w); os.waitpid({child}, 0)")


def test_special_and_forbidden_mappings_are_named(other: MappedProcess) -> None:
    forbidden = other.map(4 * _PAGE, prot=0)
    result = processes.warm(other.pid, untouched=True, budget=0)
    assert "may not read it either (---p)" in _reason(result, forbidden).reason
    reasons = {one.mapping.name: one.reason for one in result.skipped}
    assert reasons["[vvar]"] == "special memory of the kernel"
    assert not any(one.failed for one in result.skipped)


def test_memory_of_a_device_is_never_read(other: MappedProcess) -> None:
    """The ring of a packet socket, of which the page tables were dropped: only the socket could fill them again."""
    needs.root("map the ring of a packet socket")
    start = other.do(
        "import socket, struct\n"
        "ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n"
        f"ring.setsockopt(263, 5, struct.pack('4I', {4 * _PAGE}, 2, {_PAGE}, 8))\n"  # SOL_PACKET, PACKET_RX_RING
        f"answer = mapped({8 * _PAGE}, prot=3, flags=1, fd=ring.fileno())\n"
        f"checked(libc.madvise(answer, {8 * _PAGE}, 4))"
    )
    assert oracle.present_bytes(start, 8 * _PAGE, other.pid) == 0
    for untouched in (False, True):
        result = processes.warm(other.pid, "socket:*", untouched=untouched)
        assert "memory of a device" in _reason(result, start).reason
        assert not _reason(result, start).failed
        assert result.wanted_bytes == 0


def test_a_device_is_not_opened(other: MappedProcess, tmp_path: Path) -> None:
    """The path of a mapped file is a device by now, with the same inode number: a node that no driver answers for."""
    needs.root("make a device node")
    node = tmp_path / "node"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(240, 0))
    with OtherProcess(other.pid) as process:
        mapping = MappingStatus(
            1 << 20, 2 << 20, str(node), "r--s", 0, 0, 0, 0, 0, RangeSet(), _PAGE, 0, node.stat().st_dev,
            node.stat().st_ino, frozenset(),
        )  # fmt: skip
        found = MissingPages(process, untouched=True).of(mapping, RangeSet(), RangeSet())
        assert "memory of a device" in found.reason


def test_private_memory_of_dev_zero_is_anonymous_by_any_name(other: MappedProcess, tmp_path: Path) -> None:
    needs.root("make a device node")
    node = tmp_path / "zero"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    start = _map_file(other, node, 8 * _PAGE, prot=3)
    assert processes.warm(other.pid, str(node)).bytes == 0
    assert processes.warm(other.pid, str(node), untouched=True).bytes == 8 * _PAGE
    assert oracle.present_bytes(start, 8 * _PAGE, other.pid) == 8 * _PAGE


def test_a_mapped_block_device(other: MappedProcess, tmp_path: Path) -> None:
    needs.root("make a loop device")
    image = _file(tmp_path / "disk", _MIB)
    done = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, timeout=30)
    if done.returncode:
        needs.missing(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        start = _map_file(other, Path(device), _MIB, flags=1)
        result = processes.warm(other.pid, device)
        assert result.complete, result
        assert oracle.present_bytes(start, _MIB, other.pid) == _MIB
        other.do(f"libc.munmap({start}, {_MIB}); os.close(fd)")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=30)


def test_guard_regions_are_left_out(other: MappedProcess) -> None:
    """As glibc 2.42 lays them under the stack of each thread."""
    needs.capability(capabilities.PAGE_IS_GUARD)
    start = other.map(64 * _PAGE)
    other.do(f"checked(libc.madvise({start}, {16 * _PAGE}, {mman.MADV_GUARD_INSTALL}))")
    for lacking in ((), ("pagemap_scan",)):
        with without(*lacking):
            result = processes.warm(other.pid, "[anonymous]", untouched=True)
        assert result.complete, result.skipped
    assert oracle.present_bytes(start + 16 * _PAGE, 48 * _PAGE, other.pid) == 48 * _PAGE
    assert oracle.present_bytes(start, 16 * _PAGE, other.pid) == 0


_UNSHARE = """
libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
checked(libc.unshare(0x20000))  # CLONE_NEWNS
checked(libc.mount(None, b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
checked(libc.mount(b"none", b"/mnt", b"tmpfs", 0, None))
with open("/mnt/sparse", "wb") as file: file.write(bytes(4 * 4096)); file.truncate(64 * 4096)
"""


@pytest.mark.parametrize("user", [0, 65534])
def test_a_file_of_another_mount_namespace(other: MappedProcess, user: int) -> None:
    """As in a container: it is on a tmpfs that only the process sees. Its holes stay holes, and its cgroup is asked."""
    needs.root("make a mount namespace")
    with groups() as make:
        group = make(24 * _MIB)
        (group.directory / "cgroup.procs").write_text(str(other.pid))
        try:
            other.do(_UNSHARE)
            start = _map_file(other, Path("/mnt/sparse"), 64 * _PAGE, flags=1)
            other.do("os.truncate('/mnt/sparse', 64 << 20)")
            large = other.do(f"answer = mapped({64 * _MIB}, prot=1, flags=1, fd=fd)")
            if user:
                other.become(user)
                assert in_child(lambda: _as_another_user(other.pid)).complete
            else:
                assert processes.warm(other.pid).complete
            assert sum(oracle.present(start, 64 * _PAGE, other.pid)) == 4
            if not user:
                result = processes.warm(other.pid, "sparse", untouched=True)
                assert str(group.directory) in result.stopped
                assert oracle.present_bytes(large, 64 * _MIB, other.pid) < 24 * _MIB
            assert group.killed == 0
        finally:
            other.kill()


def test_memory_of_a_fault_handler_is_left_to_it(other: MappedProcess) -> None:
    start = other.map(16 * _PAGE)
    number = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine)
    registered = number is not None and other.do(
        f"uffd = libc.syscall({number}, 0x80001)\n"
        "import fcntl, struct\n"
        "api = bytearray(struct.pack('QQQ', 0xaa, 0, 0))\n"
        f"reg = bytearray(struct.pack('QQQQ', {start}, {16 * _PAGE}, 1, 0))\n"
        "answer = uffd >= 0\n"
        "if answer: fcntl.ioctl(uffd, 0xc018aa3f, api); fcntl.ioctl(uffd, 0xc020aa00, reg)"
    )
    if not registered:
        needs.missing("userfaultfd is not available")
    result = processes.warm(other.pid, untouched=True)
    assert "userfaultfd" in _reason(result, start).reason
    assert oracle.present_bytes(start, 16 * _PAGE, other.pid) == 0


def test_a_budget_ends_it(other: MappedProcess) -> None:
    start = other.map(4 * _MIB)
    result = processes.warm(other.pid, "[anonymous]", untouched=True, budget="1 MiB")
    assert result.bytes <= _MIB
    assert result.stopped == "the budget of 1.0 MiB is used up"
    assert not result.complete
    assert oracle.present_bytes(start, 4 * _MIB, other.pid) <= _MIB
    assert processes.warm(other.pid, "[anonymous]", untouched=True, budget=0).bytes == 0


def test_the_limit_of_its_cgroup_stops_it_before_the_killer_comes(other: MappedProcess) -> None:
    with groups() as make:
        group = make(24 * _MIB)
        (group.directory / "cgroup.procs").write_text(str(other.pid))
        start = other.map(64 * _MIB, flags=_SHARED)
        try:
            result = processes.warm(other.pid, untouched=True)
            assert "memory.limit_in_bytes" in result.stopped
            assert str(group.directory) in result.stopped
            assert 4 * _MIB < oracle.present_bytes(start, 64 * _MIB, other.pid) < 24 * _MIB
            assert group.killed == 0
        finally:
            other.kill()


def test_a_rate_is_kept(other: MappedProcess, tmp_path: Path) -> None:
    start = other.map(2 * _MIB)
    result = processes.warm(other.pid, "[anonymous]", untouched=True, rate="8 MiB/s")
    assert result.seconds >= 0.1  # the limit is a lower bound of the time, whatever else runs
    assert oracle.present_bytes(start, 2 * _MIB, other.pid) == 2 * _MIB


def test_ctrl_c_ends_it(other: MappedProcess, no_leaks: None) -> None:
    start = other.map(16 * _MIB)

    def strike(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.warm(other.pid, untouched=True, progress=strike)
    assert oracle.present_bytes(start, 16 * _MIB, other.pid) < 16 * _MIB


def test_a_mapping_that_vanishes_meanwhile(other: MappedProcess) -> None:
    start = other.map(16 * _MIB)

    def unmap(done: int, total: int) -> None:
        other.do(f"libc.munmap({start}, {16 * _MIB})")

    result = processes.warm(other.pid, "[anonymous]", untouched=True, progress=unmap)
    found = _reason(result, start)
    assert found.reason == "it was unmapped meanwhile"
    assert found.failed
    assert not result.complete


def test_thousands_of_mappings_that_vanish_meanwhile(other: MappedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of mappings is read again once, and not for each of them."""
    start = other.do(
        f"answer = mapped({4000 * _PAGE})\nfor at in range(0, 4000, 2): libc.mprotect(answer + at * {_PAGE}, {_PAGE}, 1)"
    )
    reading: list[int | str] = []
    read = proc.read_maps
    monkeypatch.setattr(proc, "read_maps", lambda pid: reading.append(pid) or read(pid))  # type: ignore[func-returns-value]

    def unmap(done: int, total: int) -> None:
        if not reading:
            other.do(f"libc.munmap({start}, {4000 * _PAGE})")

    result = processes.warm(other.pid, "[anonymous]", untouched=True, progress=unmap)
    gone = [one for one in result.skipped if one.reason == "it was unmapped meanwhile"]
    assert len(gone) > 3000
    assert len(reading) < 20


def test_a_process_that_ends_meanwhile(other: MappedProcess) -> None:
    other.map(16 * _MIB)
    with pytest.raises(ProcessLookupError, match=rf"process {other.pid} \(.*\) has ended meanwhile"):
        processes.warm(other.pid, untouched=True, progress=lambda done, total: other.kill())


def test_a_file_that_shrinks_meanwhile(other: MappedProcess, tmp_path: Path) -> None:
    path = _file(tmp_path / "data", 8 * _MIB)
    _map_file(other, path, 8 * _MIB, flags=1)
    result = processes.warm(other.pid, "data", untouched=True, progress=lambda done, total: os.truncate(path, _PAGE))
    assert result.bytes < result.wanted_bytes == 8 * _MIB
    (skipped,) = result.skipped
    assert "cannot be read" in skipped.reason
    assert skipped.failed


def test_seeded_changes_of_the_mappings_meanwhile(other: MappedProcess) -> None:
    """The process unmaps, protects and maps at random while it is warmed: no crash, no hang, and the sums agree."""
    random_numbers = random.Random(20261122)
    starts = [other.map(2 * _MIB) for _ in range(8)]

    def change(done: int, total: int) -> None:
        assert done <= total
        start = random_numbers.choice(starts) + random_numbers.randrange(256) * _PAGE
        length = random_numbers.randrange(1, 200) * _PAGE
        other.do(random_numbers.choice((
            f"libc.munmap({start}, {length})",
            f"libc.mprotect({start}, {length}, 0)",
            f"libc.mprotect({start}, {length}, 3)",
            f"libc.mmap({start}, {length}, 3, 0x32, -1, 0)",
        )))  # fmt: skip

    came = 0
    for _ in range(4):
        result = processes.warm(other.pid, "[anonymous]", untouched=True, progress=change)
        assert result.bytes <= result.wanted_bytes
        came += result.bytes
    assert came > 0


# --- what is refused


def test_this_process_itself() -> None:
    with pytest.raises(OSError, match=r"is this process itself: use prefault\.populate"):
        processes.warm(os.getpid())


def test_a_name_that_nothing_has(other: MappedProcess) -> None:
    with pytest.raises(ValueError, match="maps nothing of the name 'libnothing'"):
        processes.warm(other.pid, ["[heap]", "libnothing"])


def test_the_heap_is_a_name_and_no_pattern(other: MappedProcess) -> None:
    """``[heap]`` as a pattern would be one letter."""
    assert processes.warm(other.pid, "[heap]").complete


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda pid: processes.warm(cast("int", "x")), TypeError),
        (lambda pid: processes.warm(-3), ValueError),
        (lambda pid: processes.warm(pid, budget="much"), ValueError),
        (lambda pid: processes.warm(pid, rate=0), ValueError),
        (lambda pid: processes.warm(pid, progress=cast("bool", "yes")), TypeError),
    ],
)
def test_bad_arguments(other: MappedProcess, call: Callable[[int], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call(other.pid)
