"""The ways to populate that the suite is held to: the kernel's own call, and what stands in for it where it is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefault._system import capabilities
from prefault.testing import without
from support import needs
from support.populate_modes import PopulateMode
from support.regions import filesystem_of


@pytest.fixture(params=list(PopulateMode), ids=lambda way: str(way.value))
def way(request: pytest.FixtureRequest) -> Iterator[PopulateMode]:
    """Each test runs with MADV_POPULATE_* and without it."""
    chosen: PopulateMode = request.param
    if chosen is PopulateMode.MADVISE:
        needs.capability(capabilities.MADV_POPULATE)
        yield chosen
        return
    needs.capability(capabilities.PROCESS_VM_READV)
    needs.capability(capabilities.FUTEX_ADD)
    with without("madv_populate"):
        yield chosen


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory on a disk, where a file has blocks and dirty pages are written back."""
    in_memory = ("", "tmpfs", "ramfs", "overlay")
    candidates = (tmp_path, Path(__file__).parent, Path("/var/tmp"))
    found = next((path for path in candidates if os.access(path, os.W_OK) and filesystem_of(path) not in in_memory), None)
    if found is None:
        needs.missing("no directory on a disk can be written: /tmp, /var/tmp and the source tree are all in memory")
    return found
