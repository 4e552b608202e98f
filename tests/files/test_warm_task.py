"""warm_async: files are warmed in the background, to the end or until cancelled. The page cache is asked by mincore(2)."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault.sizes import MIB, PAGE_SIZE
from support import file_beds
from support.children import in_child
from support.gates import LIMIT_S, Gate


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file on a disk of which nothing is in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16 * MIB))
    file_beds.evict(path)
    return path


def _cached(path: Path) -> int:
    (found,) = prefault.status(path).files
    assert found.cached_pages is not None
    return found.cached_pages * prefault.PAGE_SIZE


def _held(path: Path, **options: Any) -> tuple[prefault.WarmTask, Gate]:
    gate = Gate()
    task = prefault.warm_async(path, progress=gate, rate="4 MiB/s", **options)
    assert gate.reached.wait(LIMIT_S)
    return task, gate


def test_the_result_is_that_of_warm(file: Path) -> None:
    with prefault.warm_async([file, file.with_name("missing")]) as task:
        pass
    result = task.result()
    assert result.bytes == 16 * MIB == _cached(file) == task.done_bytes == task.total_bytes
    assert [failure.errno for failure in result.failures] == [2]
    assert "WarmTask finished, 16.0 MiB" in repr(task)


@pytest.mark.parametrize("size", [2 * MIB, PAGE_SIZE])
def test_cancelling_ends_the_walk_through_files_that_are_cached_already(tmp_path: Path, size: int) -> None:
    path, looked = tmp_path / "file", 0
    path.write_bytes(bytes(size))
    under_way, cancelled = threading.Event(), threading.Event()

    def paths() -> Iterator[Path]:
        nonlocal looked
        for looked in range(1, 3001):
            if looked == 1000:
                under_way.set()
                assert cancelled.wait(LIMIT_S)
            yield path

    task = prefault.warm_async(prefault.select(paths(), each_link=True))
    assert under_way.wait(LIMIT_S)
    task.cancel()
    cancelled.set()
    with pytest.raises(prefault.WarmCancelled, match=r"cancelled: 0 bytes of \d+ files brought in") as caught:
        task.result(LIMIT_S)
    assert looked == 1000
    assert caught.value.result.files <= 999


def test_cancelling_stops_it_and_says_how_far_it_came(file: Path) -> None:
    task, gate = _held(file)
    with pytest.raises(TimeoutError, match="warm_async goes on"):
        task.result(0.01)
    task.cancel()
    gate.open()
    with pytest.raises(prefault.WarmCancelled, match=r"cancelled: .* brought in") as caught:
        task.result(LIMIT_S)
    assert caught.value.result.bytes == _cached(file) < 16 * MIB
    assert not isinstance(caught.value, KeyboardInterrupt)


def test_an_exception_in_the_block_cancels_and_wrong_arguments_fail(file: Path) -> None:
    with pytest.raises(ZeroDivisionError), prefault.warm_async(file, rate="100 KiB/s") as task:
        raise ZeroDivisionError
    assert task.done()
    with pytest.raises(TypeError, match="progress is"):
        prefault.warm_async(file, progress=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is one of"):
        prefault.warm_async(file, method="x").result(LIMIT_S)  # type: ignore[arg-type]


def test_await_does_not_block_the_loop(file: Path) -> None:
    async def main() -> prefault.WarmResult:
        gate = Gate()
        task = prefault.warm_async(file, progress=gate)

        async def wait() -> prefault.WarmResult:
            return await task

        waiting = asyncio.ensure_future(wait())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        gate.open()
        return await waiting

    assert asyncio.run(main()).bytes == 16 * MIB


def test_a_forked_child_does_not_wait(file: Path) -> None:
    task, gate = _held(file)

    def child() -> None:
        with pytest.raises(prefault.WarmCancelled, match="fork"):
            task.result(10)

    in_child(child)
    task.cancel()
    gate.open()
    with pytest.raises(prefault.WarmCancelled):
        task.result(LIMIT_S)
