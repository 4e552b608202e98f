"""A leak check that is cheap enough for every case of a table."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from support import oracle


def _descriptors() -> set[str]:
    """Without those of /proc and of our cgroups, which are opened once and kept."""
    return {line for line in oracle.descriptors() if not re.search(r" (/proc|/sys/fs/cgroup)/", line)}


@pytest.fixture
def no_descriptors() -> Iterator[None]:
    """The test leaves no descriptor behind, not even to the garbage collector."""
    before = _descriptors()
    yield
    assert _descriptors() <= before
