"""Threads, forks, signals and accounting: operations on common blocks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  its libraries are mappings
import pytest

import prefault
from prefault._kernel import mman
from prefault.errors import NotPopulatedError, PoolFullError
from prefault.memory.backings import TemporaryFile
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB
from prefault.sparse import Accounting, SparseMemory
from support import oracle
from support.children import in_child
from support.sparse import PAGE, faults, mappings, present_blocks, status_kib

both = pytest.mark.parametrize("unpopulated", ["zeros", "fault"])


def _unprotected_blocks(memory: SparseMemory) -> set[int]:
    assert memory._guard.protection is not None
    size = memory.block
    return {at // size for low, high in memory._guard.protection.unprotected for at in range(low, high, size)}


def _together(*functions: Callable[[], object]) -> None:
    """At once, each in a thread; the first exception is raised."""
    barrier = threading.Barrier(len(functions))
    defects: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            barrier.wait()
            function()
        except BaseException as defect:  # noqa: BLE001
            defects.append(defect)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if defects:
        raise defects[0]


# --- threads


@both
@pytest.mark.parametrize("shared", [False, True])
def test_threads_on_random_blocks(unpopulated: Any, shared: bool) -> None:
    _hammer(unpopulated, shared, seconds=0.5)


@pytest.mark.stress
@both
@pytest.mark.parametrize("shared", [False, True])
def test_threads_on_random_blocks_for_long(unpopulated: Any, shared: bool) -> None:
    _hammer(unpopulated, shared, seconds=8)


def _hammer(unpopulated: Any, shared: bool, seconds: float) -> None:
    blocks = 2000
    with SparseMemory(blocks * PAGE, shared=shared, unpopulated=unpopulated, huge="never") as memory:
        stop = time.monotonic() + seconds

        def work(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < stop:
                first, count = rng.randrange(blocks - 50), rng.choice((1, 2, 50))
                some = [(rng.randrange(blocks) * PAGE, PAGE) for _ in range(30)]
                match rng.randrange(5):
                    case 0:
                        memory.populate(first * PAGE, count * PAGE)
                    case 1:
                        memory.discard(first * PAGE, count * PAGE)
                    case 2:
                        memory.populate_many(some)
                    case 3:
                        memory.discard_many(some)
                    case 4:
                        with contextlib.suppress(NotPopulatedError):
                            memory.read(first * PAGE, 1)

        _together(*(lambda seed=seed: work(seed) for seed in range(4)))
        assert not memory._guard.operations
        if unpopulated == "fault":
            assert set(present_blocks(memory)) == _unprotected_blocks(memory)
        memory.discard()
        assert present_blocks(memory) == []
        assert mappings(memory) == 1


@both
def test_two_threads_populate_the_same_block(unpopulated: Any) -> None:
    with SparseMemory(64 * MIB, unpopulated=unpopulated, huge="never") as memory:
        results: list[prefault.PopulateResult] = []
        _together(*[lambda: results.append(memory.populate(0, 8 * MIB))] * 2)
        assert sorted(result.bytes for result in results) == [0, 8 * MIB]
        assert oracle.present_bytes(memory.range.start, 8 * MIB) == 8 * MIB


def test_a_failing_populate_keeps_the_pages_of_another(small_tmpfs: Callable[[str], Path]) -> None:
    with SparseMemory(64 * PAGE, backing=TemporaryFile(small_tmpfs("64k")), unpopulated="fault") as memory:
        for _ in range(20):
            failures: list[Exception] = []

            def too_much(failures: list[Exception] = failures) -> None:
                try:
                    memory.populate(0, 40 * PAGE, headroom="ignore")
                except prefault.BackingFullError as failure:
                    failures.append(failure)

            def little() -> None:
                # Waits for the other, or the other for this.
                memory.populate(2 * PAGE, 2 * PAGE, headroom="ignore")
                memory.write(2 * PAGE, b"mine")

            _together(too_much, little)
            assert len(failures) == 1
            assert present_blocks(memory) == [2, 3]
            assert memory.read(2 * PAGE, 4) == b"mine"
            memory.discard()


def test_different_blocks_do_not_wait_for_each_other() -> None:
    # While one thread is in the middle of populating, as its progress function shows, another does all of its work.
    with SparseMemory(256 * MIB, unpopulated="fault", huge="never") as memory:
        done: list[int] = []

        def progress(*_: int) -> None:
            if not done:
                other = threading.Thread(target=lambda: done.append(memory.populate(128 * MIB, MIB).bytes))
                other.start()
                other.join(30)
                assert done == [MIB]

        memory.populate(0, 64 * MIB, progress=progress, threads=1)
        assert done == [MIB]


@both
def test_a_thread_that_would_wait_for_itself(unpopulated: Any) -> None:
    with SparseMemory(64 * MIB, unpopulated=unpopulated, huge="never") as memory:
        caught: list[str] = []

        def progress(*_: int) -> None:
            for call in (memory.populate, memory.discard):
                try:
                    call(0, PAGE)
                except RuntimeError as error:
                    caught.append(str(error))

        memory.populate(0, 32 * MIB, progress=progress, threads=1)
        assert "this thread is at work on these blocks already" in caught[0]
        assert oracle.present_bytes(memory.range.start, 64 * MIB) == 32 * MIB


def test_closing_while_another_thread_works() -> None:
    memory = SparseMemory(64 * MIB, unpopulated="fault", huge="never")

    def progress(*_: int) -> None:
        with pytest.raises(BufferError, match="another thread"):
            memory.close()

    memory.populate(progress=progress, threads=1)
    memory.close()


# --- forks


def test_a_fork_while_other_threads_work() -> None:
    with SparseMemory(4096 * PAGE, unpopulated="fault", huge="never") as memory:
        memory.populate(0, PAGE)
        memory.write(0, b"parent")
        ended = threading.Event()

        def work(first: int) -> None:
            while not ended.is_set():
                memory.populate(first * PAGE, 300 * PAGE)
                memory.discard_many([(at * PAGE, PAGE) for at in range(first, first + 300, 2)])
                memory.discard(first * PAGE, 300 * PAGE)

        threads = [threading.Thread(target=work, args=(first,)) for first in (100, 1000, 2000)]
        for thread in threads:
            thread.start()

        def child() -> bool:
            assert memory.read(0, 6) == b"parent"
            # The operations of the other threads are undone, and none is at work on a block.
            assert set(present_blocks(memory)) == _unprotected_blocks(memory)
            memory.populate()
            memory.discard(PAGE, 4000 * PAGE)
            assert faults(memory, PAGE)
            memory.close()
            return True

        try:
            for _ in range(10):
                assert in_child(child)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert present_blocks(memory) == [0]


def test_a_fork_within_an_operation_of_this_thread() -> None:
    with SparseMemory(64 * MIB, unpopulated="fault", huge="never") as memory:
        answers: list[str] = []

        def child() -> str:
            try:
                memory.close()
            except BufferError:
                return "refused"
            return "closed"

        def progress(*_: int) -> None:
            if not answers:
                answers.append(in_child(child))

        memory.populate(progress=progress, threads=1)
        assert answers == ["refused"]


# --- Ctrl-C at any moment


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may well strike in a finalizer
@both
def test_ctrl_c_at_any_moment(unpopulated: Any) -> None:
    assert threading.current_thread() is threading.main_thread()
    with SparseMemory(4096 * PAGE, unpopulated=unpopulated, huge="never") as memory:
        memory.populate(0, PAGE)
        memory.write(0, b"kept")
        rng = random.Random(4)
        interrupted = 0
        many = [(at * PAGE, PAGE) for at in range(1, 4096, 5)]
        calls: list[Callable[[], object]] = [
            lambda: memory.populate(8 * PAGE, 64 * PAGE),
            lambda: memory.discard(8 * PAGE, 64 * PAGE),
            lambda: memory.populate_many(many),
            lambda: memory.discard_many(many),
        ]
        for _ in range(300):
            call = rng.choice(calls)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.random() * 1e-3 + 1e-6)
                before = signal.signal(signal.SIGALRM, signal.default_int_handler)
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert not list(memory._guard.operations)
            if unpopulated == "fault":
                assert set(present_blocks(memory)) == _unprotected_blocks(memory)
        assert memory.read(0, 4) == b"kept"
        assert interrupted > 10
        memory.discard()
        assert mappings(memory) == 1
    signal.signal(signal.SIGALRM, before)


# --- accounting


class _Account(Accounting):
    """Accounting that keeps a set, and checks each call against it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.charged = RangeSet()
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def charge(self, blocks: RangeSet) -> RangeSet:
        with self._lock:
            new = blocks - self.charged
            self.calls.append("charge")
            if (self.charged | new).length > self.capacity:
                raise PoolFullError(28, "the pool is full", offset=blocks.span.start)
            self.charged |= new
            return new

    def refund(self, blocks: RangeSet) -> None:
        with self._lock:
            self.calls.append("refund")
            self.charged -= blocks

    def close(self) -> None:
        self.calls.append("close")


