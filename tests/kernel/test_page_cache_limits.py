"""Mapped files and paths beside a memory cgroup that is too small for their pages: the page cache as a demand.

Pages are counted by pagemap and by fincore(1).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import prefault
from prefault._kernel._call import INT, LONG, declare
from prefault.errors import HeadroomError
from prefault.limits.target import headroom
from prefault.sizes import MIB, PAGE_SIZE
from support import file_beds, needs, oracle
from support.cgroups import Group, leave
from support.children import in_child
from support.regions import file_of

LIMIT = 64 * MIB
LITTLE = 3 * MIB
"""Bytes that a full cgroup may lose between the end of a call and the look of the test."""

Make = Callable[..., Group]


def read(path: Path, size: int) -> None:
    """Bring the first bytes of a file into the page cache, charged to the cgroup of this process."""
    with path.open("rb", buffering=0) as file:
        for _ in range(0, size, MIB):
            file.read(MIB)


class Outcome(NamedTuple):
    """Result of a populate call, or its HeadroomError, with the bytes that are present after it."""

    refused: str
    limit: str
    needed: int
    available: int
    offset: int
    populated: int
    present: int
    stayed: bool
    """Whether ``populated`` of the error names just the pages that are present."""


def populate(mapping: prefault.Mapping, **options: Any) -> Outcome:
    start, stop = mapping.range
    try:
        result = prefault.populate(mapping, **options)
    except HeadroomError as error:
        leave()
        there = oracle.present(start, stop - start)
        named = [address in error.populated for address in range(start, stop, PAGE_SIZE)]
        agrees = sum(one != other for one, other in zip(there, named, strict=True)) * PAGE_SIZE < LITTLE
        present = sum(there) * PAGE_SIZE
        return Outcome(
            str(error), error.limit, error.needed_bytes, error.available_bytes, error.offset, error.populated_bytes,
            present, agrees,
        )  # fmt: skip
    present = oracle.present_bytes(start, stop - start)
    return Outcome("", "", 0, 0, 0, result.bytes, present, stayed=True)


def populated(path: Path, *, shared: bool = True, **options: Any) -> Outcome:
    with prefault.Mapping(backing=prefault.File(path), shared=shared) as mapping:
        return populate(mapping, **options)


ACCESSES = [
    pytest.param({"shared": True, "access": "read"}, id="shared-read"),
    pytest.param({"shared": True, "access": "write"}, id="shared-write"),
    pytest.param({"shared": True, "access": None}, id="shared-default"),
    pytest.param({"shared": False, "access": "read"}, id="private-read"),
    pytest.param({"shared": False, "access": None}, id="private-default"),
]


@pytest.mark.parametrize("how", ACCESSES)
def test_a_file_of_twice_the_limit_is_refused_and_not_read(how: dict[str, Any], make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 2 * LIMIT)
    found = in_child(group.inside(lambda: populated(path, **how)))
    assert found.limit == f"{group.limit_file.name} of {group.directory}"
    assert found.needed == 2 * LIMIT
    assert LIMIT // 2 < found.available <= LIMIT
    assert (found.offset, found.populated, found.present) == (0, 0, 0)
    assert "cannot populate 128.0 MiB: 128.0 MiB of page cache are needed" in found.refused
    assert f"write to {group.limit_file}" in found.refused
    assert "headroom='ignore'; nothing was populated" in found.refused
    assert file_beds.cached_pages(path) == 0
    assert group.killed == 0


@pytest.mark.parametrize("how", ACCESSES)
def test_a_file_that_fits_is_populated(how: dict[str, Any], make_group: Make, tmp_path: Path) -> None:
    """Also where the page cache of other files has to go for it."""
    group = make_group(LIMIT)
    other, path = file_beds.make_cold(tmp_path / "other", LIMIT), file_beds.make_cold(tmp_path / "file", LIMIT // 2)

    def beside_another() -> Outcome:
        read(other, LIMIT)
        return populated(path, **how)

    found = in_child(group.inside(beside_another))
    assert found.refused == ""
    assert LIMIT // 2 - found.present < LIMIT // 128
    assert group.killed == 0


@pytest.mark.parametrize("shared", [True, False])
def test_pages_that_another_cgroup_has_paid_for_are_no_demand(shared: bool, make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 2 * LIMIT)
    read(path, 2 * LIMIT)
    found = in_child(group.inside(lambda: populated(path, shared=shared)))
    assert found.refused == ""
    assert 2 * LIMIT - found.present < LIMIT // 64
    file_beds.evict(path)
    read(path, 3 * LIMIT // 2)  # and the rest fits
    found = in_child(group.inside(lambda: populated(path, shared=shared)))
    assert found.refused == ""
    assert 2 * LIMIT - found.present < LIMIT // 64


@pytest.mark.parametrize("how", ACCESSES)
@pytest.mark.parametrize("rollback", [False, True])
def test_pages_that_push_each_other_out_are_told_at_the_end(
    how: dict[str, Any], rollback: bool, make_group: Make, tmp_path: Path
) -> None:
    """The missing half would fit if the other half, which this cgroup has paid for, were not wanted as well."""
    group = make_group(LIMIT)
    size = 3 * LIMIT // 2
    path = file_beds.make_cold(tmp_path / "file", size)

    def after_reading_half() -> Outcome:
        read(path, size // 2)
        return populated(path, rollback=rollback, **how)

    found = in_child(group.inside(after_reading_half))
    assert "were evicted while the others came in" in found.refused
    assert "96.0 MiB of page cache are needed" in found.refused
    assert found.limit == f"{group.limit_file.name} of {group.directory}"
    assert found.needed == size
    assert size // 4 < found.available < LIMIT
    assert found.stayed
    if rollback:
        assert "discarded again" in found.refused
        assert found.populated == found.present == 0
    else:
        assert abs(found.populated - found.present) < LITTLE
        assert size // 4 < found.populated < LIMIT
    assert group.killed == 0


def test_pages_that_are_locked_are_memory_that_kills(make_group: Make, tmp_path: Path) -> None:
    """The half that is cached looks reclaimable, and is not once it is locked."""
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 3 * LIMIT // 2)

    def after_reading_half() -> Outcome:
        read(path, 3 * LIMIT // 4)
        return populated(path, access=None, method="mlock")

    found = in_child(group.inside(after_reading_half))
    assert "of memory are needed" in found.refused
    assert found.present == 0

    def part_of_it() -> list[str]:
        with prefault.Mapping(backing=prefault.File(path), writable=False) as mapping:
            prefault.populate(mapping, headroom="ignore")
            found = [populate(mapping, method="mlock").refused]
            group.enter()
            # What is locked already takes nothing more.
            return [*found, *(populate(mapping, method="mlock", length=5 * LIMIT // 8).refused for _ in range(2))]

    refused, *fits = in_child(group.inside(part_of_it))
    assert "of memory are needed" in refused
    assert fits == ["", ""]
    assert group.killed == 0


def test_ignored_headroom_goes_on(make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 2 * LIMIT)
    found = in_child(group.inside(lambda: populated(path, headroom="ignore")))
    assert (found.refused, found.populated) == ("", 2 * LIMIT)
    assert found.present < LIMIT
    assert group.killed == 0


def test_a_limit_that_shrinks_meanwhile_is_told(make_group: Make, tmp_path: Path) -> None:
    """Memory was free for all of it at the start."""
    group = make_group(4 * LIMIT)
    path = file_beds.make_cold(tmp_path / "file", LIMIT)

    def shrink() -> Outcome:
        calls: list[int] = []

        def progress(done: int, total: int) -> None:
            if not calls and done > total // 2:
                calls.append(done)
                group.limit(LIMIT // 2)

        return populated(path, progress=progress)

    found = in_child(group.inside(shrink))
    assert "were evicted while the others came in" in found.refused
    assert found.stayed


def test_holes_take_page_cache_when_they_are_read(make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    with file_of(tmp_path, 2 * LIMIT) as (fd, path):
        found = in_child(group.inside(lambda: populated(path, access="read")))
        assert found.needed == 2 * LIMIT
        assert (found.present, os.fstat(fd).st_blocks) == (0, 0)


def test_plan_and_headroom_say_what_does_not_fit(make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 2 * LIMIT)
    small = file_beds.make_cold(tmp_path / "small", LIMIT // 4)

    def ask() -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
        with (
            prefault.Mapping(backing=prefault.File(path), writable=False) as large,
            prefault.Mapping(backing=prefault.File(small), writable=False) as fits,
        ):
            plans = [str(prefault.plan(target)) for target in (large, [large, fits], path, [path])]
            limits = {limit.name: (limit.limit_bytes, limit.available_bytes) for limit in headroom(large).limits
                      if limit.bounds == "page cache"}  # fmt: skip
            return plans, [str(prefault.plan(target)) for target in (fits, small)], limits

    plans, fitting, limits = in_child(group.inside(ask))
    told = f"of page cache are needed, and {group.limit_file.name} of {group.directory} leaves"
    assert "128.0 MiB are missing from the page cache" in plans[0]
    assert f"it does not fit: 128.0 MiB {told}" in plans[0]
    assert f"it does not fit: 144.0 MiB {told}" in plans[1]
    assert f"it does not fit: 128.0 MiB {told}" in plans[2]
    assert f"it does not fit: 128.0 MiB {told}" in plans[3]
    assert "16.0 MiB are missing from the page cache" in fitting[0]
    assert not any("does not fit" in text for text in fitting)
    size, available = limits[f"{group.limit_file.name} of {group.directory}"]
    assert size == LIMIT
    assert LIMIT // 2 < available <= LIMIT
    assert "MemTotal" in limits
    assert file_beds.cached_pages(path) == file_beds.cached_pages(small) == 0


def test_files_that_fit_one_by_one_and_not_together(make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    paths = [file_beds.make_cold(tmp_path / name, 3 * LIMIT // 4) for name in ("a", "b")]

    def together() -> tuple[str, int, int, list[int]]:
        with contextlib.ExitStack() as stack:
            one, two = (stack.enter_context(prefault.Mapping(backing=prefault.File(path), writable=False)) for path in paths)
            again = stack.enter_context(prefault.Mapping(backing=prefault.File(paths[0]), writable=False))
            try:
                prefault.populate({"one": one, "two": two})
            except HeadroomError as error:
                text, needed = str(error), error.needed_bytes
            nothing = oracle.present_bytes(one.range.start, one.range.length)
            # A file that is mapped twice takes its pages once.
            prefault.populate([one, again])
            return text, needed, nothing, [oracle.present_bytes(*_place(mapping)) for mapping in (one, again)]

    text, needed, nothing, present = in_child(group.inside(together))
    assert "nothing was populated" in text
    assert (needed, nothing) == (3 * LIMIT // 2, 0)
    assert all(3 * LIMIT // 4 - size < LIMIT // 64 for size in present)


def _place(mapping: prefault.Mapping) -> tuple[int, int]:
    return mapping.range.start, mapping.range.length


def test_a_collection_whose_parts_push_each_other_out(make_group: Make, tmp_path: Path) -> None:
    """The file that is cached before is evicted for the other one; the error names the member."""
    group = make_group(LIMIT)
    paths = [file_beds.make_cold(tmp_path / name, 3 * LIMIT // 4) for name in ("a", "b")]

    def together() -> tuple[str, int, int]:
        read(paths[0], 3 * LIMIT // 4)
        with (
            prefault.Mapping(backing=prefault.File(paths[0]), writable=False) as one,
            prefault.Mapping(backing=prefault.File(paths[1])) as two,
        ):
            with pytest.raises(HeadroomError, match="were evicted while the others came in") as caught:
                prefault.populate({"one": one, "two": two})
            leave()
            present = sum(oracle.present_bytes(*_place(mapping)) for mapping in (one, two))
            return str(caught.value), caught.value.populated_bytes, present

    text, told, present = in_child(group.inside(together))
    assert " of ['one'] (48.0 MiB)" in text or " of ['two'] (48.0 MiB)" in text
    assert abs(told - present) < LITTLE
    assert told < LIMIT


def test_only_the_ranges_that_are_asked_for_count(make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 4 * LIMIT)

    def ranges(size: int) -> int:
        with prefault.Mapping(backing=prefault.File(path), writable=False) as mapping:
            wanted = [(offset, size) for offset in range(0, 4 * LIMIT, 16 * MIB)]
            try:
                return prefault.populate_many(mapping, wanted).bytes
            except HeadroomError as error:
                return -error.needed_bytes

    assert in_child(group.inside(lambda: ranges(2 * MIB))) == 32 * MIB
    file_beds.evict(path)
    assert in_child(group.inside(lambda: ranges(8 * MIB))) == -128 * MIB


@pytest.mark.parametrize("kind", ["path", "list", "directory", "selection"])
def test_a_path_is_refused_before_anything_is_read(kind: str, make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    directory = tmp_path / "files"
    directory.mkdir()
    sizes = {"a": 2 * LIMIT} if kind == "path" else {"a": LIMIT, "b": LIMIT}
    paths = [file_beds.make_cold(directory / name, size) for name, size in sizes.items()]
    targets: dict[str, Callable[[], Any]] = {
        "path": lambda: paths[0], "list": lambda: paths, "directory": lambda: directory,
        "selection": lambda: prefault.select(directory),
    }  # fmt: skip
    target = targets[kind]

    def refused() -> tuple[str, str, int]:
        with pytest.raises(HeadroomError) as caught:
            prefault.populate(target())
        return str(caught.value), caught.value.limit, caught.value.needed_bytes

    text, limit, needed = in_child(group.inside(refused))
    assert "cannot bring in the 128.0 MiB" in text
    assert "nothing was brought in" in text
    assert (limit, needed) == (f"{group.limit_file.name} of {group.directory}", 2 * LIMIT)
    assert [file_beds.cached_pages(path) for path in paths] == [0] * len(paths)
    goes_on = in_child(group.inside(lambda: str(prefault.populate(target(), headroom="ignore"))))
    assert "evicted again, as memory is short" in goes_on
    assert group.killed == 0


def test_a_path_that_is_cached_elsewhere_or_in_part(make_group: Make, tmp_path: Path) -> None:
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 2 * LIMIT)
    read(path, 2 * LIMIT)
    assert in_child(group.inside(lambda: prefault.populate(path).bytes)) < LIMIT // 64
    file_beds.evict(path)

    def after_a_part() -> tuple[str, int, int]:
        read(path, LIMIT)
        with pytest.raises(HeadroomError) as caught:
            prefault.populate(path, length=3 * LIMIT // 2)
        return str(caught.value), caught.value.needed_bytes, caught.value.available_bytes

    text, needed, available = in_child(group.inside(after_a_part))
    assert "more would evict what was brought in before" in text
    assert "were brought in" in text
    assert 0 <= available < needed < 3 * LIMIT // 2


_PR_SET_DUMPABLE = 4


def test_a_file_of_which_the_kernel_does_not_tell(make_group: Make, tmp_path: Path) -> None:
    """To mincore another user's file is cached whole (Linux 5.2): it is not refused, and told at the end."""
    needs.root("become another user")
    group = make_group(LIMIT)
    path = file_beds.make_cold(tmp_path / "file", 2 * LIMIT)

    def as_another() -> Outcome:
        with prefault.Mapping(backing=prefault.File(path), writable=False) as mapping:
            os.seteuid(file_beds.NOBODY)
            declare("prctl", INT, LONG)(_PR_SET_DUMPABLE, 1)  # so that /proc/self is its own
            try:
                start, stop = mapping.range
                prefault.populate(mapping)
            except HeadroomError as error:
                os.seteuid(0)
                present = oracle.present_bytes(start, stop - start)
                return Outcome(str(error), error.limit, error.needed_bytes, 0, 0, error.populated_bytes, present, True)
        raise AssertionError("not refused")

    found = in_child(group.inside(as_another))
    assert "were evicted while the others came in" in found.refused
    assert abs(found.populated - found.present) < LITTLE
