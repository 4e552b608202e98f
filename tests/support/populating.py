"""Assert the effect of a populate call, as the kernel reports it."""

from __future__ import annotations

from typing import Any

import pytest

import prefault
from prefault.engine.methods import Access
from support import oracle
from support.regions import PAGE, Span


def assert_populated(span: Span, access: Access | None = None, **options: Any) -> prefault.PopulateResult:
    """Populate a span; assert that every page is present and that the result counts all bytes that were absent."""
    before = oracle.present_bytes(span.address, span.length)
    result = prefault.populate(span, access=access, **options)
    assert oracle.present_bytes(span.address, span.length) == span.length
    assert result.bytes >= span.length - before
    assert result.bytes + result.present_bytes == span.length
    return result


def assert_fails(
    span: Span,
    kind: type[prefault.PopulateError],
    number: int,
    *,
    page: int,
    access: Access | None,
    present: list[int] | None = None,
    before: tuple[int, ...] = (),
    page_size: int = PAGE,
    **options: Any,
) -> prefault.PopulateError:
    """Populate a span; assert that the call fails with this error at this page.

    Args:
        span: what to populate.
        kind: exact class of the error.
        number: errno.
        page: number of the first page that cannot be populated.
        access: of the populate call.
        present: numbers of the pages that are present afterwards; None: all before ``page``.
        before: numbers of pages that were present before the call.
        page_size: in which pages are counted.
        options: further arguments of populate. Headroom is not checked by default, as the kernel is to refuse.
    """
    options.setdefault("headroom", "ignore")
    with pytest.raises(prefault.PopulateError) as caught:
        prefault.populate(span, access=access, **options)
    error = caught.value
    assert (type(error), error.errno) == (kind, number), str(error)
    assert error.offset == page * page_size
    assert error.address == span.address + page * page_size
    step = page_size // PAGE
    there = [all(oracle.present(span.address + at, page_size)) for at in range(0, span.length, page_size)]
    wanted = list(range(page)) if present is None else present
    assert [index for index, is_there in enumerate(there) if is_there] == wanted
    assert oracle.present_bytes(span.address, span.length) == len(wanted) * page_size
    brought_in = [index for index in wanted if index not in before]
    assert error.populated_bytes == len(brought_in) * step * PAGE
    assert {address for part in error.populated for address in range(part.start, part.stop, page_size)} == {
        span.address + index * page_size for index in brought_in
    }
    return error
