"""Concurrent changes from elsewhere: forks, other mappings of the same memory, a kernel that refuses."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  its libraries are mappings
import pytest

import prefault
from prefault._kernel import mman
from prefault.engine.methods import METHODS
from prefault.memory.backings import Descriptor, TemporaryFile
from prefault.memory.borrowing import Span
from prefault.ranges import RangeSet
from prefault.sizes import MIB
from prefault.sparse import Accounting, SparseMemory
from support import oracle
from support.children import in_child
from support.sparse import PAGE, faults, present_blocks

EXECUTION: Any = importlib.import_module("prefault.engine.execution")

both = pytest.mark.parametrize("unpopulated", ["zeros", "fault"])


@pytest.fixture(autouse=True)
def _no_leaks(no_leaks: None) -> None:
    """Every test gives back what it takes."""


def _allocated(memory: SparseMemory) -> int:
    assert memory.fd is not None
    return os.fstat(memory.fd).st_blocks * 512


# --- forks


@contextmanager
def _another_thread_within(make: Callable[[], Any]) -> Iterator[None]:
    """Another thread stays inside of a context meanwhile, and leaves it with an exception."""
    entered, resume = threading.Event(), threading.Event()

    def stay() -> None:
        try:
            with make():
                entered.set()
                resume.wait(60)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        assert entered.wait(60)
        yield
    finally:
        resume.set()
        thread.join()


@both
def test_a_fork_discards_nothing_of_a_scratch_file(unpopulated: Any, tmp_path: Path) -> None:
    """The child takes back what other threads were at, and the file is the parent's."""
    with SparseMemory(16 * PAGE, backing=TemporaryFile(tmp_path), unpopulated=unpopulated) as memory:
        memory.populate(access="write")
        memory.write(0, b"kept")
        span = Span(*memory.range)
        with _another_thread_within(lambda: memory._guard.discarding(span)):
            assert in_child(lambda: True)
            assert os.pread(memory.fd or 0, 4, 0) == b"kept"
            assert _allocated(memory) == 16 * PAGE


class _BadAccounting(Accounting):
    def __init__(self) -> None:
        self.refunding = False

    def charge(self, blocks: RangeSet) -> RangeSet:
        return blocks

    def refund(self, blocks: RangeSet) -> None:
        if self.refunding:
            raise RuntimeError("no")

    def close(self) -> None:
        pass


def test_a_failure_in_a_fork_leaves_other_memories_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)  # for what hooks of fork raise
    accounting = _BadAccounting()
    memories = [SparseMemory(16 * PAGE, unpopulated="fault", accounting=accounting) for _ in range(3)]
    guard, span = memories[1]._guard, Span(*memories[1].range)

    def child() -> list[int]:
        accounting.refunding = False
        return [memory.populate().bytes for memory in memories]

    @contextmanager
    def populating() -> Iterator[None]:
        with guard.populating(span) as operation:
            operation.admit()
            yield

    with _another_thread_within(populating):
        accounting.refunding = True
        try:
            assert in_child(child) == [16 * PAGE] * 3
        finally:
            accounting.refunding = False
    for memory in memories:
        memory.close()


_FORK_WHILE_IMPORTING = """
import importlib.abc, importlib.machinery, os, signal, sys, threading, time
import prefault
from prefault.sparse import SparseMemory

class Slow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "numpy" else None
    def exec_module(self, module):
        began.set()
        time.sleep(0.3)

assert "numpy" not in sys.modules
memory = SparseMemory("1 MiB", unpopulated="fault")
began = threading.Event()
sys.meta_path.insert(0, Slow())
thread = threading.Thread(target=lambda: __import__("numpy"))
thread.start()
began.wait()
pid = os.fork()
if not pid:
    signal.alarm(20)
    import numpy
    os._exit(0)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_while_another_thread_imports_numpy() -> None:
    """The lock of a module that is being imported would be held for ever in the child."""
    assert subprocess.run([sys.executable, "-c", _FORK_WHILE_IMPORTING], timeout=60).returncode == 0


# --- other mappings of the same memory


@both
@pytest.mark.parametrize("many", [False, True])
def test_a_rollback_keeps_pages_that_another_mapping_populated(
    unpopulated: Any, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of zeros that the failing call brought in, and that another mapping counts on by now."""
    with (
        SparseMemory(256 * PAGE, backing="memfd", unpopulated=unpopulated) as one,
        SparseMemory(None, backing=Descriptor(one.fd or 0), unpopulated=unpopulated) as other,
    ):

        def stop(*_: object) -> None:
            monkeypatch.undo()
            other.populate(8 * PAGE, 3 * PAGE)
            other.populate(200 * PAGE, PAGE)
            raise ZeroDivisionError

        if many:
            monkeypatch.setattr(EXECUTION.ChunkSize, "finish", stop)
        with pytest.raises(ZeroDivisionError):
            one.populate_many([(0, len(one))]) if many else one.populate(progress=stop, threads=1)
        assert not any(oracle.present(one.range.start, len(one)))
        assert present_blocks(other) == [8, 9, 10, 200]
        assert _allocated(one) == 4 * PAGE


def test_a_rollback_keeps_allocated_pages_that_another_mapping_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        SparseMemory(256 * PAGE, backing="memfd") as one,
        SparseMemory(None, backing=Descriptor(one.fd or 0)) as other,
    ):

        def stop(*_: object) -> None:
            monkeypatch.undo()
            other.populate(8 * PAGE, 3 * PAGE)
            raise KeyboardInterrupt

        monkeypatch.setattr(METHODS["fallocate+populate_write"].then, "run", stop)  # type: ignore[attr-defined]
        with pytest.raises(prefault.PopulateInterrupted):
            one.populate(threads=1)
        assert not any(oracle.present(one.range.start, len(one)))
        assert present_blocks(other) == [8, 9, 10]
        assert _allocated(one) == 3 * PAGE


