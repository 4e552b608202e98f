"""The populate call itself: what it counts, how it stops, what it refuses. Why a page fails is in tests/kernel."""

from __future__ import annotations

import array
import contextlib
import gc
import mmap
import multiprocessing.shared_memory
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import prefault
from prefault._kernel import mman
from prefault._system import capabilities, own_process
from prefault.engine import chunking
from prefault.engine.methods import METHODS
from prefault.errors import HeadroomError
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import without
from support import needs, oracle
from support.regions import file_of

# The module, not the function of the same name that the package exports.
PLANNING = sys.modules["prefault.engine.planning"]


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


@pytest.fixture
def mapping() -> Iterator[prefault.Mapping]:
    """64 MiB of private anonymous memory in base pages, of which nothing is populated."""
    with prefault.Mapping("64 MiB", huge="never") as fresh:
        yield fresh


def address(memory: prefault.Mapping) -> int:
    return memory.range.start


# --- what is counted


def test_a_fresh_mapping_is_all_work(mapping: prefault.Mapping) -> None:
    result = prefault.populate(mapping)
    assert (result.bytes, result.present_bytes, result.access) == (64 * MIB, 0, "write")
    assert oracle.present_bytes(address(mapping), 64 * MIB) == 64 * MIB
    assert result.seconds > 0
    assert "64.0 MiB populated writable" in str(result)


def test_what_was_populated_before_is_not_counted(mapping: prefault.Mapping) -> None:
    prefault.populate(mapping, offset="1 MiB", length="3 MiB")
    result = prefault.populate(mapping)
    assert (result.bytes, result.present_bytes) == (61 * MIB, 3 * MIB)
    again = prefault.populate(mapping)
    assert (again.bytes, again.present_bytes) == (0, 64 * MIB)
    assert "64.0 MiB were populated already" in str(again)


def test_the_zero_page_is_work_for_writing_but_not_for_reading(mapping: prefault.Mapping) -> None:
    assert prefault.populate(mapping, access="read", length="1 MiB").bytes == MIB
    assert prefault.populate(mapping, access="read", length="1 MiB").bytes == 0
    assert prefault.populate(mapping, access="write", length="1 MiB").bytes == MIB
    assert prefault.populate(mapping, access="write", length="1 MiB").bytes == 0


def test_pages_of_the_file_are_work_for_writing_in_a_private_mapping(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(16 * PAGE_SIZE))
    with prefault.Mapping(backing=prefault.File(path), shared=False) as private:
        assert prefault.populate(private, access="read").bytes == 16 * PAGE_SIZE
        assert all(oracle.file_pages(address(private), 16 * PAGE_SIZE))
        result = prefault.populate(private, access="write")
        assert result.bytes == 16 * PAGE_SIZE
        assert not any(oracle.file_pages(address(private), 16 * PAGE_SIZE))
        assert private.memoryview() == path.read_bytes()


_LEFT = "copy-on-write pages stay the file's: pass access='write' to copy them into memory of their own now"


@pytest.mark.parametrize("place", ["disk", "tmpfs"])
def test_a_private_mapping_of_a_file_is_not_copied_unasked(tmp_path: Path, place: str) -> None:
    """As safetensors maps a model, and numpy.memmap(mode="c") a file."""
    with ExitStack() as stack:
        if place == "tmpfs":
            tmp_path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        path = tmp_path / "model"
        path.write_bytes(b"x" * 256 * PAGE_SIZE)
        array = np.memmap(path, "u1", mode="c")
        start = array.ctypes.data
        plan = prefault.plan(array)
        assert (plan.access, plan.notes) == ("read", (_LEFT,))
        result = prefault.populate(array)
        assert (result.access, result.notes) == ("read", (_LEFT,))
        assert oracle.present_bytes(start, len(array)) == len(array)
        assert oracle.smaps(start)["Anonymous"] == 0
        assert prefault.populate(array, access="read").notes == ()  # as asked
        written = prefault.populate(array, access="write")
        assert (written.access, written.bytes, written.notes) == ("write", len(array), ())
        assert oracle.smaps(start)["Anonymous"] == len(array)
        assert (array == ord("x")).all()
        readonly = np.memmap(path, "u1", mode="r")
        assert (prefault.plan(readonly).access, prefault.plan(readonly).notes) == ("read", ())


