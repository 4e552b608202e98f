"""Reading the limits: from directories like those of cgroups, and from this machine."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefault
from prefault._system import cgroups, memory_cgroups, proc
from prefault._system import meminfo as meminfo_file
from prefault._system.kept_files import KeptFile
from prefault._system.memory_cgroups import MemoryCgroup
from prefault.errors import HeadroomError
from prefault.limits.limit import Headroom, Limit
from prefault.limits.memory_limits import (
    cgroup_cache_limits,
    cgroups_have_free,
    check_cgroups,
    check_machine,
    machine_cache_limits,
    machine_has_free,
    machine_limits,
    memory_limits,
)
from prefault.limits.refusing_limits import commit_limits, resource_limit, space_limit
from prefault.limits.table import ask_for_memory
from prefault.limits.target import headroom
from prefault.sizes import GIB, MIB, PAGE_SIZE
from support.children import in_child

# The modules; prefault.headroom is a function of the same name.
MEMORY, REFUSALS = (sys.modules[f"prefault.limits.{name}"] for name in ("memory_limits", "refusing_limits"))


@pytest.fixture(autouse=True)
def _no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """memory.stat is taken for exact here, so that the sums come out even."""
    monkeypatch.setattr(MEMORY, "_STATISTICS_LAG", 0)


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces the values of /proc/meminfo, in bytes."""

    def replace(**values: int) -> None:
        path = tmp_path / "meminfo"
        path.write_text("".join(f"{key}: {value // 1024:12} kB\n" for key, value in values.items()))
        monkeypatch.setattr(meminfo_file, "_file", KeptFile(str(path)))

    replace(MemTotal=64 * GIB, MemFree=GIB, MemAvailable=48 * GIB, SwapFree=0)
    return replace


def group(directory: Path, stat: dict[str, int] | None = None, /, **files: int | str) -> MemoryCgroup:
    """Make a directory with files as in a cgroup of v2."""
    directory.mkdir(parents=True)
    for name, value in files.items():
        (directory / name.replace("__", ".")).write_text(f"{value}\n")
    (directory / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in (stat or {}).items()))
    return MemoryCgroup(str(directory), 2)


def by_name(limits: list[Limit]) -> dict[str, Limit]:
    return {limit.name: limit for limit in limits}


# --- cgroups -----------------------------------------------------------------------------------------------------------

STAT = {"inactive_file": 100 * MIB, "active_file": 60 * MIB, "file_dirty": 8 * MIB, "file_writeback": 2 * MIB,
        "inactive_anon": 200 * MIB, "active_anon": 90 * MIB, "shmem": 50 * MIB, "slab_reclaimable": 20 * MIB}  # fmt: skip


@pytest.mark.usefixtures("meminfo")
def test_group(tmp_path: Path) -> None:
    level = group(tmp_path / "a", STAT, memory__max=GIB, memory__high=960 * MIB, memory__current=512 * MIB)
    found = by_name(memory_limits([level]))
    limit = found[f"memory.max of {tmp_path}/a"]
    assert (limit.bounds, limit.limit_bytes, limit.used_bytes) == ("memory", GIB, 512 * MIB)
    # Clean page cache, and half of the slab. Not what is dirty or under writeback, not anonymous memory, not shmem.
    assert limit.reclaimable_bytes == (150 + 10) * MIB
    assert limit.reserve_bytes == 32 * MIB
    assert limit.available_bytes == (512 + 160 - 32) * MIB
    assert limit.source == f"{tmp_path}/a/memory.max"
    assert "OOM killer" in limit.consequence
    high = found[f"memory.high of {tmp_path}/a"]
    assert high.available_bytes == (960 - 512 + 160 - 30) * MIB
    assert "OOM" not in high.consequence
    assert found["MemAvailable"].available_bytes == 48 * GIB - 32 * MIB
    assert Headroom(tuple(memory_limits([level]))).tightest == high


@pytest.mark.usefixtures("meminfo")
@pytest.mark.parametrize("unlimited", [{"memory__max": "max"}, {}, {"memory__max": "max", "memory__high": "max"}])
def test_v2_without_a_limit(tmp_path: Path, unlimited: dict[str, str]) -> None:
    level = group(tmp_path / "a", STAT, memory__current=MIB, **unlimited)
    assert [limit.name for limit in memory_limits([level])] == ["MemAvailable"]


