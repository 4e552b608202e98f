"""Fixtures of the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import prefault


@pytest.fixture
def mapping() -> Iterator[prefault.Mapping]:
    """64 MiB of private anonymous memory in base pages, of which nothing is populated."""
    with prefault.Mapping("64 MiB", huge="never") as fresh:
        yield fresh
