"""ready: a loop whose page faults are counted, on memory that is populated and locked meanwhile."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
from typing import Any

import numpy
import pytest

import prefault
from prefault._kernel import mman
from prefault._system.proc import read_smaps
from prefault.arrays import fault_free
from prefault.engine import locking
from support import oracle
from support.children import in_child

_PAGES = 64
_SIZE = _PAGES * oracle.PAGE

pytestmark = pytest.mark.usefixtures("no_leaks")


def _array() -> numpy.ndarray[Any, Any]:
    """Memory of its own mapping, without huge pages, not populated."""
    return prefault.Mapping(_SIZE, huge="never").ndarray()


def _is_locked(array: numpy.ndarray[Any, Any]) -> bool:
    return "lo" in oracle.vma_flags(array.ctypes.data)


def _touch(array: numpy.ndarray[Any, Any]) -> None:
    """Write to each page from C, where nothing of Python's own is touched."""
    ctypes.memset(array.ctypes.data, 1, array.nbytes)


def test_a_loop_without_a_fault() -> None:
    array, other = _array(), _array()
    _touch(other)  # what ctypes needs is there
    address = array.ctypes.data
    with prefault.ready(array) as memory:
        before = oracle.minor_faults()
        ctypes.memset(address, 1, _SIZE)
        assert oracle.minor_faults() - before == 0
        assert _is_locked(array)
    assert memory.major_faults == 0
    assert memory.populated is not None
    assert memory.populated.bytes == memory.locked_bytes == _SIZE
    assert not _is_locked(array)
    assert all(oracle.present(address, _SIZE))


def test_faults_elsewhere_are_counted() -> None:
    array, other = _array(), _array()
    with prefault.ready(array) as memory:
        before = oracle.minor_faults()
        _touch(other)
        inside = memory.minor_faults
        assert inside >= oracle.minor_faults() - before - 1 >= _PAGES - 1
    assert memory.faults == memory.minor_faults + memory.major_faults >= inside
    after = memory.faults
    _touch(_array())
    assert memory.faults == after  # the count ends with the block


def test_major_faults(tmp_path: Any) -> None:
    """A page of a file that has left the page cache is read from the disk again."""
    path = tmp_path / "file"
    path.write_bytes(bytes(_SIZE))
    array = _array()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), _SIZE, prot=mmap.PROT_READ) as mapped:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with prefault.ready(array) as memory:
            assert mapped[0] == 0
        assert memory.major_faults >= 1


def test_check_raises() -> None:
    array, other = _array(), _array()
    with (
        pytest.raises(prefault.PageFaultsError, match="page faults in this thread") as caught,
        prefault.ready(array, check=True),
    ):
        _touch(other)
    assert caught.value.minor_faults >= _PAGES
    assert caught.value.major_faults == 0
    assert not _is_locked(array)


def test_check_hides_no_exception_of_the_block() -> None:
    array, other = _array(), _array()

    def loop() -> None:
        _touch(other)
        raise KeyError

    with pytest.raises(KeyError), prefault.ready(array, check=True):
        loop()
    assert not _is_locked(array)


def test_check_is_content_without_faults() -> None:
    array = _array()
    address = array.ctypes.data
    for _ in range(3):  # the first run touches what the interpreter itself needs
        memory = prefault.ready(array, check=False)
        with memory:
            ctypes.memset(address, 1, _SIZE)
    with prefault.ready(array, check=True):
        ctypes.memset(address, 2, _SIZE)


def test_only_what_it_locked_is_unlocked() -> None:
    array = _array()
    prefault.lock(array, offset=0, length=8 * oracle.PAGE)
    with prefault.ready(array, length=16 * oracle.PAGE) as memory:
        assert memory.locked_bytes == 8 * oracle.PAGE
        assert "lo" in oracle.vma_flags(array.ctypes.data + 12 * oracle.PAGE)
        assert "lo" not in oracle.vma_flags(array.ctypes.data + 16 * oracle.PAGE)
    assert "lo" in oracle.vma_flags(array.ctypes.data + 7 * oracle.PAGE)
    assert "lo" not in oracle.vma_flags(array.ctypes.data + 8 * oracle.PAGE)
    prefault.unlock(array)


def test_blocks_nest() -> None:
    array = _array()
    with prefault.ready(array):
        with prefault.ready(array, offset=oracle.PAGE) as inner:
            assert inner.locked_bytes == 0
        assert _is_locked(array)
    assert not _is_locked(array)


# --- locks beside each other


