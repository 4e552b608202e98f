"""The populate call itself: what it counts, how it stops, what it refuses. Why a page fails is in tests/kernel."""

from __future__ import annotations

import array
import mmap
import multiprocessing.shared_memory
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefault
from prefault._kernel import mman
from prefault.errors import HeadroomError
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import without
from support import needs, oracle
from support.regions import file_of

# The module, not the function of the same name that the package exports.
PLANNING = sys.modules["prefault.engine.planning"]


# --- what is counted


def test_a_fresh_mapping_is_all_work(mapping: prefault.Mapping) -> None:
    result = prefault.populate(mapping)
    assert (result.bytes, result.present_bytes, result.access) == (64 * MIB, 0, "write")
    assert oracle.present_bytes(mapping.range.start, 64 * MIB) == 64 * MIB
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
        assert all(oracle.file_pages(private.range.start, 16 * PAGE_SIZE))
        result = prefault.populate(private, access="write")
        assert result.bytes == 16 * PAGE_SIZE
        assert not any(oracle.file_pages(private.range.start, 16 * PAGE_SIZE))
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
    assert [index for index, there in enumerate(oracle.present(mapping.range.start, 16 * PAGE_SIZE)) if there] == [
        *range(first, last + 1)
    ]


def test_segments_of_several_mappings() -> None:
    """A buffer over read-only and writable, private memory: each part by its own method."""
    with prefault.Mapping("4 MiB", huge="never") as whole:
        from prefault._kernel import mman

        mman.mprotect(whole.range.start + MIB, MIB, mman.PROT_READ)
        plan = prefault.plan(whole)
        assert [segment.method.name for segment in plan.segments] == ["populate_write", "populate_read", "populate_write"]
        result = prefault.populate(whole)
        assert result.bytes == 4 * MIB
        assert result.method == "populate_write, populate_read"
        state = prefault.residency(whole)
        assert state.present_bytes == 4 * MIB
        assert state.allocated_bytes == 3 * MIB


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
            same = oracle.present_bytes(memory.range.start, MIB) == MIB and done.bytes == MIB - PAGE_SIZE
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert oracle.present_bytes(memory.range.start, MIB) == PAGE_SIZE


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
    assert result.bytes == size == oracle.present_bytes(mapping.range.start, 64 * MIB)
    assert result.method.startswith(method)


def test_a_hint_is_counted_by_what_came_of_it(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(64 * PAGE_SIZE))
    with prefault.Mapping(backing=prefault.File(path)) as memory:
        result = prefault.populate(memory, method="willneed")
        assert result.bytes == oracle.present_bytes(memory.range.start, len(memory)) == 0
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
    assert oracle.present_bytes(mapping.range.start, 64 * MIB) == 0
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


@pytest.mark.parametrize("thing", [5, 1.5, None, object(), [1, 2]])
def test_what_is_not_a_buffer_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=type(thing).__name__):
        prefault.populate(thing)


def test_a_failure_leaks_nothing(mapping: prefault.Mapping, no_leaks: None) -> None:
    mman.mprotect(mapping.range.start + MIB, PAGE_SIZE, mman.PROT_NONE)
    for _ in range(50):
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping, threads=2, rollback=True)


# --- what surrounds a call


def test_rollback_is_refused_where_nobody_knows_what_was_there(mapping: prefault.Mapping) -> None:
    """Without pagemap the pages of this call cannot be told from those with the user's data."""

    mapping.memoryview()[:5] = b"hello"
    mman.mprotect(mapping.range.start + MIB, PAGE_SIZE, mman.PROT_NONE)
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
        mman.mprotect(memory.range.start + 8 * PAGE_SIZE, PAGE_SIZE, mman.PROT_NONE)
        with without("process_vm_readv"), pytest.raises(prefault.ProtectionError) as caught:
            prefault.populate(memory, rollback=True)
        assert caught.value.populated_bytes == 0 == oracle.present_bytes(memory.range.start, MIB)
        assert os.pread(memory.fd, 6, 0) == b"theirs"


def test_huge_advice_on_shared_memory_is_not_spoilt_by_fallocate(thp_setting: Callable[[str, str], None]) -> None:
    """fallocate knows nothing of the advice on a mapping, and would allocate base pages."""
    thp_setting("shmem_enabled", "advise")
    with prefault.Mapping("16 MiB", backing="memfd", huge="advise") as memory:
        assert prefault.plan(memory).method == "populate_write"
        prefault.populate(memory)
        assert oracle.smaps(memory.range.start)["ShmemPmdMapped"] == 16 * MIB


def test_a_file_system_without_fallocate_is_populated_all_the_same(tmp_path: Path) -> None:
    needs.root("mount a ramfs")
    subprocess.run(["mount", "-t", "ramfs", "prefault-test", tmp_path], check=True)
    try:
        path = tmp_path / "data"
        path.write_bytes(b"hello" + bytes(16 * PAGE_SIZE - 5))
        with prefault.Mapping(backing=prefault.File(path)) as memory:
            result = prefault.populate(memory)
            assert result.bytes == 16 * PAGE_SIZE == oracle.present_bytes(memory.range.start, 16 * PAGE_SIZE)
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
        assert result.bytes == 16 * MIB == oracle.present_bytes(memory.range.start, 16 * MIB)
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
        assert oracle.present_bytes(memory.range.start, 16 * PAGE_SIZE) == 0


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


def test_a_method_is_named_by_a_text(mapping: prefault.Mapping) -> None:
    with pytest.raises(TypeError, match="list"):
        prefault.populate(mapping, method=["populate_write"])  # type: ignore[arg-type]
