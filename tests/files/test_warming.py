"""Warming: pages that were missing are there, no others; failures of one file leave the others alone."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import PageRange, RangeSet, WarmInterrupted
from prefault.files.cached_pages import cached_ranges
from prefault.files.open_file import OpenFile
from prefault.files.warm_methods import METHOD_NAMES
from prefault.files.warming import warm_file
from prefault.testing import without
from support import file_beds, needs, oracle
from support.cgroups import Group
from support.children import Child
from support.file_beds import PAGE

MIB = 1 << 20


@pytest.fixture(params=["disk", "overlay", "disk without cachestat", "disk without madv_populate"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system that reads from a disk."""
    with ExitStack() as stack:
        if request.param == "overlay":
            yield stack.enter_context(file_beds.overlay(tmp_path))
        else:
            for name in request.param.split()[2:]:
                stack.enter_context(without(name))
            yield tmp_path


def _cached(path: Path) -> RangeSet:
    with OpenFile(path) as file:
        return cached_ranges(file)


def test_a_cold_file_is_cached_afterwards_and_is_not_read_again(directory: Path) -> None:
    path = file_beds.make_cold(directory / "file", 24 * MIB + 1)
    result = prefault.warm(path)
    assert (result.bytes, result.present_bytes, result.files, result.failures) == (24 * MIB + PAGE, 0, 1, ())
    assert result.read_bytes == 24 * MIB + 1
    assert result.method in METHOD_NAMES
    assert result.threads >= 1
    assert file_beds.cached_pages(path) == 24 * MIB // PAGE + 1
    again = prefault.warm(path)
    assert (again.bytes, again.present_bytes, again.read_bytes, again.method) == (0, 24 * MIB + PAGE, 0, "")
    assert "24.0 MiB cached before" in str(again)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("threads", [1, 3])
def test_each_method_brings_in_all_of_a_file(tmp_path: Path, method: Any, threads: int) -> None:
    path = file_beds.make_cold(tmp_path / "file", 50 * MIB + 5000)
    result = prefault.warm(path, method=method, threads=threads)
    assert (result.method, result.threads) == (method, threads)
    assert result.bytes == _cached(path).length == 50 * MIB + 2 * PAGE


@pytest.mark.parametrize("method", [None, *METHOD_NAMES])
def test_ranges_are_brought_in_and_nothing_beside_them(tmp_path: Path, method: Any) -> None:
    """The disk here reads 8 MiB ahead: reading in any ordinary way brings in more."""
    seeded = random.Random(7)
    path = file_beds.make_cold(tmp_path / "file", 96 * MIB)
    whole = RangeSet([PageRange(0, 96 * MIB)])
    for longest in (4 * PAGE, 3 * MIB, 60 * MIB):
        file_beds.evict(path)
        spans = []
        for _ in range(4):
            start = seeded.randrange(96 * MIB)
            spans.append((start, start + seeded.randrange(longest)))
        asked = RangeSet(PageRange.outward(*span) for span in spans) & whole
        result = prefault.warm(path, ranges=spans, method=method)
        assert _cached(path) == asked
        assert (result.bytes, result.failures) == (asked.length, ())


def test_what_is_cached_already_is_left_out(tmp_path: Path) -> None:
    path = file_beds.make_cold(tmp_path / "file", 4 * MIB)
    pages = random.Random(8).sample(range(4 * MIB // PAGE), 300)
    file_beds.touch(path, *pages)
    with OpenFile(path) as file:
        result = warm_file(file)
    assert (result.present_bytes, result.bytes) == (300 * PAGE, 4 * MIB - 300 * PAGE)
    assert result.read_bytes == result.bytes
    assert prefault.warm(path, missing_only=False).read_bytes == 4 * MIB


def test_a_range_without_an_end_and_sizes_as_text(tmp_path: Path) -> None:
    path = file_beds.make_cold(tmp_path / "file", 4 * MIB)
    assert prefault.warm(path, ranges=[("3 MiB", None), (0, PAGE)]).bytes == MIB + PAGE
    assert prefault.warm(path, ranges=[("100 MiB", None)]).bytes == 0


def test_many_small_files_and_those_that_cannot_be_read(tmp_path: Path) -> None:
    """One of them vanishes in the middle, one is a link to nothing."""
    for number in range(600):
        file_beds.make_cold(tmp_path / f"{number:03}", PAGE * (number % 5))
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    listed = [tmp_path / f"{number:03}" for number in range(600)]

    def paths() -> Iterator[Path]:
        yield from listed[:300]
        yield tmp_path / "missing"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "socket"))
            yield tmp_path / "socket"
        yield tmp_path / "gone"
        yield from listed[300:]

    result = prefault.warm(paths())
    failed = {Path(failure.path).name: failure for failure in result.failures}
    assert set(failed) == {"missing", "socket", "gone"}
    assert all(failure.remedy and str(tmp_path) in str(failure) for failure in result.failures)
    assert result.files == 600
    assert result.bytes == sum(PAGE * (number % 5) for number in range(600))
    assert sum(_cached(path).length for path in listed) == result.bytes
    assert prefault.warm(listed).present_bytes == result.bytes