@both
@pytest.mark.parametrize("shared", [False, True])
def test_accounting(unpopulated: Any, shared: bool) -> None:
    accounting = _Account(10 * PAGE)
    memory = SparseMemory(64 * PAGE, block=2 * PAGE, shared=shared, unpopulated=unpopulated, accounting=accounting)
    memory.populate(PAGE, PAGE)
    assert accounting.charged == RangeSet([PageRange(0, 2 * PAGE)])
    memory.populate_many([(0, 1), (9 * PAGE, 1), (20 * PAGE, 4 * PAGE)])
    assert (accounting.charged.length, memory.populated) == (8 * PAGE, accounting.charged)
    calls: list[Callable[[], object]] = [
        lambda: memory.populate(0, 12 * PAGE),
        lambda: memory.populate_many([(40 * PAGE, PAGE), (50 * PAGE, 1)]),
    ]
    for call in calls:
        with pytest.raises(PoolFullError):
            call()
        assert memory.populated == accounting.charged
    memory.discard(0, 9 * PAGE)  # inward: not the block of which half is outside
    assert (accounting.charged.length, memory.populated) == (6 * PAGE, accounting.charged)
    memory.discard_many([(8 * PAGE, 2 * PAGE), (20 * PAGE, 2 * PAGE)])
    assert (accounting.charged, memory.populated) == (RangeSet([PageRange(22 * PAGE, 24 * PAGE)]),) * 2

    memory.close()
    assert accounting.calls[-1] == "close"