def test_touching_afterwards_does_not_fault(mapping: prefault.Mapping) -> None:
    prefault.populate(mapping)
    pages = mapping.ndarray()[::PAGE_SIZE]
    pages[:8] = 1  # the interpreter's own first-time faults are over now
    before = oracle.minor_faults()
    pages[:] = 2
    assert oracle.minor_faults() - before < 16  # of 16384 pages


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 4097])
def test_a_part_is_rounded_outward_and_no_further(mapping: prefault.Mapping, offset: int) -> None:
    prefault.populate(mapping, offset=offset, length=PAGE_SIZE)
    first, last = offset // PAGE_SIZE, (offset + PAGE_SIZE - 1) // PAGE_SIZE
    assert [index for index, there in enumerate(oracle.present(address(mapping), 16 * PAGE_SIZE)) if there] == [
        *range(first, last + 1)
    ]


def test_segments_of_several_mappings() -> None:
    """A buffer over read-only and writable, private memory: each part by its own method."""
    with prefault.Mapping("4 MiB", huge="never") as whole:
        from prefault._kernel import mman

        mman.mprotect(address(whole) + MIB, MIB, mman.PROT_READ)
        plan = prefault.plan(whole)
        assert [segment.method.name for segment in plan.segments] == ["populate_write", "populate_read", "populate_write"]
        result = prefault.populate(whole)
        assert result.bytes == 4 * MIB
        assert result.method == "populate_write, populate_read"
        state = prefault.residency(whole)
        assert state.present_bytes == 4 * MIB
        assert state.allocated_bytes == 3 * MIB


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
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
    result = prefault.populate(mapping, threads=8)
    assert result.threads == 2 == len(seen)
    assert result.bytes == 64 * MIB == oracle.present_bytes(address(mapping), 64 * MIB)


def test_threads_are_chosen_by_size_and_cpus(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 64)
    assert prefault.plan(mapping).threads == 2
    assert prefault.plan(mapping, length="63 MiB").threads == 1
    with prefault.Mapping("4 GiB", noreserve=True) as large:
        assert prefault.plan(large).threads == 8
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 1)
    assert prefault.plan(mapping).threads == 1


