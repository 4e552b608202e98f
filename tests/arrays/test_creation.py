"""empty, zeros, full: arrays whose pages are there, freed with the last view."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault._system import capabilities, thp
from prefault._system.proc import read_maps
from support import needs, oracle
from support.cgroups import groups
from support.children import in_child

pytestmark = pytest.mark.usefixtures("no_leaks")

_MIB = 1 << 20


def _present(array: numpy.ndarray[Any, Any]) -> int:
    first = array.ctypes.data & -oracle.PAGE
    length = array.ctypes.data + array.nbytes - first
    return oracle.present_bytes(first, length + -length % oracle.PAGE)


def _parts(array: numpy.ndarray[Any, Any]) -> list[int]:
    """Return the addresses of the mappings that an array lies in: advice for a part of one splits it."""
    stop = array.ctypes.data + array.nbytes
    return [line.start for line in read_maps() if array.ctypes.data <= line.start < stop]


def _mapped(address: int) -> bool:
    return oracle.smaps(address) != {}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "order"),
    [
        ((1000, 33), "float64", "C"),
        ((1000, 33), "int16", "F"),
        (1 << 20, "uint8", "C"),
        ((3, 5, 7), "complex128", "F"),
        ([4, 4], "S3", "C"),
    ],
)
def test_all_pages_are_present_and_zero(shape: Any, dtype: str, order: Any, shared: bool) -> None:
    array = prefault.empty(shape, dtype, order, shared=shared)
    reference = numpy.zeros(shape, dtype, order)
    assert _present(array) >= array.nbytes
    assert (array.shape, array.dtype, array.strides) == (reference.shape, reference.dtype, reference.strides)
    assert (array.flags.c_contiguous, array.flags.f_contiguous) == (
        reference.flags.c_contiguous,
        reference.flags.f_contiguous,
    )
    assert array.flags.writeable
    assert type(array) is numpy.ndarray
    assert numpy.array_equal(array, reference)


def test_touching_all_of_it_faults_no_more() -> None:
    array = prefault.empty(16 * _MIB, "uint8", huge="never")
    array[:1] = 1
    before = oracle.minor_faults()
    array[:] = 7
    assert oracle.minor_faults() - before <= 2  # of 4096 pages; the interpreter may have one of its own


def test_full_and_zeros() -> None:
    assert prefault.full((3, 4), 7).dtype == numpy.asarray(7).dtype
    assert (prefault.full((300, 400), 2.5, "float32") == 2.5).all()
    assert numpy.array_equal(prefault.full((2, 3), [1, 2, 3]), [[1, 2, 3], [1, 2, 3]])
    assert not prefault.zeros((300, 400)).any()


@pytest.mark.parametrize("shape", [0, (0,), (3, 0, 5)])
def test_arrays_without_items(shape: Any) -> None:
    assert prefault.empty(shape).shape == numpy.empty(shape).shape
    assert prefault.full(shape, 1).size == 0


def test_a_scalar_shape() -> None:
    assert prefault.empty(()).shape == ()
    assert prefault.full((), 5)[()] == 5


# --- freed with the array


@pytest.mark.parametrize("shared", [False, True])
def test_memory_goes_with_the_last_view(shared: bool) -> None:
    array = prefault.empty(4 * _MIB, "uint8", shared=shared)
    address = array.ctypes.data
    view = array[100:200].reshape(10, 10)[::2]
    del array
    gc.collect()
    assert _mapped(address)
    view[:] = 3
    assert (view == 3).all()
    del view
    gc.collect()
    assert not _mapped(address)


def test_pickles_are_ordinary_arrays() -> None:
    array = prefault.full((100, 100), 3.0, shared=True)
    copy = pickle.loads(pickle.dumps(array))
    assert type(copy) is numpy.ndarray
    assert numpy.array_equal(copy, array)
    assert not numpy.shares_memory(copy, array)


# --- what it is made of


@pytest.mark.parametrize(
    ("huge", "size", "expected"),
    [("auto", 64 * _MIB, True), ("auto", 2 * _MIB, False), ("advise", 2 * _MIB, True), ("never", 8 * _MIB, False)],
)
def test_huge_pages(huge: Any, size: int, expected: bool) -> None:
    if thp.read_setting("enabled") != "madvise":
        needs.missing("transparent huge pages are not given by advice (transparent_hugepage/enabled)")
    array = prefault.empty(size, "uint8", huge=huge)
    assert array.ctypes.data % (2 * _MIB) == 0
    # Of "auto" a chunk may get base pages, where other programs have the kernel compact memory at the moment.
    least = 2 * _MIB if huge == "auto" else size
    found = sum(oracle.smaps(address)["AnonHugePages"] for address in _parts(array))
    assert found >= least if expected else found == 0


def test_shared_with_a_fork_and_private() -> None:
    shared, private = prefault.zeros(1000, shared=True), prefault.zeros(1000)

    def write() -> None:
        shared[7] = private[7] = 7

    in_child(write)
    assert (shared[7], private[7]) == (7, 0)


def test_locked() -> None:
    array = prefault.empty(_MIB, "uint8", locked=True)
    assert "lo" in oracle.vma_flags(array.ctypes.data)
    assert oracle.smaps(array.ctypes.data)["Rss"] >= _MIB


def test_hugetlb(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    array = prefault.zeros(2 * _MIB, "uint8", backing="hugetlb")
    assert oracle.smaps(array.ctypes.data)["KernelPageSize"] == 2 * _MIB
    del array
    with pytest.raises(prefault.HugePagesError):
        prefault.zeros(64 * _MIB, "uint8", backing="hugetlb")


@pytest.mark.parametrize("backing", ["tmpfs", prefault.Memfd("named"), prefault.Anonymous()])
def test_backings(backing: Any) -> None:
    array = prefault.full(100_000, 1.5, backing=backing)
    assert _present(array) >= array.nbytes
    assert array.sum() == 150_000


@pytest.mark.parametrize("make", [prefault.empty, prefault.zeros, lambda n, backing: prefault.full(n, 1.0, backing=backing)])
def test_no_file_that_exists(tmp_path: Any, make: Any) -> None:
    (tmp_path / "file").write_bytes(b"content" * 1000)
    with pytest.raises(ValueError, match="content of its own"):
        make(512, backing=prefault.File(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"content" * 1000


@pytest.mark.parametrize("make", [prefault.empty, prefault.zeros, lambda n, node: prefault.full(n, 1.0, node=node)])
def test_on_a_node(make: Any) -> None:
    needs.capability(capabilities.MBIND)
    array = make(1 << 18, node=0)
    assert _present(array) >= array.nbytes
    line = next(
        line for line in Path("/proc/self/numa_maps").read_text().splitlines() if line.startswith(f"{array.ctypes.data:x} ")
    )
    assert " bind:0 " in line
    with pytest.raises((ValueError, OSError)):
        make(1 << 18, node=999)


# --- errors, before any memory is taken


def test_a_memory_cgroup_is_an_exception() -> None:
    def make() -> str:
        with pytest.raises(prefault.HeadroomError) as caught:
            prefault.empty(256 * _MIB, "uint8")
        return f"{caught.value.populated_bytes} {caught.value}"

    with groups() as create:
        group = create(64 * _MIB)
        text = in_child(group.inside(make))
        assert group.killed == 0
    assert text.startswith("0 ")
    assert "256" in text
    assert str(group.directory) in text


def test_more_than_there_is() -> None:
    with pytest.raises((prefault.HeadroomError, prefault.MappingError)):  # the kernel's heuristic may refuse the mapping
        prefault.empty(os.sysconf("SC_PHYS_PAGES") * oracle.PAGE * 2, "uint8")
    with pytest.raises((prefault.MappingError, ValueError)):
        prefault.empty((1 << 31, 1 << 31))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((-1,),), ValueError, "negative"),
        (("three",), TypeError, "integer"),
        ((2.5,), TypeError, "integer"),
        ((10, object), TypeError, "numpy.empty"),
        ((10, "nonsense"), TypeError, "nonsense"),
        ((10, "int8", "K"), ValueError, "'C' or 'F'"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prefault.empty(*arguments)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="huge is"):
        prefault.empty(10, huge="always")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown backing"):
        prefault.empty(10, backing="disk")
