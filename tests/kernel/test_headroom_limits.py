"""The limits for real: memory cgroups with the OOM killer behind them, a small tmpfs, huge pages, a small disk.

What would be killed runs in a child process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

import prefault
from prefault._kernel import mman
from prefault._system import hugetlb
from prefault.engine.methods import Access
from prefault.engine.scattered.advice_vector import AdviceVector
from prefault.errors import HeadroomError
from prefault.limits.memory_limits import memory_limits
from prefault.limits.target import headroom
from prefault.sizes import MIB, PAGE_SIZE
from support import needs, oracle
from support.cgroups import Group, leave
from support.children import Child, in_child
from support.regions import Region, file_of

HUGE = needs.HUGE
LIMIT = 64 * MIB

Make = Callable[..., Group]


class Refusal(NamedTuple):
    """A HeadroomError, as a child process reports it."""

    text: str
    limit: str
    needed: int
    available: int
    offset: int
    populated: int
    present: int
    """Bytes of the memory that are present after the call."""


def refusal(memory: Any, address: int, size: int, /, **options: Any) -> Refusal | None:
    """Populate memory; return the refusal, None if it is populated."""
    try:
        prefault.populate(memory, **options)
    except HeadroomError as error:
        leave()
        present = oracle.present_bytes(address, size)
        return Refusal(
            str(error), error.limit, error.needed_bytes, error.available_bytes, error.offset, error.populated_bytes, present
        )  # fmt: skip
    return None


def populated(size: int, **options: Any) -> Refusal | None:
    """Map memory of base pages and populate it."""
    backing = options.pop("backing", "anonymous")
    shared = options.pop("shared", None)
    with prefault.Mapping(size, backing=backing, shared=shared, huge="never") as mapping:
        found = refusal(mapping, mapping.range.start, size, **options)
        if found is None:
            assert oracle.present_bytes(mapping.range.start, size) == size
        return found


def touch(address: int, length: int) -> None:
    """Write to every page from user space."""
    with contextlib.suppress(BufferError):
        import numpy

        from support.regions import Span

        numpy.asarray(Span(address, length))[::PAGE_SIZE] = 1


def is_killed(function: Callable[[], object]) -> bool:
    """Return whether a child that runs the function dies of SIGKILL."""
    try:
        in_child(function)
    except AssertionError as error:
        if "died: -9" in str(error):
            return True
        raise
    return False


# --- memory cgroups ---------------------------------------------------------------------------------------------------

KINDS = [
    pytest.param({}, id="private"),
    pytest.param({"shared": True}, id="shared"),
    pytest.param({"backing": "memfd"}, id="memfd"),
    pytest.param({"backing": "memfd", "shared": False, "access": "read"}, id="private-memfd-read"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_naive_touch_is_killed_and_populate_raises(kind: dict[str, Any], make_group: Make) -> None:
    group = make_group(LIMIT)
    mapped = {key: value for key, value in kind.items() if key != "access"}

    def naive() -> None:
        with prefault.Mapping(2 * LIMIT, huge="never", **mapped) as mapping:
            touch(mapping.range.start, 2 * LIMIT)

    assert is_killed(group.inside(naive))
    assert group.killed == 1
    found = in_child(group.inside(lambda: populated(2 * LIMIT, **kind)))
    assert found is not None
    assert found.limit == f"memory.limit_in_bytes of {group.directory}"
    assert 2 * LIMIT <= found.needed < 2 * LIMIT + 2 * MIB
    assert LIMIT // 2 < found.available < LIMIT
    assert (found.offset, found.populated, found.present) == (0, 0, 0)
    assert "nothing was populated" in found.text
    assert f"write to {group.limit_file}" in found.text
    assert "128." in found.text
    assert group.killed == 1


def test_ignored_headroom_is_the_oom_killer_again(make_group: Make) -> None:
    group = make_group(LIMIT)
    assert is_killed(group.inside(lambda: populated(2 * LIMIT, headroom="ignore")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_nearly_all_of_a_cgroup_can_be_populated(kind: dict[str, Any], threads: int, make_group: Make) -> None:
    """No false refusal: the rest is the interpreter's share, page tables and the reserve."""
    group = make_group(LIMIT)
    assert in_child(group.inside(lambda: populated(LIMIT - 10 * MIB, threads=threads, **kind))) is None
    assert group.killed == 0