def test_a_failure_among_threads_is_exact(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two holes, two threads: the lower one is reported, and every page that came in is named."""
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
    start = address(mapping)
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
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
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
        mman.madvise(address(large), 1 << 30, mman.MADV_POPULATE_WRITE)
        ended = time.perf_counter_ns()
        stop.set()
        thread.join()
        assert sum(began < step < ended for step in steps) > 10


# --- progress, interruption


def test_progress_is_called_with_bytes_done_and_in_all(mapping: prefault.Mapping) -> None:
    calls: list[tuple[int, int]] = []
    prefault.populate(mapping, threads=1, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 3
    assert calls == sorted(calls)
    assert calls[-1] == (64 * MIB, 64 * MIB)


def test_progress_true_draws_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with prefault.Mapping("16 MiB") as memory:
        prefault.populate(memory, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "populate" in err


@pytest.mark.parametrize("threads", [1, 2])
def test_an_exception_in_progress_stops_the_work(
    mapping: prefault.Mapping, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        prefault.populate(mapping, threads=threads, progress=stop)
    there = oracle.present_bytes(address(mapping), 64 * MIB)
    assert 0 < there < 64 * MIB
    assert caught.value.__notes__ == [f"populate was stopped: {there / MIB:.1f} MiB of 64.0 MiB populated"]


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_says_exactly_what_is_there(
    mapping: prefault.Mapping, threads: int, rollback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during the second chunk of the calling thread. Its handler runs when the system call is over."""
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
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
    there = oracle.present_bytes(address(mapping), 64 * MIB)
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
    assert caught.value.populated_bytes == MIB // 2 == oracle.present_bytes(address(mapping), 64 * MIB)


# --- any buffer


def test_everything_with_memory_is_taken() -> None:
    shared = multiprocessing.shared_memory.SharedMemory(create=True, size=8 * PAGE_SIZE)
    try:
        memory = mmap.mmap(-1, 8 * PAGE_SIZE)
        buffers: list[Any] = [
            np.zeros(8 * PAGE_SIZE, np.uint8),
            np.zeros((64, 512), order="F"),
            memory,
            memoryview(memory)[100:5000],
            bytearray(8 * PAGE_SIZE),
            bytes(8 * PAGE_SIZE),
            array.array("d", bytes(8 * PAGE_SIZE)),
            shared,
        ]
        for buffer in buffers:
            assert prefault.residency(buffer).range.pages == 0 or prefault.populate(buffer).seconds >= 0
            state = prefault.residency(buffer)
            assert state.present_bytes == state.range.length
        del buffers, buffer
        memory.close()
    finally:
        shared.close()
        shared.unlink()


def test_a_strided_array_is_populated_by_the_pages_it_spans() -> None:
    whole = np.zeros((64, PAGE_SIZE), np.uint8)
    result = prefault.populate(whole[::2, :8])
    assert "not contiguous" in str(result)
    assert result.bytes + result.present_bytes >= 62 * PAGE_SIZE


def test_an_empty_buffer_is_nothing_to_do() -> None:
    for empty in (b"", bytearray(), np.zeros((0, 5)), memoryview(b"abc")[3:]):
        result = prefault.populate(empty)
        assert (result.bytes, result.present_bytes) == (0, 0)
        assert str(result) == "nothing to populate: the buffer is empty"
        assert str(prefault.plan(empty)) == "nothing to populate: the buffer is empty"
    with prefault.Mapping(PAGE_SIZE) as memory:
        assert prefault.populate(memory, offset=PAGE_SIZE).bytes == 0
        assert prefault.populate(memory, length=0).bytes == 0


def test_in_a_child_of_fork_it_is_the_childs_memory() -> None:
    with prefault.Mapping("1 MiB", huge="never") as memory:
        prefault.populate(memory, length=PAGE_SIZE)  # opens the files of /proc/self
        child = os.fork()
        if child == 0:
            done = prefault.populate(memory)
            same = oracle.present_bytes(address(memory), MIB) == MIB and done.bytes == MIB - PAGE_SIZE
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert oracle.present_bytes(address(memory), MIB) == PAGE_SIZE


# --- methods by name


@pytest.mark.parametrize(
    ("method", "access"),
    [
        ("populate_read", "read"),
        ("populate_write", "write"),
        ("process_madvise", "write"),
        ("process_madvise", "read"),
        ("process_vm_readv", "read"),
        ("futex_add", "write"),
        ("mlock", "read"),
    ],
)
def test_methods_by_name_populate_all(mapping: prefault.Mapping, method: str, access: Any) -> None:
    size = 8 * MIB if method != "mlock" else 32 * PAGE_SIZE  # an ordinary user may lock 64 KiB to 8 MiB
    result = prefault.populate(mapping, length=size, method=method, access=access)
    assert result.bytes == size == oracle.present_bytes(address(mapping), 64 * MIB)
    assert result.method.startswith(method)


def test_a_hint_is_counted_by_what_came_of_it(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(64 * PAGE_SIZE))
    with prefault.Mapping(backing=prefault.File(path)) as memory:
        result = prefault.populate(memory, method="willneed")
        assert result.bytes == oracle.present_bytes(address(memory), len(memory)) == 0
        assert "hint" in str(result)
        assert "nothing was populated" in str(result)


def test_fallocate_alone_allocates_but_maps_nothing() -> None:
    with prefault.Mapping("1 MiB", backing="memfd") as memory:
        assert memory.fd is not None
        result = prefault.populate(memory, method="fallocate")
        assert result.bytes == 0
        assert os.fstat(memory.fd).st_blocks * 512 == MIB


def test_mlock_beyond_the_limit_names_the_limit(mapping: prefault.Mapping) -> None:
    script = (
        "import os, resource, prefault\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "for headroom in 'check', 'ignore':\n"
        "    try: prefault.populate(prefault.Mapping('1 MiB'), method='mlock', headroom=headroom)\n"
        "    except prefault.PopulateError as error: print(type(error).__name__, error)\n"
    )
    # The capability to lock goes away with root; the modules are imported before.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    refused, failed = done.stdout.splitlines()
    assert re.match(r"HeadroomError .*1\.0 MiB of locked memory are needed, and RLIMIT_MEMLOCK leaves 64\.0 KiB", refused)
    assert re.match(r"OutOfMemoryError .*RLIMIT_MEMLOCK is 64\.0 KiB", failed)


# --- bad input


@pytest.mark.parametrize("method", ["read", "write", "read/write", "fallocate+write"])
def test_methods_that_lose_bytes_or_die_of_sigbus_are_refused(mapping: prefault.Mapping, method: str) -> None:
    mapping.memoryview()[:5] = b"hello"
    with pytest.raises(ValueError, match="measurements"):
        prefault.populate(mapping, method=method)
    assert bytes(mapping.memoryview()[:5]) == b"hello"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"offset": -1}, ValueError, "negative"),
        ({"offset": 64 * MIB + 1}, ValueError, "outside"),
        ({"offset": 1 << 70}, ValueError, "beyond"),
        ({"length": -5}, ValueError, "negative"),
        ({"length": 64 * MIB + 1}, ValueError, "outside"),
        ({"offset": 64 * MIB - 1, "length": 2}, ValueError, "outside"),
        ({"length": (1 << 63) - 1, "offset": 4096}, ValueError, "outside"),
        ({"length": "1 MXB"}, ValueError, "unknown unit"),
        ({"length": 1.5}, TypeError, "size"),
        ({"access": "both"}, ValueError, "access is"),
        ({"method": "magic"}, ValueError, "unknown method 'magic'"),
        ({"method": "populate_read", "access": "write"}, ValueError, "populates for read"),
        ({"method": "fallocate"}, ValueError, "descriptor"),
        ({"threads": 0}, ValueError, "at least 1"),
        ({"threads": 1.0}, TypeError, "number"),
        ({"threads": True}, TypeError, "number"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_done(
    mapping: prefault.Mapping, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        prefault.populate(mapping, **arguments)
    with pytest.raises(error, match=text):
        prefault.plan(mapping, **arguments)
    assert oracle.present_bytes(address(mapping), 64 * MIB) == 0
    mapping.close()  # nothing holds it


def test_closed_and_released_memory_is_refused() -> None:
    closed = prefault.Mapping(PAGE_SIZE)
    closed.close()
    view = memoryview(bytearray(PAGE_SIZE))
    view.release()
    shared = multiprocessing.shared_memory.SharedMemory(create=True, size=PAGE_SIZE)
    shared.close()
    shared.unlink()
    for memory in (closed, view, shared):
        with pytest.raises(ValueError, match=r"closed|released"):
            prefault.populate(memory)


@pytest.mark.parametrize("thing", [5, 1.5, None, object(), [1, 2], "text", Path("/tmp")])
def test_what_is_not_a_buffer_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=type(thing).__name__ + "|path"):
        prefault.populate(thing)


def test_a_failure_leaks_nothing(mapping: prefault.Mapping, no_leaks: None) -> None:
    mman.mprotect(address(mapping) + MIB, PAGE_SIZE, mman.PROT_NONE)
    for _ in range(50):
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping, threads=2, rollback=True)


