"""The table of objects against a simple model, its limits, and servers that are killed at any store."""

from __future__ import annotations

import errno
import mmap
import random
import re
from typing import Any

import pytest

from prefault.device.device_pool import DeviceObject
from prefault.device.free_extents import FreeExtents
from prefault.device.object_table import ALIGNMENT, NAME_MOST, OBJECTS_MOST, TABLE_BYTES, ObjectTable
from prefault.sizes import GIB, MIB, PAGE_SIZE

TIB = 1024 * GIB


def _table(length: int = GIB, page_size: int = PAGE_SIZE, memory: memoryview | None = None) -> ObjectTable:
    memory = memoryview(mmap.mmap(-1, TABLE_BYTES)) if memory is None else memory
    return ObjectTable(lambda: memory, True, length, page_size)


def _made(table: ObjectTable, name: str, length: int) -> DeviceObject:
    made = table.place(name, length)
    table.add(made)
    return made


# --- free extents


class _Model:
    """First fit in a list of units."""

    def __init__(self, length: int, unit: int) -> None:
        self.unit = unit
        self.length = length
        self.taken = [False] * -(-length // unit)

    def find(self, size: int) -> int | None:
        count = -(-size // self.unit)
        for first in range(len(self.taken) - count + 1):
            if not any(self.taken[first : first + count]) and first * self.unit + size <= self.length:
                return first * self.unit
        return None

    def set(self, start: int, size: int, taken: bool) -> None:
        for unit in range(start // self.unit, -(-(start + size) // self.unit)):
            assert self.taken[unit] is not taken
            self.taken[unit] = taken


@pytest.mark.parametrize("seed", range(12))
def test_free_extents_are_first_fit(seed: int) -> None:
    draw = random.Random(seed)
    length, unit = draw.choice(((100, 1), (640, 10), (647, 10), (9, 10), (2000, 7)))
    model, free = _Model(length, unit), FreeExtents(length, unit)
    there: list[tuple[int, int]] = []
    for _ in range(600):
        if there and draw.random() < 0.45:
            start, size = there.pop(draw.randrange(len(there)))
            free.give(start, size)
            model.set(start, size, False)
        else:
            size = draw.randint(1, length // draw.choice((2, 10, 30)) + 1)
            found = free.find(size)
            assert found == model.find(size)
            if found is not None:
                free.take(found, size)
                model.set(found, size, True)
                there.append((found, size))
        if draw.random() < 0.05:
            free = FreeExtents(length, unit, sorted(there))
    for start, size in there:
        free.give(start, size)
    assert free.find(length) == 0
    assert free.largest == length


# --- the table


def test_objects_are_aligned_and_found() -> None:
    table = _table()
    one, two, three = _made(table, "one", 1), _made(table, "zwei", 5 * MIB), _made(table, "三", 2 * MIB)
    assert [one.offset, two.offset, three.offset] == [0, 2 * MIB, 8 * MIB]
    assert [len(one.pages(PAGE_SIZE)), len(two.pages(PAGE_SIZE)), len(two.pages(2 * MIB))] == [1, 1280, 3]
    assert table.all() == [one, two, three]
    assert table.find("三") is three
    found = [table.at(page) for page in (0, 1, 511, 512, 512 + 1279, 512 + 1280, 2048, 2559, 2560)]
    assert found == [one, None, None, two, two, None, three, three, None]
    table.remove(two)
    assert table.at(512) is None
    assert _made(table, "again", 6 * MIB).offset == 2 * MIB
    assert _made(table, "more", 1).offset == 10 * MIB


def test_the_end_of_a_device_that_is_no_multiple() -> None:
    table = _table(5 * MIB + 100)
    _made(table, "a", 4 * MIB)
    with pytest.raises(OSError, match=f"no free extent of the device's .* has {MIB + 101} bytes, for 'b': the largest has"):
        table.place("b", MIB + 101)
    last = _made(table, "b", MIB + 100)
    assert last.offset == 4 * MIB
    with pytest.raises(OSError, match="the largest has 0") as caught:
        table.place("c", 1)
    assert caught.value.errno == errno.ENOSPC
    table.remove(last)
    assert _made(table, "c", MIB + 100) == ("c", 4 * MIB, MIB + 100)


@pytest.mark.parametrize(
    ("name", "length", "kind", "message"),
    [
        ("", 1, ValueError, "has 1 to 200 bytes in UTF-8 and no NUL, not 0"),
        ("x" * 201, 1, ValueError, "not 201"),
        ("ü" * 101, 1, ValueError, "not 202"),
        ("a\0b", 1, ValueError, "no NUL"),
        ("\udc80", 1, ValueError, r"UTF-8 can encode, not '\udc80'"),
        (b"bytes", 1, TypeError, "is a str, not bytes"),
        (None, 1, TypeError, "is a str, not NoneType"),
        ("x", 0, ValueError, "at least one byte, not 0"),
        ("x", -1, ValueError, "at least one byte, not -1"),
        ("x", 1.5, TypeError, "is an int, not float"),
        ("x", True, TypeError, "is an int, not bool"),
        ("x", GIB + 1, OSError, "no free extent"),
        ("x", 1 << 70, OSError, "no free extent"),
        ("there", 1, FileExistsError, "has an object 'there' already"),
    ],
)
def test_what_cannot_be_an_object(name: Any, length: Any, kind: type[Exception], message: str) -> None:
    table = _table()
    there = _made(table, "there", 1)
    with pytest.raises(kind, match=re.escape(message)):
        table.place(name, length)
    assert table.all() == [there]
    assert _made(table, "x" * NAME_MOST, GIB - 2 * MIB).offset == 2 * MIB


def test_what_is_not_there() -> None:
    table = _table()
    with pytest.raises(FileNotFoundError, match="the device has no object 'x'"):
        table.find("x")
    assert table.all() == []
    assert table.at(0) is None


def test_an_object_in_use_is_not_removed() -> None:
    table = _table()
    made = _made(table, "x", 1)
    table.acquire(made)
    table.acquire(made)
    for some in ("2 areas map it", "an area maps it"):
        with pytest.raises(OSError, match=f"object 'x' cannot be deleted: {some}") as caught:
            table.remove(made)
        assert caught.value.errno == errno.EBUSY
        assert table.find("x") is made
        table.release(made)
    table.remove(made)


class _KilledError(Exception):
    """The end of a server."""


class _Memory:
    """The table's memory; a server is killed after so many stores, each of one word or one name."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.left = 1 << 60

    def cast(self, _: str) -> _Memory:
        cast = _Memory(self.memory.cast("Q"))
        cast._count = self._count  # type: ignore[method-assign]
        return cast

    def _count(self) -> None:
        if not self.left:
            raise _KilledError
        self.left -= 1

    def __getitem__(self, at: Any) -> Any:
        return self.memory[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._count()
        self.memory[at] = value


@pytest.mark.parametrize("seed", range(20))
def test_a_server_killed_at_any_store_leaves_each_object_in_whole_or_not_at_all(seed: int) -> None:
    draw = random.Random(seed)
    memory = memoryview(mmap.mmap(-1, TABLE_BYTES))
    there: dict[str, DeviceObject] = {}
    number = 0
    for _ in range(60):  # servers, each of which is killed
        counted = _Memory(memory)
        table = _table(memory=counted)  # type: ignore[arg-type]
        assert table.all() == sorted(there.values(), key=lambda each: each.offset)
        doubtful: DeviceObject | None = None
        counted.left = draw.randrange(30)
        try:
            while True:
                if there and (len(there) > 10 or draw.random() < 0.4):
                    doubtful = there.pop(draw.choice(sorted(there)))
                    table.remove(doubtful)
                else:
                    number += 1
                    doubtful = table.place("n" * draw.randrange(1, 190) + str(number), draw.randrange(1, 20 * MIB))
                    table.add(doubtful)
                    there[doubtful.name] = doubtful
                doubtful = None
        except _KilledError:
            pass
        if doubtful is not None:  # its last store was made, or not
            there.pop(doubtful.name, None)
            if doubtful in _table(memory=memory).all():
                there[doubtful.name] = doubtful
        ends = [0]
        for each in sorted(there.values(), key=lambda each: each.offset):
            assert each.offset % ALIGNMENT == 0
            assert each.offset >= ends[-1]
            ends.append(each.offset + each.length)


def test_a_hundred_thousand_objects() -> None:
    memory = memoryview(mmap.mmap(-1, TABLE_BYTES))
    table = _table(TIB, memory=memory)
    for number in range(100_000):
        _made(table, f"object {number}", 1 + number % 2 * MIB)
    assert table.find("object 77777").offset == 77_777 * 2 * MIB
    for number in range(0, 100_000, 2):
        table.remove(table.find(f"object {number}"))
    assert _made(table, "large", 3 * MIB).offset == 200_000 * MIB  # no freed extent is large enough
    assert _made(table, "small", 1 * MIB).offset == 0
    again = _table(TIB, memory=memory)
    assert again.all() == table.all()
    assert _made(again, "smaller", 1).offset == 4 * MIB


def test_the_table_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OBJECTS_MOST >= 100_000
    monkeypatch.setattr("prefault.device.object_table.OBJECTS_MOST", 3)
    table = _table()
    made = [_made(table, str(number), 1) for number in range(3)]
    with pytest.raises(OSError, match="the device has 3 objects, the maximum") as caught:
        table.place("x", 1)
    assert caught.value.errno == errno.ENOSPC
    table.remove(made[1])
    assert _made(table, "x", 1).offset == 2 * MIB
