"""Threads, progress, Ctrl-C and rollback of the populate call: who works, what stops it, and what it says then."""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import prefault
from prefault._kernel import mman
from prefault._system import capabilities, own_process
from prefault.engine import chunk_queue, planning
from prefault.engine.methods import METHODS
from prefault.sizes import MIB, PAGE_SIZE
from support import needs, oracle
from support.interrupts import strike_at


def _helpers() -> list[str]:
    """Threads that take chunks for us, by the code that they are in."""
    frames = sys._current_frames().items()
    mine = threading.get_ident()
    return [str(frame) for ident, frame in frames if ident != mine and _is_at_work(frame)]


def _is_at_work(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "prefault.engine.execution" and frame.f_code.co_name == "_work":
            return True
        frame = frame.f_back
    return False


# --- threads


def test_threads_share_the_work_and_the_result_says_how_many(
    mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    run = METHODS["populate_write"].run

    def spy(start: int, length: int, target: Any) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.002)  # lets the other thread have its turn on any machine
        run(start, length, target)

    monkeypatch.setattr(METHODS["populate_write"], "run", spy)
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    result = prefault.populate(mapping, threads=8)
    assert result.threads == 2 == len(seen)
    assert result.bytes == 64 * MIB == oracle.present_bytes(mapping.range.start, 64 * MIB)


def test_threads_are_chosen_by_size_and_cpus(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: 64)
    assert prefault.plan(mapping).threads == 2
    assert prefault.plan(mapping, length="63 MiB").threads == 1
    with prefault.Mapping("4 GiB", noreserve=True) as large:
        assert prefault.plan(large).threads == 8
    monkeypatch.setattr(planning, "usable_cpus", lambda: 1)
    assert prefault.plan(mapping).threads == 1


def test_a_failure_among_threads_is_exact(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two holes, two threads: the lower one is reported, and every page that came in is named."""
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    start = mapping.range.start
    for hole in (21 * MIB + PAGE_SIZE, 22 * MIB):
        mman.mprotect(start + hole, PAGE_SIZE, mman.PROT_NONE)
    with pytest.raises(prefault.ProtectionError) as caught:
        prefault.populate(mapping, method="populate_write", threads=2)
    error = caught.value
    assert error.offset == 21 * MIB + PAGE_SIZE
    assert error.address == start + error.offset
    there = oracle.present(start, 64 * MIB)
    named = [start + index * PAGE_SIZE in error.populated for index in range(len(there))]
    assert named == there
    assert error.populated_bytes == sum(there) * PAGE_SIZE
    assert all(there[: error.offset // PAGE_SIZE])


def test_a_defect_in_a_helper_thread_is_raised_in_the_caller(
    mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = threading.get_ident()

    def broken(start: int, length: int, target: Any) -> None:
        if threading.get_ident() != caller:
            raise ZeroDivisionError("broken on purpose")
        time.sleep(0.01)

    monkeypatch.setattr(METHODS["populate_write"], "run", broken)
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        prefault.populate(mapping, threads=2)
    assert _helpers() == []


def test_other_python_threads_go_on_meanwhile() -> None:
    """ctypes releases the GIL in the system call: another thread runs while one call is under way."""
    with prefault.Mapping("1 GiB", huge="never") as large:
        steps: list[int] = []
        stop = threading.Event()

        def count() -> None:
            while not stop.is_set():
                steps.append(time.perf_counter_ns())
                time.sleep(0.001)

        thread = threading.Thread(target=count)
        thread.start()
        began = time.perf_counter_ns()
        mman.madvise(large.range.start, 1 << 30, mman.MADV_POPULATE_WRITE)
        ended = time.perf_counter_ns()
        stop.set()
        thread.join()
        assert sum(began < step < ended for step in steps) > 10


def test_without_more_threads_one_does_it_all(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[[], None], arguments: tuple[object, ...]) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    monkeypatch.setattr(sys.modules["prefault.engine.execution"], "start_new_thread", refuse)
    result = prefault.populate(mapping, threads=2)
    assert (result.bytes, result.threads) == (64 * MIB, 1)


def test_progress_of_several_threads_ends_at_all(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    for _ in range(10):
        calls: list[tuple[int, int]] = []
        prefault.discard(mapping)
        prefault.populate(mapping, threads=2, progress=lambda done, total, calls=calls: calls.append((done, total)))  # type: ignore[misc]
        assert calls[-1] == (64 * MIB, 64 * MIB)


def test_of_several_threads_all_that_they_populated_is_told(small_tmpfs: Callable[[str], Path]) -> None:
    """Some of it lies behind the page that failed, so that it was not populated before that."""
    with open(small_tmpfs("8m") / "data", "w+b") as file:
        file.truncate(32 << 20)
        memory = mmap.mmap(file.fileno(), 32 << 20)
    with pytest.raises(prefault.BackingFullError, match=r"; 8\.0 MiB populated in all \[") as caught:
        prefault.populate(memory, method="populate_write", headroom="ignore", threads=4)
    assert caught.value.populated_bytes == 8 << 20
    memory.close()


# --- progress, interruption


def test_progress_is_called_with_bytes_done_and_in_all(mapping: prefault.Mapping) -> None:
    calls: list[tuple[int, int]] = []
    prefault.populate(mapping, threads=1, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 3
    assert calls == sorted(calls)
    assert calls[-1] == (64 * MIB, 64 * MIB)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_exception_in_progress_stops_the_work(
    mapping: prefault.Mapping, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        prefault.populate(mapping, threads=threads, progress=stop)
    there = oracle.present_bytes(mapping.range.start, 64 * MIB)
    assert 0 < there < 64 * MIB
    assert caught.value.__notes__ == [f"populate was stopped: {there / MIB:.1f} MiB of 64.0 MiB populated"]


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_says_exactly_what_is_there(
    mapping: prefault.Mapping, threads: int, rollback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during the second chunk of the calling thread. Its handler runs when the system call is over."""
    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    caller, calls = threading.get_ident(), []
    enough = threading.Event()
    prefault.populate(mapping, length="1 MiB")

    def interrupted(populate: Any, *arguments: Any) -> Any:
        result = populate(*arguments)
        if threading.get_ident() == caller:
            calls.append(arguments)
            if len(calls) == 2:
                enough.set()
                signal.raise_signal(signal.SIGINT)
        else:
            enough.wait(20)  # on a busy machine the helper could take all chunks before the caller has its second
        return result

    for module, name in (("attempts", "attempt"), ("chunk_queue", "populate_long")):
        where = sys.modules[f"prefault.engine.{module}"]
        monkeypatch.setattr(where, name, partial(interrupted, getattr(where, name)))
    with pytest.raises(prefault.PopulateInterrupted) as caught:
        prefault.populate(mapping, threads=threads, rollback=rollback)
    there = oracle.present_bytes(mapping.range.start, 64 * MIB)
    assert there == (MIB if rollback else MIB + caught.value.populated_bytes)
    assert rollback or caught.value.populated_bytes > 3 * MIB  # more than the first chunk, whose first MiB was there
    assert isinstance(caught.value, KeyboardInterrupt)
    assert "of 64.0 MiB populated" in str(caught.value)
    assert _helpers() == []


_INTERRUPTED = """
import prefault, sys
mapping = prefault.Mapping(2 << 30, huge="never")
print("ready", flush=True)
try:
    while True:
        prefault.populate(mapping)
        prefault.discard(mapping)
except prefault.PopulateInterrupted as interruption:
    print("populated", interruption.populated_bytes)
except KeyboardInterrupt:
    print("between two calls")
"""


def test_a_real_ctrl_c_in_a_process_of_its_own() -> None:
    with subprocess.Popen([sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
            said, _ = child.communicate(timeout=30)
        finally:
            child.kill()  # else leaving the ``with`` would wait for ever
    assert child.returncode == 0
    assert said.startswith(("populated ", "between"))


_NOT_INTERRUPTED = """
import os, prefault, signal, threading
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
done = threading.Event()
def send():
    while not done.wait(0.0005):
        os.kill(os.getpid(), signal.SIGINT)
sender = threading.Thread(target=send)
sender.start()
with prefault.Mapping(256 << 20, huge="never") as mapping:
    print(prefault.populate(mapping, threads=2).bytes, prefault.residency(mapping).present_bytes)
done.set()
sender.join()
"""


def test_an_ignored_ctrl_c_interrupts_nothing() -> None:
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", sys.executable, "-c", _NOT_INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(256 * MIB)] * 2


def test_a_small_call_is_interrupted_with_what_is_there(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    run = METHODS["populate_write"].run

    def interrupted(start: int, length: int, target: Any) -> None:
        run(start, length // 2, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(METHODS["populate_write"], "run", interrupted)
    with pytest.raises(prefault.PopulateInterrupted) as caught:
        prefault.populate(mapping, length="1 MiB")
    assert caught.value.populated_bytes == MIB // 2 == oracle.present_bytes(mapping.range.start, 64 * MIB)


@pytest.mark.parametrize("every_us", [100, 1000])
def test_a_storm_of_ctrl_c_leaves_no_helper_at_work(
    mapping: prefault.Mapping, every_us: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals at any step, many of them while the call waits for its helpers: nothing is brought in after it returned."""
    monkeypatch.setattr(planning, "usable_cpus", lambda: 4)
    storming = False
    interrupted = 0
    rng = random.Random(every_us)

    def press(*_: object) -> None:
        if storming:
            raise KeyboardInterrupt

    # A signal in a finalizer, or in hypothesis's callback of the garbage collector, is not raised but given to this hook.
    swallowed: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: swallowed.append(report.exc_type))
    before = signal.signal(signal.SIGALRM, press)
    try:
        for _ in range(40):
            mman.madvise(mapping.range.start, 64 * MIB, mman.MADV_DONTNEED)
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.02), every_us / 1e6)
            try:
                try:
                    storming = True
                    prefault.populate(mapping, threads=4)
                finally:
                    storming = False
            except KeyboardInterrupt:
                while storming:  # a further one struck before the flag was cleared
                    with contextlib.suppress(KeyboardInterrupt):
                        storming = False
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert _helpers() == []
            there = oracle.present_bytes(mapping.range.start, 64 * MIB)
            time.sleep(0.01)  # what a helper needs for a chunk
            assert oracle.present_bytes(mapping.range.start, 64 * MIB) == there
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10
    assert set(swallowed) <= {KeyboardInterrupt}


def test_ctrl_c_while_it_waits_for_a_helper_waits_on(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 takes a thread for ended when its join() is interrupted."""
    caller = threading.get_ident()
    run = METHODS["populate_write"].run
    begun, finished = threading.Event(), threading.Event()

    def slow(start: int, length: int, target: Any) -> None:
        if threading.get_ident() == caller:
            begun.wait()
        else:
            begun.set()
            time.sleep(0.1)
        run(start, length, target)
        if threading.get_ident() != caller:
            finished.set()

    monkeypatch.setattr(planning, "usable_cpus", lambda: 2)
    monkeypatch.setattr(METHODS["populate_write"], "run", slow)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # the caller has done its part by then
        with pytest.raises(prefault.PopulateInterrupted) as caught:
            prefault.populate(mapping, threads=2, length="8 MiB", rollback=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert finished.is_set()
    assert caught.value.populated_bytes == oracle.present_bytes(mapping.range.start, 64 * MIB) == 0
    time.sleep(0.1)
    assert oracle.present_bytes(mapping.range.start, 64 * MIB) == 0


@pytest.mark.parametrize("has_own_pidfd", [True, False])
def test_ctrl_c_at_any_step_leaves_no_descriptor(
    mapping: prefault.Mapping, has_own_pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One signal a call, sooner or later in it."""
    needs.capability(capabilities.PROCESS_MADVISE)
    if not has_own_pidfd:
        monkeypatch.setattr(own_process, "has_constant", lambda: False)  # Linux before 6.15

    def press(*_: object) -> None:
        if calling:
            raise KeyboardInterrupt

    calling = False
    prefault.populate(mapping, length=MIB, method="process_madvise")
    descriptors = oracle.descriptors()
    rng = random.Random(1)
    before = signal.signal(signal.SIGALRM, press)
    interrupted = 0
    gc.disable()  # hypothesis has a callback in the collector, where Ctrl-C would be an unraisable exception
    try:
        for _ in range(4000):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.00001, 0.0003))
            try:
                try:
                    calling = True
                    prefault.populate(mapping, length=PAGE_SIZE, method="process_madvise")
                finally:
                    calling = False
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert interrupted > 100
    assert oracle.descriptors() == descriptors


def test_ctrl_c_at_each_line_of_the_queue_loses_no_chunk(mapping: prefault.Mapping) -> None:
    interrupted = 0
    for count in itertools.count(1):
        before = sys.gettrace()  # of a measurement of coverage
        sys.settrace(strike_at(count, {chunk_queue.__file__}))
        try:
            prefault.populate(mapping, length="24 MiB", threads=1, rollback=True)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        assert oracle.present_bytes(mapping.range.start, 64 * MIB) == 0, f"at line {count}"
    assert interrupted > 20