# --- the pace


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
    assert [times.chunk(one, cost) for cost in (1, 7, 14, 25)] == [32 * MIB, 64 * MIB, 64 * MIB, 32 * MIB]
    assert [times.chunk(one, 0.1) for _ in range(2)] == [256 * MIB] * 2
    four = chunking.ChunkSize(on_disk=False, threads=4, vectors=True)
    assert [times.chunk(four, cost) for cost in (1.5, 3, 5, 7)] == [8 * MIB, 8 * MIB, 8 * MIB, 4 * MIB]


def test_chunks_grow_while_another_thread_has_the_gil_but_not_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    times, one = FakeTimes(monkeypatch), chunking.ChunkSize(on_disk=False)
    assert times.chunk(one, 3, waited_ms=5, sleeps=0) == 4 * MIB
    assert times.chunk(one, 3, waited_ms=5, sleeps=1) == 8 * MIB


def test_chunks_of_a_disk_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    times, one = FakeTimes(monkeypatch), chunking.ChunkSize(on_disk=True)
    assert times.chunk(one, 0.1, waited_ms=30, sleeps=3) == 4 * MIB


# --- what surrounds a call


def test_rollback_is_refused_where_nobody_knows_what_was_there(mapping: prefault.Mapping) -> None:
    """Without pagemap the pages of this call cannot be told from those with the user's data."""

    mapping.memoryview()[:5] = b"hello"
    mman.mprotect(address(mapping) + MIB, PAGE_SIZE, mman.PROT_NONE)
    with without("pagemap", "pagemap_scan"):
        with pytest.raises(prefault.PopulateError, match="rollback is not possible"):
            prefault.populate(mapping, rollback=True)
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping)
    assert bytes(mapping.memoryview()[:5]) == b"hello"