def test_accounting_is_closed_once_when_the_memory_is_unmapped() -> None:
    accounting = _Account(10 * PAGE)

    def closed_in_the_child(memory: SparseMemory) -> list[str]:
        memory.close()
        return accounting.calls

    def forgotten() -> memoryview:
        memory = SparseMemory(4 * PAGE, accounting=accounting)
        # Of a fork: its end is not the end of the memory.
        assert in_child(lambda: closed_in_the_child(memory)) == []
        return memory.view()

    view = forgotten()
    assert accounting.calls == []
    view.release()
    del view
    assert accounting.calls == ["close"]


@both
def test_accounting_after_a_failure(unpopulated: Any, small_tmpfs: Callable[[str], Path]) -> None:
    accounting = _Account(1000 * PAGE)
    backing = TemporaryFile(small_tmpfs("64k"))
    with SparseMemory(64 * PAGE, backing=backing, unpopulated=unpopulated, accounting=accounting) as memory:
        memory.populate(3 * PAGE, 2 * PAGE)
        calls: list[Callable[[], object]] = [
            lambda: memory.populate(0, 40 * PAGE, headroom="ignore"),
            lambda: memory.populate(0, 40 * PAGE),
            lambda: memory.populate_many([(at * PAGE, PAGE) for at in range(0, 64, 2)], headroom="ignore"),
        ]
        for call in calls:
            with pytest.raises(prefault.PopulateError):
                call()
            # Only what was charged for this call is refunded.
            assert accounting.charged == memory.populated == RangeSet([PageRange(3 * PAGE, 5 * PAGE)])