def test_files_that_vanish_meanwhile(tmp_path: Path) -> None:
    for number in range(20):
        file_beds.make_cold(tmp_path / f"{number}", PAGE)
    selection = prefault.select(tmp_path)

    def vanishing() -> Iterator[Path]:
        for item in selection:
            path = Path(item.path)
            yield path
            if int(path.name) % 4 == 0:  # selected by now, and not yet opened: small files wait for others
                path.unlink()

    result = prefault.warm(vanishing())
    assert {int(Path(failure.path).name) for failure in result.failures} == {0, 4, 8, 12, 16}
    assert all("removed" in failure.remedy for failure in result.failures)
    assert result.files == 15


@pytest.mark.parametrize("budget", [None, "8 MiB"])
def test_small_files_that_grow_after_they_were_listed(tmp_path: Path, budget: str | None) -> None:
    """They are warmed whole, and no further than the budget goes."""
    paths = [file_beds.make_cold(tmp_path / f"{number}", PAGE) for number in range(6)]

    def growing() -> Iterator[Path]:
        yield from paths
        file_beds.make_cold(paths[2], 3 * PAGE)  # listed by now; small files wait for others
        file_beds.make_cold(paths[4], 16 * MIB)

    result = prefault.warm(growing(), budget=budget)
    cached = sum(_cached(path).length for path in paths)
    assert result.bytes == cached
    assert result.files == 6
    if budget is None:
        assert (cached, result.failures) == (16 * MIB + 7 * PAGE, ())
    else:
        assert cached == 8 * MIB
        assert [failure.path for failure in result.failures] == [str(paths[4])]


def test_small_files_count_by_pages_in_a_budget(tmp_path: Path) -> None:
    paths = [file_beds.make_cold(tmp_path / f"{number}", 1) for number in range(10)]
    result = prefault.warm(paths, budget=4 * PAGE)
    assert result.bytes == sum(_cached(path).length for path in paths) == 4 * PAGE
    assert len(result.failures) == 1


def test_files_that_the_kernel_makes_are_refused_and_not_read() -> None:
    result = prefault.warm("/sys/kernel/mm/transparent_hugepage/enabled")
    assert (result.bytes, result.read_bytes) == (0, 0)
    assert "is on sysfs" in str(*result.failures)
    with pytest.raises(OSError, match="is on sysfs"), prefault.stream("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        file.read(1)


def test_a_tree_with_links(tmp_path: Path) -> None:
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    file_beds.make_cold(tmp_path / "tree" / "a", 3 * PAGE)
    file_beds.make_cold(tmp_path / "tree" / "inner" / "b", 2 * MIB)
    os.link(tmp_path / "tree" / "a", tmp_path / "tree" / "inner" / "same")
    result = prefault.warm(tmp_path / "tree")
    assert (result.files, result.bytes, result.failures) == (2, 3 * PAGE + 2 * MIB, ())


def test_empty_and_sparse_files(tmp_path: Path) -> None:
    empty, sparse = tmp_path / "empty", tmp_path / "sparse"
    empty.touch()
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"data" * PAGE, 512 * MIB)
        os.fsync(file.fileno())
    file_beds.evict(sparse)
    result = prefault.warm([empty, sparse])
    assert (result.files, result.failures) == (2, ())
    assert _cached(sparse) == RangeSet([PageRange(512 * MIB, 512 * MIB + 4 * PAGE)])
    assert (result.bytes, result.hole_bytes) == (4 * PAGE, (1 << 40) - 4 * PAGE)


def test_holes_of_tmpfs_stay_holes(small_tmpfs: Callable[[str], Path]) -> None:
    path = file_beds.make(small_tmpfs("2m") / "file", 3 * PAGE)
    os.truncate(path, 100 * MIB)
    result = prefault.warm(path)
    assert (result.bytes, result.present_bytes, result.failures) == (0, 3 * PAGE, ())
    assert result.hole_bytes == 100 * MIB - 3 * PAGE
    assert path.stat().st_blocks * 512 == 3 * PAGE