def test_rollback_of_shared_memory_without_process_vm_readv_takes_no_byte() -> None:
    with prefault.Mapping("1 MiB", backing="memfd") as memory, prefault.Mapping("1 MiB", backing="memfd"):
        assert memory.fd is not None
        os.pwrite(memory.fd, b"theirs", 0)  # in the file, not in our page tables
        mman.mprotect(address(memory) + 8 * PAGE_SIZE, PAGE_SIZE, mman.PROT_NONE)
        with without("process_vm_readv"), pytest.raises(prefault.ProtectionError) as caught:
            prefault.populate(memory, rollback=True)
        assert caught.value.populated_bytes == 0 == oracle.present_bytes(address(memory), MIB)
        assert os.pread(memory.fd, 6, 0) == b"theirs"


def test_huge_advice_on_shared_memory_is_not_spoilt_by_fallocate(thp_setting: Callable[[str, str], None]) -> None:
    """fallocate knows nothing of the advice on a mapping, and would allocate base pages."""
    thp_setting("shmem_enabled", "advise")
    with prefault.Mapping("16 MiB", backing="memfd", huge="advise") as memory:
        assert prefault.plan(memory).method == "populate_write"
        prefault.populate(memory)
        assert oracle.smaps(address(memory))["ShmemPmdMapped"] == 16 * MIB


