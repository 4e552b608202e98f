"""Undoing a populate call: exactly what it brought in, and no byte of anybody else. More in tests/kernel."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault._kernel import mman
from prefault._system import capabilities
from prefault.engine.methods import METHODS, Access
from prefault.intervals import Intervals
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import without
from support import needs, oracle
from support.regions import READ, WRITE, Region, data_pages, file_of

EXECUTION = sys.modules["prefault.engine.execution"]
ROLLBACK = sys.modules["prefault.engine.rollback"]


def blocked(mapping: prefault.Mapping, at: int) -> int:
    """Make a page unreachable; the address of the mapping."""
    start = mapping.range.start
    mman.mprotect(start + at, PAGE_SIZE, mman.PROT_NONE)
    return start


def allocated(mapping: prefault.Mapping) -> int:
    assert mapping.fd is not None
    return os.fstat(mapping.fd).st_blocks * 512


@pytest.fixture
def memfd() -> Iterator[prefault.Mapping]:
    with prefault.Mapping("4 MiB", backing="memfd", huge="never") as mapping:
        yield mapping


def test_memory_that_fallocate_set_aside_beyond_the_failure_is_given_back(memfd: prefault.Mapping) -> None:
    blocked(memfd, MIB)
    with pytest.raises(prefault.ProtectionError) as caught:
        prefault.populate(memfd, rollback=True)
    assert "1.0 MiB populated in all, and discarded again" in str(caught.value)
    assert allocated(memfd) == 0


def test_the_same_after_an_interruption(memfd: prefault.Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(start: int, length: int, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(METHODS["fallocate+populate_write"].then, "run", interrupted)  # type: ignore[attr-defined]
    with pytest.raises(prefault.PopulateInterrupted):
        prefault.populate(memfd, rollback=True)
    assert allocated(memfd) == 0


def test_pages_of_others_stay_allocated_even_if_they_hold_zeros(memfd: prefault.Mapping) -> None:
    assert memfd.fd is not None
    os.pwrite(memfd.fd, bytes(8 * PAGE_SIZE), 0)
    blocked(memfd, MIB)
    with pytest.raises(prefault.ProtectionError):
        prefault.populate(memfd, rollback=True)
    assert allocated(memfd) == 8 * PAGE_SIZE


def test_the_position_of_the_descriptor_stays(tmp_path: Path) -> None:
    """Descriptors are borrowed: the owner goes on reading where it was."""
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    os.truncate(path, 64 * PAGE_SIZE)
    with prefault.Mapping(backing=prefault.File(path)) as mapping:
        assert mapping.fd is not None
        os.lseek(mapping.fd, 5, os.SEEK_SET)
        before = allocated(mapping)
        blocked(mapping, 32 * PAGE_SIZE)
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping, rollback=True)
        assert allocated(mapping) == before
        assert os.read(mapping.fd, 3) == b"567"


def test_disk_space_that_was_set_aside_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.touch()
    os.truncate(path, 64 * PAGE_SIZE)
    with prefault.Mapping(backing=prefault.File(path)) as mapping:
        assert mapping.fd is not None
        os.posix_fallocate(mapping.fd, 4 * PAGE_SIZE, 8 * PAGE_SIZE)
        before = allocated(mapping)
        blocked(mapping, 32 * PAGE_SIZE)
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping, rollback=True)
        assert allocated(mapping) == before


def test_what_the_kernel_does_not_let_go_of_is_named_and_the_cause_is_kept() -> None:
    """MADV_REMOVE refuses locked memory, and shared anonymous memory has no descriptor to punch holes with."""
    with prefault.Mapping("1 MiB", shared=True, huge="never") as mapping:
        start = mapping.range.start
        mman.mlock2(start, 8 * PAGE_SIZE, mman.MLOCK_ONFAULT)
        blocked(mapping, 16 * PAGE_SIZE)
        with pytest.raises(prefault.ProtectionError) as caught:
            prefault.populate(mapping, rollback=True)
        assert "and discarded again except 32.0 KiB" in str(caught.value)
        assert caught.value.populated_bytes == 8 * PAGE_SIZE


def test_a_sealed_memfd_hides_no_cause() -> None:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, MIB)
        with prefault.Mapping(MIB, backing=prefault.File(f"/proc/self/fd/{fd}")) as mapping:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x0010)  # F_SEAL_FUTURE_WRITE: the mapping stays writable
            start = blocked(mapping, 16 * PAGE_SIZE)
            with pytest.raises(prefault.PopulateError) as caught:
                prefault.populate(mapping, rollback=True)
            assert isinstance(caught.value, prefault.PopulateError)
            assert oracle.present_bytes(start, MIB) == 0
    finally:
        os.close(fd)


def test_a_page_that_one_look_missed_keeps_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page under migration, or swapped out between two looks, is "not present" in one of them."""
    with prefault.Mapping("1 MiB", huge="never") as mapping:
        mapping.memoryview()[:5] = b"hello"
        blocked(mapping, 16 * PAGE_SIZE)
        monkeypatch.setattr(
            sys.modules["prefault.engine.populated_pages"], "populated_before", lambda *args, **options: Intervals()
        )
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping, rollback=True)
        assert bytes(mapping.memoryview()[:5]) == b"hello"


