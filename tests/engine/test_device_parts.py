"""Requirement C7: populate, discard, residency and lock of memory that is a device's in part only."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device import DeviceArea
from prefault.errors import DiscardError, DriverError, HeadroomError, PopulateError
from prefault.sizes import PAGE_SIZE as PAGE
from prefault.sparse import SparseMemory
from support import oracle
from support.block_devices import opened
from support.devices import expected
from support.placed_areas import Counted, buffer_at, placed, room

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES = 16
FIRST, COUNT, OFFSET = 4, 4, 8
"""Pages of the memory that are the device's, and the first page of the device that lies there."""


class Mixed:
    """Sixteen pages of memory, of which four are pages 8 to 11 of a device."""

    def __init__(self, stack: ExitStack, address: int, buffer: object, device: Counted) -> None:
        self.address = address
        self.buffer = buffer
        self.device = device
        self.area = stack.enter_context(placed(device, address + FIRST * PAGE, COUNT * PAGE, OFFSET * PAGE))

    @property
    def present(self) -> list[bool]:
        return oracle.present(self.address, PAGES * PAGE)

    def content(self) -> bytes:
        return ctypes.string_at(self.address, PAGES * PAGE)


def _in_anonymous(stack: ExitStack, device: Counted) -> Mixed:
    address = stack.enter_context(room(PAGES))
    return Mixed(stack, address, buffer_at(address, PAGES * PAGE), device)


def _in_sparse(backing: str, unpopulated: str) -> object:
    def make(stack: ExitStack, device: Counted) -> Mixed:
        memory = stack.enter_context(SparseMemory(PAGES * PAGE, backing=backing, unpopulated=unpopulated))  # type: ignore[arg-type]
        return Mixed(stack, memory.range.start, memory, device)

    return make


KINDS = {
    "anonymous": _in_anonymous,
    "sparse-anonymous": _in_sparse("anonymous", "zeros"),
    "sparse-anonymous-fault": _in_sparse("anonymous", "fault"),
    "sparse-memfd": _in_sparse("memfd", "zeros"),
    "sparse-memfd-fault": _in_sparse("memfd", "fault"),
}


@pytest.fixture(params=KINDS)
def mixed(request: pytest.FixtureRequest) -> Iterator[Mixed]:
    with ExitStack() as stack:
        yield KINDS[request.param](stack, Counted())  # type: ignore[operator]


def _content(device: Counted) -> bytes:
    inside = b"".join(expected(device, page) for page in range(OFFSET, OFFSET + COUNT))
    return bytes(FIRST * PAGE) + inside + bytes((PAGES - FIRST - COUNT) * PAGE)


def test_populate_asks_the_driver_once_for_its_part(mixed: Mixed) -> None:
    result = prefault.populate(mixed.buffer)
    assert mixed.device.counts == (0, 1, COUNT, 0)
    assert (result.bytes, result.present_bytes) == (PAGES * PAGE, 0)
    assert "device" in result.method.split(", ")
    assert len(result.method.split(", ")) == 2
    assert all(mixed.present)
    assert mixed.content() == _content(mixed.device)
    again = prefault.populate(mixed.buffer)
    assert (again.bytes, again.present_bytes) == (0, PAGES * PAGE)


def test_populate_of_a_part_that_begins_and_ends_inside_of_pages(mixed: Mixed) -> None:
    result = prefault.populate(mixed.buffer, offset=3 * PAGE + 5, length=2 * PAGE)
    assert result.bytes == 3 * PAGE
    assert mixed.present == [page in (3, 4, 5) for page in range(PAGES)]
    assert mixed.device.counts == (0, 1, 2, 0)