@pytest.mark.parametrize("many", [False, True])
def test_a_discard_installs_a_guard_again_that_the_kernel_dropped(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncation of a page that another process maps just then drops the guards of all (seen on 6.18)."""
    with SparseMemory(64 * PAGE, backing="memfd", unpopulated="fault") as memory:
        memory.populate(8 * PAGE, PAGE)
        memory.populate(20 * PAGE, PAGE)
        mman.madvise(memory.range.start + 9 * PAGE, 3 * PAGE, mman.MADV_GUARD_REMOVE)
        assert not faults(memory, 10 * PAGE)
        if many:

            def punch(start: int, length: int, real: Any = memory._guard.punch) -> Any:
                mman.madvise(start, length, mman.MADV_GUARD_REMOVE)  # or only now
                return real(start, length)

            monkeypatch.setattr(memory._guard, "punch", punch)
            memory.discard_many([(9 * PAGE, PAGE), (10 * PAGE, PAGE)])
        else:
            memory.discard(9 * PAGE, 2 * PAGE)
        assert [faults(memory, at * PAGE) for at in (8, 9, 10, 12, 20)] == [False, True, True, True, False]
        assert not faults(memory, 11 * PAGE)  # no call asked for that page


def test_a_block_that_was_not_tried_keeps_what_another_thread_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    with SparseMemory(64 * PAGE, huge="never") as memory:
        mman.munmap(memory.range.start + 9 * PAGE, PAGE)

        def locate(*arguments: Any, real: Any = EXECUTION.locate) -> Any:
            memory.write(21 * PAGE, b"written")
            return real(*arguments)

        monkeypatch.setattr(EXECUTION, "locate", locate)
        with pytest.raises(prefault.HoleError):
            memory.populate_many([(at * PAGE, PAGE) for at in range(5, 30, 2)])
        assert oracle.present(memory.range.start + 21 * PAGE, PAGE) == [True]
        assert memory.read(21 * PAGE, 7) == b"written"


# --- threads


@both
def test_two_threads_that_would_wait_for_each_other(unpopulated: Any) -> None:
    barrier = threading.Barrier(2)
    errors: list[str] = []

    def work(mine: SparseMemory, others: SparseMemory) -> None:
        def progress(*_: int) -> None:
            if first:
                first.clear()
                barrier.wait(60)
                others.populate()

        first = [True]
        try:
            mine.populate(progress=progress, threads=1)
        except RuntimeError as error:
            errors.append(str(error))

    with SparseMemory(MIB, unpopulated=unpopulated) as one, SparseMemory(MIB, unpopulated=unpopulated) as other:
        threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in ((one, other), (other, one))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert errors
        assert all("wait for each other" in error for error in errors)
        one.populate()
        other.populate()


# --- a kernel that refuses


def _refusal(call: Callable[[], object]) -> prefault.DiscardError | None:
    try:
        call()
    except prefault.DiscardError as error:
        return error
    return None


@both
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_the_kernel_has_no_mapping_left_for_a_discard(
    unpopulated: Any, backing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def refuse(address: int, length: int, prot: int, real: Any = mman.mprotect) -> None:
        nonlocal calls
        calls += 1
        if calls == refused:
            raise OSError(12, "mprotect: Cannot allocate memory")
        real(address, length, prot)

    monkeypatch.setattr(mman, "mprotect", refuse)
    for refused in (1, 2, 3):
        calls = 10
        with SparseMemory(4 * MIB, backing=backing, unpopulated=unpopulated, block=PAGE) as memory:
            memory.populate()
            memory.write(5 * PAGE, b"kept")
            ranges = [(0, PAGE), (9 * PAGE, PAGE), (MIB, 3 * MIB)]
            discards: list[Callable[[], object]] = [
                lambda m=memory: m.discard(3 * PAGE, PAGE),  # type: ignore[misc]
                lambda m=memory, ranges=ranges: m.discard_many(ranges),  # type: ignore[misc]
            ]
            for discard in discards:
                calls = 0
                error = _refusal(discard)
                if error is None:
                    assert calls < refused
                    continue
                assert "vm.max_map_count" in str(error)
                assert isinstance(error.__cause__, OSError)
                calls = 10
                discard()  # no operation is at work on them, though the exception is alive
            gone = {0, 3, 9, *range(256, 1024)}
            assert present_blocks(memory) == [block for block in range(1024) if block not in gone]
            assert memory.read(5 * PAGE, 4) == b"kept"
            if unpopulated == "fault":
                assert [faults(memory, at * PAGE) for at in (2, 3, 4, 300)] == [False, True, False, True]


# --- mounts


def test_a_small_block_gets_no_huge_page_of_a_tmpfs_that_gives_them(small_tmpfs: Callable[[str], Path]) -> None:
    """fallocate does not see MADV_NOHUGEPAGE. A hole in a huge page splits it, which unmaps all the others of its pages."""
    with SparseMemory(3000 * PAGE, backing=TemporaryFile(small_tmpfs("64m,huge=always"))) as memory:
        memory.populate(0, 3 * PAGE)
        assert _allocated(memory) == 3 * PAGE
        memory.populate_many([(at * PAGE, PAGE) for at in range(3, 300, 2)])
        there = present_blocks(memory)
        memory.discard_many([(11 * PAGE, PAGE)])
        assert present_blocks(memory) == [at for at in there if at != 11]