def test_zero_pages_come_back_as_zero_pages() -> None:
    with prefault.Mapping("1 MiB", huge="never") as mapping:
        prefault.populate(mapping, access="read", length=8 * PAGE_SIZE)
        blocked(mapping, 16 * PAGE_SIZE)
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping, access="write", rollback=True)
        state = prefault.residency(mapping)
        assert state.allocated_bytes == 0


def test_refused_where_nobody_knows_what_was_there() -> None:
    with prefault.Mapping("1 MiB", huge="never") as mapping:
        mapping.memoryview()[:5] = b"hello"
        blocked(mapping, 16 * PAGE_SIZE)
        with without("pagemap", "pagemap_scan"), pytest.raises(prefault.PopulateError, match="not possible"):
            prefault.populate(mapping, rollback=True)
        assert bytes(mapping.memoryview()[:5]) == b"hello"


_WITHOUT_ROOT = """
import os, numpy, prefault  # numpy: a package that only root may read cannot be loaded later
mapping = prefault.Mapping("64 KiB")
prefault.populate(mapping)
child = os.fork()
if child == 0:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    prefault.discard(mapping)
    result = prefault.populate(mapping)
    os._exit(0 if result.bytes else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_worker_that_gave_up_root_still_populates() -> None:
    """Its /proc/self/pagemap is not its own any more: the process is not dumpable."""
    needs.root("give up root")
    done = subprocess.run([sys.executable, "-c", _WITHOUT_ROOT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("directory", ["/dev/shm", "/var/tmp"])
def test_nothing_is_allocated_in_a_file_that_comes_after_the_failure(directory: str) -> None:
    """The page of another mapping, before the file's, cannot be populated; so the file is never reached."""
    with file_of(directory, 16 * PAGE_SIZE) as (fd, path), prefault.Mapping(backing=prefault.File(path)) as mapping:
        other = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED
        mman.mmap(mapping.range.start, 4 * PAGE_SIZE, mman.PROT_NONE, other)
        with pytest.raises(prefault.ProtectionError):
            prefault.populate(mapping, rollback=True)
        assert os.fstat(fd).st_blocks == 0


_EACH_WAY_TO_READ_HOLES = pytest.mark.parametrize(
    ("shared", "prot", "access"), [(False, READ | WRITE, "write"), (False, READ | WRITE, "read"), (True, READ, "read")]
)


@_EACH_WAY_TO_READ_HOLES
@pytest.mark.parametrize("directory", [None, "/dev/shm"])
def test_pages_that_reading_holes_allocated_in_the_file_are_taken_from_it(
    directory: str | None, shared: bool, prot: int, access: Access
) -> None:
    """Only these: what was in the file stays, be it zeros, and so does what another mapping shows meanwhile."""
    with ExitStack() as stack:
        if directory is None:
            fd = os.memfd_create("prefault-test")
            stack.callback(os.close, fd)
            os.truncate(fd, 16 * PAGE_SIZE)
        else:
            fd, _ = stack.enter_context(file_of(directory, 16 * PAGE_SIZE))
        os.pwrite(fd, b"theirs", PAGE_SIZE)
        os.pwrite(fd, bytes(PAGE_SIZE), 3 * PAGE_SIZE)
        region = stack.enter_context(Region(16, prot, fd=fd, shared=shared))
        other = stack.enter_context(Region(1, READ, fd=fd, shared=True, offset=5 * PAGE_SIZE))

        def stop(done: int, total: int) -> None:
            other.read(0, 1)
            raise KeyboardInterrupt

        with pytest.raises(prefault.PopulateInterrupted) as caught:
            prefault.populate(region, access=access, rollback=True, progress=stop)
        assert caught.value.populated_bytes == 0 == oracle.present_bytes(region.address, region.length)
        assert data_pages(fd) == [1, 3, 5]
        assert os.fstat(fd).st_blocks * 512 == 3 * PAGE_SIZE
        assert region.read(1, 1).startswith(b"theirs")


@_EACH_WAY_TO_READ_HOLES
def test_pages_of_a_file_that_cannot_be_taken_from_it_are_named(shared: bool, prot: int, access: Access) -> None:
    """The only descriptor is open for reading."""
    fd = os.memfd_create("prefault-test")
    os.truncate(fd, 16 * PAGE_SIZE)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    try:
        with Region(16, prot, fd=reader, shared=shared) as region:
            region.protect(8, 1, mman.PROT_NONE)
            with pytest.raises(prefault.ProtectionError, match=r"except 32\.0 KiB") as caught:
                prefault.populate(region, access=access, rollback=True)
            assert oracle.present_bytes(region.address, region.length) == 0
            assert os.fstat(reader).st_blocks * 512 == 8 * PAGE_SIZE == caught.value.populated_bytes
            assert caught.value.populated.span.start == region.address
    finally:
        os.close(reader)