def test_discard_gives_each_part_back_where_it_came_from(mixed: Mixed) -> None:
    prefault.populate(mixed.buffer)
    ctypes.memset(mixed.address, 7, PAGES * PAGE)
    result = prefault.discard(mixed.buffer, offset=2 * PAGE, length=4 * PAGE)  # two pages of each
    assert (result.bytes, result.freed_bytes) == (4 * PAGE, 4 * PAGE)
    assert "device" in result.method.split(", ")
    assert mixed.device.counts[3] == 2
    assert mixed.present == [page not in (2, 3, 4, 5) for page in range(PAGES)]
    for page in (0, 1, *range(6, PAGES)):
        assert ctypes.string_at(mixed.address + page * PAGE, PAGE) == b"\7" * PAGE
    prefault.populate(mixed.buffer)
    assert mixed.content()[2 * PAGE : 6 * PAGE] == _content(mixed.device)[2 * PAGE : 6 * PAGE]


def test_discard_of_device_pages_alone_leaves_the_file_of_the_sparse_memory(mixed: Mixed) -> None:
    # Pages 8 to 11 of that file, where the frames of the device's pages lie in the device's file, belong to the memory.
    prefault.populate(mixed.buffer)
    ctypes.memset(mixed.address, 7, PAGES * PAGE)
    result = prefault.discard(mixed.buffer, offset=FIRST * PAGE, length=COUNT * PAGE)
    assert (result.bytes, result.method) == (COUNT * PAGE, "device")
    for page in (*range(FIRST), *range(FIRST + COUNT, PAGES)):
        assert ctypes.string_at(mixed.address + page * PAGE, PAGE) == b"\7" * PAGE


class _Pinned(Counted):
    """Refuses to take pages back."""

    def discard(self, area: DeviceArea, pages: range) -> None:
        raise PermissionError("the pages are pinned")


@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_that_refuses_a_discard_loses_no_byte_of_the_other_parts(kind: str) -> None:
    with ExitStack() as stack:
        mixed = KINDS[kind](stack, _Pinned())  # type: ignore[operator]
        prefault.populate(mixed.buffer)
        ctypes.memset(mixed.address, 7, PAGES * PAGE)
        with pytest.raises(DiscardError, match="the pages are pinned"):
            prefault.discard(mixed.buffer)
        assert mixed.content() == b"\7" * (PAGES * PAGE)
        if isinstance(mixed.buffer, SparseMemory):
            with pytest.raises(DiscardError, match="the pages are pinned"):
                mixed.buffer.discard_many([(2 * PAGE, 4 * PAGE)])
            for page in range(FIRST, FIRST + COUNT):
                assert mixed.buffer.read(page * PAGE, PAGE) == b"\7" * PAGE


def test_lock_and_residency(mixed: Mixed) -> None:
    before = prefault.residency(mixed.buffer)
    assert before.present_bytes == 0
    result = prefault.lock(mixed.buffer)
    assert (result.bytes, result.populated.bytes) == (PAGES * PAGE, PAGES * PAGE)
    assert mixed.device.counts == (0, 1, COUNT, 0)
    assert prefault.residency(mixed.buffer).present_bytes == PAGES * PAGE
    prefault.unlock(mixed.buffer)


def test_residency_does_not_count_frames_as_cached_files() -> None:
    device = Counted()
    with ExitStack() as stack:
        mixed = _in_anonymous(stack, device)
        prefault.populate(mixed.buffer)
        assert prefault.residency(mixed.buffer).cached_bytes is None


def test_plan_names_both_ways(mixed: Mixed) -> None:
    plan = prefault.plan(mixed.buffer)
    assert plan.length == (PAGES - COUNT) * PAGE
    assert "device memory" in str(plan)
    assert mixed.device.counts == (0, 0, 0, 0)


def test_progress_goes_from_nothing_to_all(mixed: Mixed) -> None:
    seen: list[tuple[int, int]] = []
    prefault.populate(mixed.buffer, progress=lambda done, whole: seen.append((done, whole)))
    assert {whole for _, whole in seen} == {PAGES * PAGE}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == PAGES * PAGE
    assert len(seen) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_before_the_failure_of_a_driver_is_undone(kind: str) -> None:
    device = Counted(bad=(OFFSET + 2,), batch_pages=1)
    with ExitStack() as stack:
        mixed = KINDS[kind](stack, device)  # type: ignore[operator]
        with pytest.raises(DriverError, match="worn out") as caught:
            prefault.populate(mixed.buffer, rollback=True)
        error = caught.value
        assert (error.offset, error.address) == ((FIRST + 2) * PAGE, mixed.address + (FIRST + 2) * PAGE)
        assert error.populated_bytes == 0
        assert not any(mixed.present)
        asked = device.counts[2]
        with pytest.raises(DriverError):
            prefault.populate(mixed.buffer, rollback=True)
        assert device.counts[2] == 2 * asked, "a page stayed with the device's server"


