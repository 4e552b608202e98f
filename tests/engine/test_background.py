"""populate_async: the task, its end in every way, and what happens to the buffer meanwhile."""

from __future__ import annotations

import asyncio
import gc
import logging
import mmap
import subprocess
import sys
import threading
from typing import Any

import numpy
import pytest

import prefault
from prefault.sizes import MIB, PAGE_SIZE
from support import oracle
from support.children import in_child
from support.gates import LIMIT_S, Gate
from support.regions import Region


def _memory(size: int = 16 * MIB) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def _present(memory: mmap.mmap) -> int:
    return oracle.present_bytes(numpy.frombuffer(memory, numpy.uint8).ctypes.data, len(memory))


def _held(memory: Any, **options: Any) -> tuple[prefault.PopulateTask, Gate]:
    """Start a call in chunks of 1 MiB and return it after the first."""
    gate = Gate()
    task = prefault.populate_async(memory, progress=gate, threads=1, rate="20 MiB/s", **options)
    assert gate.reached.wait(LIMIT_S)
    return task, gate


def test_the_result_is_that_of_populate() -> None:
    memory = _memory()
    task = prefault.populate_async(memory)
    result = task.result(LIMIT_S)
    assert (result.bytes, result.present_bytes) == (16 * MIB, 0)
    assert _present(memory) == 16 * MIB == task.done_bytes == task.total_bytes
    assert task.done()
    assert task.result() is result
    assert "finished" in repr(task)


def test_progress_shows_while_it_runs_and_a_timeout_leaves_it_running() -> None:
    memory = _memory()
    task, gate = _held(memory)
    assert 0 < task.done_bytes < task.total_bytes == 16 * MIB
    assert not task.done()
    with pytest.raises(TimeoutError, match=r"of 16\.0 MiB are done"):
        task.result(0.01)
    gate.open()
    assert task.result(LIMIT_S).bytes == 16 * MIB


@pytest.mark.parametrize("rollback", [False, True])
def test_cancelling_stops_it_and_says_how_far_it_came(rollback: bool) -> None:
    memory = _memory()
    task, gate = _held(memory, rollback=rollback)
    task.cancel()
    gate.open()
    with pytest.raises(prefault.PopulateCancelled, match=r"cancelled: [0-9.]+ MiB of 16.0 MiB populated") as caught:
        task.result(LIMIT_S)
    there = _present(memory)
    assert caught.value.populated_bytes == there
    assert (there == 0) if rollback else (0 < there < 16 * MIB)
    assert not isinstance(caught.value, KeyboardInterrupt)


def test_the_buffer_is_pinned_until_the_end() -> None:
    owner = bytearray(8 * MIB)
    task, gate = _held(owner)
    with pytest.raises(BufferError):
        owner.append(1)
    task.cancel()
    gate.open()
    with pytest.raises(prefault.PopulateCancelled):
        task.result(LIMIT_S)
    owner.append(1)


def test_errors_arrive_and_leaving_the_block_does_not_repeat_them() -> None:
    with Region(64) as region:
        region.protect(30, 1, 0)
        with pytest.raises(prefault.ProtectionError), prefault.populate_async(region):
            pass
        with prefault.populate_async(region) as task, pytest.raises(prefault.ProtectionError):
            task.result(LIMIT_S)


def test_wrong_arguments_fail_at_once_or_in_the_task() -> None:
    with pytest.raises(TypeError, match="no memory to work on"):
        prefault.populate_async(5)
    with pytest.raises(TypeError, match="progress is"):
        prefault.populate_async(bytearray(5), progress=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="access is"):
        prefault.populate_async(bytearray(5), access="x").result(LIMIT_S)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2])
def test_cancelling_ends_the_wait_of_a_low_rate(threads: int) -> None:
    started = threading.Event()

    rate = prefault.RateLimit("64 KiB/s")

    def progress(done: int, total: int) -> None:
        rate.book(1 << 30)
        started.set()

    with _memory() as memory:
        task = prefault.populate_async(memory, rate=rate, threads=threads, progress=progress)
        assert started.wait(LIMIT_S)
        task.cancel()  # the next page is due in more than an hour
        with pytest.raises(prefault.PopulateCancelled, match="populated"):
            task.result(LIMIT_S)


def test_leaving_the_block_waits_and_an_exception_cancels() -> None:
    memory = _memory()
    with prefault.populate_async(memory):
        pass
    assert _present(memory) == 16 * MIB
    other = _memory()
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with prefault.populate_async(other, threads=1, rate="4 MiB/s") as task:
            raise ZeroDivisionError
    assert task.done()
    assert _present(other) < 16 * MIB


