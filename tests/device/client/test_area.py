"""An area in use: its verbs, its failures, its statistics and logs, its end."""

from __future__ import annotations

import copy
import ctypes
import errno
import gc
import json
import os
import pickle
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault._kernel import mman
from prefault._system.capabilities import UFFD_KERNEL_FAULTS
from prefault.device import AccessLog, Area, DeviceArea
from prefault.device.device_pool import Access
from prefault.device.driver import Supplied
from prefault.errors import DiscardError, DriverError, PopulateError, PopulateInterrupted, ProtectionError
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE
from support import needs, oracle, processes
from support.children import in_child
from support.device_server import ends_by
from support.devices import Enclave, Failing, Pattern, Remade, Slow, expected

pytestmark = pytest.mark.usefixtures("no_leaks")


def _all(device: Pattern) -> bytes:
    return b"".join(expected(device, page) for page in range(device.length // device.page_size))


def _pages(*numbers: int) -> RangeSet:
    return RangeSet(PageRange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in numbers)


# --- failing


def test_a_driver_that_fails_is_an_exception_with_all_that_is_known() -> None:
    device = Failing(8, bad=(5,), batch_pages=1)
    with prefault.device.map(device) as area:
        with pytest.raises(DriverError, match="page 5 is worn out") as caught:
            prefault.populate(area)
        error = caught.value
        assert error.offset == 5 * PAGE_SIZE
        assert error.address == area.address + 5 * PAGE_SIZE
        there = oracle.present(area.address, len(area))
        assert not there[5]
        assert error.populated == RangeSet(
            PageRange(area.address + page * PAGE_SIZE, area.address + (page + 1) * PAGE_SIZE)
            for page in range(8)
            if there[page]
        )
        assert "cannot supply the page at offset 20480 (page 5 of the device)" in str(error)
        assert area.read(0, 5 * PAGE_SIZE) == _all(device)[: 5 * PAGE_SIZE]  # the rest goes on


def test_the_offset_of_a_failure_counts_from_the_buffer() -> None:
    with prefault.device.map(Failing(8, bad=(5,), batch_pages=1), offset=2 * PAGE_SIZE) as area:
        view = area.memoryview()[PAGE_SIZE + 10 :]
        with pytest.raises(DriverError) as caught:
            prefault.populate(view)
        assert caught.value.offset == 2 * PAGE_SIZE - 10
        view.release()
        view = area.memoryview()[3 * PAGE_SIZE + 10 :]  # the page that fails begins before it
        with pytest.raises(DriverError, match="at offset 0") as caught:
            prefault.populate(view)
        assert caught.value.offset == 0
        view.release()


def test_read_is_an_exception_where_a_touch_is_sigbus() -> None:
    device = Failing(8, bad=(5,))
    with prefault.device.map(device) as area:
        with pytest.raises(DriverError):
            area.read(5 * PAGE_SIZE, 1)
        with pytest.raises(ValueError, match="outside"):
            area.read(8 * PAGE_SIZE, 1)
        assert area.read(7 * PAGE_SIZE - 1, 2) == _all(device)[7 * PAGE_SIZE - 1 :][:2]


class _Moody(Pattern):
    """The first call for page 2 fails."""

    _failed = False

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 2 and not self._failed:
            self._failed = True
            raise OSError("not today")
        return super().fault(area, page, access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


def test_a_poisoned_page_can_be_populated_later() -> None:
    needs.capability(UFFD_KERNEL_FAULTS)
    device = _Moody(4)
    with prefault.device.map(device) as area:
        reader, writer = os.pipe()
        try:
            # The kernel is told of the poison that a touch would be killed by.
            with area.memoryview() as view, pytest.raises(OSError) as caught:  # noqa: PT011
                os.write(writer, view[2 * PAGE_SIZE : 3 * PAGE_SIZE])
            assert caught.value.errno == errno.EFAULT
        finally:
            os.close(reader)
            os.close(writer)
        prefault.populate(area)
        assert bytes(area.memoryview()) == _all(device)


def test_populating_a_read_only_area_writable_is_refused() -> None:
    with prefault.device.map(Pattern(2)) as area, pytest.raises(ProtectionError, match="not writable"):
        prefault.populate(area, access="write")


def test_rollback_takes_out_what_the_call_brought_in() -> None:
    device = Failing(16, bad=(9,), batch_pages=1)
    with prefault.device.map(device) as area:
        assert area.memoryview()[0] == _all(device)[0]
        with pytest.raises(DriverError) as caught:
            prefault.populate(area, rollback=True)
        assert not caught.value.populated
        assert oracle.present(area.address, len(area)) == [True] + [False] * 15


# --- interrupting


def test_progress_counts_up_to_everything() -> None:
    device = Pattern(64, batch_pages=4)
    seen: list[tuple[int, int]] = []
    with prefault.device.map(device) as area:
        prefault.populate(area, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (64 * PAGE_SIZE, 64 * PAGE_SIZE)
    assert seen == sorted(seen)


def test_ctrl_c_stops_the_driver_and_reports_what_is_present() -> None:
    device = Slow(400, delay_s=0.02, batch_pages=2, writable=False)
    with prefault.device.map(device) as area:

        def interrupt() -> None:
            while not any(oracle.present(area.address, len(area))):
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(PopulateInterrupted, match="populated") as caught:
            prefault.populate(area)
        thread.join()
        there = oracle.present(area.address, len(area))
        assert caught.value.populated.length == sum(there) * PAGE_SIZE
        assert 0 < sum(there) < 400
        time.sleep(0.1)
        assert oracle.present(area.address, len(area)) == there  # nobody goes on behind our back
        assert area.read(399 * PAGE_SIZE) == expected(device, 399)  # and the server is in good health


def test_what_progress_raises_stops_it_and_comes_out() -> None:
    device = Slow(100, delay_s=0.01, batch_pages=2)
    with prefault.device.map(device) as area:

        def progress(done: int, total: int) -> None:
            raise ZeroDivisionError(f"{done} of {total}")

        with pytest.raises(ZeroDivisionError) as caught:
            prefault.populate(area, progress=progress)
        assert "populate was stopped" in caught.value.__notes__[0]
        assert area.read(0, 10) == expected(device, 0)[:10]


# --- verbs


def test_residency_is_the_page_tables() -> None:
    with prefault.device.map(Pattern(8)) as area:
        area.populate(offset=2 * PAGE_SIZE, length=3 * PAGE_SIZE)
        assert area.residency().ranges() == _pages(2, 3, 4)
        assert oracle.present(area.address, len(area)) == [page in (2, 3, 4) for page in range(8)]


def test_discarding_through_a_read_only_area_of_a_writable_device_is_refused() -> None:
    device = Pattern(4, writable=True)
    with prefault.device.map(device) as area, prefault.device.map(device, access="read") as reading:
        area.ndarray()[0] = 99
        with pytest.raises(DiscardError):
            reading.discard()
        assert reading.read(0, 1) == b"\x63"
        area.discard()
        assert area.read(0, PAGE_SIZE) == expected(device, 0)


# --- dirty pages


@pytest.mark.parametrize("kind", ["kernel", "server"])
def test_dirty_pages(kind: str) -> None:
    device: Any = Pattern(16, writable=True) if kind == "kernel" else Enclave(16)
    with prefault.device.map(device, track_dirty=True) as area:
        assert not area.dirty_pages()
        array = area.ndarray()
        area.populate("read", length=8 * PAGE_SIZE)
        assert not array[: 4 * PAGE_SIZE : PAGE_SIZE].all() or kind == "kernel"
        assert not area.dirty_pages()
        for page in (1, 2, 6, 12):  # the last was not there before
            array[page * PAGE_SIZE + page] = 200
        assert area.dirty_pages() == _pages(1, 2, 6, 12)
        assert area.dirty_pages(clear=True) == _pages(1, 2, 6, 12)
        assert not area.dirty_pages()
        array[2 * PAGE_SIZE] = 201
        assert area.dirty_pages(clear=True) == _pages(2)
        assert array[2 * PAGE_SIZE] == 201
        faults = area.stats().write_protect
        assert (faults == 0) == (kind == "kernel")
        del array


def test_a_dirty_page_that_left_the_page_table_is_still_dirty() -> None:
    with prefault.device.map(Pattern(4, writable=True), track_dirty=True) as area:
        area.populate("write")
        area.ndarray()[PAGE_SIZE] = 1
        mman.madvise(area.address, len(area), mman.MADV_DONTNEED)
        assert PAGE_SIZE in area.dirty_pages()


def test_writes_during_dirty_pages_are_in_a_later_result() -> None:
    pages = 64
    with prefault.device.map(Pattern(pages, writable=True), track_dirty=True) as area:
        area.populate()
        with area.memoryview() as array:
            _check_all_writes_reported(area, array, pages)


def _check_all_writes_reported(area: Area, array: memoryview, pages: int) -> None:
    rounds = [0] * pages
    stop = False

    def write() -> None:
        while not stop:
            for page in range(pages):
                array[page * PAGE_SIZE] = rounds[page] = (rounds[page] + 1) % 250

    thread = threading.Thread(target=write)
    thread.start()
    copy_of = [0] * pages
    for _ in range(50):
        for run in area.dirty_pages(clear=True):
            for page in range(run.start // PAGE_SIZE, run.stop // PAGE_SIZE):
                copy_of[page] = array[page * PAGE_SIZE]
        area.dirty_pages()
    stop = True
    thread.join()
    for run in area.dirty_pages(clear=True):
        for page in range(run.start // PAGE_SIZE, run.stop // PAGE_SIZE):
            copy_of[page] = array[page * PAGE_SIZE]
    assert copy_of == rounds  # as in copying a virtual machine that runs


def test_without_tracking_there_is_no_answer() -> None:
    with prefault.device.map(Pattern(4, writable=True)) as area, pytest.raises(ValueError, match="track_dirty=True"):
        area.dirty_pages()


# --- statistics and logs


def test_statistics_count_what_happened() -> None:
    device = Pattern(32)
    with prefault.device.map(device) as area, prefault.device.map(device) as other:
        view = area.memoryview()
        for page in range(5):
            assert view[page * PAGE_SIZE] == expected(device, page)[0]
        area.populate(offset=16 * PAGE_SIZE)
        found = area.stats()
        assert (found.missing, found.minor, found.write_protect, found.errors) == (5, 0, 0, 0)
        assert found.populated_pages == 16
        assert found.supplied_pages == 21
        assert sum(found.latency) == 5
        assert other.memoryview()[0] == view[0]
        assert (other.stats().missing, other.stats().minor) == (0, 1)
        assert "5 missing" in str(found)
        view.release()


def test_a_log_is_saved_loaded_and_replayed(tmp_path: Path) -> None:
    device = Pattern(64)
    with prefault.device.map(device) as area:
        for page in (40, 3, 4, 5, 60):
            assert area.memoryview()[page * PAGE_SIZE] == expected(device, page)[0]
        area.populate(offset=10 * PAGE_SIZE, length=6 * PAGE_SIZE)
        log = area.access_log()
        log.save(tmp_path / "log")
    assert log.length == device.length
    touched = [page for run in log.runs for page in range(run.offset // PAGE_SIZE, (run.offset + run.length) // PAGE_SIZE)]
    assert touched == [40, 3, 4, 5, 60, 10, 11, 12, 13, 14, 15]
    loaded = AccessLog.load(tmp_path / "log")
    assert loaded == log
    assert loaded.bytes == 11 * PAGE_SIZE
    with prefault.device.map(device) as area:
        done = area.replay(loaded)
        assert done.bytes == 11 * PAGE_SIZE
        assert oracle.present(area.address, len(area)) == [page in touched for page in range(64)]
        assert area.stats().faults == 0
    with prefault.device.map(device, 8 * PAGE_SIZE, 4 * PAGE_SIZE) as area:
        area.replay(loaded)
        assert oracle.present(area.address, len(area)) == [page in touched for page in range(4, 12)]


def test_a_log_of_another_device_is_refused(tmp_path: Path) -> None:
    with prefault.device.map(Pattern(8)) as area:
        log = area.access_log()
    with prefault.device.map(Pattern(9)) as area, pytest.raises(ValueError, match="the log is of Pattern of 32768 bytes"):
        area.replay(log)
    for text in (
        "", "[]", "{}", '{"format": "prefault access log"}', "[" * 100_000,
        '{"format": "prefault access log", "version": 2, "device": "x", "length": 1, "runs": []}',
        json.dumps({"format": "prefault access log", "version": 1, "device": "x", "length": 1, "runs": [[-1, 5]]}),
        json.dumps({"format": "prefault access log", "version": 1, "device": "x", "length": 1, "runs": [[1 << 40, 5]]}),
        json.dumps({"format": "prefault access log", "version": 1, "device": "x", "length": 1, "runs": [[1]]}),
    ):  # fmt: skip
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ValueError, match="is no access log of prefault"):
            AccessLog.load(tmp_path / "bad")


# --- co-location


def test_a_thread_is_pinned_until_the_last_of_its_colocated_areas_is_closed() -> None:
    device = Pattern(4)
    cpus = os.sched_getaffinity(0)
    first = prefault.device.map(device, colocate=True)
    second = prefault.device.map(device, colocate=True)
    first.close()
    assert len(os.sched_getaffinity(0)) == 1
    second.close()
    assert os.sched_getaffinity(0) == cpus


def test_colocation_pins_both_sides_and_is_undone() -> None:
    before = os.sched_getaffinity(0)
    with prefault.device.map(Pattern(4), colocate=True) as area:
        here = os.sched_getaffinity(0)
        assert len(here) == 1
        server = next(
            pid for pid in processes.descendants(os.getpid()) if Path(f"/proc/{pid}/comm").read_text() == "prefault-server\n"
        )
        assert os.sched_getaffinity(server) == here
        assert area.read(0, 8)
        with prefault.device.map(Pattern(2)):
            pass
    assert os.sched_getaffinity(0) == before


def test_reading_what_may_not_be_read() -> None:
    class Touched(Pattern):
        populates = False

    with prefault.device.map(Touched(4)) as area:
        assert area.read(0, 8)
        area.protect("none")
        with pytest.raises(ProtectionError, match="not readable"):
            area.read(0, 8)


def test_ctrl_c_at_any_moment_hangs_nothing_and_mixes_nothing_up() -> None:
    # In a child: what strikes inside of a finalizer is only printed, and may leave that one area mapped.
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def storm() -> int:
        signal.signal(signal.SIGALRM, interrupt)
        device, chance, interrupted = Pattern(64), random.Random(7), 0
        keeper = prefault.device.map(device)
        for _ in range(150):
            first = chance.randrange(60)
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 5e-3))
                with prefault.device.map(device, 4 * PAGE_SIZE, first * PAGE_SIZE, populate=chance.random() < 0.5) as area:
                    assert area.read() == b"".join(expected(device, page) for page in range(first, first + 4))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
        gc.collect()
        assert keeper.read() == _all(device)
        return interrupted

    assert in_child(storm) > 0


# --- the end


def test_closing() -> None:
    area = prefault.device.map(Pattern(2))
    view = area.memoryview()
    with pytest.raises(BufferError, match="a view"):
        area.close()
    assert view[0] == expected(Pattern(2), 0)[0]
    view.release()
    area.close()
    area.close()
    assert area.closed
    for call in (
        area.memoryview, area.ndarray, area.populate, area.stats, area.access_log, area.lock, area.dirty_pages,
        lambda: area.fd, lambda: area.address, lambda: area.protect("read"), area.read, area.discard, area.residency,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            call()
    assert "closed" in repr(area)


def test_leaving_the_with_by_an_exception_while_a_view_lives() -> None:
    kept: list[Any] = []

    def use() -> None:
        with prefault.device.map(Pattern(2)) as area:
            kept.append(area.ndarray())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert kept[0][0] == expected(Pattern(2), 0)[0]


def test_an_unreferenced_area_is_collected_and_its_server_ends() -> None:
    before = processes.descendants(os.getpid())
    device = Pattern(4)
    area = prefault.device.map(device)
    memory = weakref.ref(area._memory)
    array = area.ndarray()
    del area
    gc.collect()
    assert bytes(array) == _all(device)  # a view keeps it
    del array
    gc.collect()
    assert memory() is None
    assert processes.descendants(os.getpid()) == before


def _collect(done: int, total: int) -> None:
    gc.collect()


def _frame_mappings() -> set[str]:
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "prefault-frames" in line}


def test_areas_that_are_collected_in_the_middle_of_requests() -> None:
    gc.collect()
    before = _frame_mappings()
    device = Pattern(64, batch_pages=1)
    with prefault.device.map(device) as area:
        for _ in range(20):
            cycle: list[Any] = [prefault.device.map(device, PAGE_SIZE)]
            cycle.append(cycle)
            del cycle
            area.populate(progress=_collect)
            area.discard()
        assert bytes(area.memoryview()) == _all(device)
    gc.collect()
    assert _frame_mappings() <= before


def test_copies_are_refused() -> None:
    with prefault.device.map(Pattern(2)) as area:
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                way(area)


_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4


@pytest.mark.parametrize(
    ("old_pages", "flags"),
    [(8, _MAYMOVE), (8, _MAYMOVE | _FIXED), (8, _MAYMOVE | _DONTUNMAP), (0, _MAYMOVE)],
    ids=["grown", "moved", "left behind", "duplicated"],
)
def test_a_missing_page_of_memory_that_mremap_moved_is_sigbus_and_not_zeros(old_pages: int, flags: int) -> None:
    """Its driver is not asked for the new address, and the kernel would put zeros into the frames that all clients share."""
    libc = ctypes.CDLL(None)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)

    def move(say: Callable[[str], None]) -> None:
        with prefault.device.map(Remade(8)) as area:
            prefault.populate(area, length=4 * PAGE_SIZE)
            target = mman.mmap(0, 16 * PAGE_SIZE, mman.PROT_NONE, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS)
            grown = 16 if flags == _MAYMOVE and old_pages else 8
            moved = libc.mremap(area.address, old_pages * PAGE_SIZE, grown * PAGE_SIZE, flags, target)
            if old_pages:  # the page-table entries move along
                say(f"{ctypes.string_at(moved + 3 * PAGE_SIZE, PAGE_SIZE) == expected(Remade(8), 3)} ")
            say(f"{ctypes.string_at(moved + 5 * PAGE_SIZE, PAGE_SIZE).strip(bytes(1))!r}")

    assert ends_by(move) == ("True " if old_pages else "", -signal.SIGBUS)


def test_threads_at_once() -> None:
    device = Pattern(256, batch_pages=4)
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            with prefault.device.map(device, 64 * PAGE_SIZE, number % 4 * 64 * PAGE_SIZE) as area:
                for turn in range(5):
                    area.populate(offset=turn * 8 * PAGE_SIZE)
                    area.stats()
                    first = number % 4 * 64
                    assert area.read() == b"".join(expected(device, page) for page in range(first, first + 64))
                    area.discard(length=32 * PAGE_SIZE)
        except BaseException as error:  # noqa: BLE001  the main thread looks at it
            wrong.append(repr(error))

    def run() -> list[str]:
        with prefault.device.map(device):
            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return wrong

    assert in_child(run) == []  # in a child, as stacks of threads stay mapped


def test_a_hundred_areas() -> None:
    device = Pattern(128)
    with prefault.device.map(device):
        areas = [prefault.device.map(device, PAGE_SIZE, number * PAGE_SIZE) for number in range(100)]
        assert [area.read(0, 16) for area in areas] == [expected(device, page)[:16] for page in range(100)]
        for area in areas:
            area.close()


def test_populate_errors_are_pickled_like_all_others() -> None:
    with prefault.device.map(Failing(8)) as area, pytest.raises(PopulateError) as caught:
        area.populate()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.offset, again.populated, str(again)) == (caught.value.offset, caught.value.populated, str(caught.value))