def test_hugetlbfs_is_in_memory_as_it_is(tmp_path: Path, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with file_beds.mounted(tmp_path / "huge", "-t", "hugetlbfs", "prefault-test") as directory:
        path = directory / "file"
        path.touch()
        os.truncate(path, 2 * needs.HUGE)
        result = prefault.warm(path)
        assert (result.bytes, result.hole_bytes, result.failures) == (0, 2 * needs.HUGE, ())
        assert path.stat().st_blocks == 0


def test_block_devices(tmp_path: Path) -> None:
    image = file_beds.make_cold(tmp_path / "image", 4 * MIB)
    with file_beds.loop_device(image) as device, OpenFile(device) as file:
        file_beds.evict(device)
        assert prefault.warm(device).bytes == 4 * MIB
        assert cached_ranges(file).length == 4 * MIB


# --- files that change, and failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_a_file_that_shrinks_in_the_middle(tmp_path: Path, method: Any, seed: int) -> None:
    seeded = random.Random(seed)
    path, other = file_beds.make_cold(tmp_path / "file", 40 * MIB), file_beds.make_cold(tmp_path / "other", 2 * MIB)
    left = seeded.randrange(20 * MIB)
    at = seeded.randrange(1, 16 * MIB)

    def shrink(done: int, total: int) -> None:
        if done >= at and path.stat().st_size > left:
            os.truncate(path, left)

    result = prefault.warm([path, other], method=method, threads=1, progress=shrink, rate="100 MiB/s")
    assert other.stat().st_size == _cached(other).length == 2 * MIB
    (failure,) = result.failures
    assert failure.path == str(path)
    assert "shrank" in failure.reason or "not in the page cache" in failure.reason
    assert result.bytes == _cached(path).length + 2 * MIB


def test_another_users_file_is_read_and_not_checked(tmp_path: Path) -> None:
    needs.root("become another user")
    path = file_beds.make_cold(tmp_path / "file", 3 * MIB)
    secret = file_beds.make_cold(tmp_path / "secret", 3 * MIB)
    secret.chmod(0o600)
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)

    def look() -> tuple[Any, ...]:
        os.setresuid(file_beds.NOBODY, file_beds.NOBODY, file_beds.NOBODY)
        result = prefault.warm([path, secret])
        return result.bytes, result.unchecked_bytes, [str(failure) for failure in result.failures]

    with Child(look) as child:
        number, unchecked, failures = child.result()
    assert (number, unchecked) == (3 * MIB, 3 * MIB)
    assert _cached(path).length == 3 * MIB
    assert len(failures) == 1
    assert "secret: EACCES" in failures[0]
    assert "chmod" in failures[0]


def test_without_a_thread_it_is_an_error_that_names_the_limit_and_with_fewer_it_goes_on(tmp_path: Path) -> None:
    needs.root("become another user, for whom the limit holds")
    large, small = file_beds.make_cold(tmp_path / "large", 3 * MIB), file_beds.make_cold(tmp_path / "small", PAGE)
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    user = 64000 + os.getpid() % 1000  # the limit counts all threads of a user

    def look() -> tuple[Any, ...]:
        prefault.warm(file_beds.make_cold(tmp_path / "first", 2 * MIB))  # what is imported late
        prefault.stream(large).close()
        os.setresuid(user, user, user)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        none = prefault.warm([large, small])
        with pytest.raises(OSError, match=r"large.*RLIMIT_NPROC") as refused, prefault.stream(large) as stream:
            stream.read(1)
        assert refused.value.errno == errno.EAGAIN
        return none.bytes, [str(failure) for failure in none.failures]

    def look_with_few() -> tuple[int, int]:
        prefault.warm(tmp_path / "first")
        os.setresuid(user + 1000, user + 1000, user + 1000)
        resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
        result = prefault.warm(large, method="pread", threads=8)
        return result.read_bytes, len(result.failures)

    with Child(look) as child:
        number, failures = child.result()
    assert number == 0
    assert len(failures) == 2
    assert all("RLIMIT_NPROC" in failure and "ulimit -u" in failure for failure in failures)
    with Child(look_with_few) as child:
        assert child.result() == (3 * MIB, 0)