def test_memory_that_is_mapped_for_writing_only_is_taken_back() -> None:
    """The kernel lets no process_vm_readv read it."""
    fd = os.memfd_create("prefault-test")
    os.truncate(fd, 16 * PAGE_SIZE)
    try:
        with Region(16, WRITE, fd=fd, shared=True) as region:
            region.protect(8, 1, mman.PROT_NONE)
            with pytest.raises(prefault.ProtectionError) as caught:
                prefault.populate(region, access="write", rollback=True)
            assert caught.value.populated_bytes == 0 == os.fstat(fd).st_blocks
    finally:
        os.close(fd)


def test_a_file_that_shrinks_meanwhile_hides_no_exception() -> None:
    fd = os.memfd_create("prefault-test")
    os.truncate(fd, 64 * PAGE_SIZE)
    try:
        with Region(64, fd=fd, shared=True) as region:

            def shrink(done: int, total: int) -> None:
                os.truncate(fd, PAGE_SIZE)
                raise KeyboardInterrupt

            with pytest.raises(prefault.PopulateInterrupted) as caught:
                prefault.populate(region, rollback=True, progress=shrink)
            assert caught.value.populated_bytes == 0 == os.fstat(fd).st_blocks
    finally:
        os.close(fd)


def test_the_rest_of_a_huge_page_is_named() -> None:
    """It reaches outside of the range, where another thread may have written meanwhile."""
    needs.capability(capabilities.PAGEMAP_SCAN)
    with prefault.Mapping("6 MiB", huge="advise") as mapping:
        start = mapping.range.start
        mman.mprotect(start + 4 * MIB, PAGE_SIZE, mman.PROT_NONE)
        with pytest.raises(prefault.ProtectionError) as caught:
            prefault.populate(mapping, offset="3 MiB", rollback=True)
        there = oracle.present_bytes(start, 6 * MIB)
        if not there:
            needs.missing("the kernel found no huge page, or gives none")
        assert caught.value.populated_bytes == there == MIB
        assert caught.value.populated.span == (start + 2 * MIB, start + 3 * MIB)
        assert "except 1.0 MiB" in str(caught.value)


@pytest.mark.parametrize("cause", ["interrupted", "failed"])
def test_ctrl_c_all_through_a_rollback_does_not_stop_it(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would begin the rollback again, and one that strikes between two attempts would be the end of it."""
    struck = 0

    def drop(start: int, length: int, real: Any = ROLLBACK.drop) -> str:
        nonlocal struck
        struck += 1
        if struck < 100:
            signal.raise_signal(signal.SIGINT)
        real(start, length)
        signal.raise_signal(signal.SIGINT)
        return "MADV_DONTNEED"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ROLLBACK, "drop", drop)
    with prefault.Mapping("16 MiB", huge="never") as mapping:
        if cause == "failed":
            blocked(mapping, 8 * MIB)
        with pytest.raises(prefault.PopulateInterrupted, match="discarded again") as caught:
            prefault.populate(mapping, rollback=True, progress=stop if cause == "interrupted" else False)
        assert not caught.value.populated
        assert oracle.present_bytes(mapping.range.start, mapping.range.length) == 0
    assert struck == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_heard_again_where_an_exception_struck_the_end_of_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXECUTION, "_deferred", [])
    before = signal.signal(signal.SIGINT, EXECUTION._defer)  # as it would be left
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@_EACH_WAY_TO_READ_HOLES
def test_each_of_two_files_side_by_side_gets_its_own_holes_back(shared: bool, prot: int, access: Access) -> None:
    """Neither mapping has a descriptor that populate is given, so that they are one segment of the plan."""
    with ExitStack() as stack:
        one, two = (os.memfd_create("prefault-test") for _ in range(2))
        for fd in (one, two):
            stack.callback(os.close, fd)
            os.truncate(fd, 32 * PAGE_SIZE)
        # At the offsets that the mapping of the second file would have in the first one: set aside by another process.
        os.posix_fallocate(one, 16 * PAGE_SIZE, 16 * PAGE_SIZE)
        os.pwrite(two, b"theirs", 3 * PAGE_SIZE)
        region = stack.enter_context(Region(32))
        flags = mman.MAP_FIXED | (mman.MAP_SHARED if shared else mman.MAP_PRIVATE)
        mman.mmap(region.page(0), 16 * PAGE_SIZE, prot, flags, one, 0)
        mman.mmap(region.page(16), 16 * PAGE_SIZE, prot, flags, two, 0)
        assert len(prefault.plan(region, access=access).segments) == 1
        region.protect(30, 1, mman.PROT_NONE)
        with pytest.raises(prefault.ProtectionError) as caught:
            prefault.populate(region, access=access, rollback=True)
        assert caught.value.populated_bytes == 0 == oracle.present_bytes(region.address, region.length)
        assert [os.fstat(fd).st_blocks * 512 // PAGE_SIZE for fd in (one, two)] == [16, 1]
        assert os.pread(two, 6, 3 * PAGE_SIZE) == b"theirs"