def test_small_calls_until_nothing_is_left(make_group: Make) -> None:
    """Page by page, 256 KiB, 4 MiB: refused in time, whatever a small call remembers of earlier answers."""
    group = make_group(LIMIT)

    def fill(step: int) -> int:
        with prefault.Mapping(2 * LIMIT, huge="never") as mapping:
            for offset in range(0, 2 * LIMIT, step):
                found = refusal(mapping, mapping.range.start, 2 * LIMIT, offset=offset, length=step)
                if found is not None:
                    assert (found.offset, found.populated, found.present) == (offset, 0, offset)
                    return offset
        raise AssertionError("never refused")

    for step in (PAGE_SIZE, 256 << 10, 4 * MIB):
        assert in_child(group.inside(lambda step=step: fill(step))) > LIMIT - 12 * MIB  # type: ignore[misc]
    assert group.killed == 0


def test_populated_memory_is_never_refused(make_group: Make) -> None:
    """Not private memory, not shared memory that is in its file, not a file in the page cache."""
    group = make_group(8 * LIMIT)

    def again() -> list[object]:
        with (
            prefault.Mapping(LIMIT, huge="never") as private,
            prefault.Mapping(LIMIT, backing="memfd", huge="never") as shared,
            prefault.Mapping(LIMIT, backing="memfd", huge="never") as allocated,
        ):
            prefault.populate(private)
            prefault.populate(shared)
            assert allocated.fd is not None
            os.posix_fallocate(allocated.fd, 0, LIMIT)  # in the file, and in no page table
            group.limit(group.usage + 6 * MIB)
            assert populated(16 * MIB) is not None
            group.enter()
            found: list[object] = []
            for mapping in (private, shared, allocated):
                found.append(refusal(mapping, mapping.range.start, LIMIT))
                found.append(refusal(mapping, mapping.range.start, LIMIT, access="read"))
            leave()
            present = [oracle.present_bytes(mapping.range.start, LIMIT) for mapping in (private, shared, allocated)]
            return [*found, *present]

    assert in_child(group.inside(again)) == [None] * 6 + [LIMIT] * 3
    assert group.killed == 0


def test_reading_empty_memory_needs_page_tables_only(make_group: Make) -> None:
    group = make_group(8 * LIMIT)

    def read() -> object:
        group.limit(group.usage + 8 * MIB)
        assert populated(16 * MIB) is not None
        group.enter()
        with prefault.Mapping(16 * LIMIT, huge="never") as mapping:  # all of it the zero page, and 512 page tables
            return refusal(mapping, mapping.range.start, 16 * LIMIT, access="read")

    assert in_child(group.inside(read)) is None
    assert group.killed == 0


def test_page_tables_can_be_too_much_as_well(make_group: Make) -> None:
    """64 GiB of zero pages take 128 MiB of page tables: reading them is killed as well."""
    group = make_group(LIMIT)
    length = 1024 * LIMIT

    def read() -> Refusal | None:
        with prefault.Mapping(length, huge="never", noreserve=True) as mapping:
            try:
                prefault.populate(mapping, access="read", threads=1)
            except HeadroomError as error:
                return Refusal(str(error), error.limit, error.needed_bytes, error.available_bytes, 0, 0, 0)
            return None

    found = in_child(group.inside(read))
    assert found is not None
    assert length // 512 <= found.needed < length // 512 + MIB