def test_ctrl_c_keeps_an_honest_result(tmp_path: Path) -> None:
    path = file_beds.make_cold(tmp_path / "file", 64 * MIB)

    def interrupt(done: int, total: int) -> None:
        if done >= 8 * MIB:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(WarmInterrupted) as caught:
        prefault.warm([path, tmp_path / "never"], rate="64 MiB/s", progress=interrupt)
    result = caught.value.result
    assert 8 * MIB <= result.bytes < 64 * MIB
    assert result.bytes == _cached(path).length
    assert "interrupted" in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefault warm"]


def test_an_exception_of_the_progress_function_stops_the_work(tmp_path: Path) -> None:
    path = file_beds.make_cold(tmp_path / "file", 64 * MIB)

    def stop(done: int, total: int) -> None:
        raise LookupError(f"{done} of {total}")

    with pytest.raises(LookupError):
        prefault.warm(path, rate="64 MiB/s", progress=stop)
    assert _cached(path).length < 64 * MIB


def test_progress_grows_up_to_the_bytes_in_all(tmp_path: Path) -> None:
    paths = [file_beds.make_cold(tmp_path / f"{number}", size) for number, size in enumerate((30 * MIB + 7, 500, 9 * MIB))]
    seen: list[tuple[int, int]] = []
    prefault.warm(paths, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (39 * MIB + 507, 39 * MIB + 507)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(done <= total for done, total in seen)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, *METHOD_NAMES])
def test_a_budget_is_never_exceeded(tmp_path: Path, method: Any) -> None:
    paths = [file_beds.make_cold(tmp_path / f"{number}", size) for number, size in enumerate((10 * MIB, 40 * MIB, 4096))]
    result = prefault.warm(paths, budget="30 MiB", method=method)
    assert result.bytes == 30 * MIB
    assert sum(_cached(path).length for path in paths) == 30 * MIB
    (failure,) = result.failures
    assert failure.path == str(paths[1])
    assert "stopped after 20.0 MiB of 40.0 MiB" in failure.reason
    assert "raise it (budget=, --budget)" in result.stopped
    assert str(result).endswith(result.stopped)


def test_a_budget_of_nothing(tmp_path: Path) -> None:
    paths = [file_beds.make_cold(tmp_path / "small", 4096), file_beds.make_cold(tmp_path / "large", 4 * MIB)]
    for path in paths:
        result = prefault.warm(path, budget=0)
        assert result.bytes == 0
        assert len(result.failures) == 1
        assert not _cached(path)


def test_a_budget_holds_for_a_window_as_well(tmp_path: Path) -> None:
    path = file_beds.make_cold(tmp_path / "file", 8 * MIB)
    nothing = prefault.warm(path, window="4 MiB", budget=0)
    assert (nothing.bytes, nothing.read_bytes, len(nothing.failures)) == (0, 0, 1)
    assert nothing.stopped == "the budget is 0 bytes: raise it (budget=, --budget)"
    assert not _cached(path)
    little = prefault.warm(path, window="4 MiB", budget=12 * PAGE)
    assert (little.read_bytes, little.failures, little.stopped) == (8 * MIB, (), "")
    assert 0 < _cached(path).length <= 12 * PAGE


def test_a_budget_below_one_step_is_used_up_at_a_limited_rate(tmp_path: Path) -> None:
    path = file_beds.make_cold(tmp_path / "file", 8 * MIB)
    result = prefault.warm(path, budget="3 MiB", rate="1 GiB/s", method="populate")
    assert (result.bytes, _cached(path).length) == (3 * MIB, 3 * MIB)


def test_a_memory_cgroup_stops_it_before_it_evicts_what_it_brought_in(
    tmp_path: Path, make_group: Callable[..., Group]
) -> None:
    group = make_group(96 * MIB)
    paths = [file_beds.make_cold(tmp_path / "small", 16 * MIB), file_beds.make_cold(tmp_path / "large", 384 * MIB)]

    def run() -> tuple[Any, ...]:
        result = prefault.warm(paths)
        return result.bytes, result.evicted_bytes, result.stopped, [failure.path for failure in result.failures]

    with Child(group.inside(run)) as child:
        number, evicted, stopped, failures = child.result()
    assert group.killed == 0
    assert str(group.directory) in stopped
    assert failures == [str(paths[1])]
    assert _cached(paths[0]).length == 16 * MIB
    assert number == 16 * MIB + _cached(paths[1]).length
    assert evicted == 0
    assert 40 * MIB <= number < 96 * MIB


