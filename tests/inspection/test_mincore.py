"""mincore(2): which bits count."""

from __future__ import annotations

import pytest

from prefault import PAGE_SIZE, PageRange
from prefault._kernel import mman
from prefault.inspection.mincore import resident_in


def test_only_the_lowest_bit_of_a_page_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mman, "mincore", lambda _start, _length: bytearray([1, 0, 0x81, 3, 2]))
    found = resident_in([PageRange(8 * PAGE_SIZE, 13 * PAGE_SIZE)])
    assert list(found.edges) == [at * PAGE_SIZE for at in (8, 9, 10, 12)]
    monkeypatch.setattr(mman, "mincore", lambda _start, _length: bytearray(4))
    assert not resident_in([PageRange(0, 4 * PAGE_SIZE)])
    assert not resident_in([])