def test_without_rollback_the_error_counts_all_parts() -> None:
    device = Counted(bad=(OFFSET + 2,), batch_pages=1)
    with ExitStack() as stack:
        mixed = _in_anonymous(stack, device)
        with pytest.raises(DriverError) as caught:
            prefault.populate(mixed.buffer)
        assert caught.value.populated_bytes == (FIRST + 2) * PAGE
        assert caught.value.populated.span == (mixed.address, mixed.address + (FIRST + 2) * PAGE)
        assert f"before that {FIRST * PAGE / 1024} KiB in other parts" in str(caught.value)
        assert mixed.present == [page < FIRST + 2 for page in range(PAGES)]


@pytest.mark.parametrize("kind", KINDS)
def test_device_pages_that_came_before_another_device_failed_go_back(kind: str) -> None:
    device = Counted()
    with ExitStack() as stack:
        mixed = KINDS[kind](stack, device)  # type: ignore[operator]
        other = Counted(bad=(0,))
        stack.enter_context(placed(other, mixed.address + 12 * PAGE, PAGE))
        supplied = mixed.address + FIRST * PAGE
        with pytest.raises(DriverError) as caught:
            prefault.populate(mixed.buffer, rollback=True)
        assert caught.value.offset == 12 * PAGE
        assert caught.value.populated_bytes == 0
        assert not any(oracle.present(supplied, COUNT * PAGE))
        assert mixed.area.connection.usable
        with pytest.raises(DriverError):
            prefault.populate(mixed.buffer, rollback=True)
        assert device.counts[2] == 2 * COUNT, "a page stayed with the device's server"


def test_undo_leaves_pages_that_another_client_maps(tmp_path: Path) -> None:
    device, bad = Counted(), Counted(bad=(0,))
    with (
        opened(device, tmp_path) as client,
        prefault.device.connect(str(client.path)) as stranger,
        stranger.map(PAGE, offset=PAGE) as theirs,
        room(8) as address,
        placed(client, address, 4 * PAGE),
        placed(bad, address + 4 * PAGE, PAGE),
    ):
        with pytest.raises(DriverError):
            prefault.populate(buffer_at(address, 8 * PAGE), rollback=True)
        assert device.counts[:3] == (0, 1, 4)
        assert not any(oracle.present(address, 4 * PAGE))
        prefault.populate(theirs)
        assert device.counts[2] == 4, "the page that another client may have written to was taken back"
        prefault.populate(buffer_at(address, 4 * PAGE))
        assert device.counts[2] == 4 + 3


def test_undo_leaves_pages_that_were_supplied_before() -> None:
    device = Counted()
    with ExitStack() as stack:
        mixed = _in_anonymous(stack, device)
        prefault.populate(mixed.buffer, offset=FIRST * PAGE, length=PAGE)
        ctypes.memset(mixed.address + FIRST * PAGE, 9, PAGE)
        bad = Counted(bad=(0,))
        stack.enter_context(placed(bad, mixed.address + 12 * PAGE, PAGE))
        with pytest.raises(DriverError):
            prefault.populate(mixed.buffer, rollback=True)
        assert mixed.present == [page == FIRST for page in range(PAGES)]
        assert ctypes.string_at(mixed.address + FIRST * PAGE, PAGE) == b"\x09" * PAGE


