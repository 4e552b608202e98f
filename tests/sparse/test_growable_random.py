"""GrowableArray against a list, by random changes; what is populated is asked of pagemap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefault import PAGE_SIZE
from prefault.sparse.growable import GrowableArray
from support import oracle

Change: TypeAlias = tuple[str, int]

CAPACITY = 65536
MOST = CAPACITY // 8
ITEMS_A_PAGE = PAGE_SIZE // 8

CHANGES: st.SearchStrategy[list[Change]] = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(-5, 5)),
        st.tuples(st.sampled_from(["extend", "iterate", "shrink"]), st.integers(0, 3000)),
        st.tuples(st.sampled_from(["twice", "raise"]), st.integers(0, 100)),
    ),
    max_size=30,
)
STEPS = st.sampled_from([None, 0, "20 KiB"])


def failing(count: int) -> Iterator[int]:
    yield from range(count)
    raise ZeroDivisionError


def change(growing: GrowableArray, model: list[float], verb: str, number: int) -> None:
    """One change of both. What the array takes item by item, it takes as far as it has room."""
    room = MOST - len(model)
    expected: AbstractContextManager[Any] = nullcontext()
    if verb != "shrink" and (1 if verb == "append" else min(number, len(model)) if verb == "twice" else number) > room:
        expected = pytest.raises(ValueError, match="more than the capacity")
    elif verb == "raise":
        expected = pytest.raises(ZeroDivisionError)
    with expected:
        if verb == "append":
            growing.append(number)
            model.append(number)
        elif verb == "extend":
            growing.extend(numpy.arange(number))
            model.extend(range(number))
        elif verb == "twice":
            growing.extend(growing.array[:number])
            model.extend(model[:number])
        elif verb == "shrink":
            number = min(number, len(model))
            growing.shrink(number)
            del model[number:]
            assert growing.populated_bytes <= -(-number // ITEMS_A_PAGE) * PAGE_SIZE
        else:
            model.extend(range(min(number, room)))
            growing.extend(failing(number) if verb == "raise" else iter(range(number)))
    # What it caught refers to this frame, and to the view in that of extend: a cycle, and the view would live on.
    del expected


def check(growing: GrowableArray, model: list[float]) -> None:
    assert growing.array.tolist() == model
    pages = oracle.present(growing.memory.range.start, growing.memory.range.length)
    populated = growing.populated_bytes // PAGE_SIZE
    assert pages == [True] * populated + [False] * (len(pages) - populated)
    assert growing.nbytes <= growing.populated_bytes <= CAPACITY


@settings(deadline=None, max_examples=40)
@given(CHANGES, STEPS)
def test_random_changes_against_a_list(changes: list[Change], step: int | str | None) -> None:
    model: list[float] = []
    with GrowableArray(capacity=CAPACITY, huge="never", step=step) as growing:
        for verb, number in changes:
            change(growing, model, verb, number)
            check(growing, model)


@pytest.mark.stress
@settings(deadline=None, max_examples=1000)
@given(CHANGES, STEPS, st.sampled_from(["anonymous", "memfd"]))
def test_random_changes_against_a_list_for_long(changes: list[Change], step: int | str | None, backing: str) -> None:
    model: list[float] = []
    with GrowableArray(capacity=CAPACITY, huge="never", step=step, backing=backing) as growing:
        for verb, number in changes:
            change(growing, model, verb, number)
            check(growing, model)
