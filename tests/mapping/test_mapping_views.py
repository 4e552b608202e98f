"""Views of a mapping keep its memory: closing refuses while there is one, and the last one unmaps."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, Mapping
from prefault.mapping.mapping import MemoryPin
from support import oracle
from support.mappings import maps_line

pytestmark = pytest.mark.usefixtures("no_leaks")


def _views(mapping: Mapping) -> list[Any]:
    return [
        mapping.memoryview(),
        mapping.memoryview()[5:7],
        mapping.memoryview().cast("I"),
        mapping.ndarray(),
        mapping.ndarray("f8")[::2],
        numpy.frombuffer(mapping.memoryview(), "u2"),
        iter(mapping.memoryview()),
    ]


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_closing_refuses_while_a_view_is_alive(backing: str) -> None:
    for index in range(7):
        mapping = Mapping(PAGE_SIZE, backing=backing)
        mapping.memoryview()[:4] = b"here"
        view = _views(mapping)[index]
        for _ in range(2):
            with pytest.raises(BufferError, match="a view of the mapping is still alive: delete it first"):
                mapping.close()
        assert not mapping.closed
        assert mapping.ndarray()[:4].tobytes() == b"here"
        assert prefault.populate(mapping).bytes + PAGE_SIZE >= PAGE_SIZE
        del view
        mapping.close()
        assert mapping.closed


def test_a_released_view_is_no_view() -> None:
    with Mapping(PAGE_SIZE) as mapping:
        view = mapping.memoryview()
        view.release()
    assert mapping.closed


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_a_forgotten_mapping_lives_on_in_its_views(backing: str) -> None:
    mapping = Mapping(2 * PAGE_SIZE, backing=backing)
    gone = weakref.ref(mapping)
    address, fd = mapping.range.start, mapping.fd
    view = mapping.ndarray()
    view[-4:] = list(b"here")
    del mapping
    gc.collect()
    assert gone() is None
    part = view[-4:]
    del view
    gc.collect()
    assert part.tobytes() == b"here"
    part[:] = 7
    assert maps_line(address) is not None
    del part
    assert maps_line(address) is None
    if fd is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_forgotten_mapping_without_views_is_unmapped() -> None:
    mapping = Mapping(PAGE_SIZE, backing="memfd")
    address, fd = mapping.range.start, mapping.fd
    assert fd is not None
    del mapping
    assert maps_line(address) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_with_block_that_leaves_a_view() -> None:
    mapping = Mapping(PAGE_SIZE)
    view = mapping.memoryview()
    with pytest.raises(BufferError, match="still alive"), mapping:
        view[0] = 5
    assert view[0] == 5
    del view
    mapping.close()


def test_an_exception_on_its_way_out_is_not_hidden_by_a_view() -> None:
    views: list[memoryview] = []

    def fail(mapping: Mapping) -> None:
        with mapping:
            views.append(mapping.memoryview())
            views[0][0] = 5
            raise ZeroDivisionError

    mapping = Mapping(PAGE_SIZE)
    address = mapping.range.start
    with pytest.raises(ZeroDivisionError):
        fail(mapping)
    assert mapping.closed
    assert views[0][0] == 5
    assert oracle.smaps(address)
    views.clear()
    gc.collect()
    assert not oracle.smaps(address)


def test_close_is_idempotent_and_forgets_the_descriptor() -> None:
    mapping = Mapping(PAGE_SIZE, backing="memfd")
    fd = mapping.fd
    assert fd is not None
    mapping.close()
    other = os.open("/dev/null", os.O_RDONLY)  # takes the number
    try:
        assert other == fd
        mapping.close()
        with mapping:
            pass
        del mapping
        gc.collect()
        os.fstat(other)
    finally:
        os.close(other)


def test_a_closed_mapping() -> None:
    mapping = Mapping(PAGE_SIZE, backing="memfd")
    mapping.close()
    uses: list[Callable[[], Any]] = [
        mapping.memoryview,
        mapping.ndarray,
        lambda: mapping.range,
        lambda: mapping.fd,
        lambda: mapping.file_offset,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="the mapping is closed"):
            use()
    assert mapping.closed
    assert len(mapping) == PAGE_SIZE


def test_a_view_that_is_asked_for_while_another_thread_closes() -> None:
    # The moment between looking whether the mapping is open and taking the view.
    mapping = Mapping(PAGE_SIZE)
    memory = mapping._memory
    assert memory is not None
    mapping.close()
    with pytest.raises(ValueError, match="the mapping is closed"):
        memory.exporter(PAGE_SIZE)
    with pytest.raises(ValueError, match="the mapping is closed"):
        MemoryPin(memory)