def test_two_areas_side_by_side_and_nothing_else() -> None:
    one, other = Counted(salt=1), Counted(salt=2)
    with room(8) as address, placed(one, address, 4 * PAGE), placed(other, address + 4 * PAGE, 4 * PAGE, 4 * PAGE):
        buffer = buffer_at(address, 8 * PAGE)
        result = prefault.populate(buffer)
        assert (result.bytes, result.method) == (8 * PAGE, "device")
        assert (one.counts, other.counts) == ((0, 1, 4, 0), (0, 1, 4, 0))
        wanted = b"".join([expected(one, page) for page in range(4)] + [expected(other, page) for page in range(4, 8)])
        assert ctypes.string_at(address, 8 * PAGE) == wanted
        result_2 = prefault.discard(buffer, offset=2 * PAGE, length=4 * PAGE)
        assert (result_2.bytes, result_2.freed_bytes, result_2.method) == (4 * PAGE, 4 * PAGE, "device")
        assert (one.counts[3], other.counts[3]) == (2, 2)
        assert str(prefault.plan(buffer)).startswith("device memory")


def test_a_part_that_is_mapped_for_reading_is_populated_readable() -> None:
    device = Counted()
    with room(8) as address, placed(device, address, 4 * PAGE, access="read"):
        buffer = buffer_at(address, 8 * PAGE)
        assert prefault.populate(buffer).bytes == 8 * PAGE
        with pytest.raises(PopulateError, match="not writable"):
            prefault.populate(buffer, access="write")


def test_ordinary_memory_that_does_not_fit_is_refused_before_the_driver_is_asked() -> None:
    device = Counted()
    pages = (1 << 40) // PAGE  # a tebibyte: no machine that runs this has it
    with room(pages) as address, placed(device, address, COUNT * PAGE):
        with pytest.raises(HeadroomError, match="nothing was populated") as caught:
            prefault.populate(buffer_at(address, pages * PAGE))
        assert caught.value.populated_bytes == 0
        assert caught.value.offset == COUNT * PAGE
        assert device.counts == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["sparse-anonymous", "sparse-anonymous-fault", "sparse-memfd", "sparse-memfd-fault"])
def test_many_ranges_across_a_device(kind: str) -> None:
    with ExitStack() as stack:
        mixed = KINDS[kind](stack, Counted())  # type: ignore[operator]
        memory = mixed.buffer
        assert isinstance(memory, SparseMemory)
        ranges = [(page * PAGE, PAGE) for page in (0, 2, 4, 5, 7, 9, 15)]
        result = memory.populate_many(ranges)
        assert result.bytes == 7 * PAGE
        assert mixed.device.counts[::2] == (0, 3)
        assert mixed.present == [page in (0, 2, 4, 5, 7, 9, 15) for page in range(PAGES)]
        ctypes.memset(mixed.address + 9 * PAGE, 5, PAGE)
        gone = memory.discard_many([(page * PAGE, PAGE) for page in (0, 4, 7)])
        assert (gone.bytes, gone.freed_bytes) == (3 * PAGE, 3 * PAGE)
        assert mixed.device.counts[3] == 2
        assert mixed.present == [page in (2, 5, 9, 15) for page in range(PAGES)]
        assert ctypes.string_at(mixed.address + 9 * PAGE, PAGE) == b"\5" * PAGE


@pytest.mark.parametrize("kind", ["sparse-anonymous-fault", "sparse-memfd"])
def test_many_ranges_are_all_or_none(kind: str) -> None:
    with ExitStack() as stack:
        mixed = KINDS[kind](stack, Counted(bad=(OFFSET + 3,), batch_pages=1))  # type: ignore[operator]
        memory = mixed.buffer
        assert isinstance(memory, SparseMemory)
        with pytest.raises(DriverError) as caught:
            memory.populate_many([(page * PAGE, PAGE) for page in (0, 2, 4, 7, 9)])
        assert caught.value.offset == 7 * PAGE
        assert not any(mixed.present)
        asked = mixed.device.counts[2]
        assert asked == 2
        memory.populate_many([(4 * PAGE, PAGE)])
        assert mixed.device.counts[2] == 3, "the page of the call that failed stayed with the device's server"