@both
def test_accounting_after_a_discard_that_fails(unpopulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accounting = _Account(1 << 40)
    with SparseMemory(64 * MIB * 3, block=MIB, unpopulated=unpopulated, accounting=accounting, huge="never") as memory:
        memory.populate(60 * MIB, 120 * MIB)
        memory.write(179 * MIB, b"kept")
        split = memory.range.start + 64 * MIB

        def refuse(address: int, length: int, advice: int, real: Any = mman.madvise) -> None:
            if advice in (mman.MADV_DONTNEED, mman.MADV_DONTNEED_LOCKED) and address >= split and refusing:
                raise OSError(22, "Invalid argument")
            real(address, length, advice)

        assert prefault._system.capabilities.DONTNEED_LOCKED.available is not None  # asked now, and not while it is refused
        refusing = True
        monkeypatch.setattr(mman, "madvise", refuse)
        with pytest.raises(prefault.DiscardError):
            memory.discard(0, 192 * MIB)
        refusing = False
        # In steps of 64 MiB: those before the one that failed are gone, and it and those after it are as before.
        kept = memory.populated
        assert accounting.charged == kept
        assert PageRange(128 * MIB, 180 * MIB) in kept
        assert MIB not in kept
        assert kept.length < 120 * MIB
        assert oracle.present_bytes(memory.range.start, len(memory)) == kept.length
        assert memory.read(179 * MIB, 4) == b"kept"
        if unpopulated == "fault":
            assert _unprotected_blocks(memory) == set(present_blocks(memory))
            assert (faults(memory, 60 * MIB), faults(memory, 179 * MIB)) == (True, False)
        monkeypatch.undo()
        memory.discard()
        assert not accounting.charged


# --- the measure


def test_no_leak() -> None:
    _cycle(1000)


@pytest.mark.stress
def test_no_leak_over_a_hundred_thousand_cycles() -> None:
    _cycle(100_000)


def _cycle(count: int) -> None:
    block = 2 * MIB
    kinds: Iterator[tuple[str, str]] = iter([("anonymous", "zeros"), ("anonymous", "fault"), ("memfd", "fault")])
    for backing, unpopulated in kinds:
        with SparseMemory("1 TiB", backing=backing, block=block, unpopulated=unpopulated, huge="advise") as memory:  # type: ignore[arg-type]
            for at in (3, 40, 60):  # so that there are guards, and something to be kept
                memory.populate(at * block, block)
            rng = random.Random(5)

            def cycles(number: int, memory: SparseMemory = memory, rng: random.Random = rng) -> None:
                for _ in range(number):
                    at = rng.choice((5, 41, 50, 59, 61, 1000, 500_000)) * block
                    memory.populate(at, block)
                    memory.discard(at, block)

            cycles(50)
            before = status_kib("VmRSS"), len(oracle.descriptors()), mappings(memory), status_kib("VmPTE")
            cycles(count // (1 if backing == "anonymous" else 8))
            after = status_kib("VmRSS"), len(oracle.descriptors()), mappings(memory), status_kib("VmPTE")
            assert after[1:3] == before[1:3]
            assert after[0] <= before[0] + 2048
            assert after[3] <= before[3] + 64
            assert memory.populated.length == 3 * block


def test_a_child_that_dies_leaves_no_block_unprotected_in_its_parent() -> None:
    with SparseMemory(8 * PAGE, backing="memfd", unpopulated="fault") as memory:
        pid = os.fork()
        if not pid:
            memory.populate()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        assert present_blocks(memory) == []
        assert faults(memory, 0)
        memory.populate()
