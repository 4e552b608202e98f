"""Real cells in real workers, and what becomes of the grid when a worker, a cell or the user ends it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prefault import testing
from prefault._system import capabilities, hugetlb
from prefault.bench import grid, obstacles, places, runner
from prefault.bench.grid import Cell
from prefault.bench.kinds import HUGE_PAGE_BYTES, KINDS, Places
from prefault.bench.results import CellResult, Status
from prefault.bench.runner import Repeated
from prefault.bench.stopping import StopRequest
from prefault.bench.worker_process import Worker, WorkerError
from support import processes

SIZE = 2 << 20
WRITE = Cell(SIZE, "private", "Anon 4 KiB", "write")
POPULATE = Cell(SIZE, "private", "Anon 4 KiB", "populate_write")


@pytest.fixture
def where(tmp_path: Path) -> Places:
    return Places(file=str(tmp_path))


def _results(
    cells: list[Cell],
    where: Places,
    *,
    repeats: int = 2,
    stop: StopRequest | None = None,
    meanwhile: Callable[[Repeated], None] | None = None,
) -> list[CellResult]:
    results = []
    with closing(runner.run(cells, repeats=repeats, places=where, stop=stop)) as events:
        for event in events:
            if isinstance(event, Repeated) and meanwhile is not None:
                meanwhile(event)
            elif isinstance(event, CellResult):
                results.append(event)
    return results


def _workers() -> list[int]:
    """Our children that run the worker."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat, words = (directory / "stat").read_text(), (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat.rpartition(")")[2].split()[1]) == os.getpid() and b"prefault.bench.worker" in words:
            found.append(int(directory.name))
    return found


def test_a_grid_is_measured(where: Places) -> None:
    cells = [cell for cell in grid.quick_grid(SIZE) if KINDS[cell.backing].room != "pool"]
    results = {result.cell: result for result in _results(cells, where)}
    assert set(results) == set(cells)
    for cell, result in results.items():
        if KINDS[cell.backing].room == "disk" and places.in_memory(str(where.file)):
            assert result.status is Status.UNAVAILABLE
        else:
            assert (result.status, len(result.values_ns), result.reason) == (Status.MEASURED, 2, None)
    assert _workers() == []


def test_memory_is_warmed_up_first(where: Places) -> None:
    with closing(runner.run([WRITE], repeats=1, places=where)) as events:
        first = next(events)
    assert isinstance(first, runner.WarmedUp)
    assert first.size_bytes >= SIZE


def test_a_killed_worker_fails_its_cell_and_the_grid_goes_on(where: Places) -> None:
    def kill(event: Repeated) -> None:
        if event.cell == WRITE:
            for pid in _workers():  # none any more, when times that it wrote before it died are read
                os.kill(pid, signal.SIGKILL)

    killed, after = _results([WRITE, POPULATE], where, repeats=500, meanwhile=kill)
    assert killed.status is Status.FAILED
    assert killed.reason is not None
    assert "SIGKILL" in killed.reason
    assert killed.values_ns
    assert killed.statistics is None
    assert (after.status, len(after.values_ns)) == (Status.MEASURED, 500)
    assert _workers() == []


def test_a_worker_killed_between_cells_harms_none(where: Places) -> None:
    results = []
    with closing(runner.run([WRITE, POPULATE], repeats=1, places=where)) as events:
        for event in events:
            if isinstance(event, CellResult):
                results.append(event.status)
                for pid in _workers():
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)  # it is dead when the next cell looks
    assert results == [Status.MEASURED, Status.MEASURED]


def test_an_error_in_a_cell_is_its_reason_and_the_grid_goes_on(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "obstacle", lambda *_: None)  # so that it is tried
    nowhere = Places(file=str(Path(str(where.file)) / "missing"))
    failed, after = _results([Cell(SIZE, "shared", "file", "write"), WRITE], nowhere)
    assert failed.status is Status.FAILED
    assert failed.reason is not None
    assert "No such file" in failed.reason
    assert after.status is Status.MEASURED


def test_a_sigbus_ends_the_worker_and_not_us(small_tmpfs: Callable[[str], Path]) -> None:
    worker = Worker()
    worker.measure(Cell(2 * SIZE, "shared", "tmpfs", "write"), 1, Places(tmpfs=str(small_tmpfs("1m"))))
    with pytest.raises(WorkerError, match="SIGBUS"):
        worker.repetition(20)


def test_a_silent_worker_is_killed(where: Places) -> None:
    worker = Worker()
    worker.measure(Cell(64 << 20, "private", "Anon 4 KiB", "write"), 1, where)
    with pytest.raises(WorkerError, match="no answer within 0 s"):
        worker.repetition(0)
    assert not worker.alive


def test_a_stop_keeps_what_was_measured(where: Places) -> None:
    with StopRequest() as stop:

        def request(event: Repeated) -> None:
            if event.cell == POPULATE:
                stop.request()

        done, caught, left = _results(
            [WRITE, POPULATE, Cell(SIZE, "shared", "Memfd 2 MiB", "write")], where, repeats=100, stop=stop, meanwhile=request
        )
    assert (done.status, len(done.values_ns)) == (Status.MEASURED, 100)
    assert caught.status is Status.STOPPED
    assert 1 <= len(caught.values_ns) < 100
    assert (left.status, left.values_ns, left.reason) == (Status.STOPPED, (), runner.NOT_REACHED)
    assert processes.eventually(lambda: not _workers())  # the report does not wait for the end of a killed worker