def test_clean_page_cache_is_reclaimed_and_not_counted(make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    path = tmp_path / "cache"
    path.write_bytes(bytes(2 * LIMIT))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is charged to who reads it next

    def read_then_populate() -> tuple[int, Refusal | None]:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(MIB)
            while file.readinto(buffer):
                pass
        return LIMIT - group.usage, populated(40 * MIB)

    left, found = in_child(group.inside(read_then_populate))
    assert left < 20 * MIB
    assert found is None
    assert group.killed == 0


def test_shared_memory_of_others_is_not_reclaimable(make_group: Make) -> None:
    group = make_group(LIMIT)

    def fill_then_populate() -> tuple[int, Refusal | None]:
        fd = os.memfd_create("filler")
        os.posix_fallocate(fd, 0, 40 * MIB)
        return 40 * MIB, populated(24 * MIB)

    filled, found = in_child(group.inside(fill_then_populate))
    assert found is not None
    assert found.available < LIMIT - filled


def test_the_tighter_of_two_levels_counts(make_group: Make) -> None:
    outer = make_group(LIMIT)
    inner = make_group(4 * LIMIT, outer)

    def ask() -> tuple[Refusal | None, list[str]]:
        names = [limit.name for limit in memory_limits() if limit.limit_bytes <= 4 * LIMIT]
        return populated(2 * LIMIT), names

    found, names = in_child(inner.inside(ask))
    assert found is not None
    assert found.limit == f"memory.limit_in_bytes of {outer.directory}"
    assert names == [f"memory.limit_in_bytes of {group.directory}" for group in (inner, outer)]
    inner.limit(LIMIT // 2)
    found, _ = in_child(inner.inside(ask))
    assert found is not None
    assert found.limit == f"memory.limit_in_bytes of {inner.directory}"
    assert outer.killed == inner.killed == 0


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_limit_that_shrinks_meanwhile(rollback: bool, threads: int, make_group: Make) -> None:
    group = make_group(8 * LIMIT)
    length = 4 * LIMIT

    def populate() -> tuple[Refusal | None, int, int]:
        def shrink(done: int, total: int) -> None:
            if done >= LIMIT and int(group.limit_file.read_text()) == 8 * LIMIT:
                group.limit(group.usage + 24 * threads * MIB)  # more than the chunk that a helper has under way

        with prefault.Mapping(length, huge="never") as mapping:
            before = group.usage
            options = {"rollback": rollback, "threads": threads, "progress": shrink}
            found = refusal(mapping, mapping.range.start, length, **options)
            return found, before, group.usage

    found, before, after = in_child(group.inside(populate))
    assert found is not None
    assert found.limit == f"memory.limit_in_bytes of {group.directory}"
    assert LIMIT <= found.offset < length
    assert found.needed > found.available
    assert found.populated == found.present
    assert f"stopped at offset {found.offset}" in found.text
    if rollback:
        assert found.populated == 0
        assert after < before + 4 * MIB
    else:
        assert found.populated >= found.offset
    assert group.killed == 0


def test_a_neighbour_that_takes_the_memory_meanwhile(make_group: Make) -> None:
    group = make_group(4 * LIMIT)
    go, gone, taken, took = (*os.pipe(), *os.pipe())

    def neighbour() -> None:
        os.read(go, 1)
        with prefault.Mapping(2 * LIMIT, huge="never") as mapping:
            touch(mapping.range.start, 2 * LIMIT)
            os.write(took, b"x")
            os.read(go, 1)

    def populate() -> Refusal | None:
        asked = threading.Event()

        def report(done: int, total: int) -> None:
            if done >= LIMIT and not asked.is_set():
                asked.set()
                os.write(gone, b"x")
                os.read(taken, 1)

        with prefault.Mapping(3 * LIMIT, huge="never") as mapping:
            return refusal(mapping, mapping.range.start, 3 * LIMIT, progress=report, threads=1)

    try:
        with Child(group.inside(neighbour)), Child(group.inside(populate)) as child:
            found = child.result()
    finally:
        for fd in (go, gone, taken, took):
            os.close(fd)
    assert found is not None
    assert LIMIT <= found.populated < 2 * LIMIT
    assert found.populated == found.offset == found.present
    assert group.killed == 0


def test_pages_that_a_fork_shares_are_counted(make_group: Make) -> None:
    """Shared pages are present in the child, and writing to them copies them."""
    group = make_group(LIMIT)
    length = 2 * LIMIT
    with prefault.Mapping(length, huge="never") as mapping:
        prefault.populate(mapping)
        address = mapping.range.start
        assert is_killed(group.inside(lambda: touch(address, length)))
        found = in_child(group.inside(lambda: refusal(mapping, address, length)))
        assert found is not None
        assert length <= found.needed < length + MIB
        assert group.killed == 1
        assert prefault.populate(mapping).bytes == 0


def test_a_process_that_is_moved_sees_its_new_limit(make_group: Make) -> None:
    large, small = make_group(8 * LIMIT), make_group(LIMIT)

    def move() -> tuple[object, Refusal | None]:
        first = populated(2 * LIMIT)
        small.enter()
        return first, populated(2 * LIMIT)

    first, second = in_child(large.inside(move))
    assert first is None
    assert second is not None
    assert second.limit == f"memory.limit_in_bytes of {small.directory}"


def test_memory_that_the_kernel_refuses_anyway_is_not_counted(make_group: Make) -> None:
    group = make_group(LIMIT)

    def populate() -> str:
        with Region(2 * LIMIT // PAGE_SIZE, mman.PROT_NONE) as region:
            try:
                prefault.populate(region, access="write")
            except prefault.PopulateError as error:
                return type(error).__name__
        return ""

    assert in_child(group.inside(populate)) == "ProtectionError"


# --- tmpfs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("with_descriptor", [True, False])
def test_a_tmpfs_of_64_mib(access: Access, with_descriptor: bool, small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("64m")
    with file_of(directory, 128 * MIB) as (fd, path):
        os.posix_fallocate(fd, 0, 16 * MIB)
        mapped: Any
        with contextlib.ExitStack() as stack:
            if with_descriptor:
                mapped = stack.enter_context(prefault.Mapping(backing=prefault.File(path)))
                address = mapped.range.start
            else:
                mapped = stack.enter_context(Region(128 * MIB // PAGE_SIZE, fd=fd, shared=True))
                address = mapped.address
            found = refusal(mapped, address, 128 * MIB, access=access)
            assert found is not None
            assert (found.limit, found.needed) == (f"tmpfs space of {directory}", 112 * MIB)
            assert (found.available, found.populated, found.present) == (48 * MIB, 0, 0)
            assert os.fstat(fd).st_blocks * 512 == 16 * MIB
            # 64 MiB of it fit exactly: 16 are there.
            assert refusal(mapped, address, 128 * MIB, access=access, length=64 * MIB) is None
            assert refusal(mapped, address, 128 * MIB, access=access, length=64 * MIB) is None
            with pytest.raises(prefault.BackingFullError):
                prefault.populate(mapped, access=access, headroom="ignore")
            assert headroom(mapped).tightest is not None
            assert headroom(mapped).available_bytes == 0


# --- huge pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
def test_an_empty_pool(backing: str, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(0)
    with prefault.Mapping(2 * HUGE, backing=backing, noreserve=True) as mapping:
        found = refusal(mapping, mapping.range.start, 2 * HUGE)
        assert found is not None
        assert (found.limit, found.needed, found.available) == ("hugetlb pool of 2.0 MiB pages", 2 * HUGE, 0)
        assert found.present == 0
        assert "nr_hugepages" in found.text
        with pytest.raises(prefault.BackingFullError):
            prefault.populate(mapping, headroom="ignore")


@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
def test_reserved_pages_belong_to_the_mapping_that_reserved_them(backing: str, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(3)
    with (
        prefault.Mapping(2 * HUGE, backing=backing) as owner,
        prefault.Mapping(2 * HUGE, backing=backing, noreserve=True) as other,
    ):
        assert hugetlb.read_pool(HUGE).reserved == 2
        found = refusal(other, other.range.start, 2 * HUGE)
        assert found is not None
        assert (found.needed, found.available) == (2 * HUGE, HUGE)
        pool = next(limit for limit in headroom(other).limits if limit.name == found.limit)
        assert (pool.applies, pool.available_bytes) == (True, HUGE)
        assert not any(limit.applies for limit in headroom(owner).limits)
        assert prefault.populate(other, length=HUGE).bytes == HUGE
        assert prefault.populate(owner).bytes == 2 * HUGE  # the pool has nothing left for others


def test_huge_pages_that_the_file_has_are_not_taken_again(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with prefault.Mapping(2 * HUGE, backing="memfd-hugetlb", noreserve=True) as first:
        assert prefault.populate(first).bytes == 2 * HUGE
        assert first.fd is not None
        flags = mman.MAP_NORESERVE
        with Region(2, fd=first.fd, shared=True, flags=flags, page_size=HUGE) as second:
            assert hugetlb.read_pool(HUGE).available == 0
            for access in ("read", "write"):
                assert refusal(second, second.address, 2 * HUGE, access=access) is None


@pytest.fixture
def hugetlb_cgroup() -> Iterator[Path]:
    """A cgroup (v2) with the hugetlb controller."""
    needs.root("make a cgroup")
    mounts = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]
    if not mounts or "hugetlb" not in (mounts[0] / "cgroup.controllers").read_text().split():
        needs.missing("cgroup v2 has no hugetlb controller here")
    control = mounts[0] / "cgroup.subtree_control"
    enabled = "hugetlb" in control.read_text().split()
    if not enabled:
        control.write_text("+hugetlb")
    directory = mounts[0] / f"prefault-test-{os.getpid()}"
    directory.mkdir()
    try:
        yield directory
    finally:
        directory.rmdir()
        if not enabled:
            control.write_text("-hugetlb")


def test_a_hugetlb_cgroup(hugetlb_cgroup: Path, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(4)
    (hugetlb_cgroup / "hugetlb.2MB.max").write_text(str(2 * HUGE))

    def populate() -> tuple[Refusal | None, int]:
        (hugetlb_cgroup / "cgroup.procs").write_text(str(os.getpid()))
        with prefault.Mapping(4 * HUGE, backing="hugetlb") as mapping:
            found = refusal(mapping, mapping.range.start, 4 * HUGE)
            fits = prefault.populate(mapping, length=2 * HUGE).bytes
            with pytest.raises(prefault.BackingFullError):
                prefault.populate(mapping, headroom="ignore")
            return found, fits

    found, fits = in_child(populate)
    assert found is not None
    assert (found.limit, found.needed, found.available) == (f"hugetlb.2MB.max of {hugetlb_cgroup}", 4 * HUGE, 2 * HUGE)
    assert fits == 2 * HUGE


# --- a disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 32 MiB on a loop device."""
    needs.root("mount a file system")
    image, directory = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    directory.mkdir()
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if mkfs is None:
        needs.missing("mkfs.ext4 is not installed")
    made = subprocess.run([mkfs, "-q", "-m", "0", image], capture_output=True, text=True)
    done = made.returncode or subprocess.run(["mount", "-o", "loop", image, directory], capture_output=True).returncode
    if done:
        needs.missing("no file system can be made and mounted on a loop device")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def test_holes_need_disk_space_and_blocks_do_not(small_disk: Path) -> None:
    with file_of(small_disk, 64 * MIB) as (fd, path):
        os.posix_fallocate(fd, 4 * MIB, 4 * MIB)
        space = os.statvfs(small_disk)
        with prefault.Mapping(backing=prefault.File(path)) as mapping:
            found = refusal(mapping, mapping.range.start, 64 * MIB)
            assert found is not None
            assert (found.limit, found.needed) == (f"disk space of {small_disk}", 60 * MIB)
            assert found.available == space.f_bfree * space.f_frsize
            assert found.present == 0
            assert 4 * MIB <= os.fstat(fd).st_blocks * 512 < 4 * MIB + 65536
            disk = next(limit for limit in headroom(mapping).limits if limit.bounds == "disk space")
            assert disk.available_bytes == found.available
            assert prefault.populate(mapping, length=12 * MIB).bytes == 12 * MIB
            assert 12 * MIB <= os.fstat(fd).st_blocks * 512 < 12 * MIB + 65536  # and perhaps a block of extents
            # Nearly full; what has its blocks already is populated all the same.
            os.posix_fallocate(fd, 12 * MIB, (os.statvfs(small_disk).f_bavail - 64) * space.f_frsize)
            prefault.discard(mapping)
            assert refusal(mapping, mapping.range.start, 64 * MIB, length=12 * MIB) is None
            with pytest.raises(prefault.BackingFullError):
                prefault.populate(mapping, headroom="ignore")


def test_a_private_copy_of_a_file_with_holes_needs_no_disk_space(small_disk: Path) -> None:
    with file_of(small_disk, 64 * MIB) as (_, path), prefault.Mapping(backing=prefault.File(path), shared=False) as mapping:
        assert prefault.populate(mapping, access="write").bytes == 64 * MIB


# --- rlimits ----------------------------------------------------------------------------------------------------------


def test_rlimits_bear_on_new_mappings() -> None:
    def limited() -> tuple[dict[str, tuple[int, int]], bool]:
        import resource

        used = {
            line.split(":")[0]: int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(("VmSize", "VmData"))
        }
        room = 64 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (used["VmSize"] + 2 * room, used["VmSize"] + 2 * room))
        resource.setrlimit(resource.RLIMIT_DATA, (used["VmData"] + room, used["VmData"] + room))
        found = {limit.name: (limit.limit_bytes, limit.available_bytes) for limit in headroom("anonymous").limits}
        with mmap.mmap(-1, 32 * MIB) as memory:
            bears = any(limit.name.startswith("RLIMIT") for limit in headroom(memory).limits)
        with pytest.raises(prefault.MappingError):
            prefault.Mapping(room + MIB)
        return {name: pair for name, pair in found.items() if name.startswith("RLIMIT")}, bears

    found, bears = in_child(limited)
    assert set(found) == {"RLIMIT_AS", "RLIMIT_DATA"}
    assert 120 * MIB < found["RLIMIT_AS"][1] <= 128 * MIB
    assert 60 * MIB < found["RLIMIT_DATA"][1] <= 64 * MIB
    assert not bears


def test_rollback_of_many_ranges_at_the_limit_is_no_kill(make_group: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollback takes memory itself, when none is left."""
    ranges = 60_000
    with prefault.SparseMemory(PAGE_SIZE) as memory:
        memory.populate_many([(0, PAGE_SIZE)])  # modules are loaded outside of the group
    advise = AdviceVector.advise
    group = make_group(512 * MIB)

    def scattered() -> bool:
        with prefault.SparseMemory(ranges * 2 * PAGE_SIZE, unpopulated="zeros") as memory:
            calls = 0

            def advise_and_meet_a_neighbour(self: AdviceVector, *arguments: int) -> int:
                nonlocal calls
                calls += 1
                if calls == 10:
                    group.limit(group.usage + 8 * MIB)
                return advise(self, *arguments)

            monkeypatch.setattr(AdviceVector, "advise", advise_and_meet_a_neighbour)
            offsets = numpy.arange(ranges) * 2 * PAGE_SIZE
            with pytest.raises(prefault.HeadroomError, match="discarded again"):
                memory.populate_many(numpy.stack([offsets, numpy.full(ranges, PAGE_SIZE)], axis=1))
            leave()
            return not any(oracle.present(memory.range.start, memory.range.length))

    assert in_child(group.inside(scattered))
    assert not group.killed
