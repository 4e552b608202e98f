"""The index of intervals against a walk over all of them."""

from __future__ import annotations

import random
import threading

import pytest

from prefault.interval_index import IntervalIndex


@pytest.mark.parametrize("seed", range(15))
def test_against_a_walk(seed: int) -> None:
    draw = random.Random(seed)
    index: IntervalIndex[int] = IntervalIndex()
    there: dict[int, tuple[int, int]] = {}
    space = draw.choice((20, 300, 1 << 40))
    most = draw.choice((1, 10, space))
    for item in range(600):
        if there and draw.random() < 0.4:
            gone = draw.choice(list(there))
            index.remove(*there.pop(gone), gone)
        else:
            start = draw.randrange(space)
            there[item] = start, start + draw.randint(1, most if draw.random() < 0.9 else space)
            index.add(*there[item], item)
        first = draw.randrange(space)
        last = first + draw.randint(1, draw.choice((1, 10, space)))
        expected = sorted((start, stop, item) for item, (start, stop) in there.items() if start < last and first < stop)
        assert sorted(index.overlapping(first, last)) == expected
        found = index.at(first)
        if found is None:
            assert not any(start <= first < stop for start, stop in there.values())
        else:
            assert there[found][0] <= first < there[found][1]
    for item, (start, stop) in there.items():
        index.remove(start, stop, item)
    assert index.overlapping(0, 2 * space) == []


def test_what_is_not_there_is_not_removed() -> None:
    index: IntervalIndex[str] = IntervalIndex()
    index.add(0, 10, "a")
    for start, stop, item in ((0, 10, "b"), (0, 9, "a"), (1, 10, "a"), (100, 110, "a"), (0, 1000, "a")):
        with pytest.raises(KeyError):
            index.remove(start, stop, item)
    index.add(0, 10, "b")
    with pytest.raises(KeyError):
        index.remove(0, 10, "c")
    assert sorted(index.overlapping(9, 10)) == [(0, 10, "a"), (0, 10, "b")]
    assert index.overlapping(10, 11) == []


def test_a_thread_may_ask_while_another_changes() -> None:
    index: IntervalIndex[int] = IntervalIndex()
    index.add(1 << 20, (1 << 20) + 5, -1)
    over = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not over.is_set():
                assert (1 << 20, (1 << 20) + 5, -1) in index.overlapping(0, 1 << 21)
                assert index.at((1 << 20) + 2) is not None
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    thread = threading.Thread(target=ask)
    thread.start()
    draw = random.Random(1)
    for _ in range(200):
        spans = [((start := draw.randrange(1 << 21)), start + draw.randint(1, 1 << draw.randint(0, 20))) for _ in range(50)]
        for item, span in enumerate(spans):
            index.add(*span, item)
        for item, span in enumerate(spans):
            index.remove(*span, item)
    over.set()
    thread.join()
    assert not failures
