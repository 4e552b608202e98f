"""Descriptors of /proc/self that are kept open: across fork, across closing them all, and opened by many threads at once."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from ctypes import sizeof

import pytest

import prefault
from prefault import PAGE_SIZE
from prefault._kernel import procmap
from prefault._system import capabilities
from prefault._system.kept_files import KeptFile
from prefault.memory.vma import vma_at
from prefault.testing import without
from support import needs, oracle
from support.children import in_child


@pytest.fixture(autouse=True)
def _asked_by_ioctl() -> None:
    needs.capability(capabilities.PAGEMAP_SCAN)
    needs.capability(capabilities.PROCMAP_QUERY)


def _present_pages(mapping: prefault.Mapping) -> int:
    return prefault.residency(mapping).present_bytes // PAGE_SIZE


def _kept() -> list[int]:
    """The descriptors of /proc/self/maps and pagemap that are kept."""
    return [file._fd for file in KeptFile._all if file._fd >= 0 and file.path in ("/proc/self/maps", "/proc/self/pagemap")]


def test_a_forked_child_sees_its_own_memory() -> None:
    with prefault.Mapping(8 * PAGE_SIZE, huge="never") as mapping:
        prefault.populate(mapping)
        assert _present_pages(mapping) == 8

        def in_the_child() -> tuple[int, list[bool], int, bool]:
            prefault.discard(mapping, length=5 * PAGE_SIZE)
            own = mmap.mmap(-1, PAGE_SIZE)  # mapped after the fork: the parent has nothing there, or something else
            with prefault.Mapping(4 * PAGE_SIZE, backing="memfd") as other:
                vma = vma_at(other.range.start)
                found = vma is not None and vma.start == other.range.start
            own.close()
            mine = _present_pages(mapping)
            return mine, oracle.present(mapping.range.start, mapping.range.length), len(_kept()), found

        pages, present, kept, found = in_child(in_the_child)
        assert pages == sum(present) == 3
        assert kept <= len(KeptFile._all)
        assert found
        assert _present_pages(mapping) == 8  # the parent's descriptor is its own still


def test_a_forked_child_holds_no_descriptor_of_its_parent() -> None:
    with prefault.Mapping(PAGE_SIZE) as mapping:
        prefault.residency(mapping)
        vma_at(mapping.range.start)
        assert _kept()
        # Read through the child's own /proc/self/fd: what it inherited and did not forget.
        parent = os.getpid()
        inherited = in_child(lambda: [line for line in oracle.descriptors() if f"/proc/{parent}/" in line])
        assert inherited == []


def test_no_descriptor_is_inherited_by_a_program() -> None:
    with prefault.Mapping(PAGE_SIZE) as mapping:
        prefault.residency(mapping)
        code = (
            "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if int(n) > 2][:-1])"
        )
        done = subprocess.run([sys.executable, "-c", code], close_fds=False, capture_output=True, text=True, timeout=60)
        assert f"/proc/{os.getpid()}/" not in done.stdout


def _nothing(numbers: list[int]) -> None:
    """The numbers stay free."""


def _other_files(numbers: list[int]) -> None:
    for number in numbers:
        other = os.open("/dev/null", os.O_RDWR)
        os.dup2(other, number)


def _pipes(numbers: list[int]) -> None:
    reader, _ = os.pipe()
    for number in numbers:
        os.dup2(reader, number)


@pytest.mark.parametrize("then", [_nothing, _other_files, _pipes], ids=["free", "another file", "a pipe"])
def test_after_all_descriptors_were_closed(then: Callable[[list[int]], None]) -> None:
    with prefault.Mapping(4 * PAGE_SIZE, huge="never") as mapping:
        prefault.populate(mapping, length=3 * PAGE_SIZE)

        def as_daemons_do() -> tuple[int, int, bool, list[bool]]:
            _present_pages(mapping)
            vma_at(mapping.range.start)
            numbers = _kept()
            pipe = max(int(line.split()[0]) for line in oracle.descriptors())  # the way back to the parent
            for number in numbers:
                os.close(number)
            os.closerange(3, min(pipe, *numbers))
            then(numbers)
            others = [os.fstat(number).st_ino for number in numbers] if then is not _nothing else []
            first, second = _present_pages(mapping), _present_pages(mapping)
            vma = vma_at(mapping.range.start)
            # The descriptors that took the numbers are not ours to close.
            untouched = [os.fstat(number).st_ino == inode for number, inode in zip(numbers, others, strict=False)]
            return first, second, vma is not None and vma.start <= mapping.range.start, untouched

        first, second, found, untouched = in_child(as_daemons_do)
        assert first == second == 3
        assert found
        assert all(untouched)


def test_many_threads_at_first_use_open_one() -> None:
    gc.collect()  # else what earlier tests left may be collected, and closed, meanwhile
    before = oracle.descriptors()
    for _ in range(20):
        fresh = KeptFile("/proc/self/maps")
        gate = threading.Barrier(8)
        answers: list[int] = []

        def ask(fresh: KeptFile = fresh, gate: threading.Barrier = gate, answers: list[int] = answers) -> None:
            query = procmap.ProcmapQuery(sizeof(procmap.ProcmapQuery), procmap.PROCMAP_QUERY_COVERING_OR_NEXT_VMA, 0)
            gate.wait(30)
            fresh.ioctl(procmap.PROCMAP_QUERY, query)
            answers.append(query.vma_start)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 8
        assert len(set(answers)) == 1
        assert len(oracle.descriptors() - before) == 1
        fresh.close()
        assert oracle.descriptors() == before


def test_other_errors_are_raised() -> None:
    query = procmap.ProcmapQuery(sizeof(procmap.ProcmapQuery), 1 << 40, 0)  # no such flag
    fresh = KeptFile("/proc/self/maps")
    with pytest.raises(OSError, match="Invalid argument"):
        fresh.ioctl(procmap.PROCMAP_QUERY, query)
    fresh.close()


def test_nothing_is_opened_where_ioctls_are_not_used() -> None:
    def without_ioctls() -> list[int]:
        # In a child nothing is open at first.
        with without("pagemap_scan", "procmap_query"), prefault.Mapping(PAGE_SIZE) as mapping:
            prefault.populate(mapping)
            prefault.residency(mapping)
        return _kept()

    assert in_child(without_ioctls) == []


_OTHERS_DESCRIPTORS = """
import os, prefault
prefault.populate(bytearray(4096))
os.closerange(3, 64)
others = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
child = os.fork()
if child == 0:
    for fd in others:
        os.fstat(fd)
    prefault.populate(bytearray(4096))
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_keeps_files_that_took_the_numbers_of_kept_ones() -> None:
    done = subprocess.run([sys.executable, "-c", _OTHERS_DESCRIPTORS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
