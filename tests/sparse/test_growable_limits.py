"""GrowableArray at its limits: capacity, memory, and what cannot be an item."""

from __future__ import annotations

import errno
import fractions
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, TemporaryFile
from prefault.errors import MappingError, PopulateError
from prefault.sizes import MIB
from prefault.sparse.growable import GrowableArray
from support import oracle

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def small() -> Iterator[GrowableArray]:
    """float64, at most 64 KiB, in small pages."""
    with GrowableArray(capacity="64 KiB", huge="never") as growing:
        yield growing


def present(growing: GrowableArray) -> list[bool]:
    return oracle.present(growing.memory.range.start, growing.memory.range.length)


# --- limits


def test_beyond_the_capacity(small: GrowableArray) -> None:
    small.extend(range(8000))
    for more in (numpy.zeros(193), small):
        with pytest.raises(ValueError, match=r"(8193|16000) items of 8 bytes are more than the capacity of 8192 items"):
            small.extend(more)
        assert len(small) == 8000
    with pytest.raises(ValueError, match=r"8193 items .* the capacity of 8192 items \(64\.0 KiB\): make the array"):
        small.extend(iter(range(1000)))
    assert small.array.tolist() == [*range(8000), *range(192)]  # one after the other, as far as they go
    with pytest.raises(ValueError, match="8193 items"):
        small.append(1)
    small.shrink(0)
    small.append(1)
    assert small.array.tolist() == [1]


def test_items_that_do_not_divide_pages() -> None:
    with GrowableArray("uint8", item_shape=(3000,), capacity=10_000, huge="never") as growing:
        assert growing.capacity == 3
        for number in range(3):
            growing.append(numpy.full(3000, number, "uint8"))
            assert growing.nbytes <= growing.populated_bytes <= 3 * PAGE_SIZE
        with pytest.raises(ValueError, match="4 items"):
            growing.append(numpy.zeros(3000, "uint8"))
        assert growing.array.sum() == 9000
        growing.shrink(1)
        assert sum(present(growing)) == 1


@pytest.mark.parametrize("backing", ["memfd", "tmpfs"])
def test_memory_files(backing: str) -> None:
    with GrowableArray(capacity="1 MiB", backing=backing, huge="never") as growing:
        growing.extend(range(1000))
        assert growing.memory.fd is not None
        assert allocated(growing) == growing.populated_bytes
        growing.shrink(10)
        assert allocated(growing) == PAGE_SIZE
        assert growing.array.tolist() == list(range(10))


def allocated(growing: GrowableArray) -> int:
    """Bytes of the file behind it."""
    assert growing.memory.fd is not None
    return os.fstat(growing.memory.fd).st_blocks * 512


def test_a_full_tmpfs_leaves_the_array_usable(small_tmpfs: Callable[[str], Path]) -> None:
    backing = TemporaryFile(small_tmpfs("64k"))
    with GrowableArray(capacity="1 MiB", backing=backing, huge="never", step="48 KiB") as growing:
        growing.extend(range(4096))  # 32 KiB, and the step of 48 KiB fits no more
        assert growing.populated_bytes == 32 * 1024
        with pytest.raises(PopulateError):
            growing.extend(numpy.ones(8192))
        with pytest.raises(PopulateError):
            growing.extend(iter([1.0] * 8192))
        while len(growing) < 8192:
            growing.append(5)
        with pytest.raises(PopulateError):
            growing.append(5)
        assert growing.array[:4096].tolist() == list(range(4096))
        assert allocated(growing) == growing.populated_bytes == 65536
        growing.shrink(100)
        growing.extend(range(4000))
        assert len(growing) == 4100


def test_the_last_step_before_the_capacity_is_refused_as_any_other(small_tmpfs: Callable[[str], Path]) -> None:
    backing = TemporaryFile(small_tmpfs("2m"))
    with GrowableArray("uint8", capacity="3 MiB", backing=backing, huge="never", step="2 MiB") as growing:
        growing.extend(numpy.ones(MIB, "uint8"))
        with pytest.raises(PopulateError):
            growing.extend(numpy.ones(2 * MIB, "uint8"))
        growing.extend(numpy.ones(MIB, "uint8"))
        assert growing.array.sum() == allocated(growing) == 2 * MIB