def test_a_file_system_without_fallocate_is_populated_all_the_same(tmp_path: Path) -> None:
    needs.root("mount a ramfs")
    subprocess.run(["mount", "-t", "ramfs", "prefault-test", tmp_path], check=True)
    try:
        path = tmp_path / "data"
        path.write_bytes(b"hello" + bytes(16 * PAGE_SIZE - 5))
        with prefault.Mapping(backing=prefault.File(path)) as memory:
            result = prefault.populate(memory)
            assert result.bytes == 16 * PAGE_SIZE == oracle.present_bytes(address(memory), 16 * PAGE_SIZE)
            assert "no fallocate" in str(result)
            with pytest.raises(prefault.PopulateError):
                prefault.populate(memory, method="fallocate+populate_write")
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.fixture
def ext2(tmp_path: Path) -> Iterator[Path]:
    """A file system on a disk that has no fallocate."""
    needs.root("mount a file system")
    mkfs = shutil.which("mkfs.ext2", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if mkfs is None:
        needs.missing("mkfs.ext2 is not installed")
    image, directory = tmp_path / "image", tmp_path / "ext2"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    made = subprocess.run([mkfs, "-q", image], capture_output=True)
    if made.returncode or subprocess.run(["mount", "-o", "loop", image, directory], capture_output=True).returncode:
        needs.missing("no file system can be made and mounted on a loop device")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_disk_without_fallocate_is_populated_all_the_same(ext2: Path, threads: int, rollback: bool) -> None:
    path = ext2 / "data"
    path.touch()
    os.truncate(path, 16 * MIB)
    with prefault.Mapping(backing=prefault.File(path)) as memory:
        planned = prefault.plan(memory)
        assert planned.method == "fallocate+populate_read"
        assert "populate_read alone, if the file system has no fallocate" in str(planned)
        result = prefault.populate(memory, threads=threads, rollback=rollback)
        assert result.bytes == 16 * MIB == oracle.present_bytes(address(memory), 16 * MIB)
        assert result.method == "populate_read"
        assert [note for note in result.notes if "no fallocate" in note]
        assert path.stat().st_blocks == 0
        with pytest.raises(prefault.PopulateError):
            prefault.populate(memory, method="fallocate+populate_read")
    with prefault.SparseMemory(None, backing=prefault.File(path)) as sparse:
        many = sparse.populate_many([(0, PAGE_SIZE), (8 * PAGE_SIZE, PAGE_SIZE)])
        assert (many.method, many.bytes) == ("populate_read", 2 * PAGE_SIZE)
        assert len([note for note in many.notes if "no fallocate" in note]) == 1


@pytest.mark.parametrize("directory", ["/dev/shm", "/var/tmp"])
def test_a_plan_touches_nothing(directory: str) -> None:
    with file_of(directory, 16 * PAGE_SIZE) as (fd, path), prefault.Mapping(backing=prefault.File(path)) as memory:
        assert "fallocate+populate" in str(prefault.plan(memory))
        assert os.fstat(fd).st_blocks == 0
        assert oracle.present_bytes(address(memory), 16 * PAGE_SIZE) == 0


def test_without_more_threads_one_does_it_all(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[[], None], arguments: tuple[object, ...]) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
    monkeypatch.setattr(sys.modules["prefault.engine.execution"], "start_new_thread", refuse)
    result = prefault.populate(mapping, threads=2)
    assert (result.bytes, result.threads) == (64 * MIB, 1)


def test_progress_of_several_threads_ends_at_all(mapping: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
    for _ in range(10):
        calls: list[tuple[int, int]] = []
        prefault.discard(mapping)
        prefault.populate(mapping, threads=2, progress=lambda done, total, calls=calls: calls.append((done, total)))  # type: ignore[misc]
        assert calls[-1] == (64 * MIB, 64 * MIB)


@pytest.mark.parametrize("every_us", [100, 1000])
def test_a_storm_of_ctrl_c_leaves_no_helper_at_work(
    mapping: prefault.Mapping, every_us: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals at any step, many of them while the call waits for its helpers: nothing is brought in after it returned."""
    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 4)
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
            mman.madvise(address(mapping), 64 * MIB, mman.MADV_DONTNEED)
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
            there = oracle.present_bytes(address(mapping), 64 * MIB)
            time.sleep(0.01)  # what a helper needs for a chunk
            assert oracle.present_bytes(address(mapping), 64 * MIB) == there
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

    monkeypatch.setattr(PLANNING, "usable_cpus", lambda: 2)
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
    assert caught.value.populated_bytes == oracle.present_bytes(address(mapping), 64 * MIB) == 0
    time.sleep(0.1)
    assert oracle.present_bytes(address(mapping), 64 * MIB) == 0


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


def test_a_full_tmpfs_is_told_also_of_a_file_that_was_unlinked(small_tmpfs: Callable[[str], Path]) -> None:
    path = small_tmpfs("64k") / "data"
    with open(path, "w+b") as file:
        file.truncate(1 << 20)
        memory = mmap.mmap(file.fileno(), 1 << 20)
    path.unlink()
    with pytest.raises(prefault.BackingFullError, match=r"of 64\.0 KiB"):
        prefault.populate(memory, method="populate_write", headroom="ignore")
    with pytest.raises(prefault.PopulateError, match=r"of 64\.0 KiB used") as refused:
        prefault.populate(memory, method="populate_write")
    assert isinstance(refused.value, HeadroomError)
    memory.close()


def test_of_several_threads_all_that_they_populated_is_told(small_tmpfs: Callable[[str], Path]) -> None:
    """Some of it lies behind the page that failed, so that it was not populated before that."""
    with open(small_tmpfs("8m") / "data", "w+b") as file:
        file.truncate(32 << 20)
        memory = mmap.mmap(file.fileno(), 32 << 20)
    with pytest.raises(prefault.BackingFullError, match=r"; 8\.0 MiB populated in all \[") as caught:
        prefault.populate(memory, method="populate_write", headroom="ignore", threads=4)
    assert caught.value.populated_bytes == 8 << 20
    memory.close()


def test_a_method_is_named_by_a_text(mapping: prefault.Mapping) -> None:
    with pytest.raises(TypeError, match="list"):
        prefault.populate(mapping, method=["populate_write"])  # type: ignore[arg-type]