def test_await_does_not_block_the_loop() -> None:
    memory = _memory()

    async def main() -> prefault.PopulateResult:
        task, gate = _held(memory)
        waiting = asyncio.ensure_future(_await(task))
        for _ in range(10):
            await asyncio.sleep(0)  # the loop goes on while the call is held
        assert not waiting.done()
        gate.open()
        return await waiting

    assert asyncio.run(main()).bytes == 16 * MIB


async def _await(task: prefault.PopulateTask) -> prefault.PopulateResult:
    return await task


def test_many_are_awaited_together_and_errors_do_not_end_the_loop() -> None:
    memories = [_memory(MIB) for _ in range(20)]

    async def main() -> list[Any]:
        with Region(4) as region:
            region.protect(2, 1, 0)
            tasks = [prefault.populate_async(one, threads=1) for one in (*memories, region)]
            return await asyncio.gather(*map(_await, tasks), return_exceptions=True)

    *results, error = asyncio.run(main())
    assert [result.bytes for result in results] == [MIB] * 20
    assert isinstance(error, prefault.ProtectionError)


def test_cancelling_the_waiting_task_cancels_the_call() -> None:
    memory = _memory()

    async def main() -> prefault.PopulateTask:
        task, gate = _held(memory)
        waiting = asyncio.ensure_future(_await(task))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open()
        return task

    task = asyncio.run(main())
    with pytest.raises(prefault.PopulateCancelled):
        task.result(LIMIT_S)


def test_collections_and_generators() -> None:
    memories = [_memory(MIB) for _ in range(3)]
    assert prefault.populate_async(one for one in memories).result(LIMIT_S).bytes == 3 * MIB


def test_a_forgotten_task_goes_on_and_its_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    memory = _memory()
    task, gate = _held(memory)
    call = task._call
    del task
    gc.collect()
    gate.open()
    assert call.finished.wait(LIMIT_S)
    assert _present(memory) == 16 * MIB
    assert not caplog.records
    with Region(64) as region, caplog.at_level(logging.WARNING, "prefault"):
        region.protect(30, 1, 0)
        call = prefault.populate_async(region)._call
        assert call.finished.wait(LIMIT_S)
        for thread in threading.enumerate():
            if thread.name == "prefault-populate":
                thread.join(LIMIT_S)
    assert "nobody asked for the result" in caplog.text


def test_a_forked_child_does_not_wait_for_the_parents_thread() -> None:
    task, gate = _held(_memory())

    def child() -> None:
        with pytest.raises(prefault.PopulateCancelled, match="fork"):
            task.result(10)
        with pytest.raises(prefault.PopulateCancelled, match="fork"):
            asyncio.run(_await(task))
        assert task.done()
        task.cancel()
        with task:  # its error was raised before
            pass

    in_child(child)
    gate.open()
    assert task.result(LIMIT_S).bytes == 16 * MIB


def _resize(memory: Any) -> None:
    """Do what a pin forbids: resize or unmap the memory."""
    if isinstance(memory, bytearray):
        memory.append(1)
    else:
        memory.close()


@pytest.mark.parametrize("kind", ["mmap", "bytearray", "Mapping", "list", "long list"])
def test_a_forked_child_has_its_buffers_to_itself(kind: str) -> None:
    few = {"mmap": _memory(), "bytearray": bytearray(8 * MIB), "Mapping": prefault.Mapping(8 * MIB, huge="never")}
    buffers: list[Any] = [few[kind]] if kind in few else list(few.values())
    if kind == "long list":
        buffers += [bytearray(PAGE_SIZE) for _ in range(100)]
    task, gate = _held(buffers if "list" in kind else buffers[0])

    def child() -> None:
        prefault.populate(buffers)
        for buffer in buffers:
            _resize(buffer)

    in_child(child)
    for buffer in buffers:  # in the parent they stay pinned until the end
        with pytest.raises(BufferError):
            _resize(buffer)
    gate.open()
    task.result(LIMIT_S)
    for buffer in buffers:
        _resize(buffer)


def test_the_interpreter_exits_in_the_middle() -> None:
    code = (
        "import mmap, prefault; m = mmap.mmap(-1, 1 << 30);"
        " t = prefault.populate_async(m, rate='1 MiB/s', threads=1); u = prefault.populate_async(m, rate='1 MiB/s')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_prefault_does_not_load_it() -> None:
    code = "import sys, prefault; print('prefault.engine.background.task' in sys.modules, 'logging' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout.split()[0] == "False"


def test_pages_are_counted_in_whole() -> None:
    memory = _memory()
    with prefault.populate_async(memory, offset=5, length=10) as task:
        assert task.result(LIMIT_S).bytes == PAGE_SIZE
