"""Sizes of chunks, by what the chunk before has cost."""

from __future__ import annotations

import pytest

from prefault.engine import chunking
from prefault.sizes import MIB


class FakeTimes:
    """Clocks that a test sets: what the next chunk costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = self.sleeps = 0
        monkeypatch.setattr(chunking, "perf_counter_ns", lambda: self.wall)
        monkeypatch.setattr(chunking, "thread_time_ns", lambda: self.cpu)
        monkeypatch.setattr(chunking, "getrusage", lambda who: self)

    @property
    def ru_nvcsw(self) -> int:
        return self.sleeps

    def chunk(self, one: chunking.ChunkSize, cpu_ms: float, waited_ms: float = 0, *, sleeps: int = 0) -> int:
        one.start()
        self.cpu += int(cpu_ms * 1e6)
        self.wall += int((cpu_ms + waited_ms) * 1e6)
        self.sleeps += sleeps
        one.finish()
        return one.size


def test_chunks_grow_and_shrink_with_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    times, one = FakeTimes(monkeypatch), chunking.ChunkSize(on_disk=False)
    assert [times.chunk(one, 0.1) for _ in range(6)] == [8 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, 64 * MIB, 64 * MIB]
    assert times.chunk(one, 3) == 64 * MIB
    assert [times.chunk(one, 50) for _ in range(7)][-1] == chunking.SMALLEST_CHUNK


def test_chunks_that_are_vectors_take_longer_and_less_so_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    times, one = FakeTimes(monkeypatch), chunking.ChunkSize(on_disk=False, vectors=True)
    assert [times.chunk(one, cost) for cost in (1, 5, 9, 12)] == [16 * MIB, 16 * MIB, 16 * MIB, 8 * MIB]
    assert [times.chunk(one, 0.1) for _ in range(3)] == [64 * MIB, 256 * MIB, 256 * MIB]
    four = chunking.ChunkSize(on_disk=False, threads=4, vectors=True)
    assert [times.chunk(four, cost) for cost in (1.5, 3, 5, 7)] == [8 * MIB, 8 * MIB, 8 * MIB, 4 * MIB]


def test_chunks_grow_while_another_thread_has_the_gil_but_not_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    times, one = FakeTimes(monkeypatch), chunking.ChunkSize(on_disk=False)
    assert times.chunk(one, 3, waited_ms=5, sleeps=0) == 4 * MIB
    assert times.chunk(one, 3, waited_ms=5, sleeps=1) == 8 * MIB


def test_chunks_of_a_disk_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    times, one = FakeTimes(monkeypatch), chunking.ChunkSize(on_disk=True)
    assert times.chunk(one, 0.1, waited_ms=30, sleeps=3) == 4 * MIB