def test_a_second_call_does_not_evict_what_the_first_one_brought_in(
    tmp_path: Path, make_group: Callable[..., Group]
) -> None:
    group = make_group(96 * MIB)
    path = file_beds.make_cold(tmp_path / "large", 384 * MIB)

    def run() -> tuple[int, int, int]:
        first = prefault.warm(path)
        second = prefault.warm(path)
        return first.bytes, second.present_bytes, second.bytes

    with Child(group.inside(run)) as child:
        first, present, second = child.result()
    assert first == present
    assert _cached(path).length == first + second
    assert _cached(path) == RangeSet([PageRange(0, first + second)])


def _full_of_others(path: Path) -> None:
    """Fill the page cache of a group with a file that nobody wants any more."""
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


def test_pages_that_another_cgroup_is_charged_for_take_no_room(tmp_path: Path, make_group: Callable[..., Group]) -> None:
    group = make_group(96 * MIB)
    other, path = file_beds.make_cold(tmp_path / "other", 85 * MIB), file_beds.make_cold(tmp_path / "large", 200 * MIB)
    with path.open("rb") as file:
        for at in range(0, 160 * MIB, MIB):
            os.pread(file.fileno(), MIB, at)
    before = _cached(path).length
    assert before >= 160 * MIB

    def run() -> tuple[int, int, int, str]:
        _full_of_others(other)
        result = prefault.warm(path)
        return result.present_bytes, result.bytes, result.evicted_bytes, result.stopped

    with Child(group.inside(run)) as child:
        assert child.result() == (before, 200 * MIB - before, 0, "")
    assert _cached(path).length == 200 * MIB


def test_pages_of_tmpfs_take_no_room_of_the_page_cache(
    tmp_path: Path, make_group: Callable[..., Group], small_tmpfs: Callable[[str], Path]
) -> None:
    group = make_group(96 * MIB)
    other, path = file_beds.make_cold(tmp_path / "other", 85 * MIB), file_beds.make_cold(tmp_path / "file", 40 * MIB)
    memory = [file_beds.make(small_tmpfs("64M") / "large", 40 * MIB)]
    memory += [file_beds.make(memory[0].with_name(f"small {index}"), MIB) for index in range(20)]

    def run() -> tuple[int, int, str]:
        _full_of_others(other)
        result = prefault.warm([*memory, path])
        return result.present_bytes, result.bytes, result.stopped

    with Child(group.inside(run)) as child:
        assert child.result() == (60 * MIB, 40 * MIB, "")
    assert _cached(path).length == 40 * MIB


def test_passing_through_keeps_a_window_only(tmp_path: Path, make_group: Callable[..., Group]) -> None:
    group = make_group(96 * MIB)
    path = file_beds.make_cold(tmp_path / "large", 256 * MIB)
    with Child(group.inside(lambda: prefault.warm(path, window="32 MiB"))) as child:
        result = child.result()
    assert group.killed == 0
    assert (result.failures, result.stopped) == ((), "")
    assert result.read_bytes == 256 * MIB
    assert 0 < result.bytes <= 32 * MIB
    assert result.bytes == _cached(path).length
    assert result.bytes + result.evicted_bytes == 256 * MIB


# --- arguments, and what is left behind ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"method": "mmap"}, "populate, readahead, pread"),
        ({"threads": 0}, "1 to 1024"),
        ({"threads": True}, "1 to 1024"),
        ({"budget": "-1"}, "not a size"),
        ({"window": "x"}, "not a size"),
        ({"window": "1 MiB"}, "a window has 2.0 MiB at least, not 1.0 MiB"),
        ({"rate": "0"}, "rate of 0"),
        ({"progress": 3}, "progress"),
        ({"ranges": [(5, 3)]}, "not a range"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], word: str) -> None:
    path = file_beds.make_cold(tmp_path / "file", 2 * MIB)
    with pytest.raises((TypeError, ValueError), match=word):
        prefault.warm(path, **arguments)
    assert not _cached(path)


@pytest.fixture
def _warmed_before(tmp_path: Path) -> None:
    """The first call loads modules, and the stacks of its threads stay with the C library: mappings, but no leak."""
    prefault.warm(file_beds.make_cold(tmp_path / "first", 20 * MIB), threads=3)


@pytest.mark.usefixtures("_warmed_before", "no_leaks")
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    path = file_beds.make_cold(tmp_path / "file", 20 * MIB)
    for method in METHOD_NAMES:
        file_beds.evict(path)
        prefault.warm([path, tmp_path / "none"], method=method, threads=3)
    assert oracle.descriptors()
