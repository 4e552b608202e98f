"""Many buffers borrowed at once: the pages that borrowing them one by one gives, names in errors, and pins that end."""

from __future__ import annotations

import gc
import mmap
import random
import sys
from typing import Any

import numpy
import pytest

import prefault
from prefault.intervals import Intervals
from prefault.memory.borrowed_members import Members, borrowed_collection, member_of
from prefault.memory.borrowing import borrow
from prefault.memory.collecting import leaves_of
from prefault.sizes import PAGE_SIZE
from support.regions import Region


class _Tensor:
    """Memory that is found in another way than the buffer protocol."""

    def __init__(self, array: numpy.ndarray[Any, Any]) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array = array


def _members(collection: Any) -> Members:
    return borrowed_collection(collection, 0, None, TypeError("no collection"))


def _various(choose: random.Random, whole: numpy.ndarray[Any, Any], count: int) -> list[Any]:
    """Slices of an array in all kinds: with gaps, read-only, empty, reversed, as memoryview, as tensor."""
    found: list[Any] = []
    for _ in range(count):
        start, stop = sorted(choose.sample(range(len(whole)), 2))
        part = whole[start : min(stop, start + 9 * PAGE_SIZE)]
        match choose.randrange(7):
            case 0:
                part = part[:: choose.choice([2, 5000])]
            case 1:
                part = part[:]
                part.flags.writeable = False
            case 2:
                part = part[:0]
            case 3:
                part = part[::-1]
            case 4:
                found.append(part.data)
                continue
            case 5:
                found.append(_Tensor(part))
                continue
        found.append(part)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_they_are_those_that_are_borrowed_one_by_one(seed: int) -> None:
    choose = random.Random(seed)
    with prefault.Mapping(400 * PAGE_SIZE, huge="never") as mapping:
        whole = mapping.ndarray().view(numpy.uint8)
        parts = _various(choose, whole, 300)
        expected: dict[bool, Intervals] = {}
        for part in parts:
            with borrow(part) as memory:
                pages = member_of("", memory).pages
                expected[memory.readonly] = expected.get(memory.readonly, Intervals()) | pages
        with _members(parts) as members:
            assert {readonly: pages for readonly, _, pages in members.by_kind()} == expected
            assert members.pages == expected[False] | expected[True]
            page = mapping.range.start + choose.randrange(400) * PAGE_SIZE
            assert sorted(member.name for member in members.within(page, page + PAGE_SIZE)) == sorted(
                f"[{index}]" for index, part in enumerate(parts) if _touches(part, page)
            )
        del whole, parts, part
        gc.collect()


def _touches(part: Any, page: int) -> bool:
    with borrow(part) as memory:
        return bool(member_of("", memory).pages.clipped(page, page + PAGE_SIZE))


def test_pins_end_with_the_call_also_where_one_of_them_fails() -> None:
    owners = [bytearray(10) for _ in range(200)]
    references = sys.getrefcount(owners[7])
    members = _members(owners)
    borrowed = sys.getrefcount(owners[7])  # not inside of an assertion, of which pytest keeps the values
    members.release()
    released = sys.getrefcount(owners[7])
    assert borrowed > references == released
    with _members(owners), pytest.raises(BufferError):
        owners[7].append(1)
    with pytest.raises(TypeError, match=r"^\[200\]: object has no memory"):
        _members([*owners, object()])
    closed = mmap.mmap(-1, PAGE_SIZE)
    closed.close()
    with pytest.raises(ValueError, match=r"^\['x'\]\[64\]: "):
        _members({"x": [*owners[:64], closed]})
    for owner in owners:
        owner.append(1)


def test_an_error_names_one_of_many() -> None:
    with Region(300) as region:
        region.protect(170, 1, 0)
        parts = {f"layer {index}": region.part(3 * index, 2) for index in range(100)}
        prefault.populate(parts)  # 170 is a page that none of them has
        region.protect(150, 2, 0)
        with pytest.raises(prefault.ProtectionError, match=r"offset 0 \(0x\w+\) of \['layer 50'\] \(8.0 KiB\)"):
            prefault.populate(parts)


def test_names_are_those_of_their_places() -> None:
    array = numpy.zeros(3)
    tree = {"a": [array, array], "b": {"c": array, "d": (array, 5, [array])}, "e": []}
    leaves = leaves_of(tree)
    assert leaves is not None
    names = ["['a'][0]", "['a'][1]", "['b']['c']", "['b']['d'][0]", "['b']['d'][2][0]"]
    assert [leaf.name for leaf in leaves] == names
    assert all(leaf.value is array for leaf in leaves)
    assert leaves.passed_over