def test_an_empty_pool_of_huge_pages(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with GrowableArray("uint8", capacity="8 MiB", backing="memfd-hugetlb") as growing:
        growing.extend(numpy.ones(3 * MIB, "uint8"))
        assert growing.populated_bytes == 4 * MIB
        with pytest.raises(PopulateError):
            growing.extend(numpy.ones(2 * MIB, "uint8"))
        growing.extend(numpy.ones(MIB, "uint8"))
        assert growing.array.sum() == 4 * MIB
        growing.shrink(MIB)
        assert allocated(growing) == 2 * MIB


def test_no_address_space() -> None:
    with pytest.raises(MappingError) as caught:
        GrowableArray(capacity=2**61)
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(ValueError, match="more than the kernel can map"):
        GrowableArray(capacity=2**62)


# --- bad input


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"dtype": object}, TypeError, "cannot hold Python objects"),
        ({"dtype": [("a", object)]}, TypeError, "cannot hold Python objects"),
        ({"dtype": "S"}, ValueError, "have no size"),
        ({"dtype": "nonsense"}, TypeError, "nonsense"),
        ({"capacity": 0}, ValueError, "a capacity of 0 bytes is too small for one item of 8 bytes"),
        ({"capacity": 7}, ValueError, "a capacity of 7 bytes is too small"),
        ({"capacity": -1}, ValueError, "negative"),
        ({"capacity": 1.5}, TypeError, "a size is an int or a text"),
        ({"item_shape": (0,)}, ValueError, r"an item of shape \(0,\) has no bytes"),
        ({"item_shape": (2, -1)}, ValueError, "has no bytes"),
        ({"item_shape": (2.5,)}, TypeError, "float"),
        ({"item_shape": (2**40,)}, ValueError, "too small for one item"),
        ({"backing": "paper"}, ValueError, "unknown backing 'paper'"),
        ({"huge": "yes"}, ValueError, "huge is"),
        ({"step": -1}, ValueError, "negative"),
        ({"step": "much"}, ValueError, "is not a size"),
    ],
)
def test_bad_arrays(options: dict[str, Any], error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        GrowableArray(**options)


@pytest.mark.parametrize(
    ("dtype", "item", "error"),
    [
        ("float64", "1", TypeError),
        ("float64", None, TypeError),
        ("float64", 1j, TypeError),
        ("float64", fractions.Fraction(1, 2), TypeError),
        ("float64", 10**400, OverflowError),
        ("float64", [1.0], ValueError),
        ("int64", 1.5, TypeError),
        ("int64", numpy.float64(1), TypeError),
        ("int64", 2**63, OverflowError),
        ("int8", 200, OverflowError),
        ("int8", numpy.int64(200), OverflowError),
        ("uint8", -1, OverflowError),
        ("uint8", numpy.int64(-1), OverflowError),
        ("bool", 1, TypeError),
        ("S3", "abc", TypeError),
    ],
)
def test_items_of_another_kind(dtype: str, item: Any, error: type[Exception]) -> None:
    with GrowableArray(dtype, capacity="64 KiB") as growing:
        good = numpy.ones(1, dtype)[0]
        growing.append(good)
        with pytest.raises(error):
            growing.append(item)
        with pytest.raises(error):
            growing.extend([good, item, good])  # the good one before it stays
        assert growing.array.tolist() == [good] * 2


def test_items_of_another_shape() -> None:
    with GrowableArray("float64", item_shape=(2,), capacity="64 KiB") as growing:
        growing.append([1, 2])
        for bad in (5, [1], [1, 2, 3], [[1, 2]], [1, [2]], ()):
            with pytest.raises(ValueError, match="shape"):
                growing.append(bad)
        worse: Any
        for worse in (numpy.zeros(2), numpy.zeros((3, 3)), numpy.zeros((1, 2, 1)), numpy.float64(1), numpy.zeros(())):
            with pytest.raises(ValueError, match=r"items come in an array of shape \(n, 2\), not"):
                growing.extend(worse)
        with pytest.raises(ValueError, match="shape"):
            growing.extend([[3, 4], [5]])
        assert growing.array.tolist() == [[1, 2], [3, 4]]


def test_arrays_of_another_kind(small: GrowableArray) -> None:
    small.append(1)
    for bad in (numpy.zeros(2, "complex64"), numpy.array(["1"]), numpy.array([None]), numpy.zeros(2, "M8[s]")):
        with pytest.raises(TypeError, match="cannot be stored as float64"):
            small.extend(bad)
    for not_iterable in (5, None, 1.5):
        with pytest.raises(TypeError, match="not iterable"):
            small.extend(not_iterable)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        small.extend("12")
    assert small.array.tolist() == [1]


@pytest.mark.parametrize("good", [0, 1, 4095, 4096, 4097, 8000])
def test_an_iterator_that_raises(small: GrowableArray, good: int) -> None:
    def items() -> Iterator[int]:
        yield from range(good)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        small.extend(items())
    assert small.array.tolist() == list(range(good))


def test_an_iterator_with_a_bad_item(small: GrowableArray) -> None:
    with pytest.raises(TypeError):
        small.extend([*range(5000), "x", *range(10)])
    assert small.array.tolist() == list(range(5000))


def test_closed() -> None:
    growing = GrowableArray(capacity="64 KiB")
    growing.append(1)
    growing.close()
    for use in (
        lambda: growing.append(1), lambda: growing.extend([1]), lambda: growing.extend([]), lambda: growing.shrink(0),
        lambda: growing.array, lambda: growing[0], lambda: list(growing), lambda: numpy.asarray(growing),
        lambda: growing.memory, lambda: prefault.residency(growing), lambda: growing.__setitem__(0, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the array is closed"):
            use()
    assert (len(growing), growing.nbytes, growing.populated_bytes) == (0, 0, 0)