@pytest.mark.usefixtures("meminfo")
def test_v2_levels(tmp_path: Path) -> None:
    inner = group(tmp_path / "a" / "b", memory__max=GIB, memory__current=MIB)
    (tmp_path / "a" / "memory.max").write_text(str(64 * MIB))
    (tmp_path / "a" / "memory.current").write_text(str(24 * MIB))
    levels = [inner, MemoryCgroup(str(tmp_path / "a"), 2)]
    answer = check_cgroups(39 * MIB, levels=levels)
    assert answer.short is not None
    assert (answer.short.name, answer.left_bytes) == (f"memory.max of {tmp_path}/a", 38 * MIB)
    assert check_cgroups(38 * MIB, levels=levels) == (None, 38 * MIB)
    assert check_cgroups(40 * MIB, 0.0, levels) == (None, 40 * MIB)


def test_swap_counts_as_far_as_every_level_may_use_it(tmp_path: Path, meminfo: Callable[..., None]) -> None:
    meminfo(MemTotal=64 * GIB, MemAvailable=GIB, SwapFree=300 * MIB)
    sizes: dict[str, Any] = {"memory__max": 64 * MIB, "memory__current": 64 * MIB}
    free = group(tmp_path / "free", **sizes, memory__swap__max="max", memory__swap__current=MIB)
    part = group(tmp_path / "part", **sizes, memory__swap__max=100 * MIB, memory__swap__current=60 * MIB)
    none = group(tmp_path / "none", **sizes, memory__swap__max=0, memory__swap__current=0)

    def swappable(*levels: MemoryCgroup) -> list[int]:
        return [limit.reclaimable_bytes // MIB for limit in memory_limits(levels)]

    assert swappable(free) == [300, 300]
    assert swappable(free, part) == [40, 40, 300]
    assert swappable(none, free) == [0, 0, 300]


def test_v1(tmp_path: Path, meminfo: Callable[..., None]) -> None:
    meminfo(MemTotal=64 * GIB, MemAvailable=GIB, SwapFree=300 * MIB)
    stat = {f"total_{key.removeprefix('file_')}": value for key, value in STAT.items()}
    directory = tmp_path / "a"
    group(
        directory, stat | {"inactive_file": GIB},
        memory__limit_in_bytes=GIB, memory__usage_in_bytes=512 * MIB, memory__swappiness=60,
        memory__memsw__limit_in_bytes=2 * GIB, memory__memsw__usage_in_bytes=GIB,
    )  # fmt: skip
    level = MemoryCgroup(str(directory), 1)
    found = by_name(memory_limits([level]))
    assert found[f"memory.limit_in_bytes of {directory}"].reclaimable_bytes == (150 + 300) * MIB
    # What goes to swap is still counted there.
    assert found[f"memory.memsw.limit_in_bytes of {directory}"].reclaimable_bytes == 150 * MIB
    (directory / "memory.swappiness").write_text("0\n")
    assert memory_limits([level])[0].reclaimable_bytes == 150 * MIB
    (directory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert len(memory_limits([level])) == 2


def test_page_cache_that_fits_at_best(tmp_path: Path, meminfo: Callable[..., None]) -> None:
    """All but anonymous, shared and locked memory may go; dirty pages, too, and what cannot be swapped may not."""
    meminfo(
        MemTotal=64 * GIB, MemFree=GIB, SwapFree=0, AnonPages=8 * GIB, Shmem=2 * GIB, PageTables=GIB, KernelStack=0,
        Hugetlb=4 * GIB,
    )  # fmt: skip
    stat = STAT | {"unevictable": 16 * MIB}
    level = group(tmp_path / "a", stat, memory__max=GIB, memory__high=960 * MIB, memory__current=512 * MIB)
    found = {limit.name: limit for limit in cgroup_cache_limits([level])}
    assert {limit.bounds for limit in found.values()} == {"page cache"}
    assert found[f"memory.max of {tmp_path}/a"].available_bytes == GIB - 306 * MIB
    assert found[f"memory.high of {tmp_path}/a"].available_bytes == (960 - 306) * MIB
    (machine,) = machine_cache_limits()
    assert (machine.name, machine.available_bytes) == ("MemTotal", 49 * GIB)
    v1 = {f"total_{key.removeprefix('file_')}": value for key, value in stat.items()}
    group(
        tmp_path / "b", v1, memory__limit_in_bytes=GIB, memory__usage_in_bytes=512 * MIB, memory__swappiness=60,
        memory__memsw__limit_in_bytes=2 * GIB, memory__memsw__usage_in_bytes=GIB,
    )  # fmt: skip
    meminfo(MemTotal=64 * GIB, MemFree=GIB, SwapFree=100 * MIB)
    found = {limit.name: limit for limit in cgroup_cache_limits([MemoryCgroup(str(tmp_path / "b"), 1)])}
    assert found[f"memory.limit_in_bytes of {tmp_path}/b"].available_bytes == GIB - 206 * MIB  # 100 MiB go to swap
    assert found[f"memory.memsw.limit_in_bytes of {tmp_path}/b"].available_bytes == 2 * GIB - 306 * MIB
    assert machine_cache_limits() == []  # a sandbox that does not show all of it
    assert not cgroups_have_free(513 * MIB, [level])
    assert cgroups_have_free(448 * MIB, [level])
    assert not machine_has_free(GIB)


@pytest.mark.usefixtures("meminfo")
def test_parents_that_do_not_count_their_children(tmp_path: Path) -> None:
    """Linux before 5.11, memory.use_hierarchy = 0."""
    levels = tuple(MemoryCgroup(str(group(tmp_path / name).directory), 1) for name in ("own", "parent", "root"))
    assert MEMORY._counting(levels) == levels
    (tmp_path / "parent" / "memory.use_hierarchy").write_text("0\n")
    assert MEMORY._counting(levels) == levels[:1]


@pytest.mark.usefixtures("meminfo")
def test_an_unreadable_limit_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = group(tmp_path / "a", memory__max="a lot", memory__current=1)
    without_usage = group(tmp_path / "b", memory__max=MIB)
    gone = MemoryCgroup(str(tmp_path / "c"), 2)
    assert [limit.name for limit in memory_limits([broken, without_usage, gone])] == ["MemAvailable"]
    monkeypatch.setattr(meminfo_file, "_file", KeptFile(str(tmp_path / "none")))
    assert memory_limits([gone]) == []
    assert check_cgroups(1 << 60, levels=[gone]).short is None
    assert check_machine(1 << 60).short is None
    assert Headroom(()).tightest is None
    assert Headroom(()).available_bytes is None
    assert str(Headroom(())) == "no limit is known"


def test_no_proc_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((meminfo_file, "_file"), (MEMORY, "_own_cgroups_file"), (REFUSALS, "_overcommit_file")):
        monkeypatch.setattr(module, name, KeptFile(str(tmp_path / "none")))
    assert ask_for_memory(1 << 60).short is None
    assert list(commit_limits()) == []
    with prefault.Mapping(MIB) as mapping:
        assert prefault.populate(mapping).bytes == MIB


def test_the_statistics_may_lag_behind(
    tmp_path: Path, meminfo: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MEMORY, "_STATISTICS_LAG", 50 * MIB)
    level = group(tmp_path / "a", STAT, memory__max=GIB, memory__current=512 * MIB)
    assert memory_limits([level])[0].reclaimable_bytes == (100 + 10) * MIB


def test_hugetlb_cgroups_by_directory(tmp_path: Path) -> None:
    for name, value in {
        "hugetlb.2MB.limit_in_bytes": 8 * MIB, "hugetlb.2MB.usage_in_bytes": 2 * MIB,
        "hugetlb.2MB.rsvd.limit_in_bytes": 4 * MIB, "hugetlb.2MB.rsvd.usage_in_bytes": 0,
        "hugetlb.1GB.max": "max", "hugetlb.1GB.current": 0, "hugetlb.64KB.max": MIB, "hugetlb.64KB.current": 65536,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"{value}\n")
    found = memory_cgroups.hugetlb_bounds(str(tmp_path), 1, 2 * MIB)
    assert [bound[1:] for bound in found] == [("pages", 8 * MIB, 2 * MIB), ("reservations", 4 * MIB, 0)]
    assert memory_cgroups.hugetlb_bounds(str(tmp_path), 2, GIB) == []
    assert [bound[1:] for bound in memory_cgroups.hugetlb_bounds(str(tmp_path), 2, 65536)] == [("pages", MIB, 65536)]


def test_huge_pages_that_the_memory_cgroup_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory\n")
    for options, counts in (("rw,memory_hugetlb_accounting", True), ("rw,nsdelegate", False)):
        mount = proc.Mount(0, "/", str(tmp_path), "cgroup2", options)
        monkeypatch.setattr(cgroups, "read_mounts", lambda mount=mount: [mount])
        monkeypatch.setattr(cgroups, "hierarchies", lambda pid: iter([(frozenset[str](), "/")]))
        monkeypatch.setattr(MEMORY, "_own_cgroups", MEMORY._OwnCgroups(b"", (), False))
        assert MEMORY.counts_hugetlb() is counts


# --- the commit limit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["0", "1", "2"])
def test_the_commit_limit(mode: str, tmp_path: Path, meminfo: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory without a reservation counts page by page, other memory when it is mapped."""
    meminfo(MemTotal=64 * GIB, MemAvailable=48 * GIB, SwapFree=0, CommitLimit=GIB, Committed_AS=GIB - 40 * MIB)
    (tmp_path / "overcommit").write_text(f"{mode}\n")
    monkeypatch.setattr(REFUSALS, "_overcommit_file", KeptFile(str(tmp_path / "overcommit")))
    limits = list(commit_limits())
    assert [limit.bounds for limit in limits] == (["commit"] if mode == "2" else [])
    with prefault.Mapping(64 * MIB, backing="memfd") as memfd, prefault.Mapping(64 * MIB) as private:
        assert prefault.populate(private).bytes == 64 * MIB
        if mode == "2":
            assert limits[0].available_bytes <= 40 * MIB
            with pytest.raises(HeadroomError, match=r"64\.0 MiB of commit are needed, and CommitLimit leaves") as caught:
                prefault.populate(memfd)
            assert caught.value.limit == "CommitLimit"
            assert os.fstat(memfd.fd or 0).st_blocks == 0
        else:
            assert prefault.populate(memfd).bytes == 64 * MIB
        assert prefault.populate(memfd, headroom="ignore").present_bytes in (0, 64 * MIB)
        assert prefault.populate(memfd).present_bytes == 64 * MIB


# --- headroom(target) ----------------------------------------------------------------------------------------------------


def test_of_this_process() -> None:
    found = headroom()
    names = [limit.name for limit in found.limits]
    assert "MemAvailable" in names
    assert found.tightest is not None
    assert found.tightest.bounds in ("memory", "commit", "address space", "data")
    assert found.available_bytes == found.tightest.available_bytes
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(found.limits)
    assert "/proc/meminfo" in str(found)
    for limit in found.limits:
        assert limit.source
        assert limit.consequence
        assert limit.available_bytes <= max(0, limit.limit_bytes - limit.used_bytes + limit.reclaimable_bytes)
        assert limit.name in str(limit)
    huge = [limit for limit in found.limits if limit.bounds == "huge pages"]
    assert not any(limit.applies for limit in huge)


def test_the_machine_s_memory_is_that_of_meminfo() -> None:
    limit = by_name(memory_limits([]))["MemAvailable"]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert limit.limit_bytes == int(lines["MemTotal"].split()[0]) * 1024
    available = limit.limit_bytes - limit.used_bytes
    assert abs(available - int(lines["MemAvailable"].split()[0]) * 1024) < GIB


def kinds(found: Headroom) -> set[str]:
    return {limit.bounds for limit in found.limits if limit.bounds not in ("address space", "data")}


@pytest.mark.parametrize(
    ("backing", "expected"),
    [
        ("anonymous", {"memory"}),
        ("memfd", {"memory"}),
        ("tmpfs", {"memory", "tmpfs space"}),
        ("hugetlb", {"huge pages"}),
        ("memfd-hugetlb", {"huge pages"}),
        (prefault.TemporaryFile("/no/such/directory"), set()),
    ],
)
def test_of_a_backing(backing: prefault.BackingSource | str, expected: set[str]) -> None:
    assert kinds(headroom(backing)) - {"commit"} == expected


def test_of_files_and_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    assert kinds(headroom(prefault.File(path))) == {"disk space", "page cache"}
    fd = os.memfd_create("test")
    try:
        from prefault.memory.backings import Descriptor

        assert kinds(headroom(Descriptor(fd))) - {"commit"} == {"memory"}
    finally:
        os.close(fd)


def test_of_memory(tmp_path: Path) -> None:
    assert kinds(headroom(np.zeros(1 << 20))) == {"memory"}
    assert headroom(np.zeros(0)).limits == ()
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    for options, expected in (
        ({"backing": "memfd"}, {"memory"}),
        ({"backing": "tmpfs"}, {"memory", "tmpfs space"}),
        ({"backing": prefault.File(path)}, {"disk space", "page cache"}),
        ({"backing": prefault.File(path), "writable": False}, {"page cache"}),
        ({"backing": prefault.File(path), "shared": False}, {"memory", "page cache"}),
    ):
        with prefault.Mapping(PAGE_SIZE, **options) as mapping:
            assert kinds(headroom(mapping)) - {"commit"} == expected


def test_of_many_mappings_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit is not read for each of them."""
    asked = 0

    def counted() -> list[Limit]:
        nonlocal asked
        asked += 1
        return memory_limits()

    monkeypatch.setattr(sys.modules["prefault.limits.table"], "cgroup_limits", counted)
    with prefault.SparseMemory(1000 * PAGE_SIZE, unpopulated="fault") as memory:
        memory.populate_many([(page * PAGE_SIZE, PAGE_SIZE) for page in range(0, 1000, 2)])
        assert kinds(headroom(memory)) == {"memory"}
    assert 1 <= asked <= 2  # open and shut


def test_targets_without_memory() -> None:
    with pytest.raises(ValueError, match="floppy"):
        headroom("floppy")
    with pytest.raises(TypeError, match="int"):
        headroom(7)
    with prefault.Mapping(PAGE_SIZE) as mapping:
        pass
    with pytest.raises(ValueError, match="closed"):
        headroom(mapping)


def test_a_space_without_a_limit() -> None:
    fd = os.memfd_create("test")
    try:
        assert space_limit(fd, "tmpfs space") is None
    finally:
        os.close(fd)
    assert space_limit(None, "tmpfs space") is None
    assert space_limit("/no/such/place", "disk space") is None


def test_a_limit_that_is_exceeded_leaves_nothing() -> None:
    limit = Limit("name", "memory", MIB, 3 * MIB, MIB, MIB, "consequence", "source", "remedy")
    assert limit.available_bytes == 0
    text = "0 bytes left by name (3.0 MiB of 1.0 MiB used, 1.0 MiB reclaimable, 1.0 MiB kept in reserve)"
    assert str(limit) == f"{text}; at the limit: consequence"


# --- files that are kept open ---------------------------------------------------------------------------------------------


def test_a_kept_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    file = KeptFile(str(path))
    assert file.read() == b"one"
    fd = file._fd
    path.write_text("two")
    assert (file.read(), file._fd) == (b"two", fd)
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert file.read() == b"two"
    path.unlink()
    assert file.read() == b"two"
    file.close()
    with pytest.raises(FileNotFoundError):
        file.read()


def test_a_descriptor_that_is_another_file_s_by_now_is_not_read_and_not_closed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    (tmp_path / "b").write_text("other file")
    file = KeptFile(str(tmp_path / "a"))
    file.read()
    number = file._fd
    os.close(number)  # as a daemon does with all that are open
    other = os.open(tmp_path / "b", os.O_RDONLY)
    try:
        assert other == number
        assert file.read() == b"mine"
        assert file._fd != number
        del file
        assert os.pread(other, 10, 0) == b"other file"
    finally:
        os.close(other)


def test_a_child_opens_its_own() -> None:
    file = KeptFile("/proc/self/stat")
    assert int(file.read().split()[0]) == os.getpid()
    with file._lock:  # of a thread that the child does not have

        def pids() -> tuple[int, int]:
            return int(file.read().split()[0]), os.getpid()

        first, second = in_child(pids)
    assert first == second != os.getpid()


def test_a_cgroup_that_was_removed_and_made_again(tmp_path: Path) -> None:
    level = group(tmp_path / "a", memory__max=MIB, memory__current=1)
    assert level.bounds()[0].limit == MIB
    os.rename(tmp_path / "a", tmp_path / "b")
    assert level.bounds()[0].limit == MIB  # still the same file
    (tmp_path / "b" / "memory.max").write_text(f"{2 * MIB}\n")
    assert level.bounds()[0].limit == 2 * MIB


def test_the_option_of_populate() -> None:
    with prefault.Mapping(PAGE_SIZE) as mapping:
        with pytest.raises(ValueError, match="headroom is 'check' or 'ignore', not 'maybe'"):
            prefault.populate(mapping, headroom="maybe")  # type: ignore[arg-type]
        assert prefault.populate(mapping, headroom="ignore").bytes == PAGE_SIZE
    assert HeadroomError(errno.ENOMEM, "text", limit="x", needed_bytes=2, available_bytes=1).needed_bytes == 2


@pytest.mark.parametrize("name", ["RLIMIT_MEMLOCK", "RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_whose_use_the_kernel_does_not_count_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REFUSALS, "soft_limit", lambda _: 65536)
    monkeypatch.setattr(REFUSALS, "_read", lambda _: b"Name:\tpython\nCapEff:\t0000000000000000\n")
    assert list(resource_limit(name)) == []


def test_a_machine_that_does_not_show_its_swap_has_none(meminfo: Callable[..., None]) -> None:
    meminfo(MemTotal=64 * GIB, MemAvailable=48 * GIB)
    assert [limit.reclaimable_bytes for limit in machine_limits()] == [0]
