"""Populating writable while others write: no write is lost.

A write fault could be had by reading a byte and writing it back, as programs did before MADV_POPULATE_WRITE. What
somebody else writes in between is lost then. The method "read/write" does just that, for measurements, and shows here that
these tests would see it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy
import pytest

import prefault
from prefault._kernel import mman
from prefault._system import capabilities
from prefault.engine.methods import METHODS, Target
from support import needs, userfaultfd
from support.children import Child, in_child
from support.populate_modes import PopulateMode
from support.regions import PAGE, Region

PAGES = 4
ROUNDS = 400_000
SHARED = Target(shared=True)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("prefault-test")
    os.ftruncate(fd, PAGES * PAGE)
    yield fd
    os.close(fd)


def require(method: str) -> None:
    if "process_madvise" in method:
        needs.capability(capabilities.PROCESS_MADVISE)
    elif method == "populate_write":
        needs.capability(capabilities.MADV_POPULATE)
    else:
        needs.capability(capabilities.FUTEX_ADD)


def count_up(memory: Region) -> int:
    """Add 1 to the first word of every page, over and over: the very words that the methods touch."""
    words = numpy.asarray(memory).view(numpy.uint32)[:: PAGE // 4]
    for _ in range(ROUNDS):
        numpy.add(words, numpy.uint32(1), out=words)
    return ROUNDS


@pytest.mark.parametrize("method", ["futex_add", "populate_write", "process_madvise_write"])
def test_no_increment_of_another_process_is_lost(method: str, memfd: int) -> None:
    require(method)
    with Region(PAGES, fd=memfd, shared=True) as ours, Region(PAGES, fd=memfd, shared=True) as theirs:
        words = numpy.asarray(ours).view(numpy.uint32)[:: PAGE // 4]
        runs = 0
        with Child(lambda: count_up(theirs)) as child:
            while int(words[0]) < ROUNDS and not child.ended():
                for _ in range(50):
                    METHODS[method].run(ours.address, ours.length, SHARED)
                # Now and then with real faults: our page tables are empty again, the file's pages stay.
                mman.madvise(ours.address, ours.length, mman.MADV_DONTNEED)
                runs += 50
            assert child.result() == ROUNDS
        assert words.tolist() == [ROUNDS] * PAGES
        assert runs > 50, "the other process was done before we began"


@pytest.mark.usefixtures("way")
def test_populate_loses_no_increment_either(memfd: int) -> None:
    with Region(PAGES, fd=memfd, shared=True) as ours, Region(PAGES, fd=memfd, shared=True) as theirs:
        words = numpy.asarray(ours).view(numpy.uint32)[:: PAGE // 4]
        with Child(lambda: count_up(theirs)) as child:
            while int(words[0]) < ROUNDS and not child.ended():
                prefault.populate(ours, access="write")
                mman.madvise(ours.address, ours.length, mman.MADV_DONTNEED)
            assert child.result() == ROUNDS
        assert words.tolist() == [ROUNDS] * PAGES


@pytest.mark.parametrize(("method", "kept"), [("populate_write", True), ("read/write", False)])
def test_a_write_that_comes_during_the_fault(method: str, kept: bool, memfd: int) -> None:
    """The same moment, without chance: the page is write-protected, and who answers the fault writes before we go on.

    futex_add cannot be staged like this, as it gets EFAULT where it would have to wait; but it is one atomic instruction
    of the CPU, which is what the test above is about.
    """
    if method == "populate_write":
        needs.capability(capabilities.MADV_POPULATE)
    features = userfaultfd.UffdFeature.WP_HUGETLBFS_SHMEM
    userfaultfd.opened(features, user_mode_only=False).close()

    def race() -> bytes:
        with (
            Region(2, fd=memfd, shared=True) as ours,
            Region(2, fd=memfd, shared=True) as theirs,
            userfaultfd.Userfaultfd(features, user_mode_only=False) as watcher,
        ):
            ours.fill(0, b"old")
            watcher.register(ours.address, ours.length, userfaultfd.UFFDIO_REGISTER_MODE_WP)
            watcher.write_protect(ours.address, PAGE, protect=True)

            def write_and_let_go() -> userfaultfd.Fault:
                fault = watcher.wait()
                theirs.fill(0, b"new")
                watcher.write_protect(ours.address, PAGE, protect=False)
                return fault

            with Child(write_and_let_go) as other:
                METHODS[method].run(ours.address, ours.length, SHARED)
                assert other.result() == userfaultfd.Fault(ours.address, write=True)
            return ours.read(0, 1)[:3]

    # In a child, as all that might wait for ever.
    assert in_child(race) == (b"new" if kept else b"oew")


def test_futex_add_does_not_wait_and_writes_nothing(memfd: int) -> None:
    features = userfaultfd.UffdFeature.WP_HUGETLBFS_SHMEM
    with Region(1, fd=memfd, shared=True) as ours, userfaultfd.opened(features) as watcher:
        ours.fill(0, b"old")
        watcher.register(ours.address, ours.length, userfaultfd.UFFDIO_REGISTER_MODE_WP)
        watcher.write_protect(ours.address, PAGE, protect=True)
        with pytest.raises(OSError, match="futex") as caught:
            METHODS["futex_add"].run(ours.address, ours.length, SHARED)
        assert caught.value.errno == errno.EFAULT
        assert ours.read(0, 1) == b"old" + bytes(PAGE - 3)


def test_every_word_is_left_as_it_is(way: PopulateMode) -> None:
    """Whatever it holds."""
    values = numpy.array([0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, -2048 & 0xFFFF_FFFF], numpy.uint32)
    with Region(len(values)) as region:
        words = numpy.asarray(region).view(numpy.uint32)[:: PAGE // 4]
        words[:] = values
        METHODS[way.method("write")].run(region.address, region.length, Target())
        assert words.tolist() == values.tolist()