def _locked_pages(array: numpy.ndarray[Any, Any]) -> list[bool]:
    """Return which pages of an array smaps calls locked."""
    address = array.ctypes.data
    found = [False] * (array.nbytes // oracle.PAGE)
    for line in read_smaps():
        if "lo" in line.vm_flags:
            first, last = (max(0, at - address) // oracle.PAGE for at in (line.start, line.end))
            found[first:last] = [True] * len(found[first:last])
    return found


def _locked_bytes_of_process() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmLck:"))


def test_blocks_of_two_threads_that_overlap() -> None:
    """The first to end leaves the pages of the second locked, and the last unlocks all."""
    array, before = _array(), _locked_bytes_of_process()
    entered, leave = threading.Event(), threading.Event()
    populated = []

    def second() -> None:
        with prefault.ready(array, offset=_SIZE // 4) as memory:
            populated.append(memory.locked_bytes)
            entered.set()
            assert leave.wait(30)

    thread = threading.Thread(target=second)
    with prefault.ready(array, length=_SIZE // 2) as memory:
        thread.start()
        assert entered.wait(30)
        assert memory.locked_bytes == populated[0] == _SIZE // 2
        assert all(_locked_pages(array))
    assert _locked_pages(array) == [False] * (_PAGES // 4) + [True] * (3 * _PAGES // 4)
    assert oracle.smaps(array.ctypes.data + _SIZE // 2)["Locked"] == 3 * _SIZE // 4
    assert _locked_bytes_of_process() - before == 3 * _SIZE // 4
    leave.set()
    thread.join()
    assert not any(_locked_pages(array))
    assert _locked_bytes_of_process() == before


@pytest.mark.parametrize("seed", range(6))
def test_locks_beside_each_other(seed: int) -> None:
    """Blocks of any order, lock and unlock, against a model that knows each page."""
    choose = random.Random(seed)
    array = _array()
    blocks: list[tuple[prefault.ReadyMemory, set[int]]] = []
    lasting: set[int] = set()
    foreign = {3, 4, 40}  # by mlock(2) itself
    for page in foreign:
        mman.mlock2(array.ctypes.data + page * oracle.PAGE, oracle.PAGE)
    for _ in range(60):
        first, stop = sorted(choose.sample(range(_PAGES + 1), 2))
        part: dict[str, Any] = {"offset": first * oracle.PAGE, "length": (stop - first) * oracle.PAGE}
        pages = set(range(first, stop))
        match choose.randrange(5):
            case 0 | 1:
                blocks.append((prefault.ready(array, **part).__enter__(), pages))
            case 2 if blocks:
                blocks.pop(choose.randrange(len(blocks)))[0].__exit__(None, None, None)
            case 3:
                prefault.lock(array, **part)
                lasting |= pages
            case 4:
                prefault.unlock(array, **part)
                lasting -= pages
                foreign -= pages
        expected = lasting.union(foreign, *(needed for _, needed in blocks))
        assert _locked_pages(array) == [page in expected for page in range(_PAGES)]
    for block, _ in blocks:
        block.__exit__(None, None, None)
    assert _locked_pages(array) == [page in lasting | foreign for page in range(_PAGES)]
    prefault.unlock(array)
    assert not any(_locked_pages(array))


def test_a_child_inherits_no_locks() -> None:
    array = _array()
    with prefault.ready(array) as memory:

        def child() -> None:
            assert not any(_locked_pages(array))
            with prefault.ready(array) as own:
                assert own.locked_bytes == _SIZE
                assert all(_locked_pages(array))
            assert not any(_locked_pages(array))
            prefault.lock(array)
            memory.__exit__(None, None, None)  # of the parent's block
            assert all(_locked_pages(array))

        in_child(child)
        assert all(_locked_pages(array))


def test_only_the_pages_of_an_array_with_gaps() -> None:
    array = _array()
    rows = array.view(numpy.uint8).reshape(-1, 4 * oracle.PAGE)
    with prefault.ready(rows[:, :5]) as memory:
        assert memory.locked_bytes == _SIZE // 4
        assert _locked_pages(array) == [page % 4 == 0 for page in range(_PAGES)]
    assert not any(_locked_pages(array))


# --- the block


def test_without_locking() -> None:
    array = _array()
    with prefault.ready(array, lock=False) as memory:
        assert not _is_locked(array)
        assert all(oracle.present(array.ctypes.data, _SIZE))
    assert memory.locked_bytes == 0


def test_the_owner_cannot_unmap_it_inside() -> None:
    with mmap.mmap(-1, _SIZE) as owner:
        with prefault.ready(owner), pytest.raises(BufferError):
            owner.close()
        assert len(owner) == _SIZE


def test_memory_that_is_gone_at_the_end() -> None:
    address = mman.mmap(0, _SIZE, mman.PROT_READ | mman.PROT_WRITE, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS)
    with prefault.ready((ctypes.c_char * _SIZE).from_address(address)):
        mman.munmap(address, _SIZE)


def test_an_object_is_for_one_block() -> None:
    memory = prefault.ready(_array())
    with memory, pytest.raises(RuntimeError, match="already"):
        memory.__enter__()
    assert "64.0 KiB" not in repr(memory)
    assert "minor" in repr(memory)


def test_another_thread_cannot_count() -> None:
    raised: list[str] = []
    array = _array()
    with prefault.ready(array) as memory:

        def read() -> None:
            try:
                assert memory.faults
            except RuntimeError as error:
                raised.append(str(error))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert raised == ["the page faults are counted for the thread that entered the block, and read by it"]


def test_a_limit_on_locked_memory() -> None:
    def enter() -> str:
        import resource

        resource.setrlimit(resource.RLIMIT_MEMLOCK, (oracle.PAGE, oracle.PAGE))
        os.setuid(65534)
        array = _array()
        with pytest.raises(prefault.HeadroomError) as caught, prefault.ready(array):
            pass
        with prefault.ready(array, lock=False):
            pass
        return str(caught.value)

    if os.geteuid() != 0:
        pytest.skip("only root can give up its capabilities for another user's")
    assert "RLIMIT_MEMLOCK" in in_child(enter)


def test_its_text_can_be_had_in_another_thread() -> None:
    texts: list[str] = []
    with prefault.ready(_array()) as memory:
        thread = threading.Thread(target=lambda: texts.append(repr(memory)))
        thread.start()
        thread.join()
    assert texts == ["<ReadyMemory of 256.0 KiB, in a block of another thread>"]
    assert "0 major page faults" in repr(memory)


def test_ctrl_c_right_after_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(*arguments: Any, **options: Any) -> None:
        locking.lock_pages(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(fault_free, "lock_pages", lock)
    array = _array()
    with pytest.raises(KeyboardInterrupt), prefault.ready(array):
        pass
    assert not _is_locked(array)