def test_a_killed_worker_that_is_slow_to_end_is_reaped_by_the_next(where: Places) -> None:
    slow = Worker()
    slow.kill(wait_seconds=0)
    pid = slow.pid
    del slow
    gc.collect()  # a warning of a process that was not waited for would be an error
    assert processes.eventually(lambda: not processes.alive(pid))
    Worker().close()
    assert not Path(f"/proc/{pid}").exists()


def test_signals_are_remembered_and_then_acted_upon_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_a_worker_asks_for_a_fatal_signal_should_its_parent_die_meanwhile(where: Places) -> None:
    worker = Worker()
    worker.measure(WRITE, 100_000, where)
    assert worker.repetition(60) is not None
    (flags,) = (line for line in Path(f"/proc/{worker.pid}/fdinfo/0").read_text().splitlines() if line.startswith("flags:"))
    worker.kill()
    assert int(flags.split()[1], 8) & os.O_ASYNC


def test_a_worker_does_not_outlive_its_parent() -> None:
    code = (
        "from prefault.bench.worker_process import Worker\n"
        "from prefault.bench.grid import Cell\n"
        "from prefault.bench.kinds import Places\n"
        "worker = Worker(); worker.measure(Cell(256 << 20, 'private', 'Anon 4 KiB', 'write'), 1000, Places())\n"
        "worker.repetition(60); print(worker.pid, flush=True); worker.repetition(60); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


# --- cells that this machine cannot run


def _reason(cell: Cell, where: Places) -> str:
    (result,) = _results([cell], where)
    assert result.status is Status.UNAVAILABLE
    assert result.values_ns == ()
    assert result.reason is not None
    return result.reason


def test_without_the_advice_its_cells_are_unavailable(where: Places) -> None:
    with testing.without(capabilities.MADV_POPULATE.name):
        written, populated = _results([WRITE, POPULATE], where)
    assert written.status is Status.MEASURED
    assert populated.status is Status.UNAVAILABLE
    assert "MADV_POPULATE_WRITE and _READ" in str(populated.reason)


def test_too_little_memory(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "available_memory_bytes", lambda: 64 << 20)
    assert "and 64.0 MiB are available" in _reason(WRITE, where)


def test_a_private_mapping_of_a_file_takes_twice_its_size() -> None:
    shared, private = Cell(1 << 30, "shared", "tmpfs", "write"), Cell(1 << 30, "private", "tmpfs", "write")
    assert (obstacles.memory_bytes(shared) >> 30, obstacles.memory_bytes(private) >> 30) == (1, 2)


def test_a_file_directory_in_memory() -> None:
    assert "which is memory" in _reason(Cell(SIZE, "shared", "file", "write"), Places(file="/dev/shm"))


def test_a_full_tmpfs(small_tmpfs: Callable[[str], Path]) -> None:
    directory = str(small_tmpfs("1m"))
    assert "has 1.0 MiB left of the 2.0 MiB needed" in _reason(
        Cell(SIZE, "shared", "tmpfs", "write"), Places(tmpfs=directory)
    )


def test_no_tmpfs(tmp_path: Path) -> None:
    if places.in_memory(str(tmp_path)):
        pytest.skip("temporary files are on a tmpfs here")
    assert "is not a tmpfs" in _reason(Cell(SIZE, "shared", "tmpfs", "write"), Places(tmpfs=str(tmp_path)))


def test_a_pool_that_may_not_be_grown(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hugetlb, "resize_pool", refuse)
    monkeypatch.setattr(hugetlb, "page_sizes", lambda: [HUGE_PAGE_BYTES])
    empty = hugetlb.HugetlbPool(HUGE_PAGE_BYTES, total=0, free=0, reserved=0, surplus=0, overcommit=0)
    monkeypatch.setattr(hugetlb, "read_pool", lambda _: empty)
    cell = Cell(8 * SIZE, "shared", "Memfd 2 MiB", "write")
    assert _reason(cell, where) == "the hugetlb pool has 0 free of 8 pages: only root can grow it (Permission denied)"


def test_a_kernel_without_huge_pages(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugetlb, "page_sizes", list)
    assert "no huge pages of 2 MiB" in _reason(Cell(SIZE, "shared", "Anon 2 MiB", "write"), where)


# --- the hugetlb pool and hugetlbfs


def _pool() -> int:
    return hugetlb.read_pool(HUGE_PAGE_BYTES).total


def _hugetlbfs_mounts() -> int:
    return Path("/proc/self/mountinfo").read_text().count(" - hugetlbfs ")


HUGE = [
    Cell(SIZE, sharing, "hugetlbfs", method) for sharing in ("private", "shared") for method in ("read", "populate_write")
]


def test_the_pool_is_there_for_the_cells_and_then_as_before(where: Places, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(0)
    before, mounts = _pool(), _hugetlbfs_mounts()
    during = []
    results = _results(HUGE, where, meanwhile=lambda _: during.append(_pool()))
    assert [result.status for result in results] == [Status.MEASURED] * 4, results
    assert min(during) > before
    assert _pool() == before
    assert _hugetlbfs_mounts() == mounts


def test_the_pool_is_as_before_after_an_error(where: Places, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(0)
    before, mounts = _pool(), _hugetlbfs_mounts()

    def fail(_: Repeated) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _results(HUGE, where, meanwhile=fail)
    deadline = time.monotonic() + 5  # the killed worker may hold pages for a moment
    while _pool() != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _pool() == before
    assert _hugetlbfs_mounts() == mounts


def test_a_pool_that_is_large_enough_is_left_alone(
    hugetlb_pool: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hugetlb_pool(3)

    def refuse(*_: object) -> int:
        raise AssertionError("nothing to resize")

    with monkeypatch.context() as patched:
        patched.setattr(hugetlb, "resize_pool", refuse)
        with places.hugetlb_pool(2) as pool:
            assert pool.refusal is None
