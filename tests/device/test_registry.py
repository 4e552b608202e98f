"""The table of areas that a warden shares with its servers: a server that is killed at any store leaves it sound."""

from __future__ import annotations

import random
from typing import Any

import pytest

from prefault.device.device_pool import Access
from prefault.device.registry import ROW_WORDS, AreaRecord, AreaTable, ClientRecord


class _KilledError(Exception):
    """The end of a server."""


class _Words(list[int]):
    """Words of 8 bytes; a store of several takes place word by word, in any order."""

    left = 1 << 30
    """Stores until the server is killed."""

    def __setitem__(self, at: Any, value: Any) -> None:
        places = range(*at.indices(len(self))) if isinstance(at, slice) else [at]
        values = list(value) if isinstance(at, slice) else [value]
        assert len(places) == len(values)
        stores = list(zip(places, values, strict=True))
        random.Random(self.left).shuffle(stores)
        for place, word in stores:
            if not self.left:
                raise _KilledError
            self.left -= 1
            super().__setitem__(place, word)


def _clients(*numbers: int) -> dict[int, ClientRecord]:
    return {number: ClientRecord(number, 0, 0, -1, -1, -1, -1, -1) for number in numbers}


def _area(table: AreaTable, number: int) -> AreaRecord:
    access: Access = "write" if number % 3 else "read"
    tracks, of_object = number % 2 == 0, number % 5 == 0
    return AreaRecord(number, number << 30, number << 20, number << 12, access, tracks, of_object, table.reserve())


@pytest.mark.parametrize("seed", range(20))
def test_a_server_killed_at_any_store_leaves_each_area_in_whole_or_not_at_all(seed: int) -> None:
    draw = random.Random(seed)
    words: Any = _Words([0] * ROW_WORDS * 20)
    clients = _clients(1, 2)
    there: dict[int, tuple[int, AreaRecord]] = {}
    number = 0
    for _ in range(60):  # servers, each of which is killed
        table = AreaTable(words)
        table.load(clients)
        known = {area.number: (client.number, area) for client in clients.values() for area in client.areas.values()}
        assert known == there
        doubtful: tuple[int, tuple[int, AreaRecord]] | None = None
        words.left = draw.randrange(30)
        try:
            while True:
                if there and (len(there) > 10 or draw.random() < 0.4):
                    gone = draw.choice(list(there))
                    doubtful = gone, there.pop(gone)
                    table.clear(doubtful[1][1].row)
                else:
                    number += 1
                    area = _area(table, number)
                    doubtful = number, (draw.choice((1, 2)), area)
                    table.publish(*doubtful[1])
                    there[number] = doubtful[1]
                doubtful = None
        except _KilledError:
            words.left = 1 << 30
        if doubtful is not None and words[ROW_WORDS * doubtful[1][1].row] == doubtful[0]:
            there[doubtful[0]] = doubtful[1]


def test_areas_come_back_in_the_order_in_which_they_were_mapped() -> None:
    words: Any = _Words([0] * ROW_WORDS * 20)
    table = AreaTable(words)
    areas = [_area(table, number) for number in range(1, 6)]
    for area in areas:
        table.publish(1, area)
    table.clear(areas[0].row)
    table.publish(1, _area(table, 6))
    clients = _clients(1)
    AreaTable(words).load(clients)
    assert list(clients[1].areas) == [2, 3, 4, 5, 6]


def test_rows_are_used_again_and_their_number_is_limited() -> None:
    table = AreaTable([0] * ROW_WORDS * 21)  # type: ignore[arg-type]
    for _ in range(20):
        table.reserve()
    with pytest.raises(ValueError, match="the device has 20 areas, the maximum"):
        table.reserve()
    table.clear(7)
    assert table.reserve() == 7


def test_the_areas_of_a_client_that_is_not_known_are_dropped() -> None:
    words: Any = _Words([0] * ROW_WORDS * 20)
    table = AreaTable(words)
    table.publish(1, _area(table, 1))
    table.publish(2, _area(table, 2))
    table.load(_clients(2))
    clients = _clients(1, 2)
    table.load(clients)
    assert [list(client.areas) for client in clients.values()] == [[], [2]]
