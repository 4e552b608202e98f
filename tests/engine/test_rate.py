"""Rate: bytes a second over several calls and threads, and waits that end."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import prefault
from prefault.engine import rate as rates
from prefault.engine.rate import RateLimit, rate_limit
from prefault.sizes import GIB, MIB, PAGE_SIZE
from support import oracle


class _Clock:
    """A clock that sleeping puts forward."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(rates, "time", clock)
    return clock


@pytest.mark.parametrize("text", ["2 GiB/s", "2GiB / s", "2 GiB", 2 * GIB, "2 GiB/sec", " 2 GiB/second "])
def test_rates_are_sizes_a_second(text: str | int) -> None:
    assert RateLimit(text).bytes_per_second == 2 * GIB


@pytest.mark.parametrize("wrong", ["fast", "2 GiB/min", -1, 0, "0 MiB/s"])
def test_other_texts_are_refused(wrong: str | int) -> None:
    with pytest.raises(ValueError, match=r"size|rate"):
        RateLimit(wrong)
    with prefault.Mapping("1 MiB") as memory:
        with pytest.raises(ValueError, match=r"size|rate"):
            prefault.populate(memory, rate=wrong)
        assert prefault.residency(memory).present_bytes == 0


@pytest.mark.parametrize("small", [1, "1", 500, "4096 B/s", 65535, 0])
def test_a_rate_that_would_practically_never_end_is_refused(small: str | int, tmp_path: Path) -> None:
    """A number whose unit was forgotten: at one byte a second, a page takes more than an hour."""
    (path := tmp_path / "file").write_bytes(bytes(PAGE_SIZE))
    with prefault.Mapping("1 MiB") as memory:
        for call in (
            lambda: prefault.populate(memory, rate=small),
            lambda: prefault.populate_async(memory, rate=small),
            lambda: prefault.lock(memory, rate=small),
            lambda: prefault.lock(path, rate=small),
            lambda: prefault.warm(path, rate=small),
            lambda: prefault.stream(path, rate=small),
        ):
            with pytest.raises(
                ValueError, match=r"below the smallest, 64\.0 KiB a second: give a unit, such as '500 MiB/s'"
            ):
                call()
        assert prefault.residency(memory).present_bytes == 0
    assert RateLimit("64 KiB/s").bytes_per_second == 65536


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="a size is an int or a text"):
        RateLimit(1.5)  # type: ignore[arg-type]


def test_no_limit_never_waits(clock: _Clock) -> None:
    RateLimit(None).wait(1 << 60)
    assert not clock.slept
    assert rate_limit(None) is None


def test_the_rate_holds_over_time(clock: _Clock) -> None:
    limit = RateLimit(100 * MIB)
    began = clock.now
    for _ in range(100):
        limit.wait(limit.chunk_bytes)
    done = 99 * limit.chunk_bytes  # the last is about to be done
    assert done <= 100 * MIB * (clock.now - began + 1.01 * rates.BURST_SECONDS)
    assert done >= 100 * MIB * (clock.now - began) * 0.98


def test_a_pause_saves_up_no_more_than_a_burst(clock: _Clock) -> None:
    limit = RateLimit(100 * MIB)
    limit.wait(MIB)
    clock.now += 3600
    for _ in range(20):
        limit.wait(5 * MIB)
    assert sum(clock.slept) == pytest.approx(0.9)  # 100 MiB: one second's, without the last chunk and a burst


def test_a_wait_ends_when_the_work_is_stopped() -> None:
    limit, stopped = RateLimit("64 KiB"), threading.Event()
    limit.wait(GIB)
    thread = threading.Thread(target=limit.wait, args=(1, stopped))
    thread.start()
    stopped.set()
    thread.join(30)
    assert not thread.is_alive()


def test_a_chunk_is_at_least_a_page() -> None:
    assert RateLimit("64 KiB").chunk_bytes == PAGE_SIZE
    assert RateLimit(GIB).chunk_bytes % PAGE_SIZE == 0


class _Counting(RateLimit):
    """A limit that notes what was booked."""

    def __init__(self, bytes_per_second: str) -> None:
        super().__init__(bytes_per_second)
        self.waited: list[int] = []

    def wait(self, count: int, stopped: threading.Event | None = None) -> None:
        self.waited.append(count)
        super().wait(count, stopped)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_populate_waits_for_what_it_brings_in(threads: int) -> None:
    limit = _Counting("400 MiB/s")
    with prefault.Mapping("64 MiB", huge="never") as memory:
        prefault.populate(memory, length="32 MiB")
        result = prefault.populate(memory, rate=limit, threads=threads)
        assert oracle.present_bytes(memory.range.start, 64 * MIB) == 64 * MIB
    assert result.bytes == sum(limit.waited) == 32 * MIB  # those that were present before cost nothing
    assert max(limit.waited) <= 400 * MIB * rates.BURST_SECONDS


def test_calls_share_a_limit(clock: _Clock) -> None:
    limit = RateLimit(100 * MIB)
    with prefault.Mapping("16 MiB", huge="never") as one, prefault.Mapping("16 MiB", huge="never") as other:
        prefault.populate(one, rate=limit, threads=1)
        before = limit._due
        prefault.populate(other, rate=limit, threads=1)
    assert limit._due - before == pytest.approx(0.16, rel=0.01)
    assert clock.now


def test_ctrl_c_ends_a_wait() -> None:
    import _thread

    # The wait for 64 MiB at this rate takes a quarter of an hour.
    with prefault.Mapping("64 MiB", huge="never") as memory:
        timer = threading.Timer(0.3, _thread.interrupt_main)
        timer.start()
        began = time.monotonic()
        with pytest.raises(prefault.PopulateInterrupted) as caught:
            prefault.populate(memory, rate="64 KiB/s", threads=2)
        assert time.monotonic() - began < 60
        timer.join()
        assert caught.value.populated_bytes == oracle.present_bytes(memory.range.start, 64 * MIB)


def test_sparse_memory_and_locks_take_a_rate() -> None:
    limit = _Counting("800 MiB/s")
    with prefault.SparseMemory("64 MiB", block=MIB) as memory:
        memory.populate_many([(at * MIB, MIB) for at in range(0, 64, 2)], rate=limit)
    assert sum(limit.waited) == 32 * MIB
    with prefault.Mapping("8 MiB", huge="never") as memory:
        prefault.lock(memory, rate=limit)
    assert sum(limit.waited) == 40 * MIB
